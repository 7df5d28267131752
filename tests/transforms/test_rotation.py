"""Rotations by quarters of a turn and their labels."""

from __future__ import annotations

import pytest
import torch

from ttalight.transforms import rotate_quarters, rotation_views


def images(count=6, size=5):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0))


def turned_by_hand(image, quarters):
    """Pixel by pixel: a quarter counter-clockwise brings row r, column c to row S - 1 - c, column r."""
    for _ in range(quarters):
        result = torch.empty_like(image)
        size = image.shape[-1]
        for row in range(size):
            for column in range(size):
                result[:, size - 1 - column, row] = image[:, row, column]
        image = result
    return image


def test_every_image_turns_by_its_own_quarters():
    batch, quarters = images(), torch.tensor([3, 0, 1, 2, 1, 0])
    for image, count, turned in zip(batch, quarters.tolist(), rotate_quarters(batch, quarters), strict=True):
        assert torch.equal(turned, turned_by_hand(image, count))


def test_expanded_views_are_all_four_with_their_labels():
    batch = images()
    turned, labels = rotation_views(batch)
    assert labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6 + [3] * 6
    assert torch.equal(turned, rotate_quarters(batch.repeat(4, 1, 1, 1), labels))


def test_random_views_are_labelled_by_rotation():
    batch = images(4000, 2)
    turned, labels = rotation_views(batch, "random", torch.Generator().manual_seed(1))
    assert torch.equal(turned, rotate_quarters(batch, labels))
    assert torch.bincount(labels, minlength=4).tolist() == pytest.approx([1000] * 4, abs=120)
    again = rotation_views(batch, "random", torch.Generator().manual_seed(1))
    assert torch.equal(again[1], labels)


def test_what_is_wrong_is_said():
    with pytest.raises(ValueError, match="rotations need square images, got 4 x 6"):
        rotation_views(torch.rand(2, 3, 4, 6))
    with pytest.raises(ValueError, match="rotation must be one of expand, random, got 'both'"):
        rotation_views(images(), "both")
    with pytest.raises(ValueError, match=r"quarters must be \(6,\)"):
        rotate_quarters(images(), torch.zeros(2, dtype=torch.long))
