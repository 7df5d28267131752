"""From ``fit`` to ``adapt`` with any LightningModule: ``--weights``, and a warning where nothing was loaded."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path

import lightning
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from ttalight import Trainer
from ttalight.adapters import Source
from ttalight.cli import main
from ttalight.data import DigitsDataModule
from ttalight.tasks import SupervisedTask

MODULE = "users_classifier"
CODE = Path(__file__)
QUIET = [
    "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
]  # fmt: skip
DATA = ["--data", "DigitsDataModule", "--data.limit", "20", "--data.batch_size", "10", "--data.domains", "[fog]"]
FIT = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "0"]
ADAPT = ["adapt", *DATA, *QUIET, "--adapter", "PTBN"]


class Classifier(lightning.LightningModule):
    """A module of the user's own, without an argument for its weights."""

    def __init__(self, width: int = 4, weights: str | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        parts = [nn.Conv2d(3, width, 3, stride=4), nn.BatchNorm2d(width), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
        self.network = nn.Sequential(*parts, nn.Linear(width, 10))

    def forward(self, images):
        return self.network(images)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0]), batch[1])

    def test_step(self, batch, batch_idx):
        self(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder in which the command has trained the user's module and a task."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("trained")
        patch.chdir(folder)
        (folder / f"{MODULE}.py").write_text(CODE.read_text())
        patch.syspath_prepend(str(folder))
        for name, model in (("own", [f"{MODULE}.Classifier"]), ("task", ["SupervisedTask", *ENCODER])):
            main(["fit", "--model", *model, *DATA, *QUIET, *FIT, "--name", name])
        torch.save(torch.load("runs/own/checkpoints/last.ckpt")["state_dict"], "own.pt")
        yield folder


ENCODER = ["--model.encoder", "cifar_resnet8"]


@pytest.fixture
def work(trained, tmp_path, monkeypatch):
    """An empty folder as the current one, with the files of the trained models beside it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(trained))
    return trained


@pytest.fixture
def fails(capsys):
    def run(*words: str) -> str:
        with pytest.raises(SystemExit) as stop:
            main([*ADAPT, *words])
        assert stop.value.code in (1, 2)
        assert not Path("runs").exists()
        return capsys.readouterr().err

    return run


def adapted(path: Path | str | None, **arguments):
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False,
    )  # fmt: skip
    data = DigitsDataModule(limit=20, batch_size=10, domains=["fog"])
    return trainer.adapt(Classifier(**arguments), data, Source(), weights=path)


@pytest.mark.parametrize("file", ["runs/own/checkpoints/last.ckpt", "own.pt"])
def test_command_loads_any_module(file, work):
    path = work / file
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "no weights were named")
        main([*ADAPT, "--model", f"{MODULE}.Classifier", "--weights", str(path)])
    source = json.loads(Path("runs/default/results.json").read_text())["source"]
    assert source == {"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def test_python_gives_the_numbers_of_loaded_weights(work):
    path = work / "own.pt"
    results = adapted(path)
    module = Classifier()
    module.load_state_dict(torch.load(path))
    data = DigitsDataModule(limit=20, batch_size=10, domains=["fog"])
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
    expected = trainer.adapt(module, data, Source())
    assert results["domains"][0]["nll"] == expected["domains"][0]["nll"]
    assert results["source"]["file"] == str(path)
    assert expected["source"] == {"file": None, "sha256": None}


def test_a_task_loads_its_checkpoint(work):
    """Normalisation and size of images come with the file, as by the task's own argument."""
    path = str(work / "runs/task/checkpoints/last.ckpt")
    nll = []
    for option in ("--weights", "--model.weights"):
        main([*ADAPT, "--model", "SupervisedTask", *ENCODER, option, path, "--overwrite", "--data.limit", "10"])
        results = json.loads(Path("runs/default/results.json").read_text())
        nll.append(results["domains"][0]["nll"])
        assert results["source"]["file"] == path
    assert nll[0] == nll[1]


def test_files_that_do_not_fit(work, fails):
    own = ["--model", f"{MODULE}.Classifier"]
    state = torch.load(work / "own.pt")
    torch.save({"network.9.bias": state.pop("network.0.bias")} | state, "other.pt")
    message = fails(*own, "--weights", "other.pt")
    assert "other.pt does not fit this Classifier: 1 missing: network.0.bias; 1 unexpected: network.9.bias" in message
    message = fails(*own, "--weights", str(work / "own.pt"), "--model.width", "5")
    assert "of another shape" in message
    assert "weights: there is no file nowhere.pt" in fails(*own, "--weights", "nowhere.pt")
    Path("text.pt").write_text("no weights")
    assert "weights: text.pt was refused" in fails(*own, "--weights", "text.pt")
    task = str(work / "runs/task/checkpoints/last.ckpt")
    message = fails("--model", "RotationTTT", *ENCODER, "--weights", task)
    assert f"weights: {task} was written by SupervisedTask, expected the checkpoint of a RotationTTT" in message
    message = fails("--model", "SupervisedTask", "--model.encoder", "cifar_resnet14", "--weights", task)
    assert "of another architecture (encoder: file 'cifar_resnet8', here 'cifar_resnet14')" in message


def test_both_ways_are_refused(work, fails):
    path = str(work / "own.pt")
    message = fails("--model", f"{MODULE}.Classifier", "--model.weights", path, "--weights", path)
    assert "--weights and --model.weights name weights both: give one of them" in message
    with pytest.raises(ValueError, match=r"an argument of that name, which is 'mine\.pt', and --weights"):
        adapted(path, weights="mine.pt")


class TestRandomWeights:
    def test_command_warns_once(self, work):
        for model, message in (
            (["SupervisedTask", *ENCODER], "nothing was loaded into this SupervisedTask: its weights are random"),
            ([f"{MODULE}.Classifier"], "no weights were named for this Classifier: if it loads none by itself"),
        ):
            with pytest.warns(UserWarning, match="weights") as seen:
                main([*ADAPT, "--model", *model, "--overwrite"])
            assert [str(warning.message)[: len(message)] for warning in seen] == [message]

    def test_of_a_task(self, work):
        task = SupervisedTask(encoder="cifar_resnet8")
        assert task.has_random_weights
        task.load_state_dict(task.state_dict())
        assert not task.has_random_weights
        path = work / "runs/task/checkpoints/last.ckpt"
        assert not SupervisedTask(encoder="cifar_resnet8", weights=str(path)).has_random_weights
        assert not SupervisedTask.load_from_checkpoint(path).has_random_weights
