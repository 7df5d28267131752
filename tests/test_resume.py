"""A stopped adaptation that is resumed in the middle of its stream gives the results of an uninterrupted one."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import lightning
import pytest
import torch
from support.methods import KINDS, QUICK, methods
from torch import nn

import ttalight
from ttalight import adapters
from ttalight.adapters import Source, Tent, TestTimeTraining
from ttalight.callbacks import AdaptationCheckpoint, Recorder
from ttalight.callbacks.adaptation_files import list_checkpoints, read_last
from ttalight.cli import main
from ttalight.data import Continual, DigitsDataModule, Mixed, Probed, SingleSample
from ttalight.reporting import read_predictions, read_results
from ttalight.reporting.compare import main as compare

#: All methods continue from their states (tests/adapters/test_every_method.py).
METHODS = {name: methods(QUICK, RMT={"warm_up": 12})[name] for name in KINDS} | {
    "TestTimeTraining": lambda: TestTimeTraining(steps=1, lr=0.01),
    "TestTimeTraining with readings": lambda: TestTimeTraining(steps=2, lr=0.01, read_at=[1]),
    "EATA on the stream": lambda: adapters.EATA(fisher="stream", fisher_samples=14),
    "Tent, never reset": lambda: Tent(reset="never", lr=0.01),
    "Tent, reset every 3 updates": lambda: Tent(reset=3, lr=0.01),
    "Tent, reset every batch": lambda: Tent(reset="batch", lr=0.01),
}
BATCHES, IN_DOMAIN = 10, 5

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*runs with its settings for CIFAR", "ignore:.*source", "ignore:.*statistics"
)


class Module(lightning.LightningModule):
    """A small network of two BatchNorm layers, with a self-supervised loss."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.save_hyperparameters()  # so that TensorBoard gets them
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2), nn.BatchNorm2d(width), nn.ReLU(),
            nn.Conv2d(width, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10),
        )  # fmt: skip
        self.numbers: list[int] = []

    def forward(self, images):
        return self.net(images)

    def test_step(self, batch, batch_idx):
        self.numbers.append(batch_idx)
        self(batch[0])

    def auxiliary_loss(self, images, generator):
        noise = torch.randn(images.shape, generator=generator)
        return (self.net(images + 0.1 * noise) - self.net(images)).square().mean(1)

    def adaptable_parameters(self):
        return list(self.net[:6].parameters())


class Stop(lightning.Callback):
    """A user's callback that fails, when a batch begins or when it ends."""

    def __init__(self, batch: int, begins: bool = False) -> None:
        self.batch, self.begins = batch, begins

    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if self.begins and batch_idx == self.batch:
            raise KeyError("stopped")

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if not self.begins and batch_idx == self.batch:
            raise KeyError("stopped")


def stream(order=None, **kwargs) -> DigitsDataModule:
    return DigitsDataModule(batch_size=4, domains=["clean", "contrast"], limit=20, stream=order, **kwargs)


def adapt(folder, adapter, *callbacks, every=None, resume=False, order=None, predictions=True, module=None, **kwargs):
    trainer = ttalight.Trainer(
        default_root_dir=str(folder), accelerator="cpu", enable_progress_bar=False, enable_model_summary=False,
        callbacks=[Recorder(predictions=predictions), AdaptationCheckpoint(every=every), *callbacks], **kwargs,
    )  # fmt: skip
    module = Module() if module is None else module
    return trainer.adapt(module, stream(order), adapter, resume=str(folder) if resume else None, overwrite=True)


def interrupt(folder, adapter, at, *callbacks, begins=False, **kwargs):
    with pytest.raises(KeyError, match="stopped"):
        adapt(folder, adapter, Stop(at, begins), *callbacks, **kwargs)


