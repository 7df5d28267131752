"""NC-TTT: noise of two kinds, soft labels, and a discriminator that fits its maps."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import binary_cross_entropy, softplus

from ttalight.adapters import TestTimeTraining
from ttalight.tasks import NCTTT

SMALL = {"encoder": "cifar_resnet8", "channels": 4}


@pytest.fixture
def images():
    return torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def draws():
    def start(task):
        task._draws = torch.Generator().manual_seed(1)

    return start


def inputs_of(task):
    seen = []
    task.discriminator.register_forward_hook(lambda module, args, output: seen.append((args[0], output.flatten())))
    return seen


def test_training_separates_large_and_small_noise(images, draws):
    task = NCTTT(small_noise=0.02, large_noise=0.3, **SMALL)
    draws(task)
    seen = inputs_of(task)
    losses = task.training_losses(images, torch.zeros(6, dtype=torch.long))
    _, maps = task.encode_with_maps(images)
    clean = task.projector(maps[2]).flatten(1)
    (noisy, scores), *more = seen
    assert not more  # both halves in one pass, with the statistics of both
    noise = noisy - clean.repeat(2, 1)
    assert noise[:6].std().item() == pytest.approx(0.3, rel=0.05)
    assert noise[6:].std().item() == pytest.approx(0.02, rel=0.05)
    labels = torch.tensor([1.0] * 6 + [0.0] * 6)  # what the posterior is in a thousand dimensions
    expected = binary_cross_entropy(scores.sigmoid(), labels)
    assert losses["auxiliary"].item() == pytest.approx(expected.item(), rel=1e-4)


def test_noise_of_a_batch_is_keyed(images, draws):
    task = NCTTT(**SMALL).eval()
    labels = torch.zeros(6, dtype=torch.long)
    losses = []
    for _ in range(2):
        draws(task)
        torch.rand(3)
        losses.append(task.training_losses(images, labels)["auxiliary"])
    assert torch.equal(*losses)


def test_test_time_wants_small_noise(images):
    task = NCTTT(**SMALL).eval()
    seen = inputs_of(task)
    loss = task.auxiliary_loss(images, torch.Generator())
    projections, scores = seen[0]
    _, maps = task.encode_with_maps(images)
    torch.testing.assert_close(projections, task.projector(maps[2]).flatten(1))
    torch.testing.assert_close(loss, softplus(scores))
    assert loss.shape == (6,)


def test_a_batch_of_one_works(images):
    task = NCTTT(**SMALL)
    assert TestTimeTraining(steps=2, lr=1e-3).wrap(task)(images[:1]).isfinite().all()


@pytest.mark.parametrize(("layer", "image_size", "side"), [(1, 32, 32), (2, 32, 16), (3, 48, 12), (2, 30, 15)])
def test_discriminator_fits_the_chosen_maps(layer, image_size, side):
    task = NCTTT(layer=layer, image_size=image_size, **SMALL).eval()
    assert task.discriminator[0].in_features == 4 * side * side
    loss = task.auxiliary_loss(torch.rand(2, 3, 64, 64), torch.Generator())  # larger images are cropped
    assert loss.shape == (2,)
    assert not task.encoder.training
    assert NCTTT(**SMALL).encoder.training


def test_images_of_another_size_are_an_error():
    task = NCTTT(**SMALL).eval()
    with pytest.raises(ValueError, match=r"maps of 14x14 in layer 2, .* made for 16x16: set image_size"):
        task.auxiliary_loss(torch.rand(2, 3, 28, 28), torch.Generator())


def test_noise_survives_half_precision(images, draws):
    """In bf16 a projection of size 1 has steps of 0.008: the small noise of 0.015 would be rounded away."""
    task = NCTTT(**SMALL)
    draws(task)
    seen = inputs_of(task)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = task.training_losses(images, torch.zeros(6, dtype=torch.long))["auxiliary"]
        test_time = task.auxiliary_loss(images, torch.Generator())
    assert all(values.dtype == scores.dtype == torch.float32 for values, scores in seen)
    assert loss.dtype == test_time.dtype == torch.float32


def test_published_settings():
    """Adam is the optimizer: the authors' code looks up the one of source training, SGD, instead."""
    task = NCTTT(encoder="cifar_resnet8")
    protocol = task.default_adapter().protocol()
    assert (protocol["optimizer"], protocol["lr"], protocol["steps"]) == ("Adam", 1e-5, 20)
    assert (protocol["reset"], protocol["norm"]) == ("batch", "ema")
    assert (task.small_noise, task.large_noise) == (0.015, 0.1)
    assert task.discriminator[3].bias is None
