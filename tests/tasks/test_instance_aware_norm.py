"""Source training with instance-aware statistics, from ``fit`` to ``adapt`` with NOTE."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from ttalight.cli import main
from ttalight.models.instance_aware import InstanceAwareBatchNorm
from ttalight.tasks import AlignmentTask, SupervisedTask

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "digits"
LAST = "runs/digits/source/checkpoints/last.ckpt"
QUIET = ["--trainer.enable_progress_bar", "false"]
STREAM = ["--data.limit", "100", "--data.domains", "[clean,contrast]"]


def adapt(*words: str, name: str) -> dict:
    main(["adapt", "--config", str(CONFIGS / "unadapted.yaml"), *QUIET, *STREAM, "--name", name, *words])
    return json.loads(Path(f"runs/{name}/results.json").read_text())


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder in which a source was trained for two epochs."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("work")
        patch.chdir(folder)
        words = [*QUIET, "--trainer.max_epochs", "2", "--trainer.enable_model_summary", "false"]
        main(["fit", "--config", str(CONFIGS / "source.yaml"), *words, "--model.norm", "instance_aware"])
    return folder


@pytest.fixture(autouse=True)
def _in_work(work, monkeypatch):
    monkeypatch.chdir(work)


def test_the_file_says_how_it_was_trained():
    file = torch.load(LAST, weights_only=True)
    assert file["hyper_parameters"]["norm"] == "instance_aware"
    plain = SupervisedTask(encoder="cifar_resnet8")
    assert file["state_dict"].keys() == plain.state_dict().keys()
    plain.load_state_dict(file["state_dict"])
    task = SupervisedTask(encoder="cifar_resnet8", norm="instance_aware", weights=LAST)
    for name, value in task.state_dict().items():
        assert torch.equal(value, plain.state_dict()[name])
    layers = [module for module in task.encoder.modules() if isinstance(module, InstanceAwareBatchNorm)]
    assert len(layers) == 7
    assert all(layer.num_batches_tracked == 20 for layer in layers)


def test_training_learns_and_note_adapts():
    words = ["--model.norm", "instance_aware"]
    source = adapt(*words, name="unadapted")
    assert {row["name"]: row["accuracy"] for row in source["domains"]}["clean"] > 0.2  # chance is 0.1
    note = adapt(*words, "--adapter", "NOTE", "--adapter.memory", "50", name="note")
    assert (note["method"], note["complete"]) == ("NOTE", True)
    assert note["protocol"]["norm"] == "instance_aware"
    # Before the first update NOTE predicts what the network itself does: statistics are corrected once.
    still = adapt(*words, "--adapter", "NOTE", "--adapter.lr", "0", "--adapter.momentum", "0", name="still")
    assert [row["accuracy"] for row in still["domains"]] == [row["accuracy"] for row in source["domains"]]


def test_other_arguments_than_the_files(capsys):
    message = r"weights: .* of another architecture \(norm: file 'instance_aware', here 'batch'\)"
    with pytest.raises(ValueError, match=message):
        SupervisedTask(encoder="cifar_resnet8", weights=LAST)
    with pytest.raises(ValueError, match=r"supervised: .*norm: file 'instance_aware', here 'batch'"):
        AlignmentTask(encoder="cifar_resnet8", supervised=LAST)
    with pytest.raises(SystemExit):
        adapt("--adapter", "PTBN", "--model.norm", "instance_aware", name="ptbn")
    assert "is a InstanceAwareBatchNorm with a forward of its own" in capsys.readouterr().err
    with pytest.raises(ValueError, match="norm must be 'batch' or 'instance_aware', got 'group'"):
        SupervisedTask(encoder="cifar_resnet8", norm="group")
    with pytest.raises(ValueError, match="CifarResNetGN has no BatchNorm layer"):
        SupervisedTask(encoder="cifar_resnet26_gn", norm="instance_aware")


def test_resuming_needs_the_same_norm(capsys):
    words = [*QUIET, "--trainer.max_epochs", "3", "--name", "resumed", "--ckpt_path", LAST]
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(CONFIGS / "source.yaml"), *words])
    assert "norm: file 'instance_aware', here 'batch'" in capsys.readouterr().err
