"""A watch that acts when adaptation fails, and leaves alone what works."""

from __future__ import annotations

import logging
import math
from functools import partialmethod

import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback

from ttalight.adapters import EMABN, PTBN, Source, Tent
from ttalight.monitoring import Watch
from ttalight.monitoring.hysteresis import Limit, Readings, Reference, crossings
from ttalight.monitoring.observer import LateReads

METHODS = [Source, PTBN, EMABN, Tent]
LIMITS = {
    "share": 0.5, "diversity": 0.25, "low_entropy": 0.02, "high_entropy": 0.9, "drift": 1.0, "step": 0.25,
}  # fmt: skip
FIRST = Reference(0.5, 8.0)
HEALTHY = Readings(200, 10, 0.5, 30, 8.0, 0.0, 0.0)


def beyond(reference=FIRST, **changes):
    seen = Readings(**{**vars(HEALTHY), **changes})
    return [name for name, (*_, is_beyond, _) in crossings(seen, reference, **LIMITS).items() if is_beyond]


def tensors(adapted):
    return adapted.state_dict()["tensors"]


# -- limits


def test_healthy_signals_are_within_all_limits():
    assert beyond() == []


@pytest.mark.parametrize(
    ("signal", "changes"),
    [
        ("commonest_share", {"commonest": 180}),
        ("effective_classes", {"effective_classes": 2.7}),
        ("low_entropy", {"entropy": 0.009}),
        ("high_entropy", {"entropy": 0.95 * math.log(10)}),
        ("drift", {"drift": 1.1}),
        ("step", {"step": 0.3}),
    ],
)
def test_each_signal_has_its_limit(signal, changes):
    assert beyond(**changes) == [signal]


def test_few_images_need_a_larger_share_than_many():
    # Of 10 classes the limit is a share of 0.55.
    assert beyond(images=16, commonest=16) == []
    assert beyond(images=40, commonest=40) == ["commonest_share"]
    assert beyond(images=40, commonest=28) == []
    assert beyond(images=400, commonest=280) == ["commonest_share"]


def test_two_classes_may_be_less_even_than_many():
    assert beyond(classes=2, commonest=150, images=200, effective_classes=2.0, reference=Reference(0.5, 2.0)) == []
    assert "commonest_share" in beyond(classes=1000, commonest=150, images=200)


def test_high_entropy_counts_only_above_that_of_the_first_images():
    assert beyond(Reference(2.2, 8.0), entropy=2.2) == []


def test_limit_trips_after_patience_and_again_only_after_calm():
    limit = Limit(patience=2)
    assert [limit.update(True, False) for _ in range(4)] == [False, True, False, False]
    assert not limit.update(False, False)  # inside, but not calm
    assert [limit.update(True, False) for _ in range(3)] == [False] * 3
    limit.update(False, True)
    assert [limit.update(True, False) for _ in range(2)] == [False, True]


# -- on a network


@pytest.mark.parametrize("action", ["reset", "rollback", "freeze"])
def test_absurd_learning_rate_is_caught_within_three_batches(action, net, stream, caplog, make_net):
    source = Tent(lr=1.0, reset="never").wrap(make_net())
    source(stream[0])
    watch = Watch(action)
    adapted = Tent(lr=1.0, reset="never").wrap(net).watch(watch)
    with caplog.at_level(logging.WARNING, logger="ttalight"):
        for images in stream[:3]:
            adapted(images)
    assert watch.trips
    assert watch.trips[0].batch <= 3
    assert sum(watch.counts.values()) == len(watch.trips)
    assert f"Tent, batch {watch.trips[0].batch}: {watch.trips[0].signal} is" in caplog.text
    assert adapted.report().weight_distance == 0  # there was no good state to return to but the source
    assert adapted.report().recoveries == 1


@pytest.mark.parametrize("method", METHODS)
def test_healthy_adaptation_is_not_touched(method, net, stream, make_net):
    watch = Watch()
    adapted, twin = method().wrap(net).watch(watch), method().wrap(make_net())
    assert all(torch.equal(adapted(images), twin(images)) for images in stream)
    assert watch.trips == []
    assert all(map(torch.equal, tensors(adapted).values(), tensors(twin).values()))


