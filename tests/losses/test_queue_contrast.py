"""The contrastive loss against a queue, against a sum written out."""

from __future__ import annotations

import math

import pytest
import torch

from ttalight.losses import queue_contrastive_loss


@pytest.fixture
def vectors():
    drawn = torch.randn(13, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return drawn[:4], drawn[4:8], drawn[8:]


@pytest.mark.parametrize("excludes", [False, True])
def test_is_written_out(vectors, excludes):
    queries, keys, queue = vectors
    excluded = torch.eye(5, dtype=torch.bool)[:4] if excludes else None
    expected = []
    for row, (query, key) in enumerate(zip(queries, keys, strict=True)):
        left = [other for place, other in enumerate(queue) if not (excludes and place == row)]
        own, *others = (math.exp(torch.cosine_similarity(query, other, 0) / 0.2) for other in (key, *left))
        expected.append(-math.log(own / (own + sum(others))))
    assert queue_contrastive_loss(3 * queries, keys, queue, 0.2, excluded).tolist() == pytest.approx(expected)


def test_without_negatives_is_zero(vectors):
    queries, keys, queue = vectors
    losses = queue_contrastive_loss(queries.requires_grad_(), keys, queue, 0.07, torch.ones(4, 5, dtype=torch.bool))
    losses.sum().backward()
    assert losses.tolist() == [0] * 4
    assert not queries.grad.any()


def test_half_precision_is_computed_in_full(vectors):
    halves = [each.bfloat16() for each in vectors]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = queue_contrastive_loss(*halves, 0.07)
    assert losses.dtype == torch.float32
    expected = queue_contrastive_loss(*(each.double() for each in halves), 0.07)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-5)


def test_bad_input(vectors):
    queries, keys, queue = vectors
    with pytest.raises(ValueError, match="vectors of one shape"):
        queue_contrastive_loss(queries, keys[:2], queue, 0.1)
    with pytest.raises(ValueError, match="temperature must be positive"):
        queue_contrastive_loss(queries, keys, queue, 0.0)
