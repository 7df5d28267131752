"""Error messages of the real command for bad input: one line, no traceback, and nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.optim import SGD
from torch.optim.lr_scheduler import ConstantLR

from ttalight import Trainer
from ttalight.adapters import EMABN, Tent
from ttalight.cli import main
from ttalight.tasks import ContrastiveTask, SupervisedTask

ENCODER = ["--model.encoder", "cifar_resnet8"]
QUIET = ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false"]
FIT = [
    *ENCODER, *QUIET, "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "3", "--trainer.limit_val_batches",
    "1", "--trainer.enable_model_summary", "false",
]  # fmt: skip
DIGITS = ["--data", "DigitsDataModule", "--data.limit", "20", "--data.batch_size", "10"]
SOURCE = ["fit", "--model", "SupervisedTask", *FIT, *DIGITS]
PLAIN = ["adapt", "--model", "SupervisedTask", *ENCODER, *QUIET, "--adapter", "Tent"]
TENT = [*PLAIN, *DIGITS, "--data.domains", "[clean, contrast, pixelate]", "--model.weights", "source.ckpt"]

USERS_MODULE = """
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, TensorDataset

import ttalight
from ttalight.data import DigitsDataModule

DAMAGE = {
    "none": lambda x, y: (x, y),
    "bytes": lambda x, y: (x * 255, y),
    "normalised": lambda x, y: ((x - 0.5) / 0.25, y),
    "uint8": lambda x, y: ((x * 255).byte(), y),
    "float64": lambda x, y: (x.double(), y),
    "grey": lambda x, y: (x[:, :1], y),
    "channels last": lambda x, y: (x.permute(0, 2, 3, 1), y),
    "flat": lambda x, y: (x.flatten(1), y),
    "labels": lambda x, y: (x, y + 5),
    "NaN": lambda x, y: (x.index_fill(0, torch.tensor([5, 6]), float("nan")), y),
    "infinite": lambda x, y: (x.index_fill(0, torch.tensor([5]), float("inf")), y),
}


