"""Streams in which domains meet: Mixed, Potpourri, Cross, BatchMixing, Recurring."""

from __future__ import annotations

import numpy as np
import pytest

from ttalight.data import BatchMixing, Cross, Domain, Mixed, PerDomain, Potpourri, Recurring
from ttalight.data.streams.cross import share_out

DOMAINS = [Domain(name, 5) for name in ("fog", "snow", "frost", "contrast")]


def labels(*sizes):
    return [np.arange(size) % 5 for size in sizes]


def composition(stream):
    """Samples of each domain in each batch."""
    domain = stream.domain_of(slice(None))
    parts = [domain[stream.batch(index)] for index in range(stream.batches)]
    return np.stack([np.bincount(part, minlength=len(stream.domains)) for part in parts])


class TestMixed:
    def test_every_stretch_has_the_domains_shares(self):
        """A stretch of n out of N, drawn without replacement, has hypergeometric counts."""
        sizes = np.array([4000, 2000, 1000, 1000])
        stream = Mixed().build(DOMAINS, labels(*sizes), 50, 0)
        share, n, total = sizes / sizes.sum(), 1000, sizes.sum()
        deviation = np.sqrt(n * share * (1 - share) * (total - n) / (total - 1))
        for start in range(0, 8000, n):
            counts = np.bincount(stream.domain_of(slice(start, start + n)), minlength=4)
            assert (np.abs(counts - n * share) < 5 * deviation).all()

    def test_potpourri_with_and_without_clean_images(self):
        material = (DOMAINS, labels(5, 6, 7, 8), 4, 0)
        assert Potpourri().build(*material).hash == Mixed().build(*material).hash
        assert not Potpourri().needs_clean
        assert Potpourri(clean=True).needs_clean


