"""A process that dies ends the run, which keeps what was finished."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import ttalight
from ttalight.reporting import read_results


def test_finished_domains_are_kept(launch_group):
    ended, folder = launch_group("death")
    assert all(process.returncode != 0 for process in ended)
    assert "process 1 of 2 stopped the run (KeyError: 'the second process has died'); finished domains" in " ".join(
        ended[1].stdout.split()
    )
    kept = read_results(folder / "death")
    assert not kept["complete"]
    # Sizes 17, 8, 13, 14: the first process has 17 and 8, the second 14 and 13, and dies in the latter of these.
    assert [row["samples"] for row in kept["domains"]] in ([17, 8, 13], [17, 13], [8, 13], [13])


def test_the_command_line_launches_its_processes(tmp_path):
    words = (
        "adapt --model SupervisedTask --model.encoder cifar_resnet8 --data DigitsDataModule --data.limit 12 "
        "--data.batch_size 6 --data.domains [clean,contrast] --adapter Tent --shard domain --trainer.accelerator cpu "
        "--trainer.devices 2 --trainer.strategy ddp --trainer.logger false --trainer.enable_progress_bar false"
    ).split()
    path = os.pathsep.join((str(Path(ttalight.__file__).parents[1]), os.environ.get("PYTHONPATH", "")))
    ended = subprocess.run(
        [sys.executable, "-m", "ttalight", *words, "--trainer.default_root_dir", str(tmp_path / "run")],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    results = read_results(tmp_path / "run")
    assert (results["complete"], results["environment"]["processes"]) == (True, 2)
    assert [row["name"] for row in results["domains"]] == ["clean", "contrast"]
    assert ended.stdout.count("Results: ") == 1
