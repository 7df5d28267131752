"""Probes: clean batches at intervals."""

from __future__ import annotations

import numpy as np
import pytest

from ttalight.data import Continual, Domain, Gradual, InOut, Mixed, PerDomain, Probed, SingleSample, Visit

DOMAINS = [Domain("fog", 5), Domain("snow", 5), Domain("clean")]
LABELS = [np.arange(20), np.arange(13), np.arange(10)]


def build(order, batch_size=6, domains=DOMAINS, labels=LABELS):
    return order.build(domains, labels, batch_size, 0)


def batches(stream):
    """For each batch: whether it is a probe, and the samples in it."""
    return [(stream.is_probe(index), stream.sample[stream.batch(index)].tolist()) for index in range(stream.batches)]


def test_a_probe_stands_at_the_end_of_each_visit():
    stream = build(Probed())
    assert [probe for probe, _ in batches(stream)] == [False] * 4 + [True] * 2 + [False] * 3 + [True] * 2
    assert stream.visits == (Visit(0), Visit(1), Visit(2, probe=True), Visit(2, 1, probe=True))
    assert [stream.begins_visit(index) for index in range(stream.batches)] == [index in (0, 6) for index in range(11)]


def test_a_probe_shows_the_same_images_every_time():
    stream = build(Probed(samples=7))
    first, second = (stream.sample[stream.visit == visit] for visit in (2, 3))
    assert len(set(first)) == 7
    assert first.tolist() == second.tolist()
    assert build(Probed(samples=70)).counts().tolist() == [20, 13, 10, 10]  # no more than there are


@pytest.mark.parametrize("order", [PerDomain(), Mixed(), Continual(rounds=2), SingleSample(Mixed())])
@pytest.mark.parametrize("every", [1, 5, 17, 1000])
def test_stream_without_probes_is_the_plain_one(order, every):
    other = order.build(DOMAINS[:2], LABELS[:2], 6, 0)
    stream = build(Probed(order, every=every, samples=4))
    assert [samples for probe, samples in batches(stream) if not probe] == [samples for _, samples in batches(other)]
    kept = [index for index, (probe, _) in enumerate(batches(stream)) if not probe]
    assert [stream.begins_visit(index) for index in kept] == [other.begins_visit(i) for i in range(other.batches)]
    assert stream.announced == other.announced


@pytest.mark.parametrize(("every", "places"), [(6, [6, 12, 18, 24, 30, 33]), (10, [12, 24, 30, 33]), (100, [33])])
def test_intervals_end_with_a_batch(every, places):
    stream = build(Probed(Mixed(), every=every, samples=4))
    probe = np.array([visit.probe for visit in stream.visits])[stream.visit]
    begins = np.flatnonzero(np.diff(probe.astype(int)) == 1) + 1
    assert [int((~probe[:begin]).sum()) for begin in begins] == places
    assert not probe[0]
    assert probe[-1]


def test_probes_of_clean_continue_its_visits():
    domains = [Domain("clean"), Domain("fog", 5), Domain("clean")]
    stream = build(Probed(), domains=domains)
    assert stream.visits == (Visit(0), Visit(1), Visit(2, 1, probe=True), Visit(2, 2, probe=True))


def test_the_other_stream_may_need_clean_images_too():
    stream = build(Probed(InOut(0.25), every=20, samples=3))
    own = [visit for visit in stream.visits if not visit.probe]
    assert own == [Visit(0), Visit(2), Visit(1), Visit(2, 1)]
    assert [visit.number for visit in stream.visits if visit.probe] == [2, 3]


def test_it_wants_what_the_other_stream_wants():
    assert Probed().needs_clean
    assert list(Probed(Gradual([2, 3])).severities(5)) == [2, 3]


def test_mixed_visits_have_no_ends():
    with pytest.raises(ValueError, match=r"this stream mixes its visits.*: give every, the number of samples"):
        build(Probed(Mixed()))


def test_a_window_takes_no_probes():
    with pytest.raises(ValueError, match="a stream with a window takes no probes"):
        build(Probed(SingleSample(window=3), every=4))