def test_signals_are_those_of_the_last_images(net, stream):
    watch = Watch(window=60)
    adapted = Tent(lr=0.01, reset="never").wrap(net).watch(watch)
    logits, reports = [], []
    for images in stream[:4]:
        logits.append(adapted(images))
        reports.append(adapted.report())
    seen = torch.cat(logits[1:3])  # the last but one batch and the one before hold 64 predictions
    p = seen.softmax(1)
    mean = p.mean(0)
    assert watch.signals["low_entropy"] == pytest.approx(-(p * p.log()).sum(1).mean().item())
    assert watch.signals["effective_classes"] == pytest.approx(math.exp(-(mean * mean.log()).sum().item()))
    assert watch.signals["commonest_share"] == seen.argmax(1).bincount().max().item() / 64
    assert watch.signals["drift"] == pytest.approx(reports[2].weight_distance)
    assert 0 < watch.signals["step"] < watch.signals["drift"]


def test_first_step_and_the_step_after_a_reset_start_at_the_source(net, stream):
    watch = Watch()
    adapted = Tent(lr=0.01, reset="never").wrap(net).watch(watch)
    adapted(stream[0])
    adapted(stream[1])
    assert watch.signals["step"] == watch.signals["drift"] > 0
    adapted.reset()
    adapted(stream[2])
    adapted(stream[3])
    assert watch.signals["step"] == watch.signals["drift"] > 0


def test_rollback_returns_to_a_state_that_was_good(net, stream):
    watch = Watch("rollback", good_after=2, patience=1)
    adapted = Tent(lr=0.001, reset="never").wrap(net).watch(watch)
    states = []
    for images in stream[:6]:
        adapted(images)
        states.append({name: value.clone() for name, value in tensors(adapted).items()})
    with torch.no_grad():
        for parameter in adapted.engine.net.parameters:
            parameter.mul_(5)
    adapted(stream[6])  # measured here
    adapted(stream[7])  # and read here
    assert {trip.action for trip in watch.trips} == {"rollback"}
    restored = tensors(adapted)
    assert any(all(torch.equal(state[name], restored[name]) for name in state) for state in states)
    assert adapted.report().recoveries == 0
    assert adapted.report().batches == 8  # which a rollback does not change


def test_frozen_model_stays_as_it_is_until_it_thaws(net, stream):
    watch = Watch("freeze")
    adapted = Tent(lr=1.0, reset="never").wrap(net).watch(watch)
    for images in stream[:3]:
        adapted(images)
    assert watch.is_frozen
    before, updates = tensors(adapted), adapted.report().updates
    backwards = adapted.engine.net.backwards
    for images in stream[3:6]:
        assert torch.equal(adapted(images), adapted(images, adapt=False))
    assert all(map(torch.equal, tensors(adapted).values(), before.values()))
    assert (adapted.report().updates, adapted.report().missed) == (updates, 3)
    assert adapted.engine.net.backwards == backwards
    watch.thaw()
    assert not watch.is_frozen
    adapted(stream[6])
    assert not all(map(torch.equal, tensors(adapted).values(), before.values()))


def test_state_of_a_frozen_model_is_loaded_by_another(net, make_net, stream):
    adapted, other = (Tent(lr=1.0, reset="never").wrap(network) for network in (net, make_net()))
    adapted.watch(Watch("freeze"))
    for images in stream[:5]:
        adapted(images)
    other.load_state_dict(adapted.state_dict())
    assert torch.equal(other(stream[5], adapt=False), adapted(stream[5]))


def test_frozen_model_of_a_run_adapts_no_more(net, stream, run):
    method, counts = Tent(lr=1.0, reset="never"), []
    note = LambdaCallback(on_test_batch_end=lambda *args: counts.append((method.engine.batches, method.engine.missed)))
    run(net, method, Watch("freeze"), note)
    assert counts[-1] == (3, len(stream) - 3)


def test_function_is_called_with_engine_and_trip(net, stream):
    seen = []
    watch = Watch(lambda engine, trip: seen.append((engine, trip)))
    adapted = Tent(lr=1.0, reset="never").wrap(net).watch(watch)
    for images in stream[:8]:
        adapted(images)
    assert seen[0] == (adapted.engine, watch.trips[0])
    assert len({trip.signal for _, trip in seen}) == len(seen)  # none again before it was calm
    assert adapted.report().weight_distance > 1  # which acts, or does not