class TestCross:
    def test_without_a_number_it_is_mixed(self):
        material = (DOMAINS, labels(50, 60, 70, 80), 8, 0)
        assert Cross().build(*material).hash == Mixed().build(*material).hash

    @pytest.mark.parametrize("kinds", [1, 2, 3, 4])
    def test_equal_shares_of_so_many_domains(self, kinds):
        stream = Cross(kinds).build(DOMAINS, labels(*[600] * 4), 12, 0)
        counts = composition(stream)
        regular = [sorted(row[row > 0]) == [12 // kinds] * kinds for row in counts]
        # Only the last batches are made of what is left.
        assert np.mean(regular) > 0.95
        assert regular[: len(regular) * 9 // 10] == [True] * (len(regular) * 9 // 10)

    def test_shares_that_do_not_divide(self):
        counts = composition(Cross(3).build(DOMAINS, labels(*[500] * 4), 10, 0))
        assert sorted(counts[0][counts[0] > 0]) == [3, 3, 4]

    def test_every_pair_of_domains_is_as_likely(self):
        counts = composition(Cross(2).build(DOMAINS, labels(*[6000] * 4), 4, 0))[:5000]
        pairs = {tuple(np.flatnonzero(row)) for row in counts}
        assert len(pairs) == 6
        for pair in pairs:
            share = np.mean([tuple(np.flatnonzero(row)) == pair for row in counts])
            # What is left steers towards equal use of the domains, which only narrows the binomial.
            assert abs(share - 1 / 6) < 5 * np.sqrt(1 / 6 * 5 / 6 / 5000)

    def test_random_numbers_of_domains_are_uniform(self):
        counts = composition(Cross("random").build(DOMAINS, labels(*[9000] * 4), 12, 0))[:2000]
        kinds = np.bincount((counts > 0).sum(1), minlength=5)[1:]
        assert (np.abs(kinds / 2000 - 0.25) < 5 * np.sqrt(0.25 * 0.75 / 2000)).all()

    def test_domains_of_very_different_size(self):
        sizes = (1000, 10, 3, 1)
        stream = Cross(2).build(DOMAINS, labels(*sizes), 8, 0)
        assert stream.counts().tolist() == list(sizes)
        assert np.diff(stream.offsets)[:-1].tolist() == [8] * (stream.batches - 1)

    def test_domains_are_mixed_within_a_batch(self):
        stream = Cross(2).build(DOMAINS[:2], labels(400, 400), 8, 0)
        first = [int(stream.domain_of(stream.batch(index))[0]) for index in range(stream.batches)]
        assert abs(np.mean(first) - 0.5) < 2.5 / np.sqrt(len(first))  # five standard deviations

    @pytest.mark.parametrize(("kinds", "batch_size"), [(5, 8), (3, 2)])
    def test_more_than_there_are(self, kinds, batch_size):
        message = f"domains_per_batch is {kinds}, and there are 4 domains and batches of {batch_size}"
        with pytest.raises(ValueError, match=message):
            Cross(kinds).build(DOMAINS, labels(9, 9, 9, 9), batch_size, 0)

    @pytest.mark.parametrize("seed", range(20))
    def test_share_out_uses_everything_up(self, seed):
        rng = np.random.default_rng(seed)
        left = rng.integers(0, 60, 5)
        total = int(left.sum())
        sizes = np.diff(np.append(np.arange(0, total, 7), total))
        kinds = rng.integers(1, 6, len(sizes))
        counts = share_out(left, sizes, kinds, rng)
        assert counts.min() >= 0
        assert counts.sum(0).tolist() == left.tolist()
        assert counts.sum(1).tolist() == sizes.tolist()


class TestBatchMixing:
    SIZES = (20, 17, 25, 9)

    def build(self, order="interval"):
        return BatchMixing(order).build(DOMAINS, labels(*self.SIZES), 8, 0)

    def kinds(self, stream):
        """Whether each batch is of the mixed kind."""
        visit = [stream.visit[stream.batch(index)] for index in range(stream.batches)]
        assert all(set(part < 4) in ({True}, {False}) for part in visit)  # never both kinds in one
        return [bool(part[0] >= 4) for part in visit]

    def test_kinds_alternate_and_every_sample_comes_twice(self):
        stream = self.build()
        kinds = self.kinds(stream)
        alone, mixed = kinds.count(False), kinds.count(True)
        assert (alone, mixed) == (12, 9)
        assert kinds == [False, True] * 9 + [False] * 3
        assert stream.counts().tolist() == [*self.SIZES, *self.SIZES]

    def test_batches_are_those_of_the_two_streams(self):
        stream = self.build()
        kinds = np.array(self.kinds(stream))
        for kind, other in ((False, PerDomain()), (True, Mixed())):
            expected = other.build(DOMAINS, labels(*self.SIZES), 8, 0)
            chosen = [stream.batch(index) for index in np.flatnonzero(kinds == kind)]
            for index, positions in enumerate(chosen):
                assert stream.sample[positions].tolist() == expected.sample[expected.batch(index)].tolist()
                assert stream.domain_of(positions).tolist() == expected.domain_of(expected.batch(index)).tolist()

    def test_shuffled_batches_alternate(self):
        stream = self.build("interval_shuffled")
        assert self.kinds(stream) == self.kinds(self.build())
        first = [int(stream.domain_of(stream.batch(index))[0]) for index in range(0, 18, 2)]
        assert first != sorted(first)

    def test_all_shuffled(self):
        kinds = self.kinds(self.build("shuffled"))
        assert (kinds.count(False), kinds.count(True)) == (12, 9)
        assert kinds != self.kinds(self.build())


class TestRecurring:
    def test_without_overlap_visits_follow_each_other(self):
        stream = Recurring(cycles=3, length=10, overlap=0).build(DOMAINS, labels(15, 20, 10, 40), 8, 0)
        assert stream.visit.tolist() == np.repeat(np.arange(12), 10).tolist()
        assert [(visit.domain, visit.number) for visit in stream.visits] == [(d, c) for c in range(3) for d in range(4)]

    def test_a_domain_goes_on_where_it_stopped(self):
        stream = Recurring(cycles=3, length=10, overlap=0).build(DOMAINS, labels(15, 20, 10, 40), 8, 0)
        shown = stream.sample[stream.domain_of(slice(None)) == 0]
        assert sorted(shown[:15]) == sorted(shown[15:]) == list(range(15))
        assert shown[:15].tolist() != shown[15:].tolist()

    def test_a_transition_is_linear(self):
        """In the middle of a transition of 2 m samples, at t = (j + 1/2) / 2 m, a share t is of the next domain."""
        length, bins = 40_000, 10
        stream = Recurring(cycles=1, length=length, overlap=0.5).build(DOMAINS[:2], labels(100, 100), 64, 0)
        half = length // 4
        assert set(stream.visit[: length - half]) == {0}
        assert set(stream.visit[length + half :]) == {1}
        shares = stream.visit[length - half : length + half].reshape(bins, -1).mean(1)
        middle = (np.arange(bins) + 0.5) / bins
        deviation = np.sqrt(middle * (1 - middle) / (2 * half / bins))
        assert (np.abs(shares - middle) < 5 * deviation).all()
        assert stream.counts().tolist() == [length, length]

    def test_transitions_between_unequal_visits(self):
        stream = Recurring(cycles=2, overlap=1).build(DOMAINS, labels(50, 4, 30, 1), 8, 0)
        assert stream.counts().tolist() == [50, 4, 30, 1] * 2
        # A visit meets its neighbours only.
        places = [np.flatnonzero(stream.visit == visit) for visit in range(8)]
        assert all(places[index].max() < places[index + 2].min() for index in range(6))
