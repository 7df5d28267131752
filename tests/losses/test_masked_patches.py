"""The loss of a masked autoencoder against a walk through pixels."""

from __future__ import annotations

import math

import pytest
import torch

from ttalight.losses import masked_patch_loss


def test_loss_is_that_of_masked_patches_alone():
    generator = torch.Generator().manual_seed(0)
    predicted = torch.randn(3, 5, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    patches = torch.rand(3, 5, 4, generator=generator, dtype=torch.float64)
    visible = torch.tensor([[0, 3], [4, 1], [2, 0]])
    expected = []
    for image in range(3):
        losses = []
        for place in set(range(5)) - set(visible[image].tolist()):
            values = patches[image, place].tolist()
            mean = sum(values) / 4
            deviation = math.sqrt(sum((value - mean) ** 2 for value in values) / 3 + 1e-6)
            errors = [(float(predicted[image, place, i]) - (values[i] - mean) / deviation) ** 2 for i in range(4)]
            losses.append(sum(errors) / 4)
        expected.append(sum(losses) / 3)
    loss = masked_patch_loss(predicted, patches, visible)
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))
    loss.sum().backward()
    assert not predicted.grad.gather(1, visible[..., None].expand(-1, -1, 4)).any()
    one = masked_patch_loss(predicted, patches[:1], visible)  # an image for all masks
    torch.testing.assert_close(one, masked_patch_loss(predicted, patches[:1].expand(3, -1, -1), visible))


def test_shapes_that_do_not_fit_are_refused():
    patches = torch.zeros(2, 4, 3)
    with pytest.raises(ValueError, match="expected predictions"):
        masked_patch_loss(patches[:, :3], patches, torch.zeros(2, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="no patch is masked: 4 of 4"):
        masked_patch_loss(patches, patches, torch.zeros(2, 4, dtype=torch.long))
