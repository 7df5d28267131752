"""Reports of a model that adapts, and their forms."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import nn

from ttalight.adapters import EMABN, PTBN, Source, Tent
from ttalight.monitoring import Monitor, Report
from ttalight.monitoring.prometheus import Metric, exposition, write_metrics
from ttalight.monitoring.signals import prediction_counts, prediction_sums, relative_distance, shannon


def test_report_is_of_the_predictions_that_were_returned(net, stream):
    adapted = Tent(lr=0.01).wrap(net)
    logits = torch.cat([adapted(images) for images in stream[:5]])
    report, p = adapted.report(), logits.softmax(1)
    mean = p.mean(0)
    assert report.images == 160
    assert (report.batches, report.updates, report.skipped, report.classes) == (5, 5, 0, 4)
    assert report.entropy == pytest.approx(-(p * p.log()).sum(1).mean().item())
    assert report.diversity == pytest.approx(-(mean * mean.log()).sum().item())
    assert report.effective_classes == pytest.approx(math.exp(report.diversity))
    counts = logits.argmax(1).bincount(minlength=4)
    assert report.commonest_class == counts.argmax()
    assert report.commonest_share == pytest.approx(counts.max().item() / 160)
    assert 0 < report.seconds < 1


def test_report_measures_distances_from_the_source(net, stream):
    names = [name for name, value in net.named_parameters() if name[0] in "14"]  # of the BatchNorm layers
    source = torch.cat([net.get_parameter(name).detach().clone() for name in names])
    adapted = Tent(lr=0.01).wrap(net)
    for images in stream[:3]:
        adapted(images)
    moved = torch.cat([net.get_parameter(name).detach() for name in names])
    assert adapted.report().weight_distance == pytest.approx(((moved - source).norm() / source.norm()).item())
    assert adapted.report().statistics_distance is None
    adapted.reset()
    assert adapted.report().weight_distance == 0


def test_report_measures_statistics_that_move(net, stream):
    source = torch.cat([net[1].running_mean, net[1].running_var, net[4].running_mean, net[4].running_var]).clone()
    adapted = EMABN().wrap(net)
    adapted(stream[0])
    moved = torch.cat([net[1].running_mean, net[1].running_var, net[4].running_mean, net[4].running_var])
    expected = ((moved - source).norm() / source.norm()).item()
    assert adapted.report().statistics_distance == pytest.approx(expected)
    assert adapted.report().weight_distance is None


@pytest.mark.parametrize("method", [Source, PTBN, EMABN, Tent])
def test_comparison_with_the_source_changes_nothing(method, net, stream, make_net):
    adapted, twin = method().wrap(net), method().wrap(make_net())
    adapted(stream[0])
    twin(stream[0])
    with torch.no_grad():
        source = make_net()(stream[1]).argmax(1)
    report = adapted.report(stream[1])
    assert adapted.engine.net.forwards == twin.engine.net.forwards
    logits = adapted(stream[1])
    if method is not EMABN:  # which predicts after its update
        assert report.source_agreement == pytest.approx((logits.argmax(1) == source).double().mean().item())
    assert torch.equal(twin(stream[1]), logits)
    assert all(map(torch.equal, adapted.state_dict()["tensors"].values(), twin.state_dict()["tensors"].values()))


def test_source_agrees_with_itself(net, stream):
    adapted = Source().wrap(net)
    assert adapted.report(stream[0]).source_agreement == 1  # before the first batch, too


def test_report_before_the_first_batch_has_counts_only(net):
    report = Tent().wrap(net).report()
    assert {name: value for name, value in report.items() if value is not None} == {
        "method": "Tent", "batches": 0, "updates": 0, "skipped": 0, "bad_batches": 0, "missed": 0, "recoveries": 0,
        "images": 0,
    }  # fmt: skip


def test_report_keeps_the_last_images_only():
    net = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)).eval()
    adapted = Source().wrap(net)
    seen = torch.empty(0, 2)
    for size in (400, 300, 450, 1, 1200, 300):  # fits, wraps, is more than all
        seen = torch.cat([seen, adapted(torch.randn(size, 3, 4, 4))])[-1000:]
        p = seen.softmax(1)
        report = adapted.report()
        assert report.images == len(seen)
        assert report.entropy == pytest.approx(-(p * p.log()).sum(1).mean().item(), rel=1e-5)


def test_changed_outputs_do_not_change_a_report(net, stream):
    adapted = Source().wrap(net)
    logits = adapted(stream[0])
    before = adapted.report()
    logits.zero_()
    assert adapted.report() == before


def test_maps_are_reported_by_pixel(stream):
    net = nn.Conv2d(3, 5, 1).double().eval()
    adapted = Source().wrap(net)
    images = torch.rand(2, 3, 20, 17, dtype=torch.float64)
    logits = adapted(images)[:, :, ::8, ::8]
    report = adapted.report()
    assert (report.images, report.classes) == (2, 5)
    assert report.commonest_share == pytest.approx(logits.argmax(1).flatten().bincount().max().item() / 18)


def test_signals_against_loops():
    torch.manual_seed(0)
    logits = torch.randn(40, 6, dtype=torch.float64)
    counts, entropies, p = [0] * 6, 0.0, torch.zeros(6, dtype=torch.float64)
    for row in logits:
        counts[int(row.argmax())] += 1
        q = row.softmax(0)
        entropies -= sum(float(value) * math.log(float(value)) for value in q)
        p += q
    assert prediction_counts(logits).tolist() == counts
    expected = torch.tensor([entropies, *counts, *p.tolist()], dtype=torch.float64)
    assert torch.allclose(prediction_sums(logits), expected)
    assert shannon(torch.ones(6)).exp().item() == pytest.approx(6)
    assert shannon(torch.tensor([0.0, 3.0, 0.0])).item() == 0


def test_distance_from_a_source_of_zeros_is_absolute():
    assert relative_distance([torch.tensor([3.0, 4.0])], [torch.zeros(2)]).item() == 5
    assert relative_distance([torch.ones(2), torch.ones(1)], [torch.zeros(2), torch.ones(1)]).item() == pytest.approx(
        2**0.5
    )


SAMPLE = re.compile(r'([a-zA-Z_:][\w:]*)(\{(?:[a-zA-Z_]\w*="(?:[^"\\\n]|\\[\\"n])*",?)*\})? (NaN|[+-]Inf|[-+.\de]+)')


def parse(text):
    """Return the samples of a text in the exposition format, and check the format's rules on the way."""
    assert text.endswith("\n")
    samples, kinds, helped = {}, {}, set()
    for line in text[:-1].split("\n"):
        if line.startswith("# HELP "):
            name = line.split(" ")[2]
            assert name not in helped
            assert name not in samples
            helped.add(name)
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name not in kinds
            assert name not in samples
            assert kind in ("counter", "gauge", "histogram", "summary", "untyped")
            kinds[name] = kind
        else:
            name, labels, value = SAMPLE.fullmatch(line).groups()
            assert name in kinds
            assert (kinds[name] == "counter") == name.endswith("_total")
            samples[name] = (labels, float(value))
    return samples