def scalars(folder):
    """All that TensorBoard reads, (tag, step, value), in any order."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    tags = events.Tags()["scalars"]
    assert events.Tags()["tensors"] == ["results/text_summary"]
    return sorted((tag, event.step, event.value) for tag in tags for event in events.Scalars(tag))


def numbers(folder):
    """The results without times and memory."""
    results = json.loads((Path(folder) / "results.json").read_text())
    results["cost"] |= {"images_per_second": None, "peak_memory_bytes": None}
    for row in results["domains"]:
        row["seconds"] = row["images_per_second"] = None
    return results


def assert_same(resumed, whole):
    assert (resumed / "predictions.npz").read_bytes() == (whole / "predictions.npz").read_bytes()
    assert numbers(resumed) == numbers(whole)
    assert scalars(resumed) == scalars(whole)
    assert not (resumed / "adaptation").exists()
    assert not list(resumed.glob(".predictions*"))


@pytest.fixture(scope="module")
def whole_tent(tmp_path_factory):
    """An uninterrupted run of Tent."""
    folder = tmp_path_factory.mktemp("whole")
    adapt(folder, Tent(lr=0.01))
    return folder


@pytest.mark.parametrize("name", METHODS)
def test_continues_at_any_batch(name, tmp_path):
    draw = random.Random(name)
    stop = draw.choice([batch for batch in range(1, BATCHES) if batch != IN_DOMAIN])
    every = draw.randint(1, stop)
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    adapt(whole, METHODS[name]())
    interrupt(resumed, METHODS[name](), stop, begins=draw.random() < 0.5, every=every)
    adapt(resumed, METHODS[name](), resume=True)
    assert_same(resumed, whole)


ORDERS = {
    "Continual": Continual(),
    "Mixed": Mixed(),
    "Probed": Probed(),
    "SingleSample": SingleSample(window=4),
}


def drawing(**kwargs) -> TestTimeTraining:
    """A method whose draws depend on visit and batch."""
    return TestTimeTraining(steps=1, lr=0.01, **{"reset": "never"} | kwargs)


@pytest.mark.parametrize("order", ORDERS)
def test_on_every_kind_of_stream(order, tmp_path):
    """A probe's batches leave nothing, a window's older images do not count."""
    order = ORDERS[order]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    adapt(whole, drawing(), order=order)
    interrupt(resumed, drawing(), 3, every=1, order=order)
    for stop in range(4, 10):  # every batch is the first of a run and the last of another
        interrupt(resumed, drawing(), stop, every=1, order=order, resume=True)
    adapt(resumed, drawing(), resume=True, order=order)
    assert_same(resumed, whole)


def test_at_the_boundary_of_a_domain(tmp_path):
    """The boundary is announced once, and the reset that it brings comes."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    adapt(whole, drawing(reset="domain"))
    interrupt(resumed, drawing(reset="domain"), IN_DOMAIN, begins=True)
    adapt(resumed, drawing(reset="domain"), resume=True)
    assert_same(resumed, whole)


def test_stopped_again_and_again(tmp_path, whole_tent):
    interrupt(tmp_path, Tent(lr=0.01), 3, every=2)
    interrupt(tmp_path, Tent(lr=0.01), 2, begins=True, resume=True)  # at once
    interrupt(tmp_path, Tent(lr=0.01), 6, every=3, resume=True)
    interrupt(tmp_path, Tent(lr=0.01), 8, every=4, resume=True)
    adapt(tmp_path, Tent(lr=0.01), resume=True)
    assert_same(tmp_path, whole_tent)


def test_batches_keep_their_numbers(tmp_path):
    module = Module()
    interrupt(tmp_path, Tent(), 6, every=4, predictions=False)
    adapt(tmp_path, Tent(), resume=True, module=module, predictions=False)
    assert module.numbers == list(range(5, BATCHES))  # the domain had ended after batch 4


def test_a_limit_counts_from_the_beginning(tmp_path):
    interrupt(tmp_path, Tent(), 6, every=6, predictions=False)
    module = Module()
    results = adapt(tmp_path, Tent(), resume=True, module=module, predictions=False, limit_test_batches=8)
    assert module.numbers == [6, 7]
    assert results["complete"] is False


def test_stopped_before_the_first_checkpoint(tmp_path, whole_tent):
    interrupt(tmp_path, Tent(lr=0.01), 2)
    adapt(tmp_path, Tent(lr=0.01), resume=True)
    assert_same(tmp_path, whole_tent)


