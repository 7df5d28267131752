"""Streams as data: positions, boundaries, probes, windows, hashes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ttalight.data import Domain, ImageArrays, PerDomain, Stream, StreamDataset, StreamSampler, Visit

DOMAINS = [Domain("clean"), Domain("contrast", 5), Domain("pixelate", 5)]
LABELS = [np.arange(7), np.arange(10), np.arange(3)]


def per_domain(seed=0, shuffle=True, batch_size=4) -> Stream:
    return PerDomain(shuffle).build(DOMAINS, LABELS, batch_size, seed)


def small(**changes) -> Stream:
    """Six samples of two domains in batches of 2, 1, 2 and 1; the second batch may become a probe."""
    fields = {
        "domains": DOMAINS[:2],
        "visits": [Visit(0), Visit(1), Visit(0, 1)],
        "visit": np.array([0, 0, 1, 2, 2, 2]),
        "sample": np.array([3, 1, 9, 0, 2, 4]),
        "offsets": np.array([0, 2, 3, 5, 6]),
        "announced": True,
    }
    return Stream(**(fields | changes))


PROBED = [Visit(0), Visit(1, probe=True), Visit(0, 1)]


class TestBatches:
    def test_positions(self):
        stream = small()
        assert [stream.batch(index) for index in range(stream.batches)] == [
            slice(0, 2),
            slice(2, 3),
            slice(3, 5),
            slice(5, 6),
        ]
        assert list(StreamSampler(stream)) == [stream.batch(index) for index in range(4)]
        assert len(stream) == 6

    def test_domains_and_counts(self):
        stream = small()
        assert stream.domain_of(slice(1, 4)).tolist() == [0, 1, 0]
        assert stream.counts().tolist() == [2, 1, 3]

    def test_everything_counts_without_a_window(self):
        stream = small()
        assert [len(range(6)[stream.batch(i)][stream.scored(i)]) for i in range(4)] == [2, 1, 2, 1]

    def test_it_says_what_it_is(self):
        text = repr(small(window=3))
        assert "6 samples of 2 domains in 3 visits, announced, 4 batches, window 3" in text
        assert small(window=3).hash[:8] in text

    def test_references_cannot_be_changed(self):
        with pytest.raises(ValueError, match="read-only"):
            small().sample[0] = 1


class TestBoundaries:
    def test_announced(self):
        stream = small()
        assert [stream.begins_visit(index) for index in range(4)] == [True, True, True, False]

    def test_not_announced(self):
        stream = small(announced=False)
        assert [stream.begins_visit(index) for index in range(4)] == [True, False, False, False]

    def test_probes_are_passed_over(self):
        stream = small(visits=PROBED)
        assert [stream.is_probe(index) for index in range(4)] == [False, True, False, False]
        # The third batch follows a probe, but its own visit differs from that before the probe.
        assert [stream.begins_visit(index) for index in range(4)] == [True, False, True, False]
        same = small(visits=PROBED, visit=np.array([0, 0, 1, 0, 0, 0]))
        assert [same.begins_visit(index) for index in range(4)] == [True, False, False, False]
        first = small(visits=[Visit(0, probe=True), Visit(1), Visit(0, 1)], announced=False)
        assert [first.begins_visit(index) for index in range(4)] == [False, True, False, False]


class TestWindow:
    def test_batches_show_a_window_and_score_their_own(self):
        stream = small(window=3, announced=False)
        shown = [list(range(6)[stream.batch(index)]) for index in range(4)]
        assert shown == [[0, 1], [0, 1, 2], [2, 3, 4], [3, 4, 5]]
        assert [batch[stream.scored(index)] for index, batch in enumerate(shown)] == [[0, 1], [2], [3, 4], [5]]

    def test_a_window_never_hides_a_batch_s_own_samples(self):
        stream = small(window=1)
        assert [stream.batch(index) for index in range(4)] == [small().batch(index) for index in range(4)]

    def test_an_announced_boundary_ends_it(self):
        stream = small(window=4)
        assert [list(range(6)[stream.batch(index)]) for index in range(4)] == [[0, 1], [2], [3, 4], [3, 4, 5]]


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"visit": np.zeros(5, int)}, "visit and sample must be equally long, got 5 and 6"),
            ({"offsets": np.array([0, 2, 2, 6])}, "offsets must rise from 0 to the number of samples, 6"),
            ({"offsets": np.array([0, 2])}, "offsets must rise from 0 to the number of samples, 6"),
            ({"offsets": np.array([1, 6])}, "offsets must rise from 0"),
            ({"visit": np.array([0, 0, 1, 2, 2, 3])}, "visit has the index 3, but there are 3 visits"),
            ({"sample": np.array([0, 1, 2, 3, 4, -1])}, r"sample must lie in \[0, 2\^32\), got -1 to 4"),
            ({"sample": np.array([0, 1, 2, 3, 4, 2**32])}, r"sample must lie in"),
            ({"sample": np.zeros(6)}, "sample must be integers .* got float64"),
            ({"sample": np.zeros(0, int), "visit": np.zeros(0, int)}, "N at least 1"),
            ({"visits": [Visit(0), Visit(2), Visit(0, 1)]}, "every visit must be to one of the 2 domains"),
            ({"window": 0}, "window must be at least 1, got 0"),
            ({"visits": PROBED, "window": 2}, "a stream with probes has no window"),
            ({"visits": PROBED, "offsets": np.array([0, 3, 6])}, "a batch must be a probe as a whole"),
        ],
    )
    def test_what_is_no_stream(self, changes, message):
        with pytest.raises(ValueError, match=message):
            small(**changes)


def test_hashes_of_probes_and_windows_are_stable():
    assert small(visits=PROBED).hash == "c0b23cf2a69bb514ebaa3e4e51810ed48fef7d8f81717cfbd7b69003acc3631e"
    assert small(window=3).hash == "fa79f055f94de76d3825814a6e28befab30db7e75f77213754dc17a937c044b9"
    assert small().hash == "cbda3b8bed63723e38ccaa64c05a95ca1b4f6b8c9f160a486b03c1bcb52792ed"


def test_probe_changes_the_hash():
    assert small(visits=PROBED).hash != small(visits=[Visit(0), Visit(1), Visit(0, 1)]).hash
    assert small(window=3).hash != small(window=4).hash
    assert small(window=None).hash == small().hash


def test_the_hash_is_stable():
    assert per_domain(shuffle=False).hash == "227345c24c602479e8db5d7fdc80e475f29b3fb47eeeeb334062a60343fc8287"


@pytest.mark.parametrize(
    "change",
    [
        {"domains": [Domain("fog"), *DOMAINS[1:]]},
        {"visits": [Visit(0), Visit(1), Visit(1, 1)]},
        {"sample": np.arange(20)[::-1]},
        {"offsets": np.array([0, 20])},
        {"announced": False},
    ],
)
def test_the_hash_sees_everything(change):
    stream = per_domain()
    fields = {name: getattr(stream, name) for name in ("domains", "visits", "visit", "sample", "offsets", "announced")}
    assert Stream(**fields).hash == stream.hash
    assert Stream(**(fields | change)).hash != stream.hash


def test_samples_come_from_their_domains(sets):
    rng = np.random.default_rng(0)
    visit = rng.integers(0, 3, 50)
    sample = np.array([rng.integers(len(LABELS[v])) for v in visit])
    stream = Stream(DOMAINS, [Visit(0), Visit(1), Visit(2)], visit, sample, np.array([0, 20, 50]), announced=False)
    dataset = StreamDataset(stream, sets)
    for positions in StreamSampler(stream):
        images, labels = dataset[positions]
        assert images[:, 0, 0, 0].tolist() == (10 * visit[positions]).tolist()
        assert labels.tolist() == sample[positions].tolist()


@pytest.fixture
def sets():
    return [
        ImageArrays(torch.full((len(labels), 3, 2, 2), 10 * domain, dtype=torch.uint8), torch.from_numpy(labels))
        for domain, labels in enumerate(LABELS)
    ]


class TestDataset:
    @pytest.mark.parametrize("workers", [0, 2])
    def test_windowed_batch_scores_new_images_only(self, workers, sets):
        stream = Stream(
            DOMAINS, [Visit(0), Visit(1)], np.repeat([0, 1], 3), np.arange(6), np.arange(7), announced=False, window=3
        )
        loader = DataLoader(
            StreamDataset(stream, sets), batch_size=None, sampler=StreamSampler(stream), num_workers=workers
        )
        seen, scored = [], []
        for index, (images, labels) in enumerate(loader):
            assert len(images) == len(labels) == min(index + 1, 3)
            seen.append(labels.tolist())
            scored += labels[stream.scored(index)].tolist()
        assert seen[-1] == [3, 4, 5]
        assert scored == list(range(6))

    def test_samples_that_a_set_has_not(self, sets):
        stream = Stream(DOMAINS, [Visit(2)], np.zeros(2, int), np.array([2, 3]), np.array([0, 2]), announced=True)
        with pytest.raises(ValueError, match=r"asks for sample 3 of pixelate, which has 3 samples: .* another limit"):
            StreamDataset(stream, sets)

    def test_a_set_too_few(self, sets):
        with pytest.raises(ValueError, match="the stream has 3 domains, got the images of 2"):
            StreamDataset(per_domain(), sets[:2])