def test_prometheus_text_follows_the_format(net, stream):
    adapted = Tent().wrap(net)
    adapted(stream[0])
    report = adapted.report()
    samples = parse(report.prometheus({"model": 'a "b"\\\nc'}))
    assert samples["ttalight_updates_total"] == ('{method="Tent",model="a \\"b\\"\\\\\\nc"}', 1)
    assert samples["ttalight_entropy"][1] == report.entropy
    assert not any("agreement" in name for name in samples)  # what there is not has no sample
    assert len(samples) == sum(value is not None for value in report.values()) - 1


def test_numbers_that_are_not_finite_have_the_names_of_the_format():
    metrics = [Metric(f"x{i}", "gauge", "a\nb", value) for i, value in enumerate((math.nan, math.inf, -math.inf))]
    text = exposition(metrics)
    assert [line.split()[1] for line in text.splitlines() if line[0] == "x"] == ["NaN", "+Inf", "-Inf"]
    assert "# HELP x0 a\\nb" in text
    parse(text)


def test_odd_names_are_refused():
    with pytest.raises(ValueError, match="letters, digits"):
        exposition([Metric("my-metric", "gauge", "", 1)])
    with pytest.raises(ValueError, match="name of its own"):
        exposition([Metric("x", "gauge", "", 1)] * 2)
    with pytest.raises(ValueError, match="a label needs"):
        exposition([Metric("x", "gauge", "", 1)], {"__name": "y"})


def test_file_for_the_node_exporter_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "tta" / "model.prom"
    write_metrics(path, "a 1\n")
    write_metrics(path, "a 2\n")
    assert path.read_text() == "a 2\n"
    assert [file.name for file in path.parent.iterdir()] == ["model.prom"]
    with pytest.raises(ValueError, match=r"end with \.prom"):
        write_metrics(tmp_path / "model.txt", "")


def test_report_is_a_mapping_that_people_can_read():
    report = Report("Tent", 3, 2, 1, 0, 0, images=10, entropy=0.25)
    assert report["entropy"] == 0.25
    assert "entropy" in report
    assert "anything" not in report
    assert "entropy             0.25" in repr(report).splitlines()
    assert "source agreement" not in repr(report)


def test_monitor_logs_curves_and_writes_a_file(net, run, tmp_path):
    monitor = Monitor(every=5, prometheus=str(tmp_path / "run.prom"), labels={"job": "x"})
    rows = run(net, Tent(), monitor)
    curves = {row["step"]: row for row in rows if "monitor/entropy" in row}
    assert sorted(curves) == [5, 10]
    assert curves[10]["monitor/updates"] == 10
    assert curves[10]["monitor/entropy"] == monitor.report.entropy
    assert curves[5]["monitor/images"] == 160
    samples = parse((tmp_path / "run.prom").read_text())
    assert samples["ttalight_batches_total"] == ('{method="Tent",job="x"}', 10)


def test_monitor_does_not_change_a_run(net, stream, run, make_net):
    adapted = Tent().wrap(make_net())
    expected = [adapted(images) for images in stream]
    watched = Tent().wrap(net).watch(Monitor(every=1))
    assert all(torch.equal(watched(images), logits) for images, logits in zip(stream, expected, strict=True))


def test_batch_that_an_observer_fails_in_is_undone(net, stream):
    class Fails:
        def observe(self, engine, logits):
            raise KeyError("full")

    adapted = Tent().wrap(net)
    adapted(stream[0])
    before = adapted.state_dict()
    adapted.engine.observers.append(Fails())
    with pytest.raises(KeyError):
        adapted(stream[1])
    after = adapted.state_dict()
    assert after["counters"] == before["counters"]
    assert all(map(torch.equal, after["tensors"].values(), before["tensors"].values()))


def test_predictions_without_adaptation_are_not_reported(net, stream):
    seen = []

    class Sees:
        def observe(self, engine, logits):
            seen.append(len(logits))

    adapted = Tent().wrap(net)
    adapted.engine.observers.append(Sees())
    adapted(stream[0], adapt=False)
    adapted(stream[0])
    adapted(stream[1], adapt=False)
    assert seen == [32]
    assert (adapted.report().batches, adapted.report().images) == (1, 32)
