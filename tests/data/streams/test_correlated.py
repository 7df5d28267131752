"""Correlated, PracticalTTA and LabelShift have the distributions that they state."""

from __future__ import annotations

import numpy as np
import pytest

from ttalight.data import Correlated, Domain, LabelShift, PracticalTTA
from ttalight.data.streams.class_order import correlated_order, dirichlet_sizes


def rng(seed=0):
    return np.random.default_rng(seed)


def runs(classes):
    """Lengths of the runs of equal classes, and the class of each."""
    starts = np.flatnonzero(np.diff(classes, prepend=-1))
    return np.diff(np.append(starts, len(classes))), classes[starts]


class TestDirichletSizes:
    @pytest.mark.parametrize("gamma", [0.05, 0.5, 5.0])
    def test_concentration(self, gamma):
        """For proportions p from Dirichlet(g) over S slots, E[sum of p^2] = (g + 1) / (S g + 1) and E[p] = 1 / S."""
        slots, n = 8, 100_000
        sizes = dirichlet_sizes(np.full(4000, n), gamma, slots, rng())
        assert (sizes.sum(1) == n).all()
        shares = sizes / n
        squares = (shares**2).sum(1)
        error = squares.std() / np.sqrt(len(squares))
        assert abs(squares.mean() - (gamma + 1) / (slots * gamma + 1)) < 5 * error + 1e-4
        variance = (1 / slots) * (1 - 1 / slots) / (slots * gamma + 1)
        assert np.abs(shares.mean(0) - 1 / slots).max() < 5 * np.sqrt(variance / 4000) + 1e-5

    def test_rounding_against_a_hand_loop(self):
        counts = np.array([1, 7, 100])
        sizes = dirichlet_sizes(counts, 0.3, 4, rng(3))
        proportions = rng(3).dirichlet([0.3] * 4, 3)
        for row, share, n in zip(sizes, proportions, counts, strict=True):
            ends = [0, *(int(np.floor(n * share[: k + 1].sum())) for k in range(3)), n]
            assert row.tolist() == [ends[k + 1] - ends[k] for k in range(4)]


class TestCorrelatedOrder:
    def test_against_a_slow_reference(self):
        labels = rng(1).integers(0, 6, 500)
        order = correlated_order(labels, 0.2, 5, rng(2))
        assert sorted(order) == list(range(500))
        # Cut the order where the classes begin again: at most five slots, in each of which a class has one run.
        slots, seen = 1, set()
        lengths, classes = runs(labels[order])
        for name in classes.tolist():
            if name in seen:
                slots, seen = slots + 1, set()
            seen.add(name)
        assert slots <= 5
        for name in range(6):
            assert lengths[classes == name].sum() == (labels == name).sum()

    def test_smaller_gamma_has_longer_runs(self):
        """Few slots a class: a class is in about S (1 - (1 - 1/S)^...) slots, so runs become fewer as gamma falls."""
        labels = rng(1).integers(0, 50, 20_000)
        counts = [len(runs(labels[correlated_order(labels, gamma, None, rng(2))])[0]) for gamma in (0.01, 0.1, 1, 100)]
        assert counts == sorted(counts)
        assert counts[0] < 50 * 5
        assert counts[-1] > 50 * 49  # every class in nearly every slot

    def test_sorted_has_one_run_a_class(self):
        labels = rng(1).integers(0, 5, 300)
        firsts = set()
        for seed in range(40):
            order = correlated_order(labels, None, None, rng(seed))
            _, classes = runs(labels[order])
            assert sorted(classes) == list(range(5))
            firsts.add(int(classes[0]))
        assert firsts == set(range(5))  # one is missing with probability below 0.001

    def test_samples_of_a_class_are_shuffled(self):
        labels = np.zeros(200, dtype=int)
        order = correlated_order(labels, None, None, rng())
        # The correlation of a random order has standard deviation 1 / sqrt(N - 1).
        assert abs(np.corrcoef(order, np.arange(200))[0, 1]) < 5 / np.sqrt(199)

    def test_classes_that_do_not_occur(self):
        labels = np.array([3, 900, 3, 70_000])
        assert sorted(correlated_order(labels, 0.5, None, rng())) == [0, 1, 2, 3]

    def test_a_single_class(self):
        assert sorted(correlated_order(np.full(9, 4), 0.1, None, rng())) == list(range(9))

    def test_many_slots_and_tiny_gamma(self):
        labels = rng(1).integers(0, 10, 100)
        assert sorted(correlated_order(labels, 1e-6, 1000, rng())) == list(range(100))


DOMAINS = [Domain("fog", 5), Domain("snow", 5), Domain("motion_blur", 5), Domain("frost_procedural", 5)]


