"""Moments of features: scale, queue, precision, and what is wrong with input. Values are in tests/reference."""

from __future__ import annotations

import pytest
import torch

from ttalight.losses import MomentAlignment, MomentSummary, feature_moments


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def summary(batches=40, size=50, width=6):
    made = MomentSummary()
    for index in range(batches):
        made.add(randn(size, width, seed=index))
    return made


@pytest.fixture
def alignment():
    made = MomentAlignment(6, weight=2.0)
    made.summarize(summary())
    return made


def test_shifted_batch_costs_more_than_source_batch(alignment):
    losses = [alignment(randn(50, 6, seed=100 + index)).item() for index in range(20)]
    assert 0.4 < sum(losses) / 20 / 2.0 < 1.6  # batches against the whole lie nearer than batches against each other
    assert alignment(3 * randn(50, 6)) > 10 * max(losses)
    assert alignment(randn(50, 6) + 2) > 10 * max(losses)


def test_descent_brings_the_moments_of_the_source(alignment):
    features = (3 * randn(50, 6, seed=9) + 1).requires_grad_()
    optimizer = torch.optim.Adam([features], lr=0.05)
    for _ in range(500):
        optimizer.zero_grad()
        alignment(features).backward()
        optimizer.step()
    mean, covariance = feature_moments(features.detach())
    torch.testing.assert_close(mean, alignment.mean, atol=0.05, rtol=0)
    torch.testing.assert_close(covariance, alignment.covariance, atol=0.05, rtol=0)


def test_order_of_samples_is_of_no_consequence(alignment):
    features = randn(50, 6, seed=5)
    torch.testing.assert_close(alignment(features), alignment(features.flip(0)))


def test_one_image_has_no_covariance_but_a_gradient(alignment):
    feature = randn(1, 6).requires_grad_()
    assert feature_moments(feature)[1].abs().max() == 0
    alignment(feature).backward()
    assert feature.grad.isfinite().all()
    assert feature.grad.abs().sum() > 0


def test_under_autocast_as_without(alignment):
    features = 100 + randn(50, 6)  # cancellation: bfloat16 would leave nothing of the covariance
    plain, expected = alignment(features), feature_moments(features)[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(alignment(features), plain)
        assert torch.equal(feature_moments(features)[1], expected)


class TestQueue:
    @pytest.fixture
    def queued(self):
        made = MomentAlignment(6, queue=8)
        made.summarize(summary())
        return made

    def test_joins_once_it_is_full_without_gradients(self, queued):
        plain = MomentAlignment(6)
        plain.summarize(summary())
        parts = [randn(4, 6, seed=index).requires_grad_() for index in range(4)]
        torch.testing.assert_close(queued(parts[0]), plain(parts[0]))
        torch.testing.assert_close(queued(parts[1]), plain(parts[1]))  # half full
        loss = queued(parts[2])
        torch.testing.assert_close(loss, plain(torch.cat(parts[:3])))
        loss.backward()
        assert parts[0].grad is None
        assert parts[2].grad is not None
        torch.testing.assert_close(queued(parts[3]), plain(torch.cat(parts[1:])))  # the oldest has left

    def test_does_not_move_where_nothing_is_learned(self, queued):
        with torch.no_grad():
            queued(randn(20, 6))
        assert int(queued.queued) == 0
        assert queued.queue.abs().sum() == 0

    def test_takes_batches_larger_than_itself(self, queued):
        features = randn(20, 6).requires_grad_()
        queued(features)
        assert torch.equal(queued.queue, features[:8])
        assert int(queued.queued) == 8

    def test_is_not_in_files(self, queued):
        assert set(queued.state_dict()) == {"mean", "covariance", "spread"}


def test_what_is_wrong_is_said(alignment):
    with pytest.raises(ValueError, match=r"expected features \(batch, dimension\) .*, got \(2, 3, 4, 4\)"):
        feature_moments(torch.zeros(2, 3, 4, 4))
    with pytest.raises(ValueError, match="no moments of the source"):
        MomentAlignment(6)(randn(3, 6))
    with pytest.raises(ValueError, match="fewer than two"):
        summary(batches=1).result()
    with pytest.raises(ValueError, match="weight of moment alignment must be at least 0, got -1"):
        MomentAlignment(6, weight=-1)
    with pytest.raises(ValueError, match="queue must be at least 0, got -1"):
        MomentAlignment(6, queue=-1)
