"""Losses of ClusT3, NC-TTT and ReC-TTT against loops over the printed formulas, in Python floats."""

from __future__ import annotations

import math
import statistics

import pytest
import torch

from ttalight.losses import (
    clustering_loss,
    in_distribution_loss,
    mutual_divergence,
    noise_contrastive_loss,
    noise_logits,
    reconstruction_loss,
)

EXACT = {"rtol": 1e-10, "atol": 1e-12}


def draw(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def softmax(logits: list[float]) -> list[float]:
    powers = [math.exp(value - max(logits)) for value in logits]
    return [value / sum(powers) for value in powers]


def entropy(p: list[float]) -> float:
    return -sum(value * math.log(value) for value in p if value > 0)


def positions(maps: torch.Tensor) -> list[list[float]]:
    """Return the channel vectors of all pixels of all images."""
    images, _, height, width = maps.shape
    return [maps[b, :, i, j].tolist() for b in range(images) for i in range(height) for j in range(width)]


def clustering(maps: torch.Tensor, variant: str) -> float:
    vectors = positions(maps)
    count, clusters = len(vectors), len(vectors[0])
    conditional = sum(entropy(softmax(vector)) for vector in vectors) / count
    if variant == "paper":
        mean = [sum(softmax(vector)[k] for vector in vectors) / count for k in range(clusters)]
        return conditional - entropy(mean)
    mean = softmax([sum(vector[k] for vector in vectors) / count for k in range(clusters)])
    return conditional + sum(math.log(1 / clusters / value) / clusters for value in mean) / clusters


class TestClustering:
    @pytest.mark.parametrize("variant", ["paper", "code"])
    @pytest.mark.parametrize("shape", [(3, 4, 2, 5), (1, 2, 3, 3), (4, 3, 1, 1), (1, 3, 1, 1)])
    def test_against_the_formula(self, shape, variant):
        maps = 3 * draw(*shape)
        expected = clustering(maps, variant)
        assert clustering_loss(maps, variant=variant).item() == pytest.approx(expected, rel=1e-10, abs=1e-12)

    @pytest.mark.parametrize("variant", ["paper", "code"])
    def test_groups_are_assignments_of_their_own(self, variant):
        maps = 3 * draw(3, 3 * 4, 2, 2)
        expected = sum(clustering(part, variant) for part in maps.chunk(3, dim=1))
        assert clustering_loss(maps, 3, variant).item() == pytest.approx(expected, rel=1e-10)

    def test_paper_is_the_negative_mutual_information(self):
        certain = 200 * torch.eye(4, dtype=torch.float64)[:, :, None, None]
        assert clustering_loss(certain).item() == pytest.approx(-math.log(4))  # certain, all clusters alike
        assert clustering_loss(certain[:1].expand(4, -1, 1, 1)).item() == pytest.approx(0, abs=1e-12)  # one cluster
        assert clustering_loss(torch.zeros(4, 4, 1, 1)).item() == pytest.approx(0, abs=1e-6)  # uncertain

    @pytest.mark.parametrize("variant", ["paper", "code"])
    def test_unused_clusters_keep_loss_finite(self, variant):
        logits = torch.tensor([[1e4, 0.0, -1e4]] * 2)[:, :, None, None].requires_grad_()
        loss = clustering_loss(logits, variant=variant)
        loss.backward()
        assert loss.isfinite()
        assert logits.grad.isfinite().all()

    @pytest.mark.parametrize("variant", ["paper", "code"])
    def test_cluster_dimension_ignores_sample_order(self, variant):
        """The authors' view of (B, K, H, W) as (K, B * H * W) makes this fail."""
        maps = 3 * draw(6, 4, 3, 3)
        whole = clustering_loss(maps, variant=variant)
        order = torch.tensor([3, 0, 5, 1, 4, 2])
        torch.testing.assert_close(clustering_loss(maps[order], variant=variant), whole, **EXACT)
        viewed = maps.view(4, -1).T[:, :, None, None]
        reordered = maps[order].view(4, -1).T[:, :, None, None]
        assert abs(clustering_loss(viewed, variant=variant) - clustering_loss(reordered, variant=variant)) > 1e-3

    def test_half_precision_is_computed_in_float32(self):
        maps = 3 * draw(3, 4, 2, 2).bfloat16()
        assert clustering_loss(maps).dtype == torch.float32
        assert torch.equal(clustering_loss(maps), clustering_loss(maps.float()))

    @pytest.mark.parametrize(
        ("shape", "options", "message"),
        [
            ((3, 5, 2, 2), {"groups": 2}, r"groups=2 and K of 2 or more, got \(3, 5, 2, 2\)"),
            ((3, 2, 2, 2), {"groups": 2}, "K of 2 or more"),
            ((3, 4), {"variant": "view"}, "variant must be 'paper' or 'code', got 'view'"),
        ],
    )
    def test_says_what_is_wrong(self, shape, options, message):
        with pytest.raises(ValueError, match=message):
            clustering_loss(torch.zeros(shape), **options)


class TestNoise:
    def test_logits_are_those_of_the_two_densities(self):
        noise, small, large = 0.05 * draw(5, 3), 0.02, 0.1

        def log_density(vector: list[float], deviation: float) -> float:
            return sum(
                -0.5 * (value / deviation) ** 2 - math.log(deviation * math.sqrt(2 * math.pi)) for value in vector
            )

        expected = [log_density(vector, large) - log_density(vector, small) for vector in noise.tolist()]
        torch.testing.assert_close(
            noise_logits(noise, small, large), torch.tensor(expected, dtype=torch.float64), **EXACT
        )

    def test_many_dimensions_do_not_overflow(self):
        """As a probability the label of 400,000 dimensions overflows on the way; as a logit it does not."""
        noise = torch.randn(2, 400_000, generator=torch.Generator().manual_seed(0))
        logits = noise_logits(noise * torch.tensor([[0.1], [0.015]]), 0.015, 0.1)
        assert logits.isfinite().all()
        assert logits[0] > 1e5
        assert logits[1] < -1e5
        losses = noise_contrastive_loss(torch.tensor([2.0, 2.0]), logits)
        assert losses.tolist() == pytest.approx([math.log1p(math.exp(-2)), math.log1p(math.exp(2))])

    def test_loss_is_the_cross_entropy_with_soft_labels(self):
        scores, targets = draw(2, 6)

        def loss(score: float, target: float) -> float:
            p, y = 1 / (1 + math.exp(-score)), 1 / (1 + math.exp(-target))
            return -y * math.log(p) - (1 - y) * math.log(1 - p)

        expected = [loss(*pair) for pair in zip(scores.tolist(), targets.tolist(), strict=True)]
        torch.testing.assert_close(
            noise_contrastive_loss(scores, targets), torch.tensor(expected, dtype=torch.float64), **EXACT
        )

    def test_test_time_loss_is_that_of_label_0(self):
        scores = torch.tensor([-800.0, -1.0, 0.0, 2.5, 800.0]).double()
        never = torch.full_like(scores, -1e6)
        torch.testing.assert_close(in_distribution_loss(scores), noise_contrastive_loss(scores, never), **EXACT)
        assert in_distribution_loss(scores)[2].item() == pytest.approx(math.log(2))
        assert in_distribution_loss(scores)[4] == 800

    def test_says_what_is_wrong(self):
        with pytest.raises(ValueError, match=r"0 < small < large, got small=0.1, large=0.1"):
            noise_logits(torch.zeros(2, 3), 0.1, 0.1)
        with pytest.raises(ValueError, match=r"one shape \(B,\), got \(3, 1\) and \(3,\)"):
            noise_contrastive_loss(torch.zeros(3, 1), torch.zeros(3))


def cosine(u: list[float], v: list[float]) -> float:
    dot = sum(a * b for a, b in zip(u, v, strict=True))
    return dot / math.hypot(*u) / math.hypot(*v)


class TestReconstruction:
    @pytest.fixture
    def scales(self):
        shapes = [(3, 2, 4, 4), (3, 5, 2, 2)]
        return [[draw(*shape, seed=seed + n) for n, shape in enumerate(shapes)] for seed in (1, 10)]

    def test_against_the_formula(self, scales):
        decoded, targets = scales
        expected = [
            sum(1 - cosine(a[i].flatten().tolist(), b[i].flatten().tolist()) for a, b in zip(*scales, strict=True))
            for i in range(3)
        ]
        torch.testing.assert_close(
            reconstruction_loss(decoded, targets), torch.tensor(expected, dtype=torch.float64), **EXACT
        )

    def test_targets_get_no_gradient(self, scales):
        decoded, targets = ([values.requires_grad_() for values in maps] for maps in scales)
        reconstruction_loss(decoded, targets).sum().backward()
        assert all(values.grad is None for values in targets)
        assert all(values.grad.any() for values in decoded)

    @pytest.mark.parametrize("alpha", [-3.0, 0.0, 1.0])
    def test_only_hard_positions_have_gradients(self, scales, alpha):
        decoded, targets = scales
        plain = [values.clone().requires_grad_() for values in decoded]
        mined = [values.clone().requires_grad_() for values in decoded]
        loss, same = reconstruction_loss(plain, targets), reconstruction_loss(mined, targets, alpha)
        torch.testing.assert_close(loss, same, **EXACT)
        loss.sum().backward()
        same.sum().backward()
        for ours, theirs, all_of_it, kept in zip(decoded, targets, plain, mined, strict=True):
            apart = [1 - cosine(*pair) for pair in zip(positions(ours), positions(theirs), strict=True)]
            border = statistics.mean(apart) + alpha * statistics.stdev(apart)
            hard = torch.tensor([value >= border for value in apart]).view(3, 1, *ours.shape[2:])
            assert hard.any()
            assert hard.all() == (alpha == -3)
            torch.testing.assert_close(kept.grad, all_of_it.grad * hard, **EXACT)

    def test_a_single_position_learns(self):
        decoded = draw(1, 4, 1, 1).requires_grad_()
        reconstruction_loss([decoded], [draw(1, 4, 1, 1, seed=6)], alpha=1.0).sum().backward()
        assert decoded.grad.any()

    def test_says_what_is_wrong(self, scales):
        with pytest.raises(ValueError, match="expected maps of the same shapes"):
            reconstruction_loss(scales[0], scales[1][::-1])
        with pytest.raises(ValueError, match="expected maps of the same shapes"):
            reconstruction_loss([], [])


class TestDivergence:
    def test_against_the_formula(self):
        first, second = draw(2, 5, 3)

        def divergence(p: list[float], q: list[float]) -> float:
            return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

        pairs = [(softmax(a), softmax(b)) for a, b in zip(first.tolist(), second.tolist(), strict=True)]
        expected = torch.tensor([divergence(p, q) + divergence(q, p) for p, q in pairs], dtype=torch.float64)
        torch.testing.assert_close(mutual_divergence(first, second), expected, **EXACT)

    def test_classifiers_learn_from_each_other_detached(self):
        first, second = draw(2, 5, 3).unbind()
        first.requires_grad_()
        mutual_divergence(first, second).sum().backward()
        with torch.no_grad():
            expected = first.softmax(1) - second.softmax(1)  # of KL(q || p) alone, the other direction is held fixed
        torch.testing.assert_close(first.grad, expected, **EXACT)

    def test_of_a_sample_does_not_depend_on_the_batch(self):
        """A softmax over the batch, as in the authors' code, makes this fail."""
        first, second = draw(2, 5, 3)
        torch.testing.assert_close(mutual_divergence(first, second)[2:3], mutual_divergence(first[2:3], second[2:3]))

    def test_says_what_is_wrong(self):
        with pytest.raises(ValueError, match=r"one shape \(B, C\), got \(2, 3\) and \(3, 2\)"):
            mutual_divergence(torch.zeros(2, 3), torch.zeros(3, 2))
