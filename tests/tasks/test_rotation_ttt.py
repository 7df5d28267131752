"""Test-time training by rotation. What every such task must do is in test_auxiliary_tasks.py."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from ttalight.adapters import EMABN, Source, TestTimeTraining
from ttalight.tasks import RotationTTT

SMALL = {"encoder": "cifar_resnet8", "lr": 1e-3}


def batch(count=5):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(4))


@pytest.mark.parametrize(("encoder", "branch"), [("cifar_resnet8", "layer1"), ("cifar_resnet26_gn", "layer2")])
def test_branch_starts_as_a_copy_of_the_later_stages(encoder, branch):
    task = RotationTTT(encoder=encoder, branch=branch).eval()
    images = batch()
    with torch.no_grad():
        features = task.encode(images)
        torch.testing.assert_close(task.branch[-1](features), task.rotation_logits(images))
    own = {id(parameter) for parameter in task.branch.parameters()}
    assert own.isdisjoint(id(parameter) for parameter in task.encoder.parameters())


def test_branch_of_a_timm_resnet():
    task = RotationTTT(encoder="resnet10t", stem="imagenet", branch="layer3").eval()
    with torch.no_grad():
        images = batch(2)
        torch.testing.assert_close(task.branch[-1](task.encode(images)), task.rotation_logits(images))


def test_training_loss(make_trainer, make_data, tmp_path):
    task = RotationTTT(crop="none", rotation_weight=0.5, **SMALL)
    seen, logits, rotations = {}, [], []
    task.log = lambda name, value, **kwargs: seen.setdefault(name, value)
    task.classifier.register_forward_hook(lambda module, args, output: logits.append(output.detach()))
    task.branch.register_forward_hook(lambda module, args, output: rotations.append(output.detach()))
    task.on_train_batch_end = lambda outputs, batch, batch_idx: seen.setdefault("labels", batch[1])
    make_trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(task, datamodule=make_data())
    expected = cross_entropy(logits[0], seen["labels"])
    expected += 0.5 * cross_entropy(rotations[0], torch.arange(4).repeat_interleave(20))
    assert seen["train/loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_rotation_can_be_learned(make_trainer, make_data, tmp_path):
    task = RotationTTT(crop="none", encoder="cifar_resnet8", lr=1e-2, warmup_epochs=0)
    losses = []
    task.log = lambda name, value, **kwargs: losses.append(value.item()) if name == "train/rotation" else None
    make_trainer(tmp_path, limit_train_batches=10, limit_val_batches=0).fit(task, datamodule=make_data(batch_size=20))
    assert losses[-1] < 0.8 * losses[0]


def test_auxiliary_loss_of_copies():
    task = RotationTTT(encoder="cifar_resnet8", rotation="random", copies=6, crop="padded").eval()
    shown = []
    task.branch.register_forward_pre_hook(lambda module, args: shown.append(args[0]))
    loss = task.auxiliary_loss(batch(1), torch.Generator().manual_seed(0))
    assert len(shown[0]) == task.auxiliary_views == 6
    assert len(shown[0].flatten(1).unique(dim=0)) > 3  # copies differ in crop and rotation
    with torch.no_grad():
        again = task.auxiliary_loss(batch(1), torch.Generator().manual_seed(0))
        other = task.auxiliary_loss(batch(1), torch.Generator().manual_seed(1))
    assert torch.equal(loss.detach(), again)
    assert not torch.equal(again, other)


def test_published_protocol_on_single_images():
    """One image, copies of it, SGD without momentum: against a plain loop on a network with GroupNorm."""
    from ttalight.seeding import derive_seed

    options = {"encoder": "cifar_resnet26_gn", "rotation": "random", "copies": 4, "crop": "none"}
    task = RotationTTT(**options)
    adapted = TestTimeTraining(steps=2, optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05), seed=0).wrap(
        task
    )
    images = batch(2)
    logits = torch.cat([adapted(image[None]) for image in images])
    adapted.release()
    for index, image in enumerate(images):
        net = RotationTTT(**options).eval()
        net.load_state_dict(task.state_dict())
        optimizer = torch.optim.SGD(net.adaptable_parameters(), lr=0.05)
        for step in range(2):
            draws = torch.Generator().manual_seed(derive_seed(0, "adapt", 0, index, step))
            quarters = (4 * torch.rand(4, 1, generator=draws)[:, 0]).long()
            turned = torch.stack([image.rot90(int(count), (1, 2)) for count in quarters])
            optimizer.zero_grad()
            cross_entropy(net.rotation_logits(turned), quarters).backward()
            optimizer.step()
        with torch.no_grad():
            torch.testing.assert_close(net(image[None])[0], logits[index], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("adapt_head", [True, False])
def test_what_moves(adapt_head):
    task = RotationTTT(encoder="cifar_resnet8", branch="layer2", adapt_head=adapt_head)
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    adapting = {names[id(parameter)] for parameter in task.adaptable_parameters()}
    assert any(name.startswith("branch.") for name in adapting) == adapt_head
    encoder = {name for name in names.values() if name.startswith("encoder.")}
    assert {name for name in encoder if name in adapting} == {
        name for name in encoder if not name.startswith("encoder.layer3")
    }


def test_statistics_behind_the_branch_stay():
    task = RotationTTT(encoder="cifar_resnet8", branch="layer2")
    adapter = EMABN(steps=2, reset="never")
    adapted = adapter.wrap(task)
    adapted(batch())
    tensors = adapted.engine.capture()["tensors"]
    assert not torch.equal(tensors["encoder.layer2.0.bn1.statistics.0"], torch.zeros(32))
    assert torch.equal(tensors["encoder.layer3.0.bn1.statistics.0"], torch.zeros(64))
    adapted.release()


def test_groupnorm_without_steps_is_the_source():
    task = RotationTTT(encoder="cifar_resnet26_gn")
    one, other = TestTimeTraining(steps=2, lr=0.0).wrap(task), Source()
    adapted = one(batch(2))
    one.release()
    source = other.wrap(task)
    assert torch.equal(adapted, source(batch(2)))
    source.release()


def test_default_adapter_is_the_published_one():
    adapter = RotationTTT(encoder="cifar_resnet8").default_adapter()
    optimizer = adapter.make_optimizer([torch.nn.Parameter(torch.zeros(1))])
    group = optimizer.param_groups[0]
    assert isinstance(optimizer, torch.optim.SGD)
    assert (group["lr"], group["momentum"], group["weight_decay"]) == (1e-3, 0, 0)
    assert (adapter.steps, adapter.reset) == (10, "batch")


def test_images_that_are_not_square_are_cut_first():
    images = torch.rand(2, 3, 32, 40)
    with pytest.raises(ValueError, match="rotations need square images, got 32 x 40"):
        RotationTTT(encoder="cifar_resnet8").auxiliary_loss(images, torch.Generator())
    cut = RotationTTT(encoder="cifar_resnet8", image_size=24)
    assert cut.auxiliary_loss(images, torch.Generator()).isfinite()
