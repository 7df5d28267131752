"""Schedules of adaptation: every Nth batch, those that fit a budget, those that a clock leaves time for."""

from __future__ import annotations

import copy
import json

import lightning
import numpy as np
import pytest
import torch
from support.networks import small_net
from torch import nn

import ttalight
from ttalight.adapters import PTBN, Tent
from ttalight.callbacks import AdaptationCheckpoint
from ttalight.data import Clocked, Continual, DigitsDataModule, PerDomain, Probed, SingleSample
from ttalight.engine import schedule
from ttalight.engine.schedule import Budget, Clock
from ttalight.reporting import read_results


@pytest.fixture
def batches():
    torch.manual_seed(1)
    return [torch.rand(4, 3, 8, 8, dtype=torch.float64) for _ in range(7)]


def decisions(clock, sizes):
    """Decisions of a schedule on batches of the given sizes, when nothing is measured."""
    found = []
    for index, size in enumerate(sizes):
        clock.arrive(index)
        found.append(clock.adapts(index, size))
        clock.note(size, found[-1], 0.0)
    return found


@pytest.mark.parametrize(("cost", "every"), [(0.2, 1), (1.0, 1), (1.5, 2), (2.0, 2), (2.5, 3), (7.0, 7)])
@pytest.mark.parametrize("rate", [0.3, 1.0, 30.0])
def test_a_clock_adapts_to_one_of_so_many_batches_as_the_cost_rounded_up(cost, every, rate):
    arrivals = np.cumsum([16] * 40) / rate
    seen = decisions(Clock(arrivals, [16 * cost / rate] * 40), [16] * 40)
    assert seen == [index % every == 0 for index in range(40)]


def test_a_short_batch_costs_its_share():
    """Two images arrive at once per second and take 1.5 s each: 0, then 12 s busy, then 3 s."""
    sizes = [8, 2, 8, 8]
    assert decisions(Clock(np.cumsum(sizes), [1.5 * size for size in sizes]), sizes) == [True, False, False, True]


def test_a_measured_clock_is_busy_as_long_as_a_batch_took():
    clock = Clock([1.0, 2.0, 3.0, 4.0])
    seen = []
    for index, seconds in enumerate([1.5, 0.0, 0.9, 0.1]):
        clock.arrive(index)
        seen.append(clock.adapts(index, 4))
        clock.note(4, seen[-1], seconds)
    assert seen == [True, False, True, True]


def test_a_budget_skips_what_is_too_slow_and_tries_again_later():
    budget, seen = Budget(milliseconds=10), []
    for batch in range(40):
        seen.append(budget.adapts(batch, 5))
        budget.note(5, seen[-1], 0.03 if seen[-1] else 0.004)
    tried = [batch for batch, adapted in enumerate(seen) if adapted]
    assert tried == [0, 3, 8, 17, 34]  # after 2, 4, 8 and 16 batches


def test_a_budget_adapts_again_when_the_method_has_become_fast():
    budget, seen = Budget(milliseconds=10), []
    for batch in range(30):
        seen.append(budget.adapts(batch, 5))
        budget.note(5, seen[-1], 0.004 if not seen[-1] else 0.03 if batch < 4 else 0.007)
    assert seen[-10:] == [True] * 10


def test_a_budget_lets_small_batches_through():
    budget = Budget(milliseconds=10)
    budget.note(20, True, 0.02)
    assert not budget.adapts(1, 20)
    assert budget.adapts(1, 8)


def test_every_third_batch_is_adapted_to_and_the_others_are_predicted(batches):
    wrapped, by_hand = Tent(lr=0.1, adapt_every=3).wrap(small_net()), Tent(lr=0.1).wrap(small_net())
    for index, images in enumerate(batches):
        assert torch.equal(wrapped(images), by_hand(images, adapt=index % 3 == 0))
    engine = wrapped.engine
    assert (engine.batches, engine.missed, engine.updates) == (3, 4, 3)
    assert engine.net.forwards == 7
    assert all(torch.equal(a, b) for a, b in zip(wrapped.module.parameters(), by_hand.module.parameters(), strict=True))