def test_trainer_and_adapter_are_reusable(tmp_path):
    """Nothing of a resumption that failed reaches the next run."""
    interrupt(tmp_path, Tent(lr=0.01), 7, every=3, predictions=False)
    adapter, data = Tent(lr=0.01), stream()
    trainer = ttalight.Trainer(default_root_dir=str(tmp_path), accelerator="cpu", enable_progress_bar=False)
    trainer.callbacks.append(stop := Stop(7, begins=True))
    with pytest.raises(KeyError):
        trainer.adapt(Module(), data, adapter, resume=str(tmp_path))
    trainer.callbacks.remove(stop)
    module = Module()
    results = trainer.adapt(module, data, adapter, overwrite=True)
    assert module.numbers == list(range(BATCHES))
    assert results["complete"] is True
    assert data.start_batch == 0


class TestCheckpoints:
    def test_the_last_two_are_kept_and_hold_plain_things(self, tmp_path):
        interrupt(tmp_path, Tent(), 8, every=2)
        assert [batches for batches, _ in list_checkpoints(tmp_path)] == [8, 6]
        for _, path in list_checkpoints(tmp_path):
            assert torch.load(path, weights_only=True)["adapter"]["counters"]["batches"] in (6, 8)

    def test_at_the_end_of_a_domain(self, tmp_path):
        interrupt(tmp_path, Tent(), 8)
        assert [batches for batches, _ in list_checkpoints(tmp_path)] == [IN_DOMAIN]

    def test_by_time(self, tmp_path):
        recorder, checkpoint = Recorder(), AdaptationCheckpoint(seconds=1e-9)
        trainer = ttalight.Trainer(
            default_root_dir=str(tmp_path), accelerator="cpu", enable_progress_bar=False,
            callbacks=[recorder, checkpoint, Stop(2)],
        )  # fmt: skip
        with pytest.raises(KeyError):
            trainer.adapt(Module(), stream(), Source())
        assert list_checkpoints(tmp_path)[-1][0] == 1  # the second one has to wait, for its cost

    def test_none_where_checkpoints_are_switched_off(self, tmp_path):
        trainer = ttalight.Trainer(
            default_root_dir=str(tmp_path), accelerator="cpu", enable_progress_bar=False, enable_checkpointing=False,
            callbacks=Stop(7),
        )  # fmt: skip
        with pytest.raises(KeyError):
            trainer.adapt(Module(), stream(), Source())
        assert not (tmp_path / "adaptation").exists()

    def test_a_new_run_takes_old_ones_away(self, tmp_path):
        interrupt(tmp_path, Tent(), 8, every=4)
        interrupt(tmp_path, Tent(), 1)
        assert list_checkpoints(tmp_path) == []

    @pytest.mark.parametrize("arguments", [{"every": 0}, {"seconds": 0}])
    def test_arguments(self, arguments):
        with pytest.raises(ValueError, match="must be"):
            AdaptationCheckpoint(**arguments)


class TestDamage:
    @pytest.mark.parametrize("damage", ["truncated", "changed", "empty"])
    def test_the_one_before_is_used_and_it_says_so(self, damage, tmp_path, whole_tent):
        interrupt(tmp_path, Tent(lr=0.01), 8, every=2)
        path = list_checkpoints(tmp_path)[0][1]
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes({"truncated": content[:-100], "changed": content, "empty": b""}[damage])
        with pytest.warns(UserWarning, match=r"batch-8-.* is damaged.*continues from the one before, batch 6 instead"):
            adapt(tmp_path, Tent(lr=0.01), resume=True)
        assert_same(tmp_path, whole_tent)

    def test_all_of_them(self, tmp_path):
        interrupt(tmp_path, Tent(), 8, every=2)
        for _, path in list_checkpoints(tmp_path):
            path.write_bytes(path.read_bytes()[:-1])
        with (
            pytest.warns(UserWarning, match="batch-8"),
            pytest.raises(ValueError, match="no other is left: start the run again"),
        ):
            adapt(tmp_path, Tent(), resume=True)

    def test_a_file_that_is_being_written_is_not_read(self, tmp_path):
        interrupt(tmp_path, Tent(), 8, every=4)
        whole = list_checkpoints(tmp_path)
        (tmp_path / "adaptation" / ".batch-9-0123456789abcdef.ckpt.1.tmp").write_bytes(b"half")
        assert list_checkpoints(tmp_path) == whole
        assert read_last(tmp_path)["batches"] == 8

    def test_predictions_that_are_gone(self, tmp_path):
        interrupt(tmp_path, Tent(), 8, every=4)
        (part,) = tmp_path.glob(".predictions.npz.*.parts/logits")
        part.write_bytes(part.read_bytes()[:100])
        with pytest.raises(ValueError, match="the first 32 predictions of the run to resume are not in"):
            adapt(tmp_path, Tent(), resume=True)

    def test_a_full_disk(self, tmp_path, whole_tent, monkeypatch):
        """The second checkpoint cannot be written: the first one stays, and serves once there is space."""
        real = os.fsync

        def full(descriptor):
            name = os.readlink(f"/proc/self/fd/{descriptor}")
            if "/.batch-6-" in name:
                raise OSError(28, "No space left on device")
            real(descriptor)

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left on device"):
            adapt(tmp_path, Tent(lr=0.01), every=3)
        monkeypatch.setattr(os, "fsync", real)
        assert [batches for batches, _ in list_checkpoints(tmp_path)] == [5, 3]
        assert len(list((tmp_path / "adaptation").iterdir())) == 2
        adapt(tmp_path, Tent(lr=0.01), resume=True)
        assert_same(tmp_path, whole_tent)