class TestCorrelated:
    def test_mixed_takes_all_domains_in_each_run(self):
        labels = [rng(d).integers(0, 4, 400) for d in range(4)]
        stream = Correlated(gamma=None, mixed=True).build(DOMAINS, labels, 64, 0)
        domain = stream.domain_of(slice(None))
        classes = np.array([labels[d][s] for d, s in zip(domain, stream.sample, strict=True)])
        lengths, _ = runs(classes)
        assert len(lengths) == 4
        ends = np.cumsum(lengths)
        for start, stop in zip(ends - lengths, ends, strict=True):
            half = domain[start : start + (stop - start) // 2]
            expected = np.bincount(domain[start:stop], minlength=4) / (stop - start)
            # Half of the run, drawn without replacement: a hypergeometric count of each domain.
            deviation = np.sqrt(expected * (1 - expected) / len(half) / 2)
            assert (np.abs(np.bincount(half, minlength=4) / len(half) - expected) < 5 * deviation).all()

    def test_domains_have_orders_of_their_own(self):
        labels = [rng().integers(0, 4, 50)] * 4
        stream = Correlated().build(DOMAINS, labels, 16, 0)
        assert len({part.tobytes() for part in stream.sample.reshape(4, 50)}) == 4


class TestPracticalTTA:
    LABELS = (np.arange(10) % 3, np.arange(11) % 3, np.arange(12) % 3, np.arange(13) % 3)

    def test_published_order_and_batches_across_boundaries(self):
        stream = PracticalTTA().build(DOMAINS, self.LABELS, 16, 0)
        path = [stream.domains[visit.domain].name for visit in stream.visits]
        assert path == ["motion_blur", "snow", "fog", "frost_procedural"]
        assert np.diff(stream.offsets).tolist() == [16, 16, 14]
        assert np.diff(stream.visit.astype(int)).min() == 0  # visits one after the other

    def test_domains_that_the_authors_have_not_come_last(self):
        domains = [Domain("spatter", 5), *DOMAINS[:2], Domain("saturate", 5)]
        stream = PracticalTTA().build(domains, self.LABELS, 16, 0)
        assert [visit.domain for visit in stream.visits] == [2, 1, 0, 3]


class TestLabelShift:
    @pytest.mark.parametrize("ratio", [1, 9, 500_000])
    def test_probability_of_the_class_of_a_phase(self, ratio):
        classes, per_class, draws = 10, 40, 20_000
        labels = np.repeat(np.arange(classes), per_class)[rng().permutation(classes * per_class)]
        stream = LabelShift(ratio, samples=draws).build([Domain("fog", 5)], [labels], 64, 0)
        phases = labels[stream.sample].reshape(classes, -1)
        counts = np.stack([np.bincount(phase, minlength=classes) for phase in phases])
        n = draws // classes
        high, low = ratio / (ratio + classes - 1), 1 / (ratio + classes - 1)
        frequent = counts.argmax(1)
        if ratio > 1:
            assert sorted(frequent) == list(range(classes))  # every class has a phase
            assert not np.array_equal(frequent, np.arange(classes))
            share = counts[np.arange(classes), frequent] / n
            assert np.abs(share - high).max() < 5 * np.sqrt(high * (1 - high) / n) + 1e-4
            counts[np.arange(classes), frequent] = round(n * low)
        assert np.abs(counts / n - low).max() < 5 * np.sqrt(low * (1 - low) / n) + 1e-3

    def test_class_samples_are_drawn_with_replacement(self):
        """The counts of uniform draws from m samples have a chi-square statistic of mean m - 1, variance 2 (m - 1)."""
        labels = np.repeat([0, 1], [100, 300])
        stream = LabelShift(1, samples=40_000).build([Domain("fog", 5)], [labels], 64, 0)
        for name in (0, 1):
            members = np.flatnonzero(labels == name)
            counts = np.bincount(stream.sample, minlength=400)[members]
            expected = counts.sum() / len(members)
            statistic = ((counts - expected) ** 2 / expected).sum()
            assert abs(statistic - (len(members) - 1)) < 5 * np.sqrt(2 * (len(members) - 1))
            assert abs(counts.sum() / 40_000 - 0.5) < 0.0125  # 5 standard deviations

    def test_phases_as_equal_as_they_can_be(self):
        labels = np.arange(30) % 3
        stream = LabelShift(samples=100).build([Domain("fog", 5)], [labels], 64, 0)
        lengths, _ = runs(labels[stream.sample])
        assert sorted(lengths) == [33, 33, 34]

    def test_a_single_class(self):
        stream = LabelShift(samples=7).build([Domain("fog", 5)], [np.full(3, 8)], 4, 0)
        assert set(stream.sample) <= {0, 1, 2}
