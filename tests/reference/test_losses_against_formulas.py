"""The losses against double loops over the printed formulas, in Python floats."""

from __future__ import annotations

import math

import pytest
import torch

from ttalight.losses import alignment_loss, barlow_twins_loss, contrastive_loss, entropy

EXACT = {"rtol": 1e-10, "atol": 0.0}


def _sim(u: list[float], v: list[float]) -> float:
    dot = sum(a * b for a, b in zip(u, v, strict=True))
    return dot / math.sqrt(sum(a * a for a in u)) / math.sqrt(sum(b * b for b in v))


def _probability(anchor: list[float], positive: list[float], others: list[list[float]], temperature: float) -> float:
    """exp of the positive over the sum of exp over the set, shifted so that nothing overflows."""
    top = max(_sim(anchor, other) for other in others)
    total = sum(math.exp((_sim(anchor, other) - top) / temperature) for other in others)
    return math.exp((_sim(anchor, positive) - top) / temperature) / total


def _contrastive(first: list, second: list, temperature: float, symmetric: bool) -> float:
    size, terms = len(first), []
    for anchors, partners in ((first, second), (second, first))[: 2 if symmetric else 1]:
        for i in range(size):
            others = [anchors[j] for j in range(size) if j != i] + partners
            terms.append(-math.log(_probability(anchors[i], partners[i], others, temperature)))
    return sum(terms) / len(terms)


def _alignment(first: list, second: list, target: list, temperature: float, sibling: str) -> float:
    size, terms = len(first), []
    for anchors, partners in ((first, second), (second, first)):
        for i in range(size):
            others = [anchors[j] for j in range(size) if j != i] + target
            others += [partners[j] for j in range(size) if j != i or sibling != "exclude"]
            term = math.log(_probability(anchors[i], target[i], others, temperature))
            if sibling == "positive":
                term = (term + math.log(_probability(anchors[i], partners[i], others, temperature))) / 2
            terms.append(-term)
    return sum(terms) / len(terms)


def _barlow_twins(first: list, second: list, redundancy: float) -> float:
    size, width, standard = len(first), len(first[0]), []
    for view in (first, second):
        columns = [[row[i] for row in view] for i in range(width)]
        means = [math.fsum(column) / size for column in columns]
        spreads = [
            math.sqrt(math.fsum((value - mean) ** 2 for value in column) / size + 1e-5)
            for column, mean in zip(columns, means, strict=True)
        ]
        standard.append([[(row[i] - means[i]) / spreads[i] for i in range(width)] for row in view])
    total = 0.0
    for i in range(width):
        for j in range(width):
            correlation = math.fsum(a[i] * b[j] for a, b in zip(*standard, strict=True)) / size
            total += (1 - correlation) ** 2 if i == j else redundancy * correlation**2
    return total


@pytest.fixture(params=[(2, 3), (5, 1), (7, 16)], ids=["2x3", "5x1", "7x16"])
def vectors(request) -> torch.Tensor:
    generator = torch.Generator().manual_seed(11)
    return torch.randn(3, *request.param, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("temperature", [0.03, 0.5, 3.0])
def test_contrastive(vectors, temperature, symmetric):
    first, second, _ = vectors
    expected = _contrastive(first.tolist(), second.tolist(), temperature, symmetric)
    loss = contrastive_loss(first, second, temperature, symmetric=symmetric)
    torch.testing.assert_close(loss.item(), expected, **EXACT)


@pytest.mark.parametrize("sibling", ["negative", "exclude", "positive"])
@pytest.mark.parametrize("temperature", [0.03, 0.5, 3.0])
def test_alignment(vectors, temperature, sibling):
    first, second, target = vectors
    expected = _alignment(first.tolist(), second.tolist(), target.tolist(), temperature, sibling)
    loss = alignment_loss(first, second, target, temperature, sibling=sibling)
    torch.testing.assert_close(loss.item(), expected, **EXACT)


@pytest.mark.parametrize("redundancy", [0.0, 0.005, 2.0])
def test_barlow_twins(vectors, redundancy):
    first, second, _ = vectors
    expected = _barlow_twins(first.tolist(), second.tolist(), redundancy)
    torch.testing.assert_close(barlow_twins_loss(first, second, redundancy).item(), expected, **EXACT)


def test_entropy():
    logits = 5 * torch.randn(6, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for row, value in zip(logits.tolist(), entropy(logits).tolist(), strict=True):
        total = sum(math.exp(logit) for logit in row)
        expected = -sum(math.exp(logit) / total * math.log(math.exp(logit) / total) for logit in row)
        assert value == pytest.approx(expected, rel=1e-10)