def test_periods_begin_with_each_visit(batches):
    wrapped = Tent(adapt_every=3, reset="never").wrap(small_net())
    for images in batches[:2]:
        wrapped(images)
    wrapped.engine.announce()
    wrapped(batches[2])
    assert wrapped.engine.batches == 2


def test_a_slow_method_is_skipped_in_a_wrapped_network(batches, monkeypatch):
    times = iter(np.cumsum([0, 0.1] * 100).tolist())
    monkeypatch.setattr(schedule, "_time", lambda images: next(times))
    wrapped = Tent(max_milliseconds=50).wrap(small_net())
    for images in batches:
        wrapped(images)
    assert (wrapped.engine.batches, wrapped.engine.missed) == (2, 5)
    assert (wrapped.report().batches, wrapped.report().missed) == (2, 5)


def test_a_batch_that_fails_leaves_the_schedule_unchanged(batches, monkeypatch):
    wrapped = Tent(max_milliseconds=1e6, adapt_every=2).wrap(small_net())
    wrapped(batches[0])
    before = copy.deepcopy(wrapped.state_dict())
    with pytest.raises(ValueError, match="NaN"):
        wrapped(torch.full_like(batches[0], torch.nan))
    after = wrapped.state_dict()
    assert after["schedules"] == before["schedules"]
    assert after["counters"] == before["counters"]


def test_the_schedule_is_part_of_the_state(batches):
    wrapped = Tent(adapt_every=3, reset="never").wrap(small_net())
    outputs = [wrapped(images) for images in batches]
    other = Tent(adapt_every=3, reset="never").wrap(small_net())
    for images in batches[:4]:
        other(images)
    resumed = Tent(adapt_every=3, reset="never").wrap(small_net())
    resumed.load_state_dict(other.state_dict())
    assert all(torch.equal(resumed(x), seen) for x, seen in zip(batches[4:], outputs[4:], strict=True))


def test_a_state_with_an_impossible_schedule_is_refused(batches):
    wrapped = Tent(max_milliseconds=1e6).wrap(small_net())
    wrapped(batches[0])
    state = wrapped.state_dict()
    state["schedules"] = {"Budget": state["schedules"]["Budget"] | {"patience": float("nan")}}
    with pytest.raises(ValueError, match="patience"):
        wrapped.load_state_dict(state)


@pytest.mark.parametrize("arguments", [{"adapt_every": 0}, {"adapt_every": 1.5}, {"max_milliseconds": 0.0}])
def test_schedules_out_of_range_are_refused(arguments):
    with pytest.raises((ValueError, TypeError), match=next(iter(arguments))):
        Tent(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "needs a rate"),
        ({"rate": 0.0}, "rate must be positive"),
        ({"rate": 1.0, "cost": 2.0, "milliseconds": 3.0}, "not both"),
        ({"milliseconds": 3.0}, "needs a rate"),
    ],
)
def test_clocks_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        Clocked(**arguments)


# -- runs


