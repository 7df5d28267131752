"""One run at a time in a folder; a start that fails leaves nothing there."""

from __future__ import annotations

import errno
import os
import signal
import socket
import textwrap
import threading
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import lightning
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from support.processes import fork
from torch import nn

import ttalight
from ttalight.adapters import PTBN, Source, Tent
from ttalight.callbacks import Recorder
from ttalight.cli import main
from ttalight.data import DigitsDataModule
from ttalight.files import run_folder
from ttalight.files.run_folder import hold_folder
from ttalight.reporting import read_results
from ttalight.tasks import SupervisedTask

pytestmark = pytest.mark.filterwarnings("ignore")
GOING_ON = "is still running"
QUIET = "--trainer.accelerator cpu --trainer.enable_progress_bar false --trainer.enable_model_summary false".split()
WORDS = [
    *"--model SupervisedTask --model.encoder cifar_resnet8 --data DigitsDataModule --data.limit 20".split(),
    *"--data.batch_size 5 --data.domains [clean,contrast]".split(), *QUIET,
]  # fmt: skip
ADAPT = ["adapt", *WORDS, "--adapter", "Tent"]


@pytest.fixture
def in_process():
    """Runs a function in a forked process until it has called what it is given; returns the process."""
    processes = []

    def fork(function: Callable[[Callable[[], None]], None]) -> int:
        reader, writer = os.pipe()
        process = os.fork()
        if process == 0:
            try:
                function(lambda: os.write(writer, b"x") and signal.pause())
            finally:
                os._exit(1)
        os.close(writer)
        processes.append(process)
        assert os.read(reader, 1) == b"x"
        os.close(reader)
        return process

    yield fork
    for process in processes:
        end(process)


def end(process: int) -> None:
    try:
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def held(folder: Path) -> Callable[[Callable[[], None]], None]:
    def hold(reached: Callable[[], None]) -> None:
        with hold_folder(folder):
            reached()

    return hold


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class TestHoldFolder:
    def test_other_process_is_refused_until_a_kill(self, tmp_path, in_process):
        process = in_process(held(tmp_path / "a" / "run"))
        with (
            pytest.raises(ValueError, match=rf"{GOING_ON} \(process {process} on {socket.gethostname()}\): wait until"),
            hold_folder(tmp_path / "a" / "run"),
        ):
            pass
        assert (tmp_path / "a" / "run").is_dir()
        end(process)
        with hold_folder(tmp_path / "a" / "run"):
            pass

    def test_other_thread_is_refused(self, tmp_path):
        refused = []

        def other() -> None:
            try:
                with hold_folder(tmp_path):
                    pass
            except ValueError as error:
                refused.append(str(error))

        with hold_folder(tmp_path), hold_folder(tmp_path / "." / "x" / ".."):
            thread = threading.Thread(target=other)
            thread.start()
            thread.join()
        assert GOING_ON in refused[0]
        other()
        assert len(refused) == 1

    def test_surviving_worker_does_not_hold_the_run(self, tmp_path, in_process):
        def with_worker(reached: Callable[[], None]) -> None:
            with hold_folder(tmp_path):
                worker = os.fork()
                if worker == 0:
                    signal.pause()
                (tmp_path / "worker").write_text(str(worker))
                reached()

        process = in_process(with_worker)
        end(process)
        with hold_folder(tmp_path):
            os.kill(int((tmp_path / "worker").read_text()), signal.SIGKILL)

    def test_what_it_made_goes_and_what_was_there_stays(self, tmp_path):
        with hold_folder(tmp_path / "a" / "b"):
            (tmp_path / "a" / "kept").touch()
        assert files(tmp_path) == {"a/kept": b""}
        assert not (tmp_path / "a" / "b").exists()

    def test_a_link_is_not_followed(self, tmp_path):
        (tmp_path / "precious").write_text("precious")
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / ".lock").symlink_to(tmp_path / "precious")
        with pytest.raises(OSError, match="symbolic link"), hold_folder(tmp_path / "run"):
            pass
        assert (tmp_path / "precious").read_text() == "precious"


class TestWithoutLocks:
    """A file system that knows no flock."""

    @pytest.fixture(autouse=True)
    def _none(self, monkeypatch):
        def flock(*args, **kwargs):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(run_folder, "_flock", flock)

    def test_other_process_is_refused_until_a_kill(self, tmp_path, in_process):
        process = in_process(held(tmp_path))
        with pytest.raises(ValueError, match=rf"{GOING_ON} \(process {process}.*if it is gone, remove .*lock-owner"):
            hold_folder(tmp_path).__enter__()
        end(process)
        with hold_folder(tmp_path):
            pass
        assert files(tmp_path) == {}


