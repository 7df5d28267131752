"""The Y model: two losses on one encoder. What every such task must do is in test_auxiliary_tasks.py."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from ttalight.losses import contrastive_loss
from ttalight.tasks import JointTask

SMALL = {"encoder": "cifar_resnet8", "lr": 1e-3}


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_loss_is_the_sum_of_both_on_three_views(weight, make_trainer, make_data, tmp_path):
    task = JointTask(contrastive_weight=weight, crop="none", **SMALL)
    seen, logits, projected = {}, [], []
    task.log = lambda name, value, **kwargs: seen.setdefault(name, value)
    task.classifier.register_forward_hook(lambda module, args, output: logits.append(output.detach()))
    task.projector.register_forward_hook(lambda module, args, output: projected.append(output.detach()))
    task.on_train_batch_end = lambda outputs, batch, batch_idx: seen.setdefault("labels", batch[1])
    make_trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(task, datamodule=make_data())
    supervised = cross_entropy(logits[0], seen["labels"])
    contrastive = contrastive_loss(*projected[0].chunk(2), 0.01)
    assert (len(logits[0]), len(projected[0])) == (20, 40)
    assert seen["train/loss"].item() == pytest.approx((supervised + weight * contrastive).item(), rel=1e-5)


def test_both_losses_reach_the_encoder(make_trainer, make_data, tmp_path):
    def fit(**kwargs):
        torch.manual_seed(0)
        task = JointTask(**SMALL, **kwargs)
        before = {name: value.clone() for name, value in task.named_parameters()}
        make_trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(task, datamodule=make_data())
        return task, {name for name, value in task.named_parameters() if not torch.equal(value, before[name])}

    both, moved = fit()
    assert moved == {name for name, _ in both.named_parameters()}
    _, moved = fit(contrastive_weight=0.0)
    assert "encoder.conv1.weight" in moved
    assert "projector.weight" not in moved


def test_classifier_reads_encoder_not_projector():
    task = JointTask(encoder="cifar_resnet8").eval()
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        logits = task(images)
        task.projector.weight.zero_()
        assert torch.equal(task(images), logits)
        assert torch.equal(logits, task.classifier(task.encoder(task.normalize(images))))


def test_auxiliary_loss_is_the_contrast_of_keyed_views():
    task = JointTask(encoder="cifar_resnet8", symmetric=False).eval()
    images = torch.rand(4, 3, 32, 32)
    with torch.no_grad():
        loss = task.auxiliary_loss(images, torch.Generator().manual_seed(2))
        views = task.views(images, torch.Generator().manual_seed(2))
        expected = contrastive_loss(*task.project(views).chunk(2), 0.01, symmetric=False)
    assert torch.equal(loss, expected)


def test_one_image_has_nothing_to_learn_from():
    task = JointTask(encoder="cifar_resnet8").eval()
    with pytest.warns(UserWarning, match="a batch of one image has nothing to be compared with"):
        loss = task.auxiliary_loss(torch.rand(1, 3, 32, 32), torch.Generator())
    loss.backward()
    assert loss == 0
    assert task.projector.weight.grad.abs().max() == 0


def test_default_is_cta_s_test_time():
    protocol = JointTask(encoder="cifar_resnet8").default_adapter().protocol()
    assert (protocol["steps"], protocol["lr"], protocol["optimizer"]) == (20, 1e-6, "Adam")
    assert (protocol["reset"], protocol["norm"]) == ("batch", "ema")