class Mine(LightningDataModule):
    def __init__(self, damage: str = "none", samples: int = 8, batch_size: int = 4):
        super().__init__()
        self.damage, self.samples, self.batch_size = damage, samples, batch_size

    def train_dataloader(self):
        images = torch.rand(self.samples, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        images, labels = DAMAGE[self.damage](images, torch.arange(self.samples) % 10)
        return DataLoader(TensorDataset(images, labels), self.batch_size)

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class SecondDomainHasNaN(DigitsDataModule):
    batches = 0

    def on_after_batch_transfer(self, batch, dataloader_idx):
        images, *rest = super().on_after_batch_transfer(batch, dataloader_idx)
        self.batches += 1
        if self.batches == 4:
            images[3:5, 0, 0, 0] = float("nan")
        return images, *rest


class Broken(DigitsDataModule):
    def load(self, split):
        raise ValueError("a mistake of the user's own")
"""


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """A folder with a module of the user's own, and checkpoints written by the real command."""
    folder = tmp_path_factory.mktemp("stages")
    (folder / "users_module.py").write_text(USERS_MODULE)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main([*SOURCE, "--name", "source"])
        main(["fit", "--model", "ContrastiveTask", *FIT, *DIGITS, "--name", "simclr"])
    for name in ("source", "simclr"):
        shutil.move(folder / "runs" / name / "checkpoints" / "last.ckpt", folder / f"{name}.ckpt")
    shutil.rmtree(folder / "runs")
    return folder


@pytest.fixture
def work(stages, tmp_path, monkeypatch):
    """A fresh copy of that folder as the current one."""
    folder = tmp_path / "work"
    shutil.copytree(stages, folder)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delenv("TTALIGHT_DATA", raising=False)
    yield folder
    sys.modules.pop("users_module", None)


@pytest.fixture
def says(work, capsys):
    """Run a command that must fail; return the one line that it says."""

    def run(*words: str, code: int = 1) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main(list(words))
        captured = capsys.readouterr()
        assert stop.value.code == code, captured.err
        assert "Traceback" not in captured.err + captured.out
        first, last = captured.err.count("ttalight: error: "), captured.err.splitlines()[-1]
        assert first == 1
        assert last.startswith("ttalight: error: ")
        return last.removeprefix("ttalight: error: ")

    return run


def results(name: str = "default") -> dict:
    return json.loads(Path(f"runs/{name}/results.json").read_text())


class Payload:
    """Makes a file when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("EXECUTED",)


class TestWords:
    """Faults of the command line or a configuration. The nearest names are suggested."""

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--model", "SupervizedTask"], "model: there is no class SupervizedTask; nearest: SupervisedTask"),
            (
                ["--adapter", "Tentt"],
                "adapter: there is no class Tentt; nearest: Tent; a class of your own is named by",
            ),
            (["--data.stream", "PerDomian"], "data.stream: there is no class PerDomian; nearest: PerDomain"),
            (["--adapter.optimizer", "SGDD"], "adapter.optimizer: there is no class SGDD; nearest: SGD"),
            (["--adapter", "no_module.Mine"], "adapter: there is no module no_module; one in the current folder"),
            (["--data", "users_module.Mien"], "data: there is no Mien in the module users_module; nearest: Mine"),
            (["--model.encodr", "x"], "model: SupervisedTask has no argument encodr; nearest: encoder"),
            (["--adapter.lrr", "1"], "adapter: Tent has no argument lrr; nearest: lr"),
            (
                ["--data.stream", "PerDomain", "--data.stream.shufle", "true"],
                "PerDomain has no argument shufle; nearest: shuffle",
            ),
            (["--trainer.max_epoks", "1"], "unrecognized arguments: --trainer.max_epoks 1; nearest: --trainer.max_e"),
            (["--adapter.lr", "fast"], "adapter.lr: expected float; got fast"),
            (["--adapter.reset", "often"], "adapter.reset: expected one of 'domain', 'batch', 'never' or int; got of"),
            (["--data.domains", "fog"], "data.domains: expected a list such as '[a, b]'; got fog"),
            (["--config", "nowhere.yaml"], "config: File does not exist: "),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_options(self, words, message, says):
        assert message in says(*TENT, *words, code=2)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("adapter: {class_path: Tentt}", "adapter: there is no class Tentt; nearest: Tent"),
            (
                "adapter: {class_path: Tent, init_args: {optimizer: {class_path: SGD, init_args: {lrr: 1}}}}",
                "adapter.optimizer: SGD has no argument lrr; nearest: lr",
            ),
            ("trainer: {callbacks: [{class_path: LearningRateMonitr}]}", "nearest: LearningRateMonitor"),
            ("trainer: {max_epoks: 1}", "does not accept option 'trainer.max_epoks'; nearest: trainer.max_epochs"),
            ("nam: mine", "does not accept option 'nam'; nearest: name"),
            ("model: [", "Problems parsing config: "),
            (
                "some words" + "\n:more" * 999,
                "config: expected a file of options, one 'name: value' a line; got some wo",
            ),
        ],
    )
    def test_files(self, text, message, says, work):
        (work / "wrong.yaml").write_text(text)
        assert message in says(*TENT, "--config", "wrong.yaml", code=2)

    def test_an_argument_before_its_class(self, says):
        message = says("adapt", "--adapter.lr", "1", code=2)
        assert "adapter: name the class that has it by --adapter, one of " in message
        assert " Tent," in message
        message = says("adapt", "--model.encoder", "x", code=2)
        assert "there is no argument encoder: name the class that has it by --model, one of AlignmentTask, " in message

    def test_a_subcommand(self, says):
        assert "there is no command adap; nearest: adapt" in says("adap", code=2)

    def test_what_works_still_works(self, work, capsys):
        """A module of the user's own, several configurations, help and --print_config."""
        (work / "one.yaml").write_text("adapter: {class_path: Tent, init_args: {lr: 0.5}}")
        (work / "two.yaml").write_text("adapter: {init_args: {lr: 0.25}}")
        files = ["--config", "one.yaml", "--config", "two.yaml", "--data", "users_module.Mine"]
        for words, text in [([*TENT[:-2], *files, "--print_config"], "lr: 0.25"), (["adapt", "--help"], "--adapter")]:
            with pytest.raises(SystemExit) as stop:
                main(words)
            assert stop.value.code == 0
            assert text in capsys.readouterr().out


class TestNames:
    """Names that a class looks up itself."""

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--data.domains", "[clean, fogg]"], "there is no corruption 'fogg': did you mean fog?"),
            (["--model.encoder", "cifar_resnet88"], "has no network named 'cifar_resnet88'; nearest: cifar_resnet8"),
            (["--data.severity", "6", "--data.domains", "[fog]"], "severity must be an integer from 1 (mild) to 5"),
            (["--adapter.lr", "-1"], "lr must be at least 0, got -1"),
            (["--trainer.accelerator", "gpuu"], "You selected an invalid accelerator name: `accelerator='gpuu'`"),
            (["--trainer.devices", "x"], "`devices` selected with `CPUAccelerator` should be an int > 0"),
            (["--seed_everything", "-1"], "-1 is not in bounds, numpy accepts from 0 to 4294967295"),
        ],
        ids=lambda value: " ".join(value) if isinstance(value, list) else "",
    )
    def test_values(self, words, message, says):
        assert message in says(*TENT, *words)

    def test_user_code_errors_keep_their_traceback(self, work):
        with pytest.raises(ValueError, match=r"^a mistake of the user's own$"):
            main([*TENT, "--data", "users_module.Broken"])


