"""ReC-TTT: who is reconstructed from whom, what learns, and what stays as it was."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.nn.functional import cosine_similarity

from ttalight.adapters import TestTimeTraining
from ttalight.tasks import ReCTTT

SMALL = {"encoder": "cifar_resnet8", "decoder_blocks": [1, 1, 1]}


@pytest.fixture
def images():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def task():
    """A task whose two encoders have left their common start, as training makes them."""
    torch.manual_seed(0)
    task = ReCTTT(**SMALL)
    with torch.no_grad():
        for part in (task.encoder, task.mirror_encoder, task.classifier, task.mirror_classifier):
            for parameter in part.parameters():
                parameter += 0.1 * torch.randn_like(parameter)
    return task.eval()


def walk(encoder, images):
    """Return features and the maps after each layer, by a walk through the network's parts."""
    values, maps = encoder.act1(encoder.bn1(encoder.conv1(images))), []
    for layer in (encoder.layer1, encoder.layer2, encoder.layer3):
        values = layer(values)
        maps.append(values)
    return values.mean((2, 3)), maps


def test_logits_are_the_mean_of_both_classifiers(task, images):
    first, _ = walk(task.encoder, images)
    second, _ = walk(task.mirror_encoder, images.flip(3))
    expected = (task.classifier(first) + task.mirror_classifier(second)) / 2
    torch.testing.assert_close(task(images), expected)


def test_encoder_and_frozen_encoder_swap(task, images):
    """With a decoder that returns what it was given, each pair's distance counts twice, and nothing else does."""
    parts = []

    class Mirror(torch.nn.Module):
        def forward(self, maps):
            parts.extend(maps)
            return [list(stream) for stream in zip(*(values.chunk(4) for values in maps), strict=True)]

    task.decoder = Mirror()
    loss = task.auxiliary_loss(images, torch.Generator())
    pairs = [
        (walk(encoder, seen)[1], walk(task.frozen, seen)[1])
        for encoder, seen in ((task.encoder, images), (task.mirror_encoder, images.flip(3)))
    ]
    expected = sum(
        1 - cosine_similarity(ours.flatten(1), theirs.flatten(1))
        for maps in pairs
        for ours, theirs in zip(*maps, strict=True)
    )
    torch.testing.assert_close(loss, expected / 2)
    assert [tuple(values.shape) for values in parts] == [(16, 16, 32, 32), (16, 32, 16, 16), (16, 64, 8, 8)]


def test_encoders_learn_from_own_decoding(task, images):
    """As targets, and as each other's partners, they get no gradient."""
    _, maps = task._pass(task.encoder, images)
    rest = [task._pass(part, images)[1] for part in (task.frozen, task.frozen, task.mirror_encoder)]
    whole = task._reconstruction([maps, *rest], None).mean()
    gradient = torch.autograd.grad(whole, task.encoder.conv1.weight, retain_graph=True)[0]
    decoded = task.decoder([torch.cat(values) for values in zip(maps, *rest, strict=True)])[0]
    own = sum(
        (1 - cosine_similarity(ours.flatten(1), theirs.detach().flatten(1))).mean()
        for ours, theirs in zip(decoded, rest[0], strict=True)
    )
    expected = torch.autograd.grad(own / 4, task.encoder.conv1.weight)[0]
    torch.testing.assert_close(gradient, expected)
    assert gradient.any()


def test_mining_at_test_time_changes_gradient_only(task, images):
    gradients, losses = [], []
    for task.mine_at_test in (False, True):
        loss = task.auxiliary_loss(images, torch.Generator()).mean()
        losses.append(loss.detach())
        gradients.append(torch.autograd.grad(loss, task.encoder.conv1.weight)[0])
    torch.testing.assert_close(*losses)
    assert not torch.allclose(*gradients)


def test_statistics_of_first_three_stages_update(task, images):
    adapter = TestTimeTraining(steps=1, lr=1e-3, reset="never")
    adapted = adapter.wrap(task)
    adapted(images)
    moved = {name.partition(".statistics")[0] for name in adapted.state_dict()["tensors"] if "statistics" in name}
    owners = {".".join(name.split(".")[:2]) for name in moved}
    assert owners == {f"{part}.layer{n}" for part in ("encoder", "mirror_encoder") for n in (1, 2, 3)}


