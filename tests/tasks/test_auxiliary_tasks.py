"""Properties of every classifier that adapts by an auxiliary loss: files, command line, controls, resets, batches."""

from __future__ import annotations

import json

import pytest
import torch

from ttalight.adapters import EMABN, Source, TestTimeTraining
from ttalight.cli import main
from ttalight.tasks import JointTask, ProbeTask, RotationTTT, TTTPlusPlus

SMALL = {"encoder": "cifar_resnet8", "lr": 1e-3}
KINDS = {"joint": JointTask, "probe": ProbeTask, "rotation": RotationTTT, "ttt++": TTTPlusPlus}
OPTIONS = {"ttt++": {"calibration_images": 100}}


@pytest.fixture(scope="module")
def files(tmp_path_factory, make_data, make_trainer, stages):
    """Checkpoint files that tiny runs of all tasks wrote."""

    def fit(name):
        source = {"self_supervised": stages["simclr"]} if name == "probe" else {}
        folder = tmp_path_factory.mktemp("fit")
        make_trainer(folder).fit(KINDS[name](**SMALL, **source, **OPTIONS.get(name, {})), datamodule=make_data())
        return str(folder / "checkpoints" / "last.ckpt")

    return {name: fit(name) for name in KINDS}


@pytest.fixture(params=list(KINDS))
def task(request, files):
    return KINDS[request.param](weights=files[request.param], encoder="cifar_resnet8")


def stream(task, adapter, batches=(6, 6)):
    """Adapt to batches of images and return the logits."""
    images = torch.rand(sum(batches), 3, 32, 32, generator=torch.Generator().manual_seed(1))
    adapted = adapter.wrap(task)
    logits = [adapted(part) for part in images.split(batches)]
    adapted.release()
    return torch.cat(logits)


@pytest.mark.parametrize("name", list(KINDS))
def test_fit_and_adapt_by_the_command_line(name, stages, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kind = KINDS[name].__name__
    common = [
        "--model", kind, "--model.encoder", "cifar_resnet8", "--data", "DigitsDataModule", "--data.batch_size", "16",
        "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
    ]  # fmt: skip
    tiny = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "2"]
    source = ["--model.self_supervised", stages["simclr"]] if name == "probe" else []
    tiny += [word for option, value in OPTIONS.get(name, {}).items() for word in (f"--model.{option}", str(value))]
    main(["fit", "--name", "source", *common, *tiny, *source])
    weights = "runs/source/checkpoints/last.ckpt"
    run = ["--data.limit", "10", "--data.domains", "[contrast]", "--model.weights", weights]
    main(["adapt", "--name", "run", *common, *run])
    results = json.loads((tmp_path / "runs" / "run" / "results.json").read_text())
    assert results["complete"] is True
    assert (results["method"], results["model"]) == ("TestTimeTraining", kind)
    protocol = KINDS[name](encoder="cifar_resnet8").default_adapter().protocol()
    assert {key: results["protocol"][key] for key in ("steps", "lr", "optimizer", "reset", "prediction")} == {
        key: protocol[key] for key in ("steps", "lr", "optimizer", "reset", "prediction")
    }
    assert results["source"]["file"] == weights
    views = KINDS[name](encoder="cifar_resnet8").auxiliary_views
    assert results["cost"]["forwards_per_batch"] == protocol["steps"] * views + 1


def test_zero_steps_are_the_source_model(task):
    assert torch.equal(stream(task, TestTimeTraining(steps=0)), stream(task, Source()))


@pytest.mark.parametrize("reset", ["batch", "never"])
def test_zero_rate_is_the_control_on_the_same_views(task, reset):
    trained = stream(task, TestTimeTraining(steps=3, lr=0.0, reset=reset))
    assert torch.equal(trained, stream(task, EMABN(steps=3, reset=reset)))
    assert not torch.equal(trained, stream(task, Source()))


def test_a_run_leaves_no_trace_and_repeats(task):
    task.train()
    state = {name: value.clone() for name, value in [*task.state_dict().items(), *task.named_buffers()]}
    flags = [(part.training, *(p.requires_grad for p in part.parameters())) for part in task.modules()]
    first = stream(task, TestTimeTraining(steps=2, lr=1e-3, reset="never"))
    assert all(torch.equal(value, state[name]) for name, value in task.state_dict().items())
    assert all(torch.equal(value, state[name]) for name, value in task.named_buffers())
    assert [(part.training, *(p.requires_grad for p in part.parameters())) for part in task.modules()] == flags
    assert torch.equal(first, stream(task, TestTimeTraining(steps=2, lr=1e-3, reset="never")))


def test_the_classifier_stays_and_what_is_named_moves(task):
    adapter = TestTimeTraining(steps=2, lr=1e-3, reset="never")
    before = {name: value.clone() for name, value in task.named_parameters()}
    stream(task, adapter)
    moved = {name: value for name, value in adapter.state_dict()["tensors"].items() if name in before}
    named = {id(parameter) for parameter in task.adaptable_parameters()}
    assert moved.keys() == {name for name, parameter in task.named_parameters() if id(parameter) in named}
    assert not any(name.startswith("classifier.") for name in moved)
    assert not torch.equal(moved["encoder.conv1.weight"], before["encoder.conv1.weight"])


def test_readings_touch_nothing(task):
    """Predicting on the way changes no later prediction, and gives what a shorter run gives."""
    adapter = TestTimeTraining(steps=3, lr=1e-3, read_at=[1])
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    adapted = adapter.wrap(task)
    final, reading = adapted(images), adapted.engine.net.readings[1]
    adapted.release()
    assert torch.equal(final, stream(task, TestTimeTraining(steps=3, lr=1e-3), (6,)))
    assert torch.equal(reading, stream(task, TestTimeTraining(steps=1, lr=1e-3), (6,)))


@pytest.mark.filterwarnings("ignore:.*nothing to be compared with")
def test_ragged_and_single_batches(task):
    logits = stream(task, TestTimeTraining(steps=2, lr=1e-3), (5, 2, 1))
    assert logits.shape == (8, 10)
    assert logits.isfinite().all()


def test_files_of_other_tasks_and_shapes_are_refused(task, stages, files):
    kind = type(task)
    with pytest.raises(ValueError, match=f"weights: .* was written by SupervisedTask, expected .* a {kind.__name__}"):
        kind(weights=stages["source"], encoder="cifar_resnet8")
    name = next(name for name, value in KINDS.items() if value is kind)
    with pytest.raises(ValueError, match="of another architecture \\(num_classes: file 10, here 7\\)"):
        kind(weights=files[name], encoder="cifar_resnet8", num_classes=7)


@pytest.mark.parametrize("kind", list(KINDS.values()), ids=list(KINDS))
def test_unknown_crop(kind):
    with pytest.raises(ValueError, match="crop must be 'resized', 'padded' or 'none', got 'round'"):
        kind(encoder="cifar_resnet8", crop="round")
