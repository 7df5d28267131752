"""Crops and flips of label maps, beside the same crops of images."""

from __future__ import annotations

import pytest
import torch

from ttalight.transforms import RandomResizedCropFlipMaps, resized_crop_maps


def test_crop_by_hand():
    labels = torch.arange(2 * 6 * 8).view(2, 6, 8)
    boxes = torch.tensor([[1, 2, 4, 4], [0, 0, 6, 8]])
    first, second = resized_crop_maps(labels, boxes, 2, torch.tensor([False, True]))
    assert torch.equal(first, labels[0, [2, 4]][:, [3, 5]])  # centres of halves of the box
    assert torch.equal(second, labels[1, [1, 4]][:, [6, 2]])


def test_maps_follow_images():
    """Regions of an image larger than its blur have the class that is drawn there."""
    labels = torch.zeros(3, 32, 48, dtype=torch.uint8)
    labels[:, 8:, 24:] = 1
    images = labels[:, None].expand(-1, 3, -1, -1).double()
    augment = RandomResizedCropFlipMaps(size=20)
    images, maps = augment(images, labels, torch.Generator().manual_seed(0))
    assert images.shape == (3, 3, 20, 20)
    assert (maps.shape, maps.dtype) == ((3, 20, 20), torch.uint8)
    assert ((images[:, 0] - maps).abs() > 0.55).sum() == 0


def test_shapes_must_agree():
    with pytest.raises(ValueError, match=r"label maps must be \(2, 4, 4\), as the images, got \(2, 4, 5\)"):
        RandomResizedCropFlipMaps()(torch.rand(2, 3, 4, 4), torch.zeros(2, 4, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"boxes \(B, 4\), got \(2, 4, 4\) and \(1, 4\)"):
        resized_crop_maps(torch.zeros(2, 4, 4), torch.zeros(1, 4, dtype=torch.long), 2)
