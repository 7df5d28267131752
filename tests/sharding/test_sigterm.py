"""SIGTERM to any process of a run ends all of them with exit code 143, a checkpoint written."""

from __future__ import annotations

import os
import signal
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from support.processes import fork, free_port

import ttalight
from ttalight.callbacks.adaptation_files import list_checkpoints
from ttalight.cli import main
from ttalight.reporting import read_results

SLOW = """
    import os, time
    from pathlib import Path
    import lightning

    class Slow(lightning.Callback):
        '''Says which process has which rank once the run is in its third batch.'''

        def __init__(self):
            self.batches = 0

        def on_test_batch_start(self, trainer, *args):
            time.sleep(0.1)
            self.batches += 1
            if self.batches == 3:
                Path(f"rank-{trainer.global_rank}").write_text(str(os.getpid()))

        on_train_batch_start = on_test_batch_start
"""
COMMON = """--model SupervisedTask --model.encoder cifar_resnet8 --data DigitsDataModule --data.batch_size 4
    --trainer.accelerator cpu --trainer.devices 2 --trainer.enable_progress_bar false
    --trainer.enable_model_summary false --trainer.callbacks+=slow.Slow --name stopped""".split()
STREAM = "--data.domains [clean,contrast,brightness] --data.limit 40".split()
ADAPT = ["adapt", *COMMON, *STREAM, "--adapter", "Tent"]
FIT = ["fit", *COMMON, "--trainer.max_epochs", "1000"]
SECONDS = 10


class Run:
    """A run of two processes.

    Args:
        words: The words of the command.
        folder: The working folder.
        external: Whether both processes are started from here, as a scheduler does; else Lightning launches the second.
    """

    def __init__(self, words: list[str], folder: Path, external: bool, strategy: str = "ddp") -> None:
        (folder / "slow.py").write_text(textwrap.dedent(SLOW))
        words = [*words, "--trainer.strategy", strategy]
        self.folder, self.log = folder, folder / "log-0"
        call: tuple = (main, words)
        if strategy == "ddp" and not external:  # the second process gets the words of the first one's interpreter
            path = os.pathsep.join((str(Path(ttalight.__file__).parents[1]), str(folder)))
            more = {"PYTHONPATH": os.pathsep.join((path, os.environ.get("PYTHONPATH", ""))), "OMP_NUM_THREADS": "1"}
            call = (os.execve, sys.executable, [sys.executable, "-m", "ttalight", *words], {**os.environ, **more})
        launch = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()} if external else {}
        self.started = [
            fork(
                *call, log=folder / f"log-{rank}", rank=rank, folder=folder,
                environment={**launch, **({"LOCAL_RANK": str(rank)} if external else {})},
            )
            for rank in range(2 if external else 1)
        ]  # fmt: skip

    def processes(self) -> list[int]:
        """Waits until the run is in its third batch, and returns the processes by rank."""
        files = [self.folder / f"rank-{rank}" for rank in range(2)]
        for _ in range(3000):
            if all(file.is_file() and file.read_text() for file in files):
                return [int(file.read_text()) for file in files]
            assert all(process.is_alive() for process in self.started), self.log.read_text()
            time.sleep(0.1)
        raise AssertionError("the run does not begin")

    def end(self, seconds: float = SECONDS) -> list[int]:
        """Waits for the end, and returns the exit codes."""
        for process in self.started:
            process.join(timeout=seconds)
        return [process.exitcode for process in self.started]

    def kill(self) -> None:
        for process in self.started:
            process.kill()
            process.join()
        for file in self.folder.glob("rank-*"):
            if is_there(int(file.read_text())):
                os.kill(int(file.read_text()), signal.SIGKILL)


def is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def start(tmp_path):
    runs = []

    def begin(words: list[str], external: bool, **kwargs) -> Run:
        runs.append(Run(words, tmp_path, external, **kwargs))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill()


@pytest.mark.parametrize("external", [False, True])
def test_the_second_process(external, start, tmp_path):
    run = start([*ADAPT, "--shard", "batch"], external)
    processes = run.processes()
    os.kill(processes[1], signal.SIGTERM)
    assert run.end() == [128 + signal.SIGTERM] * len(run.started)
    assert not any(is_there(process) for process in processes)
    assert list_checkpoints(tmp_path / "runs" / "stopped")[0][0] >= 3


def rows(run: Path) -> list[dict]:
    """The results of a complete run, without times."""
    results = read_results(run)
    assert results["complete"]
    return [{**row, "seconds": None, "images_per_second": None} for row in results["domains"]]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shard", ["batch", "domain"])
def test_a_run_goes_on(shard, start, tmp_path, monkeypatch):
    """With the numbers of an undisturbed one; where domains are divided it begins with the first batch."""
    words = [*ADAPT, "--shard", shard]
    stopped, whole = tmp_path / "runs" / "stopped", tmp_path / "runs" / "whole"
    run = start(words, external=shard == "batch")
    processes = run.processes()
    for process in processes if shard == "batch" else processes[:1]:
        os.kill(process, signal.SIGTERM)
    assert run.end() == [128 + signal.SIGTERM] * len(run.started)
    assert not any(is_there(process) for process in processes)
    assert [number >= 3 for number, _ in list_checkpoints(stopped)[:1]] == [True] * (shard == "batch")
    assert not (stopped / "results.json").exists() or not read_results(stopped)["complete"]
    quick = ["--trainer.callbacks", "null"]
    assert start(["adapt", "--resume", "runs/stopped", *quick], external=True).end(300) == [0, 0]
    if shard == "batch":
        assert start([*words, *quick, "--name", "whole"], external=True).end(300) == [0, 0]
    else:  # bit for bit those of one process
        monkeypatch.chdir(tmp_path)
        monkeypatch.syspath_prepend(tmp_path)
        torch.set_num_threads(1)
        main([*words, *quick, "--trainer.devices", "1", "--name", "whole"])
    assert rows(stopped) == rows(whole)
    left = [path.name for path in stopped.iterdir() if not path.name.startswith("events")]
    assert sorted(left) == ["config.yaml", "domains.csv", "hparams.yaml", "results.json", "stream.npz"]


@pytest.mark.parametrize("ranks", [(0, 1), (1,)])
def test_fit(ranks, start):
    run = start(FIT, external=True)
    processes = run.processes()
    for rank in ranks:
        os.kill(processes[rank], signal.SIGTERM)
    assert run.end() == [128 + signal.SIGTERM] * 2


@pytest.mark.parametrize("to", ["launcher", "second"])
def test_forked_processes(to, start, tmp_path):
    run = start([*ADAPT, "--shard", "batch"], external=False, strategy="ddp_fork")
    processes = run.processes()
    os.kill(run.started[0].pid if to == "launcher" else processes[1], signal.SIGTERM)
    assert run.end() == [128 + signal.SIGTERM]
    assert not any(is_there(process) for process in processes)
    assert list_checkpoints(tmp_path / "runs" / "stopped")[0][0] >= 3