class Module(lightning.LightningModule):
    """A small network with a BatchNorm layer."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 6, 3, stride=4), nn.BatchNorm2d(6), nn.ReLU(), nn.AdaptiveAvgPool2d(1))
        self.end = nn.Sequential(nn.Flatten(), nn.Linear(6, 10))

    def forward(self, images):
        return self.end(self.net(images))

    def test_step(self, batch, batch_idx):
        self(batch[0])


class Stop(lightning.Callback):
    """Fails when a batch ends."""

    def __init__(self, batch):
        self.batch = batch

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if batch_idx == self.batch:
            raise KeyError("stopped")


def run(folder, order, adapter, *callbacks, batch_size=4, **arguments):
    data = DigitsDataModule(batch_size=batch_size, domains=["clean", "contrast"], limit=20, stream=order)
    trainer = ttalight.Trainer(
        default_root_dir=str(folder), accelerator="cpu", enable_progress_bar=False, callbacks=list(callbacks)
    )
    return trainer.adapt(Module(), data, adapter, **arguments)


@pytest.mark.filterwarnings("ignore:.*statistics")
def test_a_run_under_a_clock_counts_what_it_misses(tmp_path):
    results = run(tmp_path, Clocked(cost=2.5, stream=Continual()), Tent(lr=0.01))
    assert results == read_results(tmp_path)
    assert results["missed"] == [1, 2, 4, 5, 7, 8]
    assert results["missed_batches"] == 6
    assert results["cost"]["backwards_per_batch"] == pytest.approx(0.4)
    assert results["cost"]["forwards_per_batch"] == 1.0
    protocol = results["protocol"]
    assert (protocol["stream"], protocol["stream_args"]["cost"]) == ("Clocked", 2.5)
    assert protocol["stream_args"]["stream"]["class"] == "Continual"
    assert protocol["stream_hash"] == run(tmp_path / "b", Continual(), PTBN())["protocol"]["stream_hash"]


@pytest.mark.filterwarnings("ignore:.*statistics")
def test_a_cost_in_milliseconds_is_that_of_a_full_batch(tmp_path):
    """At 40 images a second a batch of four takes 100 ms."""
    results = run(tmp_path, Clocked(rate=40, milliseconds=150, stream=Continual()), Tent(lr=0.01))
    assert results["missed"] == [1, 3, 5, 7, 9]


@pytest.mark.filterwarnings("ignore:.*statistics")
@pytest.mark.parametrize(
    "order", [Clocked(cost=2.5, stream=Continual()), Clocked(cost=3.0, stream=Probed(PerDomain()))]
)
def test_a_stopped_run_under_a_clock_resumes(order, tmp_path):
    whole = run(tmp_path / "whole", order, Tent(lr=0.01, reset="never"))
    with pytest.raises(KeyError, match="stopped"):
        run(tmp_path / "a", order, Tent(lr=0.01, reset="never"), Stop(4), AdaptationCheckpoint(every=1))
    resumed = run(tmp_path / "a", order, Tent(lr=0.01, reset="never"), resume=str(tmp_path / "a"))
    assert resumed["missed"] == whole["missed"]
    assert [row["nll"] for row in resumed["domains"]] == [row["nll"] for row in whole["domains"]]
    assert resumed["cost"]["backwards_per_batch"] == whole["cost"]["backwards_per_batch"]


@pytest.mark.filterwarnings("ignore:.*statistics")
def test_the_decisions_of_a_measured_clock_are_recorded(tmp_path, monkeypatch):
    times = iter(np.cumsum([0, 0.25] * 100).tolist())
    monkeypatch.setattr(schedule, "_time", lambda images: next(times))
    run(tmp_path, Clocked(rate=40, stream=Continual()), Tent(lr=0.01))
    assert json.loads((tmp_path / "results.json").read_text())["missed"] == [1, 2, 4, 5, 7, 8]


@pytest.mark.filterwarnings("ignore:.*statistics")
def test_a_window_arrives_with_its_newest_image(tmp_path):
    order = Clocked(cost=2.0, stream=SingleSample(window=4))
    results = run(tmp_path, order, Tent(lr=0.01), batch_size=1)
    assert results["missed"] == list(range(1, 40, 2))


@pytest.mark.filterwarnings("ignore:.*statistics")
def test_a_run_with_adapt_every_says_that(tmp_path):
    results = run(tmp_path, Continual(), Tent(lr=0.01, adapt_every=4))
    assert results["missed"] == [1, 2, 3, 5, 6, 7, 9]
    assert results["protocol"]["adapt_every"] == 4
    assert "missed" not in run(tmp_path / "all", Continual(), Tent(lr=0.01))
