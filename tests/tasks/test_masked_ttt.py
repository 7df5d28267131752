"""Test-time training with masked autoencoders: both stages, and images that adapt by themselves."""

from __future__ import annotations

import copy
import json

import pytest
import torch

from ttalight.adapters import MaskedReconstruction, Source, Tent, TestTimeTraining
from ttalight.cli import main
from ttalight.models import create_encoder
from ttalight.tasks import MaskedAutoencoderTask, MaskedTTT

SMALL = {"decoder_width": 32, "decoder_depth": 1, "lr": 1e-3}
HEAD = {"head_width": 32, "head_depth": 1}
STEPS = {"steps": 3, "masks": 4, "lr": 0.05}


@pytest.fixture(scope="module")
def files(tmp_path_factory, make_data, make_trainer):
    """Checkpoint files of both stages, written by tiny runs."""
    folder = tmp_path_factory.mktemp("stages")
    make_trainer(folder / "first").fit(MaskedAutoencoderTask(**SMALL), datamodule=make_data())
    first = str(folder / "first" / "checkpoints" / "last.ckpt")
    make_trainer(folder / "second").fit(MaskedTTT(autoencoder=first, **SMALL, **HEAD), datamodule=make_data())
    return first, str(folder / "second" / "checkpoints" / "last.ckpt")


@pytest.fixture(scope="module")
def task(files):
    return MaskedTTT(weights=files[1], **SMALL, **HEAD).eval()


@pytest.fixture
def images():
    return torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def run(task, adapter, images):
    adapted = adapter.wrap(task)
    logits = adapted(images)
    adapted.release()
    return logits


def test_probing_trains_the_classifier_alone(files):
    first, second = (torch.load(file, weights_only=True)["state_dict"] for file in files)
    shared = [name for name in first if name.startswith(("encoder.", "decoder."))]
    assert all(torch.equal(first[name], second[name]) for name in shared)
    assert not torch.equal(MaskedTTT(**SMALL, **HEAD).state_dict()["head.norm.bias"], second["head.norm.bias"])


def test_autoencoder_learns_and_keeps_its_positions(make_trainer, make_data, tmp_path):
    task = MaskedAutoencoderTask(crop="none", warmup_epochs=0, **SMALL)
    before, losses = task.encoder.pos_embed.clone(), []
    task.log = lambda name, value, **kwargs: losses.append(value.item()) if name == "train/loss" else None
    make_trainer(tmp_path, limit_train_batches=16).fit(task, datamodule=make_data(batch_size=50))
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])
    assert torch.equal(task.encoder.pos_embed, before)


@pytest.mark.parametrize("images_at_once", [1, 3])
def test_images_adapt_as_each_would_alone(task, images, images_at_once):
    """The reference takes one image at a time, with a copy of the task and torch's optimizer."""
    logits = run(task, MaskedReconstruction(seed=0, images_at_once=images_at_once, **STEPS), images)
    adapter = MaskedReconstruction(seed=0)
    adapted = adapter.wrap(task)
    adapter.engine.announce()
    drawn = [task.draw_masks(4, adapter.engine.net.draws(step)) for step in range(3)]
    adapted.release()
    for image, found in zip(images[:, None], logits, strict=True):
        own = copy.deepcopy(task)
        learning = [value for name, value in own.encoder.named_parameters() if name != "pos_embed"]
        learning.append(own.decoder.mask_token)
        optimizer = torch.optim.SGD(learning, lr=0.05, momentum=0.9)
        for value in learning:
            value.requires_grad_()
        for visible in drawn:
            optimizer.zero_grad()
            sum(own.reconstruction_losses(image, places[None]).mean() / 4 for places in visible).backward()
            optimizer.step()
        with torch.no_grad():
            torch.testing.assert_close(found, own(image)[0], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(logits, run(task, Source(), images), atol=1e-3)


def test_predictions_along_the_way_are_those_of_shorter_runs(task, images):
    adapter = MaskedReconstruction(seed=0, read_at=[0, 2], **STEPS)
    adapted = adapter.wrap(task)
    adapted(images)
    readings, net = dict(adapter.engine.net.readings), adapter.engine.net
    assert (net.forwards, net.backwards) == (3 * 4 + 3, 3 * 4)
    adapted.release()
    torch.testing.assert_close(readings[0], run(task, Source(), images))
    torch.testing.assert_close(readings[2], run(task, MaskedReconstruction(**STEPS | {"steps": 2}, seed=0), images))


def test_adaptation_leaves_the_task_as_it_was(task, images):
    before = {name: value.clone() for name, value in task.state_dict().items()}
    first = run(task, MaskedReconstruction(seed=0, **STEPS), images)
    assert torch.equal(first, run(task, MaskedReconstruction(seed=0, **STEPS), images))
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
    adapted = (adapter := MaskedReconstruction(**STEPS)).wrap(task)
    adapted(images[:2])
    with pytest.raises(TypeError, match="so there is no network to export"):
        adapted.export()
    adapted.release()
    assert adapter.protocol()["optimizer"] == "SGD"


def test_a_batch_can_adapt_together(task, images):
    """The steps of a batch are shared, and statistics are none: other methods work on the task as well."""
    source = run(task, Source(), images)
    for adapter in (TestTimeTraining(steps=2, lr=1e-3, reset="domain"), Tent(lr=1e-2, steps=2)):
        adapted = adapter.wrap(task)
        adapted(images)
        assert not torch.equal(adapted(images), source)
        adapted.release()


def test_adapt_by_the_command_line(files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    options = [f"--model.{name}={value}" for name, value in {**SMALL, **HEAD, "weights": files[1]}.items()]
    data = ["--data", "DigitsDataModule", "--data.batch_size", "3", "--data.limit", "4", "--data.domains", "[contrast]"]
    adapter = ["--adapter", "MaskedReconstruction", "--adapter.steps", "2", "--adapter.masks", "2"]
    main(["adapt", "--name", "run", "--model", "MaskedTTT", *options, *data, *adapter, "--trainer.accelerator", "cpu"])
    results = json.loads((tmp_path / "runs" / "run" / "results.json").read_text())
    assert (results["complete"], results["method"]) == (True, "MaskedReconstruction")
    assert results["protocol"]["masks"] == 2
    default = MaskedTTT().default_adapter().protocol()
    assert [default[key] for key in ("steps", "lr", "momentum", "masks", "reset")] == [20, 5e-3, 0.9, 128, "batch"]


def test_what_does_not_fit_is_refused(files, images, make_trainer, make_data, tmp_path):
    with pytest.raises(ValueError, match=r"give autoencoder .* or weights .*, not both"):
        MaskedTTT(autoencoder=files[0], weights=files[1], **SMALL, **HEAD)
    with pytest.raises(ValueError, match="give autoencoder= \\(checkpoint of a MaskedAutoencoderTask\\)"):
        make_trainer(tmp_path).fit(MaskedTTT(**SMALL, **HEAD), datamodule=make_data())
    with pytest.raises(ValueError, match="mask_ratio must lie in"):
        MaskedAutoencoderTask(mask_ratio=0.99)
    with pytest.raises(TypeError, match="has no masked autoencoder to train: use MaskedTTT"):
        MaskedReconstruction().wrap(create_encoder("cifar_resnet8"))
    with pytest.raises(ValueError, match="reset must be 'batch'"):
        MaskedReconstruction(reset="domain")
    with pytest.raises(ValueError, match="masks must be at least 1, got 0"):
        MaskedReconstruction(masks=0)