class TestData:
    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ("CIFARDataModule", "no test_batch in nowhere/cifar-10-batches-py (TTALIGHT_DATA is not set). To get the"),
            ("CorruptedDataModule", "no CIFAR-10-C in nowhere/CIFAR-10-C (TTALIGHT_DATA is not set): expected"),
            ("ImageFolderDataModule", "no test folder in nowhere, which does not exist"),
        ],
    )
    def test_no_data_at_the_path(self, data, message, says):
        assert message in says(*PLAIN, "--data", data, "--data.root", "nowhere")

    def test_an_archive_that_was_cut_off(self, says):
        Path("data").mkdir()
        Path("data/cifar-10-python.tar.gz").write_bytes(b"\x1f\x8b" + bytes(100))
        message = says(*PLAIN, "--data", "CIFARDataModule", "--data.download", "true")
        assert "data/cifar-10-python.tar.gz is not the published file: its md5 is" in message
        assert "remove it to have it downloaded again" in message

    def test_a_pickle_that_was_changed_is_not_opened(self, says):
        folder = Path("data/cifar-10-batches-py")
        folder.mkdir(parents=True)
        (folder / "test_batch").write_bytes(pickle.dumps(Payload()))
        message = says(*PLAIN, "--data", "CIFARDataModule")
        assert "test_batch is not the published file and was not opened: its md5 is" in message
        assert not Path("EXECUTED").exists()

    @pytest.mark.parametrize(
        ("images", "labels", "message"),
        [
            ("cut short", None, r"fog.npy is cut short: 1,000 bytes are missing at its end; copy it again"),
            ("no header", None, "fog.npy is not a .npy file"),
            (np.array([Payload()], dtype=object), None, "fog.npy holds Python objects, which may run code"),
            (
                np.zeros((10, 32, 32, 3), np.float32),
                None,
                "must hold uint8 RGB images of shape (rows, H, W, 3), it has f",
            ),
            (np.zeros((10, 32, 32, 1), np.uint8), None, "it has uint8 of shape (10, 32, 32, 1)"),
            (np.zeros((10, 64, 64, 3), np.uint8), None, "has images of 64 x 64 pixels, cifar10 has 32 x 32"),
            (None, np.full(10, 10), "labels.npy has labels from 10 to 10, expected 0 to 9"),
        ],
        ids=["cut", "header", "object", "float", "grey", "size", "labels"],
    )
    def test_arrays(self, images, labels, message, says):
        folder = Path("CIFAR-10-C")
        folder.mkdir()
        path = folder / "fog.npy"
        np.save(path, np.zeros((10, 32, 32, 3), np.uint8))
        np.save(folder / "labels.npy", np.zeros(10, np.int64) if labels is None else labels)
        if isinstance(images, np.ndarray):
            np.save(path, images, allow_pickle=True)
        elif images == "cut short":
            path.write_bytes(path.read_bytes()[:-1000])
        elif images == "no header":
            path.write_bytes(b"\x93NUMPY\x01\x00\x20\x00{'descr': '|u1', (" + bytes(200))
        words = ["--data", "CorruptedDataModule", "--data.root", ".", "--data.domains", "[fog]"]
        assert message in says(*PLAIN, *words)
        assert not Path("EXECUTED").exists()

    @pytest.mark.parametrize("num_workers", ["0", "1"])
    def test_an_image_that_cannot_be_read(self, num_workers, says):
        """With a worker the error comes from another process, its traceback a text."""
        for name in ("cat/1.png", "dog/1.png", "dog/2.png"):
            path = Path("photos/test") / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40)).save(path)
        path.write_bytes(path.read_bytes()[:60])
        words = ["--data", "ImageFolderDataModule", "--data.root", "photos", "--data.num_workers", num_workers]
        message = says(*PLAIN, *words, "--model.num_classes", "2")
        assert message.startswith("cannot read image photos/test/dog/2.png (")
        assert message.endswith("): replace or remove the file")


