from __future__ import annotations

import pytest
import torch

from ttalight.models import Normalize

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def test_normalises_each_channel():
    images = torch.rand(2, 3, 4, 5)
    normalised = Normalize(MEAN, STD)(images)
    for channel in range(3):
        expected = (images[:, channel] - MEAN[channel]) / STD[channel]
        torch.testing.assert_close(normalised[:, channel], expected)


def test_is_the_identity_by_default():
    images = torch.rand(2, 3, 4, 4)
    assert torch.equal(Normalize()(images), images)


def test_values_are_buffers_in_the_state_dict():
    source, target = Normalize(MEAN, STD), Normalize()
    target.load_state_dict(source.state_dict())
    images = torch.rand(1, 3, 4, 4)
    assert torch.equal(source(images), target(images))
    assert not list(source.parameters())


def test_set_writes_in_place():
    layer = Normalize()
    mean, std = layer.mean, layer.std
    layer.set(MEAN, STD)
    assert layer.mean is mean
    assert layer.std is std
    torch.testing.assert_close(layer(torch.tensor(MEAN)[None, :, None, None]), torch.zeros(1, 3, 1, 1))


def test_gradients_reach_the_images():
    images = torch.rand(1, 3, 2, 2, requires_grad=True)
    Normalize(MEAN, STD)(images).sum().backward()
    torch.testing.assert_close(images.grad, (1 / torch.tensor(STD))[None, :, None, None].expand(1, 3, 2, 2))


@pytest.mark.parametrize(
    ("mean", "std", "message"),
    [
        ((0.5,), STD, "mean must be three finite numbers"),
        (MEAN, (1.0, 1.0), "std must be three finite numbers"),
        ((0.5, 0.5, float("nan")), STD, "mean must be three finite numbers"),
        (MEAN, (0.2, 0.0, 0.2), "std must be positive"),
        (MEAN, (0.2, -0.1, 0.2), "std must be positive"),
    ],
)
def test_refuses_bad_values_and_keeps_the_old_ones(mean, std, message):
    with pytest.raises(ValueError, match=message):
        Normalize(mean, std)
    layer = Normalize(MEAN, STD)
    with pytest.raises(ValueError, match=message):
        layer.set(mean, std)
    assert torch.equal(layer.mean, torch.tensor(MEAN))
    assert torch.equal(layer.std, torch.tensor(STD))


def test_refuses_bytes():
    with pytest.raises(TypeError, match="divide bytes by 255"):
        Normalize()(torch.zeros(1, 3, 2, 2, dtype=torch.uint8))
