"""ClusT3: projectors of their own, clusters that belong to a sample, settings that were published."""

from __future__ import annotations

import pytest
import torch

from ttalight.adapters import TestTimeTraining
from ttalight.losses import clustering_loss
from ttalight.tasks import ClusT3

SMALL = {"encoder": "cifar_resnet8", "projectors": 3, "clusters": 4}


@pytest.fixture
def images():
    return torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def maps_of(task, images):
    """Return the maps after layer1 and layer2, by a walk through the network's parts."""
    encoder = task.encoder
    first = encoder.layer1(encoder.act1(encoder.bn1(encoder.conv1(task.normalize(images)))))
    return {"1": first, "2": encoder.layer2(first)}


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_loss_is_the_sum_over_single_projectors(images, variant):
    task = ClusT3(variant=variant, **SMALL).eval()
    expected = 0.0
    for name, values in maps_of(task, images).items():
        bank = task.projectors[name]
        for weight, bias in zip(bank.weight.split(4), bank.bias.split(4), strict=True):
            logits = torch.nn.functional.conv2d(values, weight, bias)
            expected = expected + clustering_loss(logits, variant=variant)
    loss = task.auxiliary_loss(images, torch.Generator())
    torch.testing.assert_close(loss, expected)
    assert len(task.projectors["1"].weight) == 12


@pytest.mark.parametrize("variant", ["paper", "code"])
def test_loss_does_not_depend_on_the_order_of_samples(images, variant):
    task = ClusT3(variant=variant, **SMALL).eval()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    loss, reordered = (task.auxiliary_loss(values, torch.Generator()) for values in (images, images[order]))
    torch.testing.assert_close(loss, reordered)


def test_batch_of_one_has_logits_and_loss(images):
    task = ClusT3(**SMALL).eval()
    assert task(images[:1]).shape == (1, 10)
    loss = task.auxiliary_loss(images[:1], torch.Generator())
    loss.backward()
    assert loss < 0  # positions of one image are samples enough
    assert task.encoder.conv1.weight.grad.any()


def test_variants_are_told_apart(images):
    torch.manual_seed(0)
    paper = ClusT3(**SMALL).eval()
    code = ClusT3(variant="code", **SMALL).eval()
    code.load_state_dict(paper.state_dict())
    assert paper.auxiliary_loss(images, torch.Generator()) < 0 < code.auxiliary_loss(images, torch.Generator())


def test_layers_choose_what_is_read_and_what_adapts():
    task = ClusT3(layers=[1], **SMALL)
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    adapted = {names[id(parameter)].split(".")[1] for parameter in task.adaptable_parameters()}
    assert adapted == {"conv1", "bn1", "layer1"}
    assert set(task.projectors) == {"1"}


def test_published_settings():
    task = ClusT3(encoder="cifar_resnet8")
    assert {name: conv.out_channels for name, conv in task.projectors.items()} == {"1": 150, "2": 150}
    adapter = task.default_adapter()
    assert isinstance(adapter, TestTimeTraining)
    protocol = adapter.protocol()
    assert (protocol["optimizer"], protocol["lr"], protocol["steps"]) == ("Adam", 1e-5, 20)
    assert (protocol["reset"], protocol["norm"]) == ("batch", "ema")