class TestUsersBatches:
    """Batches of a data module that is not of this package."""

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            ("bytes", "images must be RGB in [0, 1], got values from 0.0"),
            ("normalised", "leave normalisation to the task"),
            ("uint8", "got torch.uint8: use images.float() / 255"),
            ("float64", "images are torch.float64, the network takes torch.float32: convert them in the data module"),
            ("grey", "got shape (4, 1, 32, 32) with 1 channels: repeat the grey channel"),
            ("channels last", "got shape (4, 32, 32, 3): move the channels by permute(0, 3, 1, 2)"),
            ("flat", "images must be (B, 3, H, W); got shape (4, 3072)"),
            ("labels", "labels must be from 0 to 6, got 5 to 8: correct them, or set num_classes"),
        ],
    )
    def test_first_batch(self, damage, message, says):
        assert message in says(*PLAIN, *self.words(damage), "--model.num_classes", "7")

    def words(self, damage: str) -> list[str]:
        return ["--data", "users_module.Mine", "--data.damage", damage]

    def test_first_batch_of_fit_and_what_is_undamaged(self, says):
        fit = ["fit", "--model", "SupervisedTask", *FIT, "--overwrite"]
        assert "got values from 0.0" in says(*fit, *self.words("bytes"))
        assert "labels must be from 0 to 6, got 5 to 8" in says(*fit, *self.words("labels"), "--model.num_classes", "7")
        main([*PLAIN, *self.words("none"), "--name", "undamaged"])
        assert results("undamaged")["domains"][0]["samples"] == 8

    @pytest.mark.parametrize(("damage", "count"), [("NaN", 2), ("infinite", 1)])
    def test_pixels_of_a_later_batch(self, damage, count, says):
        message = says(*PLAIN, *self.words(damage))
        assert f"{count} of 4 images in batch 1 of visit 0 (counted from 0) have NaN or infinite pixels" in message
        message = says("fit", "--model", "SupervisedTask", *FIT, *self.words(damage), "--name", "other")
        assert f"{count} of 4 images have NaN or infinite pixels" in message

    @pytest.mark.parametrize("adapter", ["Source", "PTBN", "EMABN", "Tent"])
    def test_finished_domains_are_kept(self, adapter, says):
        message = says(*TENT, "--data", "users_module.SecondDomainHasNaN", "--adapter", adapter)
        assert "2 of 10 images in batch 1 of visit 1" in message
        assert results()["complete"] is False
        assert [row["name"] for row in results()["domains"]] == ["clean"]
        assert results()["domains"][0]["samples"] == 20

    @pytest.mark.parametrize("adapter", [EMABN, Tent], ids=lambda adapter: adapter.__name__)
    def test_nothing_moves_on_such_a_batch(self, adapter):
        """A run that leaves it out continues as if it had never come."""
        task = SupervisedTask(encoder="cifar_resnet8")
        batches = torch.rand(3, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        outputs = []
        for damaged in (False, True):
            adapted = adapter(reset="never", seed=0).wrap(task)
            outputs.append(adapted(batches[0]))
            if damaged:
                with pytest.raises(ValueError, match="1 of 4 images in batch 1 of visit 0"):
                    adapted(batches[1].index_fill(0, torch.tensor([2]), float("nan")))
            outputs.append(adapted(batches[2]))
            adapted.release()
        assert torch.equal(outputs[0], outputs[2])
        assert torch.equal(outputs[1], outputs[3])


class TestCheckpoints:
    def damaged(self, kind: str) -> str:
        content = Path("source.ckpt").read_bytes()
        if kind == "cut":
            Path("bad.ckpt").write_bytes(content[: len(content) // 2])
        elif kind == "empty":
            Path("bad.ckpt").write_bytes(b"")
        elif kind == "changed":
            where = content.index(b"hyper_parameters")
            Path("bad.ckpt").write_bytes(content[:where] + b"\xff" * 40 + content[where + 40 :])
        elif kind == "code":
            torch.save({"state_dict": {"weight": Payload()}}, "bad.ckpt")
        elif kind == "pickle":
            Path("bad.ckpt").write_bytes(pickle.dumps(Payload()))
        else:
            torch.save({"list": [1, 2], "entries": {"state_dict": [1, 2]}}[kind], "bad.ckpt")
        return "bad.ckpt"

    @pytest.mark.parametrize(
        ("kind", "message"),
        [
            ("cut", "bad.ckpt is not a readable checkpoint ("),
            ("empty", "bad.ckpt is not a readable checkpoint (EOFError): is it complete?"),
            ("changed", "bad.ckpt "),
            (
                "code",
                "bad.ckpt was refused: it holds something other than tensors and plain values, or is damaged (Try",
            ),
            ("pickle", "bad.ckpt was refused: "),
            ("list", "bad.ckpt holds a list, expected a checkpoint or a state_dict"),
            ("entries", "bad.ckpt is not a checkpoint: its state_dict is a list, expected a dict"),
        ],
    )
    def test_damaged_or_dangerous(self, kind, message, says, work):
        path = self.damaged(kind)
        weights = says(*TENT, "--model.weights", path)
        assert f"weights: {message}" in weights
        assert "weights_only" not in weights  # PyTorch's advice to turn the protection off
        if kind in ("cut", "code"):
            assert f"ckpt_path: {message}" in says(*SOURCE, "--ckpt_path", path)
        assert not Path("EXECUTED").exists()

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (
                ["--model.weights", "nowhere.ckpt"],
                "weights: there is no file nowhere.ckpt. Run the stage that writes it",
            ),
            (["--model.weights", "simclr.ckpt"], "was written by ContrastiveTask, expected the checkpoint of a Superv"),
            (["--model.encoder", "cifar_resnet20"], "(encoder: file 'cifar_resnet8', here 'cifar_resnet20'). Set"),
            (["--model.num_classes", "7"], "(num_classes: file 10, here 7). Set these arguments to the file's values"),
        ],
        ids=["missing", "class", "architecture", "classes"],
    )
    def test_of_another_kind(self, words, message, says):
        assert message in says(*TENT, *words)

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["--ckpt_path", "nowhere.ckpt"], "there is no checkpoint nowhere.ckpt to resume from"),
            (["--ckpt_path", "simclr.ckpt"], "was written by ContrastiveTask, and ckpt_path resumes the same class"),
            (
                ["--ckpt_path", "source.ckpt", "--model.encoder", "cifar_resnet20"],
                "is of another architecture (encoder",
            ),
            (["--ckpt_path", "plain.ckpt", "--model.encoder", "cifar_resnet20"], "missing: encoder.layer1.1."),
        ],
        ids=["missing", "class", "architecture", "keys"],
    )
    def test_to_resume_from(self, words, message, says):
        content = torch.load("source.ckpt", weights_only=True)
        del content["hyper_parameters"], content["ttalight"]
        torch.save(content, "plain.ckpt")
        code = 2 if "nowhere.ckpt" in words else 1
        assert message in says(*SOURCE, *words, code=code)