def test_the_fourth_stage_neither_adapts_nor_moves():
    task = ReCTTT(encoder="resnet18", **{key: value for key, value in SMALL.items() if key != "encoder"})
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    adapted = {names[id(parameter)].split(".")[1] for parameter in task.adaptable_parameters()}
    assert adapted == {"conv1", "bn1", "layer1", "layer2", "layer3"}
    chosen = {id(module) for module in task.adaptation_modes()}
    assert not chosen & {id(module) for module in (*task.encoder.layer4.modules(), task.encoder.bn1)}
    loss = task.auxiliary_loss(torch.rand(2, 3, 32, 32), torch.Generator())
    assert loss.shape == (2,)


class TestTraining:
    @pytest.fixture
    def fit(self, make_trainer, make_data, tmp_path):
        def run(task, **trainer):
            make_trainer(tmp_path, limit_val_batches=0, **trainer).fit(task, datamodule=make_data(batch_size=10))
            return task

        return run

    @pytest.fixture
    def start(self, stages):
        return {"supervised": stages["source"], **SMALL}

    def test_encoders_start_from_the_supervised_model(self, start, stages, fit):
        task = ReCTTT(**start)
        source = torch.load(stages["source"], weights_only=True)["state_dict"]
        parts = ("encoder", "mirror_encoder", "frozen")
        assert all(
            torch.equal(value, source[f"encoder.{name}"])
            for part in parts
            for name, value in getattr(task, part).state_dict().items()
        )
        assert torch.equal(task.mirror_classifier.weight, source["classifier.weight"])
        assert task.source["file"] == stages["source"]
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="the frozen encoder")
            fit(task)
        for name, value in task.frozen.state_dict().items():  # running statistics too
            assert torch.equal(value, source[f"encoder.{name}"]), name
        moved = [getattr(task, part).conv1.weight for part in parts[:2]]
        assert not torch.equal(*moved)
        assert not torch.equal(moved[0], source["encoder.conv1.weight"])
        assert not task.train().frozen.training

    def test_hard_positions_decrease_in_first_tenth(self, start, fit):
        seen = []
        task = ReCTTT(**start)
        task.on_train_batch_end = lambda *args: seen.append(task.alpha)
        task.training_losses = lambda images, labels: {"supervised": task(images).square().mean()}
        fit(task, max_epochs=1, limit_train_batches=40)
        assert seen == pytest.approx([-2.0, -1.0, 0.0, *[1.0] * 37])  # after steps 1, 2, ... of 40

    def test_adds_four_losses(self, start, fit):
        task, seen = ReCTTT(**start), {}
        task.log = lambda name, value, **kwargs: seen.__setitem__(name, value.item())
        task.log_dict = lambda values: seen.update({name: value.item() for name, value in values.items()})
        fit(task, max_steps=1)
        parts = [seen[f"train/{name}_loss"] for name in ("supervised", "auxiliary", "divergence")]
        assert seen["train/loss"] == pytest.approx(sum(parts), rel=1e-5)

    def test_random_targets_are_warned_of(self, fit):
        with pytest.warns(UserWarning, match="frozen encoder of ReC-TTT has random weights.*supervised="):
            fit(ReCTTT(**SMALL), limit_train_batches=1)


def test_some_of_the_classes_are_refused(make_trainer, make_data, tmp_path):
    data = make_data()
    data.source_classes, data.num_classes = list(range(7)), 7
    with pytest.raises(ValueError, match=r"two classifiers, .* train it on these classes alone"):
        make_trainer(tmp_path).fit(ReCTTT(**SMALL), datamodule=data)


def test_settings_of_the_authors_code():
    """One number of steps, fixed before: theirs was the best of a list by test accuracy."""
    task = ReCTTT(**SMALL)
    adapter = task.default_adapter()
    protocol = adapter.protocol()
    assert (protocol["optimizer"], protocol["lr"], protocol["steps"]) == ("AdamW", 1e-3, 10)
    assert (protocol["reset"], protocol["norm"]) == ("batch", "ema")
    assert adapter.make_optimizer([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]["weight_decay"] == 1e-5


def test_images_that_do_not_halve_are_an_error():
    with pytest.raises(ValueError, match=r"maps that halve from stage to stage.*\(7, 7\)"):
        ReCTTT(**SMALL).auxiliary_loss(torch.rand(2, 3, 28, 28), torch.Generator())


def test_blocks_are_checked():
    with pytest.raises(ValueError, match=r"three numbers of blocks, 1 or more each, got \[3, 4\]"):
        ReCTTT(encoder="cifar_resnet8", decoder_blocks=[3, 4])