class TestProcessesOfOneRun:
    def check(self, folder: Path) -> None:
        with hold_folder(folder, first=False):
            pass

    def test_without_a_lock(self, tmp_path):
        self.check(tmp_path / "none")
        assert not (tmp_path / "none").exists()

    def test_the_launch_tells(self, tmp_path, in_process, monkeypatch):
        monkeypatch.setenv("MASTER_PORT", "1234")
        process = in_process(held(tmp_path))
        self.check(tmp_path)
        monkeypatch.setenv("MASTER_PORT", "1235")
        with pytest.raises(ValueError, match=GOING_ON):
            self.check(tmp_path)
        end(process)
        self.check(tmp_path)

    def test_a_process_that_the_first_has_launched(self, tmp_path, monkeypatch):
        with hold_folder(tmp_path):
            process = os.fork()
            if process == 0:
                os.environ["MASTER_PORT"] = "1234"
                try:
                    self.check(tmp_path)
                    os._exit(0)
                finally:
                    os._exit(1)
            assert os.waitpid(process, 0)[1] == 0


class NoNorms(lightning.LightningModule):
    """A network that Tent cannot adapt."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 28 * 28, 10))

    def forward(self, images):
        return self.net(images)

    def test_step(self, batch, batch_idx):
        self(batch[0])


class Fails(lightning.Callback):
    def on_test_start(self, trainer, pl_module):
        raise KeyError("no start")


def trainer(folder: Path, *callbacks: lightning.Callback) -> ttalight.Trainer:
    return ttalight.Trainer(
        default_root_dir=str(folder), accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
        callbacks=list(callbacks),
    )  # fmt: skip


def adapt(folder: Path, *callbacks: lightning.Callback, adapter=None, **kwargs):
    torch.manual_seed(0)
    data = DigitsDataModule(batch_size=5, domains=["clean", "contrast"], limit=20)
    return trainer(folder, *callbacks).adapt(SupervisedTask(encoder="cifar_resnet8"), data, adapter or Tent(), **kwargs)


class TestTrainer:
    def test_every_verb_is_refused(self, tmp_path, in_process):
        adapt(tmp_path / "run")
        before = files(tmp_path)
        process = in_process(held(tmp_path / "run"))
        owner = {"run/.lock": (tmp_path / "run" / ".lock").read_bytes()}
        task, data = SupervisedTask(encoder="cifar_resnet8"), DigitsDataModule(batch_size=5, limit=20)
        with pytest.raises(ValueError, match=GOING_ON):
            adapt(tmp_path / "run")
        with pytest.raises(ValueError, match=GOING_ON):
            adapt(tmp_path / "elsewhere", Recorder(folder=str(tmp_path / "run")))
        with pytest.raises(ValueError, match=GOING_ON):
            adapt(tmp_path / "run", resume=str(tmp_path / "run"))
        for verb in ("fit", "validate", "test", "predict"):
            with pytest.raises(ValueError, match=GOING_ON):
                getattr(trainer(tmp_path / "run"), verb)(task, datamodule=data)
        assert files(tmp_path) == before | owner
        end(process)
        assert adapt(tmp_path / "run", overwrite=True)["complete"] is True
        assert not (tmp_path / "run" / ".lock").exists()

    @pytest.mark.parametrize("folder", ["new", "new/deep"])
    def test_a_start_that_fails_leaves_nothing(self, folder, tmp_path):
        with pytest.raises(KeyError, match="no start"):
            adapt(tmp_path / folder, Fails())
        with pytest.raises(ValueError, match="there is no corruption"):
            trainer(tmp_path / folder).adapt(NoNorms(), DigitsDataModule(domains=["fogg"]), Source())
        with pytest.raises(ValueError, match="there is no run in"):
            adapt(tmp_path / folder, resume=str(tmp_path / folder))
        assert list(tmp_path.iterdir()) == []

    def test_a_start_that_fails_leaves_what_was_there(self, tmp_path):
        adapt(tmp_path)
        before = files(tmp_path)
        with pytest.raises(KeyError, match="no start"):
            adapt(tmp_path, Fails(), adapter=PTBN(), overwrite=True)
        assert {name: content for name, content in files(tmp_path).items() if name in before} == before
        assert read_results(tmp_path)["method"] == "Tent"

    def test_results_are_replaced_only_if_asked(self, tmp_path):
        adapt(tmp_path / "run")
        before = files(tmp_path)
        for callbacks, folder in (([], "run"), ([Recorder(folder=str(tmp_path / "run"))], "elsewhere")):
            with pytest.raises(FileExistsError, match=r"there are results in .*run already: .*overwrite=True\)$"):
                adapt(tmp_path / folder, *callbacks, adapter=PTBN())
        assert files(tmp_path) == before
        assert adapt(tmp_path / "run", adapter=PTBN(), overwrite=True)["method"] == "PTBN"
        assert read_results(tmp_path / "run")["method"] == "PTBN"

    def test_evaluations_say_what_they_replace(self, tmp_path):
        run, task, data = trainer(tmp_path), SupervisedTask(encoder="cifar_resnet8"), DigitsDataModule(limit=10)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "this evaluation replaces")
            run.test(task, datamodule=data)
            adapt(tmp_path, adapter=PTBN(), overwrite=True)  # it was asked to
        for evaluate in (run.test, trainer(tmp_path).validate):
            with pytest.warns(UserWarning, match=f"replaces the results in {tmp_path}: give another default_root_dir"):
                evaluate(task, datamodule=data)

    def test_a_folder_that_fit_has_written_is_used(self, tmp_path):
        runner = ttalight.Trainer(
            default_root_dir=tmp_path, max_epochs=1, limit_train_batches=1, limit_val_batches=0, accelerator="cpu",
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        task = SupervisedTask(encoder="cifar_resnet8")
        data = DigitsDataModule(batch_size=5, domains=["clean"], limit=10)
        runner.fit(task, datamodule=data)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "nothing was loaded")  # it was trained
            assert runner.adapt(task, data, PTBN())["complete"] is True
        assert {"results.json", "checkpoints/last.ckpt"} <= files(tmp_path).keys()

    def test_a_failed_start_leaves_no_folder_of_logs(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        for logger in (None, CSVLogger("logs")):
            runner = ttalight.Trainer(logger=logger, accelerator="cpu", enable_progress_bar=False)
            with pytest.raises(ValueError, match="was made for 7"):
                runner.adapt(SupervisedTask(encoder="cifar_resnet8", num_classes=7), DigitsDataModule(limit=10), Tent())
        assert list(tmp_path.iterdir()) == []

    def test_a_run_that_began_stays(self, tmp_path):
        class Stops(lightning.Callback):
            def on_test_batch_end(self, *args):
                raise KeyError("stopped")

        with pytest.raises(KeyError, match="stopped"):
            adapt(tmp_path / "run", Stops())
        assert (tmp_path / "run" / "stream.npz").is_file()
        assert adapt(tmp_path / "run", resume=str(tmp_path / "run"))["complete"] is True


WAITS = """
    import time
    from pathlib import Path
    import lightning

    class Waits(lightning.Callback):
        def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            if batch_idx == 6:
                Path("waits").touch()
                time.sleep(1000)
