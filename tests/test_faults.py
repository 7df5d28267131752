"""Stopped runs: files are whole, and resuming gives the result of an uninterrupted run."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import textwrap
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from PIL import Image
from stress import kill_harness as harness

from ttalight.callbacks.adaptation_files import list_checkpoints, read_last, write_checkpoint
from ttalight.cli import main
from ttalight.reporting import PredictionWriter, read_results
from ttalight.reporting.compare import main as compare

ROOT = Path(__file__).resolve().parents[1]
QUIET = "--trainer.accelerator cpu --trainer.enable_progress_bar false --trainer.enable_model_summary false".split()
DIGITS = "--data DigitsDataModule --data.limit 20 --data.batch_size 5 --data.domains [clean,contrast]".split()
MODEL = "--model SupervisedTask --model.encoder cifar_resnet8".split()
FIT = [
    "fit", *MODEL, *"--trainer.max_epochs 3 --trainer.limit_train_batches 2 --trainer.limit_val_batches 0".split(),
]  # fmt: skip
ADAPT = ["adapt", *MODEL, *"--adapter Tent --predictions true".split()]
EVERY = "--trainer.callbacks+=AdaptationCheckpoint --trainer.callbacks.every 2".split()

FAULTS = """
    import os, signal
    from pathlib import Path
    import lightning
    import torch

    class Fault(lightning.Callback):
        def __init__(self, kind: str, batch: int = 5):
            self.kind, self.batch, self.seen = kind, batch, 0

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self.strike()

        def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            self.strike()

        def strike(self):
            self.seen += 1
            if self.seen != self.batch:
                return
            if self.kind == "callback":
                raise KeyError("a mistake of the user's own")
            if self.kind == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            if self.kind == "terminate":
                os.kill(os.getpid(), signal.SIGTERM)
            if self.kind == "vanish":
                for path in Path("photos").rglob("*.png"):
                    path.rename(path.with_suffix(".gone"))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with uninterrupted runs, and a callback that fails."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "faults.py").write_text(textwrap.dedent(FAULTS))
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (folder / "photos" / split / name).mkdir(parents=True)
            for index in range(10):
                image = Image.fromarray(draw.integers(0, 255, (40, 40, 3), dtype=np.uint8))
                image.save(folder / "photos" / split / name / f"{index}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main([*FIT, *DIGITS, *QUIET, "--name", "fit"])
        main([*ADAPT, *DIGITS, *QUIET, *EVERY, "--name", "adapt"])
    return folder


@pytest.fixture
def work(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    yield folder
    for name in os.listdir(folder / "runs"):
        if name not in ("fit", "adapt"):
            shutil.rmtree(folder / "runs" / name)


def fault(kind: str) -> list[str]:
    return ["--trainer.callbacks+=faults.Fault", f"--trainer.callbacks.kind={kind}"]


def command(stage: str) -> list[str]:
    return [*FIT, *DIGITS, *QUIET] if stage == "fit" else [*ADAPT, *DIGITS, *QUIET, *EVERY]


def go_on(stage: str) -> None:
    """Resume the run named ``stopped``, and compare."""
    if stage == "fit":
        main([*command(stage), "--name", "stopped", "--ckpt_path", "last"])
    else:
        main(["adapt", "--resume", "runs/stopped", "--trainer.callbacks", "null"])
    harness.check_same(stage, Path("runs/stopped"), Path("runs") / stage)


STAGES = pytest.mark.parametrize("stage", ["fit", "adapt"])


class TestExceptions:
    @STAGES
    def test_in_a_user_s_callback(self, stage, work):
        with pytest.raises(KeyError, match="a mistake of the user's own"):
            main([*command(stage), *fault("callback"), "--name", "stopped"])
        go_on(stage)

    @STAGES
    def test_a_batch_for_which_memory_does_not_suffice(self, stage, work, capsys):
        with pytest.raises(SystemExit) as stop:
            main([*command(stage), *fault("memory"), "--name", "stopped"])
        assert stop.value.code == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith(
            "ttalight: error: out of memory (CUDA out of memory. Tried to allocate 2.00 GiB): free mem"
        )
        go_on(stage)

    @STAGES
    def test_sigterm_lets_the_batch_end(self, stage, work):
        with pytest.raises(SystemExit) as stop:
            main([*command(stage), *fault("terminate"), "--name", "stopped"])
        assert stop.value.code == 128 + signal.SIGTERM
        if stage == "adapt":
            assert list_checkpoints(Path("runs/stopped"))[0][0] == 5  # of the very batch
        go_on(stage)

    @STAGES
    @pytest.mark.parametrize("workers", ["0", "2"])
    def test_data_that_vanish(self, stage, workers, work, capsys):
        """Those of a stream over folders of domains are decoded when a batch is read."""
        data = "ImageFolderDataModule" if stage == "fit" else "DomainFoldersDataModule"
        photos = f"--data {data} --data.root photos --data.batch_size 2 --model.num_classes 2".split()
        photos += ["--data.num_workers", workers, "--data.resize", "32"]
        words = [*(FIT if stage == "fit" else ADAPT), *photos, *QUIET, *(EVERY if stage == "adapt" else [])]
        main([*words, "--name", "whole"])
        try:
            with pytest.raises(SystemExit):
                main([*words, *fault("vanish"), "--trainer.callbacks.batch=2", "--name", "stopped"])
        finally:
            for path in Path("photos").rglob("*.gone"):
                path.rename(path.with_suffix(".png"))
        said = capsys.readouterr().err.splitlines()[-1]
        assert said.startswith("ttalight: error: cannot read image photos/")
        assert "FileNotFoundError" in said
        if stage == "fit":
            main([*words, "--name", "stopped", "--overwrite"])  # it was its first epoch
        else:
            main(["adapt", "--resume", "runs/stopped", "--trainer.callbacks", "null"])
        harness.check_same(stage, Path("runs/stopped"), Path("runs/whole"))


class TestDisk:
    @STAGES
    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
    def test_full_or_read_only_in_the_middle(self, stage, number, work, capsys, monkeypatch):
        """The second file of that kind cannot be written."""
        real, seen = os.fsync, []

        def fails(descriptor):
            name = os.readlink(f"/proc/self/fd/{descriptor}")
            seen.append(name)
            if sum(".ckpt" in name for name in seen) == 2:
                raise OSError(number, os.strerror(number))
            real(descriptor)

        monkeypatch.setattr(os, "fsync", fails)
        with pytest.raises(SystemExit) as stop:
            main([*command(stage), "--name", "stopped"])
        assert stop.value.code == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert f"{os.strerror(number)}: could not write, what was there before is kept: " in said
        monkeypatch.setattr(os, "fsync", real)
        assert not list(Path("runs/stopped").rglob("*.tmp"))
        go_on(stage)

    @STAGES
    def test_read_only_from_the_start(self, stage, work, capsys, monkeypatch):
        real = os.mkdir

        def mkdir(path, *args, **kwargs):
            if "runs/stopped" in str(path):
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            real(path, *args, **kwargs)

        monkeypatch.setattr(os, "mkdir", mkdir)
        with pytest.raises(SystemExit) as stop:
            main([*command(stage), "--name", "stopped"])
        assert stop.value.code == 1
        said = capsys.readouterr().err.splitlines()[-1]
        assert "runs/stopped" in said
        assert "Read-only file system: write to another folder: --trainer.default_root_dir names one" in said

    def test_half_a_configuration_has_another_name(self, work, monkeypatch):
        """Read as a whole one, it would be another run's."""
        monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(KeyError("killed")))
        with pytest.raises(KeyError):
            main([*command("adapt"), "--name", "stopped"])
        assert not Path("runs/stopped/config.yaml").exists()


class TestLastCheckpoint:
    """Of ``fit``; those of ``adapt`` are in test_resume.py."""

    @pytest.fixture
    def stopped(self, work):
        with pytest.raises(KeyError):
            main([*command("fit"), *fault("callback"), "--name", "stopped"])
        return Path("runs/stopped/checkpoints")

    @pytest.mark.parametrize("damage", ["truncated", "changed", "empty", "gone"])
    def test_the_one_before_is_used_and_it_says_so(self, damage, stopped):
        last = stopped / "last.ckpt"
        content = bytearray(last.read_bytes())
        content[len(content) // 2] ^= 1  # in the weights, where PyTorch does not look
        if damage == "gone":
            last.unlink()
        else:
            last.write_bytes({"truncated": content[:-100], "changed": content, "empty": b""}[damage])
        with pytest.warns(UserWarning, match=r"last\.ckpt.*: the run continues from the one before, .*previous\.ckpt"):
            go_on("fit")

    def test_both(self, stopped, capsys):
        for name in ("last.ckpt", "previous.ckpt"):
            (stopped / name).write_bytes(b"")
        with pytest.raises(SystemExit):
            main([*command("fit"), "--name", "stopped", "--ckpt_path", "last"])
        assert "and no other is left: start the run again with --overwrite" in capsys.readouterr().err

    def test_in_python_damage_is_an_error(self, stopped):
        from ttalight.files.checkpoints import CheckpointFiles

        path = stopped / "last.ckpt"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"last\.ckpt is not a whole checkpoint .*does not fit its checksum"):
            CheckpointFiles().load_checkpoint(path)
        with pytest.raises(ValueError, match="weights_only=True always"):
            CheckpointFiles().load_checkpoint(stopped / "previous.ckpt", weights_only=False)


class TestNothingPassesForComplete:
    def test_earlier_results_are_removed_at_the_start(self, tmp_path, capsys, monkeypatch):
        """A new run in the folder of a complete one, killed before its first row."""
        from ttalight import Trainer
        from ttalight.adapters import Tent
        from ttalight.data import DigitsDataModule
        from ttalight.tasks import SupervisedTask

        class Stop(lightning.Callback):
            def on_test_batch_end(self, *args):
                os.kill(os.getpid(), 0)
                raise KeyError("stopped")

        def adapt(*callbacks):
            trainer = Trainer(
                default_root_dir=str(tmp_path), accelerator="cpu", enable_progress_bar=False, callbacks=[*callbacks]
            )
            data = DigitsDataModule(batch_size=5, domains=["clean"], limit=10)
            return trainer.adapt(SupervisedTask(encoder="cifar_resnet8"), data, Tent(), overwrite=True)

        assert adapt()["complete"] is True
        with pytest.raises(KeyError):
            adapt(Stop())
        assert not (tmp_path / "results.json").exists() or not read_results(tmp_path)["complete"]
        with pytest.raises(SystemExit):
            compare([str(tmp_path)])

    def test_predictions_are_written_before_results(self, work, monkeypatch):
        real = PredictionWriter.close

        def closes(self, *args, **kwargs):
            assert read_results(self.target.parent)["complete"] is False
            real(self, *args, **kwargs)

        monkeypatch.setattr(PredictionWriter, "close", closes)
        main([*command("adapt"), "--name", "stopped"])
        assert read_results("runs/stopped")["complete"] is True
        assert not list(Path("runs/stopped").glob(".predictions*"))


class TestPredictionParts:
    @pytest.mark.parametrize("beyond", [1, 7, 10_000])
    def test_files_are_cut_back_to_the_checkpoint(self, beyond, work):
        with pytest.raises(KeyError):
            main([*command("adapt"), *fault("callback"), "--trainer.callbacks.batch=6", "--name", "stopped"])
        run = Path("runs/stopped")
        assert list_checkpoints(run)[0][0] == 4
        (parts,) = run.glob(".predictions.npz.*.parts")
        assert (parts / "position").stat().st_size == 8 * 25  # of five batches
        for part in parts.iterdir():
            with part.open("ab") as file:
                file.write(b"\xaa" * beyond)
        go_on("adapt")

    def test_a_folder_elsewhere_is_not_touched(self, tmp_path):
        """A checkpoint that was tampered with names it."""
        victim = tmp_path / "victim"
        victim.mkdir()
        for name in ("position", "visit", "domain", "sample", "label", "prediction", "logits"):
            (victim / name).write_bytes(b"precious")
        (tmp_path / "run").mkdir()
        state = {"parts": "../victim", "count": 0, "shapes": {}}
        with pytest.raises(
            ValueError, match=r"the state of predictions names the folder '\.\./victim': start the run again"
        ):
            PredictionWriter(tmp_path / "run", state)
        assert all(path.read_bytes() == b"precious" for path in victim.iterdir())


def test_a_checkpoint_that_lacks_parts(tmp_path):
    write_checkpoint(tmp_path, 3, {"batches": 3})
    with pytest.raises(ValueError, match="lacks what a run needs to resume, and no other is left"):
        read_last(tmp_path)


def test_kills(tmp_path):
    """Three of the kills that tests/stress/kill_harness.py makes."""
    lines = list(harness.kills(tmp_path, 3, first=57))
    assert len(lines) == 3


def test_kills_from_the_last_batch_to_the_end(work):
    """At points from the end of the last batch to the end of the process, of a run of two batches.

    Each third point, and the last ones. Without the step of three the loop takes them all.
    """
    words = [*harness.ADAPT, "--data.limit", "5", "--trainer.callbacks.every", "1"]
    names = harness.count_points("adapt", words, work)
    last = max(number for number, name in enumerate(names) if name == "on_test_batch_end")
    for at in sorted({*range(last, len(names), 3), *range(len(names) - 3, len(names))}):
        harness.kill("adapt", words, work, names, at, torn=True)
    reached = " ".join(names[last:])
    for name in ("predictions.npz", "results.json", "domains.csv", ".parts", "adaptation", ".lock", "teardown"):
        assert name in reached


def test_kills_while_a_run_replaces_another(work):
    """One of both can be resumed, the other one's files do not matter to it."""
    new = [*harness.ADAPT, "--data.limit", "10", "--trainer.callbacks.every", "1"]
    old = [*new, "--adapter.lr", "0.01"]
    runs = work / "runs"
    whole = [runs / "old", runs / "new"]
    main([*old, "--name", "old"])
    main([*new, "--name", "new"])
    code, names, _ = harness.in_process([*old, "--name", "points"], work, harness.Points(None, False))
    third = [number for number, name in enumerate(names) if name == "on_test_batch_start"][2]
    harness.in_process([*old, "--name", "stopped"], work, harness.Points(third, False))
    shutil.copytree(runs / "stopped", runs / "copy")
    words = [*new, "--name", "copy", "--overwrite"]
    code, names, said = harness.in_process(words, work, harness.Points(None, False))
    assert code == 0, said
    begin, end = names.index("on_test_start"), names.index("on_test_batch_start")
    kinds = ("results.json", "adaptation", "rmtree", "hparams.yaml", "config.yaml", "stream.npz", "position")
    reached = []
    points = [at for at in range(begin, end) if any(kind in names[at] for kind in kinds)]
    for at in sorted({*points[::4], points[-1]}):
        shutil.rmtree(runs / "copy")
        shutil.copytree(runs / "stopped", runs / "copy")
        assert harness.in_process(words, work, harness.Points(at, True))[0] == -signal.SIGKILL
        code, _, said = harness.in_process(["adapt", "--resume", "runs/copy"], work)
        assert code == 0, f"{names[at]}: {said[-2000:]}"
        reached.append([harness.numbers(path) for path in whole].index(harness.numbers(runs / "copy")))
        harness.check_same("adapt", runs / "copy", whole[reached[-1]])
    assert reached == sorted(reached)
    assert set(reached) == {0, 1}


def test_the_configuration_of_a_run_is_plain(work):
    assert json.loads(Path("runs/adapt/results.json").read_text())["complete"] is True
    assert torch.load("runs/fit/checkpoints/previous.ckpt", weights_only=True)["epoch"] == 1