class TestBatchSizes:
    """Contrast takes two images: one has no negatives."""

    def words(self, task: str, batch_size: int, samples: int = 5) -> list[str]:
        parts = ["--model.supervised", "source.ckpt", "--model.self_supervised", "simclr.ckpt"]
        data = ["--data", "users_module.Mine", "--data.batch_size", str(batch_size), "--data.samples", str(samples)]
        return ["fit", "--model", task, *FIT, *data, *(parts if task == "AlignmentTask" else [])]

    @pytest.mark.parametrize("task", ["ContrastiveTask", "AlignmentTask"])
    def test_fewest_images_to_train_on(self, task, says):
        assert "contrast needs at least 2 images in a batch, got 1" in says(*self.words(task, 1))
        main([*self.words(task, 2), "--name", "two"])  # batches of 2, 2 and 1
        assert torch.load("runs/two/checkpoints/last.ckpt", weights_only=True)["epoch"] == 0

    def test_a_skipped_rest_changes_nothing(self, work):
        from users_module import Mine

        weights = []
        for samples in (4, 5):
            torch.manual_seed(0)
            task = ContrastiveTask(
                encoder="cifar_resnet8",
                optimizer=lambda parameters: SGD(parameters, 0.1, momentum=0.9),
                scheduler=lambda optimizer: ConstantLR(optimizer, factor=1),
            )
            trainer = Trainer(
                default_root_dir=str(work / f"{samples}"), accelerator="cpu", max_epochs=1, limit_val_batches=0,
                enable_progress_bar=False, enable_model_summary=False,
            )  # fmt: skip
            trainer.fit(task, datamodule=Mine(samples=samples, batch_size=2))
            weights.append(task.state_dict())
        assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())

    def test_test_time_training_on_one_image_warns(self, work):
        words = ["adapt", "--model", "CrossTaskTTT", *ENCODER, *QUIET, *DIGITS, "--data.limit", "3", "--overwrite"]
        with pytest.warns(UserWarning, match="a batch of one image has nothing to be compared with"):
            main([*words, "--data.batch_size", "2", "--adapter", "TestTimeTraining", "--adapter.steps", "1"])
        assert results()["complete"] is True
        assert results()["protocol"]["samples"] == 3