"""


class TestCommand:
    @pytest.fixture
    def refused(self, capsys):
        def run(*words: str) -> str:
            capsys.readouterr()
            with pytest.raises(SystemExit) as stop:
                main(list(words))
            assert stop.value.code == 2
            said = capsys.readouterr().err.splitlines()
            assert [line for line in said if line.startswith("ttalight: error: ")] == said[-1:]
            return said[-1]

        return run

    def test_a_second_one_is_refused_while_the_first_lives(self, tmp_path, monkeypatch, refused):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "waits.py").write_text(textwrap.dedent(WAITS))
        monkeypatch.syspath_prepend(tmp_path)
        words = [*ADAPT, "--name", "run", "--overwrite", "--trainer.callbacks+=waits.Waits"]
        first = fork(main, words, log=tmp_path / "log")
        try:
            while not Path("waits").exists():
                assert first.is_alive(), (tmp_path / "log").read_text()
                time.sleep(0.1)
            before = files(tmp_path / "runs")
            for more in (ADAPT, [*ADAPT, "--overwrite"], ["fit", *WORDS], ["fit", *WORDS, "--overwrite"]):
                said = refused(*more, "--name", "run")
                assert f"run {GOING_ON} (process {first.pid} on " in said
                assert "give this one another name" in said
            Path("link").symlink_to(tmp_path / "runs")
            for folder in ("runs/run", str(tmp_path / "runs" / "run"), "link/run", "runs/../link/./run"):
                assert GOING_ON in refused("adapt", "--resume", folder)
                assert GOING_ON in refused(*ADAPT, "--trainer.default_root_dir", folder)
            assert files(tmp_path / "runs") == before
        finally:
            first.kill()
            first.join()
        main(["adapt", "--resume", "runs/run", "--trainer.callbacks", "null"])
        assert read_results("runs/run")["complete"] is True
        assert not [path for path in Path("runs/run").iterdir() if path.name.startswith(".")]

    def test_a_start_that_fails_leaves_nothing(self, tmp_path, monkeypatch, refused):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit):
            main([*ADAPT, "--data.domains", "[fogg]"])
        with pytest.raises(SystemExit):
            main([*ADAPT, "--model.weights", "nowhere.ckpt"])
        refused(*ADAPT, "--resume", "runs/default")
        assert list(tmp_path.iterdir()) == []