class TestOtherRuns:
    def test_a_foreign_checkpoint(self, tmp_path):
        interrupt(tmp_path, Tent(lr=0.01), 8, every=2)
        files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
        with pytest.raises(ValueError, match=r"is of another run \(adapter's lr: there 0.01, here 0.02\): resume with"):
            adapt(tmp_path, Tent(lr=0.02), resume=True)
        with pytest.raises(ValueError, match=r"stream: there \w+, here \w+\)"):
            adapt(tmp_path, Tent(lr=0.01), resume=True, order=Mixed())
        with pytest.raises(ValueError, match=r"parameters: there \d+, here \d+\)"):
            adapt(tmp_path, Tent(lr=0.01), resume=True, module=Module(width=4))
        with pytest.raises(ValueError, match="adapter: there Tent, here PTBN"):
            adapt(tmp_path, adapters.PTBN(), resume=True, predictions=False)
        assert {path: path.read_bytes() for path in files} == files

    def test_a_complete_run(self, tmp_path):
        """It is cleaned up once, if it was killed before it had done so."""
        whole = adapt(tmp_path, Tent(), predictions=False)
        for left in (
            "adaptation/batch-3-0123456789abcdef.ckpt",
            "ranks/0.pt",
            ".predictions.npz.7.parts/label",
            ".a.tmp",
        ):
            path = tmp_path / left
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(b"half")
            assert adapt(tmp_path, Tent(), resume=True, predictions=False) == whole
            assert not path.exists()
            assert path.parent == tmp_path or not path.parent.exists()
        with pytest.raises(ValueError, match="is complete, there is nothing to resume"):
            adapt(tmp_path, Tent(), resume=True, predictions=False)

    def test_no_run(self, tmp_path):
        with pytest.raises(ValueError, match=r"there is no run in .* to resume"):
            adapt(tmp_path, Tent(), resume=True)

    def test_another_folder(self, tmp_path):
        interrupt(tmp_path / "a", Tent(), 3, predictions=False)
        trainer = ttalight.Trainer(default_root_dir=str(tmp_path / "b"), accelerator="cpu", enable_progress_bar=False)
        with pytest.raises(ValueError, match=r"the run to resume is in .*a, and this one writes to .*b: use Trainer\("):
            trainer.adapt(Module(), stream(), Tent(), resume=str(tmp_path / "a"))

    def test_data_without_a_stream(self, tmp_path):
        class Loose(lightning.LightningDataModule):
            def test_dataloader(self):
                data = stream()
                data.setup("test")
                return [data.on_after_batch_transfer(batch, 0) for batch in data.test_dataloader()]

        interrupt(tmp_path, Tent(), 3, predictions=False)
        trainer = ttalight.Trainer(default_root_dir=str(tmp_path), accelerator="cpu", enable_progress_bar=False)
        with pytest.raises(ValueError, match="no stream, its data module is a Loose"):
            trainer.adapt(Module(), Loose(), Tent(), resume=str(tmp_path))

    def test_compare_does_not_take_a_part_for_the_whole(self, tmp_path, whole_tent, capsys):
        interrupt(tmp_path, Tent(lr=0.01), 8, every=2)
        assert read_results(tmp_path)["complete"] is False
        compare([str(whole_tent), str(tmp_path)])
        assert f"left out, not finished: {tmp_path} (20/40 images)" in capsys.readouterr().out


