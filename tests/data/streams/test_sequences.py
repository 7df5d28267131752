"""Streams that go through one domain after the other: PerDomain, Continual, Gradual, InOut, SingleSample."""

from __future__ import annotations

import numpy as np
import pytest

from ttalight.data import Continual, Domain, Gradual, InOut, Mixed, PerDomain, SingleSample, Visit

DOMAINS = [Domain("clean"), Domain("contrast", 5), Domain("pixelate", 5)]
LABELS = [np.arange(7), np.arange(10), np.arange(3)]


class TestPerDomain:
    def build(self, seed=0, shuffle=True):
        return PerDomain(shuffle).build(DOMAINS, LABELS, 4, seed)

    def test_batches_do_not_cross_boundaries(self):
        stream = self.build()
        sizes = [len(stream.sample[stream.batch(index)]) for index in range(stream.batches)]
        assert sizes == [4, 3, 4, 4, 2, 3]
        assert all(len(set(stream.domain_of(stream.batch(index)))) == 1 for index in range(stream.batches))

    def test_every_sample_comes_once(self):
        stream = self.build()
        for domain, labels in enumerate(LABELS):
            samples = stream.sample[stream.domain_of(slice(None)) == domain]
            assert sorted(samples) == list(range(len(labels)))

    def test_boundaries_are_announced(self):
        stream = self.build()
        begins = [stream.begins_visit(index) for index in range(stream.batches)]
        assert begins == [True, False, True, False, False, True]

    def test_unshuffled_order(self):
        assert self.build(shuffle=False).sample.tolist() == [*range(7), *range(10), *range(3)]

    def test_is_a_function_of_the_seed(self):
        assert self.build(seed=3).hash == self.build(seed=3).hash
        assert self.build(seed=3).hash != self.build(seed=4).hash
        assert sorted(self.build(seed=3).sample) == sorted(self.build(seed=4).sample)

    def test_domain_order_ignores_other_domains(self):
        assert np.array_equal(
            PerDomain().build(DOMAINS[:1], LABELS[:1], 4, 0).sample, self.build().sample[: len(LABELS[0])]
        )


class TestContinual:
    def test_first_round_has_the_batches_of_per_domain(self):
        told, silent = PerDomain().build(DOMAINS, LABELS, 4, 0), Continual().build(DOMAINS, LABELS, 4, 0)
        for name in ("visits", "domains"):
            assert getattr(told, name) == getattr(silent, name)
        for name in ("visit", "sample", "offsets"):
            assert np.array_equal(getattr(told, name), getattr(silent, name))
        assert sum(silent.begins_visit(index) for index in range(silent.batches)) == 1

    def test_rounds_are_numbered_and_shuffled_anew(self):
        stream = Continual(rounds=3).build(DOMAINS, LABELS, 4, 0)
        assert stream.visits == tuple(Visit(domain, number) for number in range(3) for domain in range(3))
        rounds = stream.sample.reshape(3, -1)
        assert len({part.tobytes() for part in rounds}) == 3

    def test_random_order_repeats_and_follows_the_seed(self):
        orders = []
        for seed in range(30):
            path = [
                visit.domain for visit in Continual(rounds=2, order="random").build(DOMAINS, LABELS, 4, seed).visits
            ]
            assert path[:3] == path[3:]
            orders.append(tuple(path[:3]))
        assert len(set(orders)) == 6  # all orders of three domains; one is missing with probability below 0.03


class TestGradual:
    LEVELS = tuple(Domain(name, level) for name in ("fog", "snow") for level in (1, 2, 3, 4, 5))

    def test_published_path(self):
        order = Gradual()
        assert list(order.severities(3)) == [1, 2, 3, 4, 5]
        stream = order.build(self.LEVELS, [np.arange(4)] * 10, 4, 0)
        seen = [(stream.domains[visit.domain], visit.number) for visit in stream.visits]
        way = [(1, 0), (2, 0), (3, 0), (4, 0), (5, 0), (4, 1), (3, 1), (2, 1), (1, 1)]
        assert seen == [(Domain(name, level), number) for name in ("fog", "snow") for level, number in way]
        assert not stream.announced

    def test_domains_without_severities_are_visited_once(self):
        stream = Gradual([2, 1]).build([Domain("clean"), Domain("fog", 1), Domain("fog", 2)], [np.arange(3)] * 3, 2, 0)
        assert [visit.domain for visit in stream.visits] == [0, 2, 1]

    def test_a_missing_severity(self):
        with pytest.raises(
            ValueError, match=r"fog is there at severities \[5\], and the path needs \[1, 2, 3, 4\] too"
        ):
            Gradual().build([Domain("fog", 5)], [np.arange(3)], 2, 0)


class TestInOut:
    DOMAINS = (Domain("fog", 5), Domain("snow", 5), Domain("clean"))

    def build(self, share=0.25, sizes=(40, 20, 12)):
        return InOut(share).build(self.DOMAINS, [np.arange(size) for size in sizes], 8, 0)

    def test_share_of_clean_images_without_repetition(self):
        stream = self.build()
        assert stream.visits == (Visit(0), Visit(2), Visit(1), Visit(2, 1))
        assert stream.counts().tolist() == [30, 10, 15, 5]
        for visit in range(4):
            assert len(set(stream.sample[stream.visit == visit])) == stream.counts()[visit]
        assert set(stream.visit[:40]) == {0, 1}
        assert 40 in stream.offsets

    def test_clean_images_stand_anywhere(self):
        """The mean place of n marked ones among N is (N - 1) / 2, with variance (N + 1) (N - n) / 12 n."""
        stream = self.build(0.5, (2000, 10, 2000))
        places = np.flatnonzero(stream.visit[:2000] == 1)
        deviation = np.sqrt(2001 * 1000 / 12 / 1000)
        assert abs(places.mean() - 999.5) < 5 * deviation

    def test_too_few_clean_images(self):
        with pytest.raises(
            ValueError, match=r"share 0.5 of the 40 samples of fog is 20, and there are 12 clean images"
        ):
            self.build(0.5)


class TestSingleSample:
    def test_the_samples_of_the_other_stream_one_by_one(self):
        other = Mixed().build(DOMAINS, LABELS, 4, 0)
        stream = SingleSample(Mixed()).build(DOMAINS, LABELS, 4, 0)
        assert np.array_equal(stream.sample, other.sample)
        assert stream.batches == len(stream) == 20

    def test_a_window_stays_within_an_announced_visit(self):
        stream = SingleSample(window=4).build(DOMAINS, LABELS, 32, 0)
        shown = [stream.sample[stream.batch(index)] for index in range(stream.batches)]
        assert [len(batch) for batch in shown] == [1, 2, 3, 4, 4, 4, 4, 1, 2, 3, 4, 4, 4, 4, 4, 4, 4, 1, 2, 3]
        newest = [int(batch[stream.scored(index)][0]) for index, batch in enumerate(shown)]
        assert newest == stream.sample.tolist()

    def test_it_wants_what_the_other_stream_wants(self):
        assert list(SingleSample(Gradual([1, 4])).severities(5)) == [1, 4]
        assert SingleSample(InOut()).needs_clean
        assert not SingleSample().needs_clean
