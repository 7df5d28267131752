"""Every stream through the real command line, on the embedded digits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from ttalight.cli import main
from ttalight.data import (
    BatchMixing,
    Continual,
    Correlated,
    Cross,
    DigitsDataModule,
    Gradual,
    InOut,
    LabelShift,
    Mixed,
    PerDomain,
    Potpourri,
    PracticalTTA,
    Probed,
    Recurring,
    SavedStream,
    SingleSample,
)

DATA = {"batch_size": 8, "domains": ["contrast", "fog"], "limit": 12}

#: How a stream is asked for, as words or as YAML, and the same in Python.
STREAMS = [
    (["--data.stream", "PerDomain"], PerDomain()),
    (["--data.stream", "Continual", "--data.stream.rounds", "2"], Continual(rounds=2)),
    (["--data.stream", "Gradual", "--data.stream.path", "[1,3,1]"], Gradual(path=[1, 3, 1])),
    ("stream: Mixed", Mixed()),
    ("stream: {class_path: Potpourri, init_args: {clean: true}}", Potpourri(clean=True)),
    (["--data.stream", "InOut", "--data.stream.share", "0.25"], InOut(share=0.25)),
    ("stream: {class_path: Correlated, init_args: {gamma: 0.1}}", Correlated(gamma=0.1)),
    ("stream: {class_path: Correlated, init_args: {gamma: null, mixed: true}}", Correlated(gamma=None, mixed=True)),
    (["--data.stream", "PracticalTTA", "--data.stream.slots", "3"], PracticalTTA(slots=3)),
    (["--data.stream", "LabelShift", "--data.stream.ratio", "20"], LabelShift(ratio=20)),
    ("stream: {class_path: SingleSample, init_args: {stream: Mixed, window: 3}}", SingleSample(Mixed(), window=3)),
    (["--data.stream", "Cross", "--data.stream.domains_per_batch", "random"], Cross(domains_per_batch="random")),
    (["--data.stream", "Cross", "--data.stream.domains_per_batch", "2"], Cross(domains_per_batch=2)),
    (["--data.stream", "BatchMixing", "--data.stream.order", "shuffled"], BatchMixing(order="shuffled")),
    ("stream: {class_path: Recurring, init_args: {cycles: 2, length: 5}}", Recurring(cycles=2, length=5)),
    (
        "stream: {class_path: Probed, init_args: "
        "{stream: {class_path: Continual, init_args: {rounds: 2}}, samples: 5}}",
        Probed(Continual(rounds=2), samples=5),
    ),
]


def adapt(name, asked, adapter="Source"):
    """Run ``adapt`` and return its results."""
    data = DATA | (yaml.safe_load(asked) if isinstance(asked, str) else {})
    Path(f"{name}.yaml").write_text(yaml.safe_dump({"data": {"class_path": "DigitsDataModule", "init_args": data}}))
    main([
        "adapt", "--config", f"{name}.yaml", "--model", "SupervisedTask", "--model.encoder", "cifar_resnet8",
        "--model.num_classes", "10", "--adapter", adapter, *(asked if isinstance(asked, list) else []),
        "--trainer.accelerator", "cpu", "--trainer.logger", "false", "--trainer.enable_progress_bar", "false",
        "--name", name,
    ])  # fmt: skip
    return json.loads(Path(f"runs/{name}/results.json").read_text())


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["ttalight"])


@pytest.mark.parametrize(
    ("asked", "order"), STREAMS, ids=lambda value: type(value).__name__ if not isinstance(value, (str, list)) else "-"
)
def test_rows_are_visits_of_the_stream(asked, order):
    results = adapt("run", asked)
    data = DigitsDataModule(**DATA, stream=order)
    data.setup("test")
    stream = data.stream
    assert results["complete"] is True
    assert results["protocol"]["stream"] == type(order).__name__
    assert results["protocol"]["stream_hash"] == stream.hash
    expected = {
        (stream.domains[visit.domain].name, stream.domains[visit.domain].severity, visit.number): int(count)
        for visit, count in zip(stream.visits, stream.counts(), strict=True)
    }
    rows = {(row["name"], row["severity"], row["visit"]): row["samples"] for row in results["domains"]}
    assert rows == expected


def test_methods_share_a_stream_replayed_from_file():
    asked = STREAMS[6][0]
    hashes = [adapt(method, asked, method)["protocol"]["stream_hash"] for method in ("Source", "Tent", "PTBN")]
    data = DigitsDataModule(**DATA, stream=STREAMS[6][1])
    data.setup("test")
    data.stream.save("stream.npz")
    again = adapt("again", ["--data.stream", "SavedStream", "--data.stream.path", "stream.npz"], "Tent")
    assert {*hashes, again["protocol"]["stream_hash"]} == {data.stream.hash}
    assert SavedStream("stream.npz").describe() == {"path": "stream.npz"}


def test_probes_do_not_change_the_other_rows():
    plain = adapt("plain", "stream: {class_path: Continual, init_args: {rounds: 2}}", "Tent")
    probed = adapt("probed", STREAMS[-1][0], "Tent")
    measures = [[(row["name"], row["visit"], row["nll"]) for row in run["domains"]] for run in (plain, probed)]
    assert [row for row in measures[1] if row[0] != "clean"] == measures[0]
    assert len(measures[1]) == 8


def test_an_argument_out_of_range(capsys):
    with pytest.raises((SystemExit, ValueError)) as stop:
        adapt("bad", ["--data.stream", "Continual", "--data.stream.rounds", "0"])
    assert "rounds must be at least 1, got 0" in capsys.readouterr().err + str(stop.value)
