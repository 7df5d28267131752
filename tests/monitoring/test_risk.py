"""The alarm on the risk of a model that adapts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ttalight.adapters import PTBN, Source, Tent
from ttalight.monitoring import RiskMonitor
from ttalight.monitoring.risk import calibrate, error_bounds, uncertainty

CLASSES = 4


@pytest.fixture
def blur():
    """A network that averages colours, and images whose colours say their class as clearly as asked."""
    net = nn.Sequential(nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES)).eval()
    with torch.no_grad():
        net[3].weight.copy_(torch.eye(4))
        net[3].bias.zero_()

    def images(count, clearness, seed):
        generator = torch.Generator().manual_seed(seed)
        labels = torch.randint(CLASSES, (count,), generator=generator)
        colours = clearness * nn.functional.one_hot(labels, CLASSES) + torch.randn(count, 4, generator=generator)
        return colours.view(count, 4, 1, 1).expand(-1, -1, 2, 2).clone(), labels

    return net, images


def play(monitor, net, images, method=Source, batch=50):
    adapted = method().wrap(net).watch(monitor)
    for part in images.split(batch):
        adapted(part)
    adapted.release()
    return monitor


def test_stationary_streams_raise_few_alarms(blur):
    net, images = blur
    monitor = RiskMonitor(*images(600, 3.0, 0), tolerance=0.0)
    alarms = [play(monitor, net, images(1000, 3.0, seed)[0], batch=100).alarm for seed in range(1, 21)]
    assert sum(alarm is not None for alarm in alarms) <= 1
    assert monitor.count == 900  # the last batch waits for a next one


def test_worse_streams_raise_an_alarm_in_time(blur):
    net, images = blur
    labelled = images(600, 3.0, 0)
    shifted, labels = images(2000, 0.5, 1)
    with torch.no_grad():
        error = (net(shifted).argmax(1) != labels).double().mean().item()
    monitor = play(RiskMonitor(*labelled), net, shifted)
    assert monitor.alarm.images <= 500
    assert monitor.alarm.batch == monitor.alarm.images // 50
    assert monitor.limit < monitor.alarm.lower_bound < error
    assert monitor.lower_bound < error


def test_collapse_of_a_sure_model_is_found_by_its_class_shares(blur):
    net, images = blur
    labelled, (stream, labels) = images(600, 3.0, 0), images(1000, 3.0, 1)
    alarms = {}
    for label_shift in (False, True):
        monitor = RiskMonitor(*labelled, label_shift=label_shift)
        adapted = Source().wrap(net).watch(monitor)
        for number, part in enumerate(stream.split(50)):
            if number == 4:
                net[3].bias.data[0] += 100
            adapted(part)
        net[3].bias.data[0] -= 100
        adapted.release()
        alarms[label_shift] = monitor.alarm
    assert alarms[True] is None
    assert alarms[False].signal == "class_shares"
    assert 5 <= alarms[False].batch <= 8
    wrong = torch.cat([net(stream[:200]).argmax(1) != labels[:200], labels[200 : alarms[False].images] != 0])
    assert monitor.limit < alarms[False].lower_bound < wrong.double().mean()


def test_classes_that_come_in_runs_need_label_shift(blur):
    net, images = blur
    labelled, (stream, labels) = images(600, 3.0, 0), images(1000, 3.0, 1)
    in_runs = stream[labels.argsort()]
    assert play(RiskMonitor(*labelled), net, in_runs).alarm is not None  # though no image is predicted worse
    assert play(RiskMonitor(*labelled, label_shift=True), net, in_runs).alarm is None


# -- simulated runs: labelled images and a stream of each, tested after every batch of 50

RUNS, LABELLED, STREAM, BATCH = 1000, 500, 1000, 50


def predictions(shape, generator):
    """Return the labels and the logits of a model that errs towards class 0, some of which are all but certain."""
    labels = torch.randint(CLASSES, shape, generator=generator)
    logits = 3.0 * nn.functional.one_hot(labels, CLASSES) + torch.randn(*shape, CLASSES, generator=generator)
    return labels, logits + torch.tensor([0.5, 0, 0, 0])


def images_before_alarm(calibrations, logits):
    """Return after how many images each run alarms, infinite without an alarm."""
    runs, images = logits.shape[:2]
    thresholds = torch.stack([calibration.threshold for calibration in calibrations]).view(-1, 1)
    limits = torch.tensor([calibration.limit for calibration in calibrations]).view(-1, 1)
    doubts = uncertainty(logits.flatten(0, 1)).view(runs, images)
    looks = slice(BATCH - 1, None, BATCH)
    flags = (doubts > thresholds).cumsum(1)[:, looks]
    predicted = nn.functional.one_hot(logits.argmax(2), CLASSES).cumsum(1)[:, looks]
    calibration = calibrations[0]._replace(shares=torch.stack([c.shares for c in calibrations])[:, None])
    bounds = error_bounds(flags, predicted, calibration, 0.05)
    alarms = torch.stack([bound > limits for bound in bounds.values()]).any(0)
    first = (alarms.int().argmax(1) + 1.0) * BATCH
    return first.masked_fill(~alarms.any(1), torch.inf)


@pytest.fixture(scope="module")
def simulated():
    """Calibrations of 1,000 runs, each from labelled images of its own, and the logits of their streams."""
    generator = torch.Generator().manual_seed(0)
    labels, logits = predictions((RUNS, LABELLED), generator)
    given = dict(level=0.05, tolerance=0.0, false_flags=0.05, label_shift=False)
    calibrations = [calibrate(x, y, **given) for x, y in zip(logits, labels, strict=True)]
    return calibrations, *predictions((RUNS, STREAM), generator)


def test_few_stationary_runs_alarm(simulated):
    calibrations, _, logits = simulated
    assert images_before_alarm(calibrations, logits).isfinite().double().mean() <= 0.05


def test_runs_that_collapse_alarm_soon(simulated):
    calibrations, _, logits = (part[:200] for part in simulated)
    start = 400
    sure = torch.where(torch.arange(STREAM) < start, 0.0, 100.0)[:, None] * torch.eye(CLASSES)[0]
    delay = images_before_alarm(calibrations, logits + sure) - start
    assert (delay > 0).all()
    assert delay.median() <= 200  # three quarters of these are errors
    assert delay.max() <= 300


def test_uncertainty_orders_predictions_that_are_all_but_certain():
    logits = torch.randn(50, CLASSES, dtype=torch.float64)
    assert torch.allclose(uncertainty(logits).sigmoid(), 1 - logits.softmax(1).amax(1))
    assert torch.equal(
        uncertainty(logits + torch.tensor([500.0, 0, 0, 0])).diff() > 0,
        (logits[:, 1:].logsumexp(1) - logits[:, 0]).diff() > 0,
    )


def test_flags_are_of_the_method_s_predictions_and_counted_once(blur):
    net, images = blur
    labelled, stream = images(600, 3.0, 0), images(200, 1.0, 1)[0]
    monitor = play(RiskMonitor(*labelled), net, stream, PTBN)
    adapted = PTBN().wrap(net)
    doubts = torch.cat([1 - adapted(part).softmax(1).amax(1) for part in stream[:150].split(50)])
    assert monitor.count == 150
    assert monitor.flags == (doubts.double() > monitor._calibration.threshold.sigmoid()).sum()


def test_collapse_is_noticed_with_thresholds_of_the_present_model(blur):
    net, images = blur
    labelled, stream = images(600, 3.0, 0), images(2000, 3.0, 1)[0]
    alarms = {}
    for every in (None, 2):
        monitor = RiskMonitor(*labelled, every=every, batch_size=50, label_shift=True)
        adapted = Source().wrap(net).watch(monitor)
        for number, part in enumerate(stream.split(50)):
            if number == 10:
                net[3].bias.data[0] += 100  # sure of one class
            adapted(part)
        net[3].bias.data[0] -= 100
        adapted.release()
        alarms[every] = monitor.alarm
    assert alarms[None] is None  # the model is as sure as ever, and wrong
    assert 10 < alarms[2].batch <= 20


def test_calibration_changes_nothing(blur):
    net, images = blur
    labelled, stream = images(600, 3.0, 0), images(300, 1.0, 1)[0]
    outputs = []
    for monitors in ((), (RiskMonitor(*labelled, every=1),)):
        adapted = Tent(lr=0.01, reset="never").wrap(net).watch(*monitors)
        outputs.append(torch.cat([adapted(part) for part in stream.split(50)]))
        forwards = adapted.engine.net.forwards
        adapted.release()
        outputs[-1] = (outputs[-1], forwards)
    assert torch.equal(outputs[0][0], outputs[1][0])
    assert outputs[0][1] == outputs[1][1]


def test_curves_of_a_run(net, run, stream):
    labelled = torch.cat(stream)
    with torch.no_grad():
        labels = net(labelled).argmax(1)
    rows = [row for row in run(net, Tent(), RiskMonitor(labelled, labels, false_flags=0.1)) if "risk/limit" in row]
    assert len(rows) == 11
    assert {"risk/lower_bound", "risk/limit", "risk/alarm"} <= rows[-1].keys()


def test_odd_arguments_are_refused():
    images, labels = torch.rand(4, 3, 2, 2), torch.zeros(4)
    with pytest.raises(ValueError, match="a label for each image"):
        RiskMonitor(images, labels[:3])
    with pytest.raises(ValueError, match="level must be above 0"):
        RiskMonitor(images, labels, level=0.0)
    with pytest.raises(ValueError, match="tolerance must be"):
        RiskMonitor(images, labels, tolerance=1.0)
    with pytest.raises(ValueError, match="4 images are too few"):
        Source().wrap(nn.Flatten()).watch(RiskMonitor(images, labels))(images)