class TestRunFolder:
    def test_an_existing_name(self, says):
        main(TENT)
        before = Path("runs/default/results.json").read_bytes()
        assert "there is a run in runs/default already: give another --name, replace it with" in says(*TENT, code=2)
        assert Path("runs/default/results.json").read_bytes() == before

    def test_failed_replacement_keeps_the_old_run(self, says):
        main(TENT)
        files = {path: path.read_bytes() for path in Path("runs/default").rglob("*") if path.is_file()}
        for words in (
            ["--model.weights", "nowhere.ckpt"],
            ["--data.domains", "[fogg]"],
            ["--model.num_classes", "7", "--model.weights", "null"],
        ):
            says(*TENT, "--overwrite", *words)
            assert {path: path.read_bytes() for path in files} == files
        main([*TENT, "--overwrite", "--data.limit", "10"])
        assert results()["domains"][0]["samples"] == 10
        assert len(list(Path("runs/default").glob("events.out.tfevents.*"))) == 1

    @pytest.mark.parametrize(
        "name", ["..", "../x", "/tmp/x", "", " ", ".", "a/../../b", "a//b", "a\nb", "a\x1b[31m", "a\0b"]
    )
    def test_a_name_that_is_none(self, name, says, work):
        before = sorted(work.parent.rglob("*"))
        assert "is no name of a folder in runs: use letters" in says(*TENT, "--name", name, code=2)
        assert sorted(work.parent.rglob("*")) == before

    def test_a_folder_that_cannot_be_made(self, says):
        Path("runs").write_text("a file")
        message = says(*TENT)
        assert "runs" in message
        assert "directory" in message.lower()

    @pytest.mark.parametrize(
        ("number", "advice"),
        [
            (errno.ENOSPC, "No space left on device: could not write, what was there before is kept: free some space"),
            (errno.EROFS, "Read-only file system: could not write, what was there before is kept: write to another"),
        ],
        ids=["full", "read-only"],
    )
    def test_a_disk_that_takes_no_more_results(self, number, advice, says, monkeypatch):
        """The first domain's results are written, the next ones are not."""
        original = os.fsync

        def fsync(descriptor: int) -> None:
            if Path("runs/default/results.json").exists():
                raise OSError(number, os.strerror(number))
            original(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        message = says(*TENT)
        assert message.startswith("runs/default/")
        assert advice in message
        assert [row["name"] for row in results()["domains"]] == ["clean"]
        assert not list(Path("runs/default").glob(".*"))

    def test_a_full_disk_costs_no_checkpoint(self, says, monkeypatch):
        main([*SOURCE, "--name", "kept"])
        path = Path("runs/kept/checkpoints/last.ckpt")
        before = path.read_bytes()

        def fsync(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", fsync)
        message = says(*SOURCE, "--name", "kept", "--ckpt_path", "last", "--trainer.max_epochs", "2")
        assert "last.ckpt: No space left on device: could not write, what was there before is kept" in message
        assert path.read_bytes() == before
        assert os.listdir(path.parent) == ["last.ckpt"]


class TestProcess:
    def test_code_in_a_checkpoint_does_not_run(self, work):
        torch.save({"state_dict": {"weight": Payload()}}, "bad.ckpt")
        command = [sys.executable, "-m", "ttalight", *TENT, "--model.weights", "bad.ckpt"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1
        assert done.stderr.splitlines()[-1].startswith("ttalight: error: weights: bad.ckpt was refused: ")
        assert "Traceback" not in done.stderr
        assert not Path("EXECUTED").exists()

    def test_the_environment_can_ask_for_tracebacks(self, work, monkeypatch):
        """The interpreter shows them."""
        monkeypatch.setenv("TTALIGHT_TRACEBACK", "1")
        with pytest.raises(ValueError, match="there is no file nowhere") as error:
            main([*TENT, "--model.weights", "nowhere.ckpt"])
        shown = "".join(traceback.format_exception(error.value))
        assert "MissingFileError: weights: there is no file nowhere.ckpt." in shown
