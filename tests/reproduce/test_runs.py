"""Runs of ``ttalight reproduce``: states, files, errors."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from ttalight.cli import main as ttalight_main
from ttalight.reporting.figures import can_plot
from ttalight.reproduce import command as command_module
from ttalight.reproduce.command import main
from ttalight.reproduce.jobs import execute, state
from ttalight.reproduce.plan import Job, Planner

QUIET = ["--trainer.enable_progress_bar", "false"]
TINY_FIT = [*QUIET, "--trainer.enable_model_summary", "false", "--trainer.limit_train_batches", "2"]
RATE = ["--images-per-second", "1000"]


@pytest.fixture(scope="module")
def command():
    """Runs the words in this process, on two training batches; keeps them."""

    class Command:
        def __init__(self) -> None:
            self.words: list[list[str]] = []

        def __call__(self, words: list[str]) -> int:
            self.words.append(words)
            try:
                ttalight_main([*words, *(TINY_FIT if words[0] == "fit" else QUIET)])
            except SystemExit as stop:
                return int(stop.code or 0)
            return 0

    return Command()


@pytest.fixture(scope="module")
def demo(command, tmp_path_factory):
    """The folder in which Table 1 and 6 of the demo have been made, and the table's own function."""
    folder = tmp_path_factory.mktemp("reproduce")

    def make(*words: str) -> None:
        main([*words, "--recipe", "demo", "--output", str(folder), *RATE], command)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ttalight"])
        patch.setenv("PL_GLOBAL_SEED", "0")
        make("--table", "1")
        make("--table", "6")
        yield folder / "demo" / "digits", make


@pytest.mark.slow
class TestRuns:
    def test_table_1(self, demo):
        text = (demo[0] / "table1.md").read_text()
        lines = [line for line in text.splitlines() if line.startswith("|")]
        assert [line.split("|")[1].strip() for line in lines[2:]] == ["supervised", "aligned, τ 0.25", "aligned, τ 0.5"]
        rows = json.loads((demo[0] / "align_0.25_source_0" / "results.json").read_text())["domains"]
        clean, corrupted = 100 * rows[0]["accuracy"], 100 * sum(row["accuracy"] for row in rows[1:]) / 2
        assert lines[3].split("|")[2].strip() == f"{clean:.2f}"
        assert lines[3].split("|")[4].strip() == f"{corrupted:.2f}"
        assert "network cifar_resnet8 here, resnet50 there" in text
        assert "not finished" not in text

    def test_the_page_has_every_table_and_figure(self, demo):
        page = (demo[0] / "report.html").read_text()
        assert "<h2>Table 1, digits</h2>" in page
        assert "<h2>Table 6, digits</h2>" in page
        line = next(
            line for line in (demo[0] / "table1.md").read_text().splitlines() if line.startswith("| supervised")
        )
        assert "".join(f"<td>{cell}</td>" for cell in line[2:-2].split(" | ")) in page
        drawn = sorted(path.stem for path in demo[0].glob("*.svg"))
        assert page.count("<svg") == len(drawn)
        if can_plot():
            assert "table1" in drawn
            assert (demo[0] / "table1.png").exists()
            assert "Table 1: accuracy against the temperature" in page
        assert not re.search(r"(src|href)=\"(?!#)|@import|<script", page)

    def test_table_6_and_its_figure(self, demo):
        text = (demo[0] / "table6.md").read_text()
        geometry = json.loads((demo[0] / "joint_adapt_0" / "geometry.json").read_text())["mean"]
        first = next(row for row in geometry if (row["place"], row["steps"]) == ("projector", 0))
        assert f"| Y projector | {first['davies_bouldin']:.2f} | 5.64 |" in text
        assert "| distance to supervised | CTA projector |" in text
        if (demo[0] / "figure2.png").exists():
            assert (demo[0] / "figure2.svg").exists()

    def test_a_finished_table_runs_nothing(self, demo, command):
        before = len(command.words)
        demo[1]("--table", "1")
        assert len(command.words) == before

    def test_table_2_shares_what_is_there(self, demo, command):
        root, make = demo
        before = len(command.words)
        make("--table", "2", "--methods", "CTA", "--report")
        assert len(command.words) == before
        assert "| CTA |" in (root / "table2.md").read_text()
        assert "not finished: source_ptbn_0" in (root / "table2.md").read_text()
        make("--table", "2", "--methods", "CTA")
        new = [Path(words[2]).stem for words in command.words[before:]]
        assert new == ["source_ptbn_0", "source_tent_0", "align_ptbn_0", "align_emabn_0", "align_emabn_1"]
        text = (root / "table2.md").read_text()
        line = next(line for line in text.splitlines() if line.startswith("| CTA |"))
        assert "±" in line
        assert "oracle" not in text
        make("--table", "2", "--methods", "CTA", "--report", "--oracle")
        assert "| CTA (oracle: best steps by test accuracy) |" in (root / "table2.md").read_text()

    def test_states(self, demo, tmp_path):
        root, _ = demo
        plan = {job.name: job for job in Planner("demo", "digits", root).plan(1).jobs}
        assert state(plan["source"], root) == "done"
        longer = plan["source"].config["trainer"] | {"max_epochs": 5}
        job = Job("source", "fit", plan["source"].config | {"trainer": longer}, 0.0)
        with pytest.raises(ValueError, match="was run with another configuration than this plan"):
            state(job, root)
        (root / "plans" / "source.yaml").write_text(yaml.safe_dump(job.config))
        assert state(job, root) == "unfinished"
        (root / "plans" / "source.yaml").write_text(yaml.safe_dump(plan["source"].config, sort_keys=False))
        assert state(plan["source"], tmp_path) == "to do"

    def test_run_from_a_changed_file_is_repeated(self, demo, tmp_path):
        root = tmp_path / "digits"
        shutil.copytree(demo[0], root)
        for path in (root / "plans").glob("*.yaml"):
            path.write_text(path.read_text().replace(str(demo[0]), str(root)))
        jobs = {job.name: job for table in (1, 6) for job in Planner("demo", "digits", root).plan(table).jobs}
        assert {state(job, root) for job in jobs.values()} == {"done"}

        source = root / "source" / "checkpoints" / "last.ckpt"
        content = torch.load(source)
        content["state_dict"]["classifier.bias"] += 1
        torch.save(content, source)
        states = {name: state(job, root) for name, job in jobs.items()}
        assert {name for name, found in states.items() if found == "outdated"} == {
            "source_source_0", "align_0.25", "align", "encoder.pt", "cta_adapt_0", "cta_adapt_1",
        }  # fmt: skip
        assert {found for found in states.values() if found != "outdated"} == {"done"}

        execute(jobs["encoder.pt"], root, None)
        assert state(jobs["encoder.pt"], root) == "done"
        assert state(jobs["joint"], root) == "done"  # the encoder was the same
        (root / "encoder.pt").write_bytes(b"another")
        assert state(jobs["joint"], root) == "outdated"
        seen = []
        with pytest.raises(RuntimeError, match="stopped with code 7"):
            execute(jobs["align"], root, lambda words: seen.append(words) or 7)
        assert seen[0][-1] == "--overwrite"
        assert state(jobs["align"], root) == "to do"  # not done: the old run is out of the way

    def test_after_damage_the_checkpoint_before_is_resumed(self, demo, tmp_path):
        job = next(job for job in Planner("demo", "digits", tmp_path).plan(1).jobs if job.name == "source")
        folder = tmp_path / "source" / "checkpoints"
        shutil.copytree(demo[0] / "source" / "checkpoints", folder)
        last, previous = folder / "last.ckpt", folder / "previous.ckpt"
        assert state(job, tmp_path) == "done"
        assert previous.is_file()
        last.write_bytes(last.read_bytes()[:1000])
        assert state(job, tmp_path) == "unfinished"
        last.unlink()
        assert state(job, tmp_path) == "unfinished"
        seen = []
        with pytest.raises(RuntimeError, match="stopped with code 7"):
            execute(job, tmp_path, lambda words: seen.append(words) or 7)
        assert seen[0][-2:] == ["--ckpt_path", "last"]
        previous.write_bytes(b"")
        with pytest.raises(ValueError, match=r"source has no whole checkpoint: take .*source away"):
            state(job, tmp_path)

    def test_a_stopped_adaptation_is_resumed(self, demo, tmp_path):
        job = next(job for job in Planner("demo", "digits", tmp_path).plan(1).jobs if job.verb == "adapt")
        run = tmp_path / job.name
        run.mkdir(parents=True)
        (run / "config.yaml").write_text("")
        seen = []
        with pytest.raises(RuntimeError, match="stopped with code 7: the same command resumes it"):
            execute(job, tmp_path, lambda words: seen.append(words) or 7)
        assert seen[0][-2:] == ["--resume", str(run)]