def test_predictions_that_are_not_finite_trip_at_once(net, stream):
    watch = Watch()
    adapted = Source().wrap(net).watch(watch)
    adapted(stream[0])
    with torch.no_grad():
        net[8].bias.fill_(math.nan)
    adapted(stream[1])
    adapted(stream[2])
    assert [trip.signal for trip in watch.trips] == ["not_finite"]


def test_predictions_of_one_class_trip_on_single_images(net, stream):
    watch = Watch(lambda engine, trip: None, window=64, patience=1)
    adapted = Source().wrap(net).watch(watch)
    for images in torch.cat(stream[:3]).split(1):
        adapted(images)
    assert not watch.trips
    with torch.no_grad():
        net[8].bias[1] += 5000
    for images in torch.cat(stream[:3]).split(1):
        adapted(images)
    assert {trip.signal for trip in watch.trips} == {"commonest_share", "effective_classes", "low_entropy"}


def test_reference_is_a_report_of_healthy_predictions(net, stream, make_net):
    healthy = Source().wrap(make_net())
    healthy(stream[0])
    watch = Watch(reference=healthy.report(), patience=1)
    with torch.no_grad():
        net[8].bias[1] += 50  # collapsed from the first image on
    adapted = Source().wrap(net).watch(watch)
    for images in stream[:2]:
        adapted(images)
    assert "low_entropy" in watch.counts
    with pytest.raises(ValueError, match="seen predictions"):
        Watch(reference=Tent().wrap(make_net()).report())


def test_run_is_watched_and_logged(net, run, make_net):
    watch = Watch()
    rows = run(net, watch, Tent(lr=1.0, reset="never"))
    curves = [row for row in rows if "watch/trips" in row]
    assert len(curves) == 12
    assert curves[0]["watch/trips"] == 0
    assert curves[-1]["watch/trips"] == len(watch.trips) > 0
    assert curves[-1]["watch/drift"] == watch.signals["drift"]
    first = list(watch.trips)
    run(make_net(), watch, Source())
    assert first
    assert watch.trips == []  # a run begins with none


def test_probes_are_not_watched(net, stream):
    watch = Watch()
    adapted = Tent(lr=1.0, reset="never").wrap(net).watch(watch)
    adapted.engine.probe(True)
    for images in stream[:4]:
        adapted(images)
    adapted.engine.probe(False)
    assert watch.trips == []


def counted(tensor, real, calls, *args, **kwargs):
    calls.append(real)
    return real(tensor, *args, **kwargs)


def test_watch_adds_no_wait_to_a_step(stream, monkeypatch, make_net):
    read = []
    monkeypatch.setattr(LateReads, "exchange", lambda self, values: read[-1] if read else None)
    counts = []
    for watched in (False, True):
        adapted = Tent(reset="never").wrap(make_net())
        if watched:
            adapted.watch(Watch())
        adapted(stream[0])
        read += [[1.0, 9.0, 3.0, 0.0, 0.0]]
        adapted(stream[1])
        calls = []
        with monkeypatch.context() as within:
            for name in ("item", "tolist", "__float__", "__int__", "__bool__", "cpu", "numpy", "nonzero", "bincount"):
                real = getattr(torch.Tensor, name)
                within.setattr(torch.Tensor, name, partialmethod(counted, real, calls))
            adapted(stream[2])
        read.clear()
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0


def test_numbers_are_read_with_the_next_batch():
    reads = LateReads()
    assert reads.exchange(torch.ones(2)) is None
    assert reads.exchange(torch.zeros(2)) == [1.0, 1.0]


def test_odd_arguments_are_refused():
    with pytest.raises(ValueError, match="reset, rollback, freeze or a function"):
        Watch("stop")
    with pytest.raises(ValueError, match="share must be above 0"):
        Watch(share=1.5)
    with pytest.raises(ValueError, match="drift must be above 0"):
        Watch(drift=0.0)
    with pytest.raises(ValueError, match="patience must be at least 1"):
        Watch(patience=0)
    with pytest.raises(TypeError, match="window must be a whole number"):
        Watch(window=2.5)
