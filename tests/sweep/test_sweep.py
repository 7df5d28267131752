"""``ttalight sweep``, run as a user runs it: what it runs, skips, resumes, reports and chooses."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path

import pytest
import yaml

from ttalight.cli import main
from ttalight.data import DigitsDataModule
from ttalight.data.corruptions import EXTRA
from ttalight.reporting import read_results
from ttalight.sweep.runs import read_config
from ttalight.sweep.selection import _validation_words

BASE = {
    "model": {"class_path": "SupervisedTask", "init_args": {"encoder": "cifar_resnet8", "num_classes": 10}},
    "data": {"class_path": "DigitsDataModule", "init_args": {"batch_size": 10, "domains": ["clean", "fog"]}},
    "adapter": {"class_path": "EMABN", "init_args": {"momentum": 0.2}},
    "trainer": {"accelerator": "cpu"},
}
TENT = {"class_path": "Tent", "init_args": {"lr": [1e-3, 1e-2]}}
#: Stops a run once, in its third batch or at its end, as the word in a file says.
STOPPER = """
    import os
    from pathlib import Path
    from signal import SIGTERM
    import lightning

    def stop(*words):
        if Path("stop").exists() and (word := Path("stop").read_text()) in words:
            Path("stop").unlink()
            if word in ("terminate", "late"):
                os.kill(os.getpid(), SIGTERM)
            else:
                raise {"interrupt": KeyboardInterrupt, "fault": ZeroDivisionError}[word]("in the third batch")

    class Stopper(lightning.Callback):
        def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            if batch_idx == 2:
                stop("interrupt", "fault", "terminate")

        def on_test_end(self, trainer, pl_module):
            stop("late")