KILLER = """
    import os
    from pathlib import Path
    import lightning

    class Killer(lightning.Callback):
        def __init__(self, signal: int):
            self.signal = signal

        def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            if batch_idx == 7 and not Path("killed").exists():
                Path("killed").touch()
                os.kill(os.getpid(), self.signal)
"""
WORDS = """--model SupervisedTask --model.encoder cifar_resnet8 --data DigitsDataModule --data.limit 20
    --data.batch_size 4 --data.domains [clean,contrast] --adapter Tent --adapter.lr 0.01 --predictions true
    --trainer.accelerator cpu --trainer.enable_progress_bar false
    --trainer.callbacks+=AdaptationCheckpoint --trainer.callbacks.every 3""".split()


class TestCommand:
    @pytest.fixture(scope="class")
    def folder(self, tmp_path_factory):
        """A folder with an uninterrupted run."""
        folder = tmp_path_factory.mktemp("work")
        (folder / "killer.py").write_text(textwrap.dedent(KILLER))
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            main(["adapt", *WORDS, "--name", "whole"])
        return folder

    @pytest.fixture
    def whole(self, folder, monkeypatch):
        monkeypatch.chdir(folder)
        monkeypatch.syspath_prepend(folder)
        Path("killed").unlink(missing_ok=True)
        return Path("runs/whole")

    @staticmethod
    def words(number: signal.Signals) -> list[str]:
        return [*WORDS, "--trainer.callbacks+=killer.Killer", f"--trainer.callbacks.signal={int(number)}"]

    def test_a_killed_run_goes_on(self, whole):
        """One that replaces another run."""
        main(["adapt", *WORDS, "--adapter", "PTBN", "--name", "a"])
        command = [sys.executable, "-m", "ttalight", "adapt", *self.words(signal.SIGKILL), "--name", "a", "--overwrite"]
        done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        resumed = Path("runs/a")
        assert [batches for batches, _ in list_checkpoints(resumed)] == [6, 5]
        assert read_results(resumed)["complete"] is False
        config = (resumed / "config.yaml").read_bytes()
        main(["adapt", "--resume", "runs/a"])
        assert_same(resumed, whole)
        assert (resumed / "config.yaml").read_bytes() == config

    def test_a_terminated_run_goes_on_where_it_was(self, whole, caplog):
        with pytest.raises(SystemExit) as stop:
            main(["adapt", *self.words(signal.SIGTERM), "--name", "b"])
        assert stop.value.code == 143
        assert "it can be resumed from batch 8: ttalight adapt --resume runs/b" in caplog.text
        assert len(read_predictions("runs/b")["position"]) == 32
        main(["adapt", "--resume=runs/b", "--trainer.callbacks", "null"])  # options may differ where numbers do not
        assert_same(Path("runs/b"), whole)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--resume", "runs/whole"], "--resume: the run in runs/whole is complete, there is nothing to resume"),
            (["--resume", "runs/none"], "--resume: there is no run in runs/none to resume"),
            (["--resume", "runs/whole", "--overwrite"], "--resume continues a run and --overwrite replaces it"),
            ([*WORDS, "--name", "whole"], "there is a run in runs/whole already: give another --name, replace it with"),
        ],
    )
    def test_errors(self, words, message, whole, capsys):
        with pytest.raises(SystemExit) as stop:
            main(["adapt", *words])
        assert stop.value.code == 2
        assert message in capsys.readouterr().err

    def test_stopped_run_names_resume_and_overwrite(self, whole, capsys):
        with pytest.raises(SystemExit):
            main(["adapt", *self.words(signal.SIGTERM), "--name", "c"])
        with pytest.raises(SystemExit):
            main(["adapt", *WORDS, "--name", "c"])
        assert "or resume it: --resume runs/c" in capsys.readouterr().err
        main(["adapt", *WORDS, "--name", "c", "--overwrite"])
        assert_same(Path("runs/c"), whole)