def test_fit_only_leaves_the_adaptation_out(tmp_path):
    seen = []
    words = ["--table", "2", "--methods", "CTA", "--recipe", "lite0", "--fit-only", "--output", str(tmp_path), *RATE]
    main(words, lambda words: seen.append(words) or 0)
    assert [(words[0], Path(words[2]).stem) for words in seen] == [
        ("fit", "source"),
        ("fit", "simclr"),
        ("fit", "align"),
    ]


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--table", "7"], 2, "table: expected one of 1, 2, 3, 4, 5, 6; got 7"),
        (["--table", "1", "--images-per-second", "0"], 2, "--images-per-second must be positive, got 0.0"),
        (["--table", "4", "--data", "cifar10"], 1, "Table 4 is of cifar100: leave --data out, got cifar10"),
        (["--table", "2", "--methods", "CTAA"], 1, "--methods: CTAA unknown, there are TTT, TTT++, ClusT3, "),
    ],
)
def test_an_error_is_one_line(words, code, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        ttalight_main(["reproduce", *words])
    assert stop.value.code == code
    found = capsys.readouterr().err
    assert found.startswith(f"ttalight: error: {message}")
    assert found.count("\n") == 1


def test_a_run_that_fails_is_one_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(command_module, "_subprocess", lambda words: 3)
    with pytest.raises(SystemExit) as stop:
        ttalight_main(["reproduce", "--table", "1", "--recipe", "demo", "--output", str(tmp_path), *RATE])
    assert stop.value.code == 1
    assert capsys.readouterr().err == ("ttalight: error: fit source stopped with code 3: the same command resumes it\n")