"""


@pytest.fixture(autouse=True)
def _work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["ttalight"])
    Path("base.yaml").write_text(yaml.safe_dump(BASE))
    Path("stopper.py").write_text(textwrap.dedent(STOPPER))


def write(**grid):
    grid = {name.replace("__", "."): values for name, values in grid.items()}
    content = {"config": "base.yaml", "grid": grid | {"data.limit": 20}}
    Path("sweep.yaml").write_text(yaml.safe_dump(content, sort_keys=False))


def sweep(*words):
    main(["sweep", "sweep.yaml", *words])


def fails(code, *words):
    with pytest.raises(SystemExit) as stop:
        sweep(*words)
    assert stop.value.code == code


def numbers(folder):
    """The results without times."""
    results = json.loads((Path("runs") / folder / "results.json").read_text())
    results["cost"]["images_per_second"] = None
    for row in results["domains"]:
        row["seconds"] = row["images_per_second"] = None
    return results


def test_runs_are_those_of_adapt_and_are_skipped(capsys):
    write(adapter=["PTBN", TENT], seed_everything=[0, 1])
    sweep("--part", "1/3")
    assert sorted(path.parent.name for path in Path("runs/sweep").rglob("results.json")) == [
        "PTBN-seed=0", "Tent-lr=0.001-seed=1",
    ]  # fmt: skip
    before = Path("runs/sweep/PTBN-seed=0/results.json").stat().st_mtime_ns
    capsys.readouterr()
    sweep("--dry-run")
    out = capsys.readouterr().out
    assert "finished PTBN-seed=0" in out
    assert "to do    Tent-lr=0.01-seed=1" in out
    assert "2 of 6 runs are finished" in out
    assert len(list(Path("runs/sweep").rglob("results.json"))) == 2
    sweep()
    out = capsys.readouterr().out
    assert Path("runs/sweep/PTBN-seed=0/results.json").stat().st_mtime_ns == before
    assert out.index("sweep: 4/4 Tent-lr=0.01-seed=1, accuracy") < out.index("method") < out.rindex("Tent (lr 0.001)")
    assert "The table again: ttalight compare runs/sweep\n" in out
    assert "Results: " not in out
    assert Path("runs/sweep/sweep.yaml").read_text() == Path("sweep.yaml").read_text()

    words = ["--adapter", "Tent", "--adapter.lr", "0.01", "--seed_everything", "1", "--data.limit", "20"]
    main(["adapt", "--config", "base.yaml", *words, "--name", "alone"])
    assert numbers("sweep/Tent-lr=0.01-seed=1") == numbers("alone")
    own, alone = (yaml.safe_load(Path(f"runs/{name}/config.yaml").read_text())
                  for name in ("sweep/Tent-lr=0.01-seed=1", "alone"))  # fmt: skip
    assert own | {"name": "alone"} == alone


def test_a_changed_file(capsys):
    """A larger grid continues, runs that are no longer in it stay, and other settings for the same run are refused."""
    write(adapter__momentum=[0.1, 0.2])
    sweep("--part", "1/2")
    write(adapter__momentum=[0.2], data__stream=["Mixed"])
    sweep()
    assert {path.parent.name for path in Path("runs/sweep").rglob("results.json")} == {
        "momentum=0.1", "momentum=0.2-stream=Mixed",
    }  # fmt: skip
    assert "The table again: ttalight compare runs/sweep/momentum=0.2-stream=Mixed\n" in capsys.readouterr().out
    text = Path("sweep.yaml").read_text()
    Path("sweep.yaml").write_text(text.replace("data.limit: 20", "data.limit: 30"))
    fails(1)
    assert "has --data.limit=20 instead of --data.limit=30" in capsys.readouterr().err
    Path("sweep.yaml").write_text(text)
    Path("base.yaml").write_text("# a comment changes nothing\n" + Path("base.yaml").read_text())
    sweep("--dry-run")
    Path("base.yaml").write_text(yaml.safe_dump(BASE | {"predictions": True}))
    fails(1)
    assert "has another base.yaml" in capsys.readouterr().err


@pytest.mark.parametrize(("word", "code"), [("interrupt", 130), ("fault", 1), ("terminate", 143), ("late", 143)])
def test_a_stopped_run_resumes(word, code, capsys):
    stopper = [{"class_path": "stopper.Stopper"}, {"class_path": "AdaptationCheckpoint", "init_args": {"every": 1}}]
    write(adapter__momentum=[0.1, 0.3], trainer__callbacks=[stopper])
    Path("stop").write_text(word)
    fails(code)
    captured = capsys.readouterr()
    first, second = (f"sweep/momentum={value}-callbacks=Stopper+AdaptationCheckpoint,every=1" for value in (0.1, 0.3))
    assert Path("runs", second).exists() == (word == "fault")
    if word == "interrupt":
        assert "interrupted: 0 of 2 runs are finished; the same command continues" in captured.err
    if word == "fault":
        assert "ZeroDivisionError: in the third batch (see error.txt in its folder)" in captured.err
        assert f"in {Path('runs', first)}" in captured.err
        assert "1 of 2 runs failed: the same command tries them again" in captured.err
        assert "stopper.py" in Path("runs", first, "error.txt").read_text()
        assert "failed" in captured.out
        assert read_results(Path("runs", second))["complete"]
    if word == "late":
        assert read_results(Path("runs", first))["complete"]
        return
    assert list(Path("runs", first, "adaptation").glob("batch-2-*"))
    sweep()
    assert not Path("runs", first, "error.txt").exists()
    words = ["--adapter.momentum", "0.1", "--data.limit", "20", "--name", "alone"]
    main(["adapt", "--config", "base.yaml", *words])
    assert numbers(first) == numbers("alone")


def test_two_processes_and_a_run_that_fails(capsys):
    write(data__domains=[["clean"], ["fogg"], ["fog", "clean"]])
    fails(1, "--jobs", "2")
    captured = capsys.readouterr()
    assert "fogg" in captured.err
    assert "1 of 3 runs failed" in captured.err
    done = [Path("runs/sweep", name) for name in ("domains=clean", "domains=fog+clean")]
    assert all(read_results(folder)["complete"] for folder in done)
    assert "different stream_hash" in captured.out
    assert "The table again: ttalight compare runs/sweep --different stream_hash severity samples\n" in captured.out


def test_words_are_checked_before_the_first_run(capsys):
    write(adapter=["PTBN", "Tentt"])
    fails(1)
    assert "ttalight: error: Tentt: adapter: there is no class Tentt; nearest: Tent" in capsys.readouterr().err
    write(adapter=["Tent", "PTBN"], adapter__lr=[0.1])
    fails(1)
    assert "PTBN-lr=0.1: adapter: PTBN has no argument lr" in capsys.readouterr().err
    assert not Path("runs").exists()


@pytest.mark.parametrize(("words", "message"), [(["--part", "3/2"], "--part must be I/N"), (["--jobs", "0"], "--jobs")])
def test_bad_options(words, message, capsys):
    write(adapter=["PTBN"])
    fails(2, *words)
    assert message in capsys.readouterr().err


def test_several_devices_are_refused(capsys):
    write(adapter=["PTBN"], trainer__devices=2)
    fails(1)
    assert "a sweep gives each run one device, and the configuration asks for 2" in capsys.readouterr().err


class TestSelect:
    def test_the_choice_comes_before_the_test_labels(self, monkeypatch, capsys):
        loads, load = [], DigitsDataModule.load

        def record(self, split):
            loads.append((split, Path("runs/sweep/selection.json").exists()))
            return load(self, split)

        monkeypatch.setattr(DigitsDataModule, "load", record)
        write(adapter=["PTBN", TENT], seed_everything=[0, 1])
        sweep("--select", "--part", "1/2")
        assert "3 of 6 runs are finished; the choice needs all" in capsys.readouterr().out
        sweep("--select")
        assert [split for split, _ in loads] == ["validation"] * 6 + ["test"] * 4
        assert all(chosen == (split == "test") for split, chosen in loads)

        selection = json.loads(Path("runs/sweep/selection.json").read_text())
        by_name = {row["candidate"]: row for row in selection["candidates"]}
        assert list(by_name["PTBN"]["domains"]) == list(EXTRA)
        for name, row in by_name.items():
            folders = [f"runs/sweep/validation/{name}-seed={seed}" for seed in (0, 1)]
            accuracies = [read_results(folder)["mean"]["accuracy"] for folder in folders]
            assert row["accuracy"] == pytest.approx(sum(accuracies) / 2)
            assert row["runs"] == 2
        rivals = [row for row in selection["candidates"] if row["adapter"] == "Tent"]
        assert by_name["PTBN"]["chosen"]
        assert [row["chosen"] for row in rivals].count(True) == 1
        best = max(rivals, key=lambda row: row["accuracy"])
        assert best["chosen"]
        assert {path.name for path in Path("runs/sweep").glob("*-seed=*")} == {
            f"{name}-seed={seed}" for name in ("PTBN", best["candidate"]) for seed in (0, 1)
        }
        out = capsys.readouterr().out
        assert out.index("The choice: runs/sweep/selection.json") < out.index("method")

    def test_a_data_module_without_validation_images(self, capsys):
        Path("mine.py").write_text("import lightning\nclass Mine(lightning.LightningDataModule): pass\n")
        Path("base.yaml").write_text(yaml.safe_dump(BASE | {"data": {"class_path": "mine.Mine"}}))
        Path("sweep.yaml").write_text("{config: base.yaml, grid: {adapter: [PTBN]}}")
        fails(1, "--select")
        err = capsys.readouterr().err
        assert err.startswith("ttalight: error: --select: the data module mine.Mine has no argument stream_split")
        assert len(err.splitlines()) == 1

    def test_corruptions_of_validation_images_are_generated(self):
        words = _validation_words(read_config(["--config=base.yaml", "--data=CorruptedDataModule"]))
        assert "--data.init_args.generate=true" in words
        config = read_config(["--config=base.yaml", "--data=CorruptedDataModule", *words])["data"]["init_args"]
        assert (config["generate"], config["stream_split"], config["domains"]) == (True, "validation", list(EXTRA))
