from __future__ import annotations

import math

import pytest
import torch
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as oracle

from ttalight.transforms import (
    draw_boxes,
    draw_mask,
    draw_offsets,
    horizontal_flip,
    padded_crop,
    random_crop,
    random_horizontal_flip,
    resized_crop,
)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def oracle_crops(images, boxes, size):
    crops = [
        oracle.resized_crop(images[n % len(images)], *box, size=[size, size], antialias=True)
        for n, box in enumerate(boxes.tolist())
    ]
    return torch.stack(crops)


@pytest.mark.parametrize(
    ("height", "width", "size", "batch"),
    [(32, 32, 32, 40), (28, 28, 32, 40), (48, 40, 32, 40), (17, 50, 9, 40), (3, 3, 8, 40), (256, 256, 224, 2)],
)
def test_resized_crop_equals_torchvision(height, width, size, batch):
    images = torch.rand(batch, 3, height, width, generator=seeded())
    boxes = draw_boxes(batch, height, width, (0.05, 1.0), (0.4, 2.5), seeded(1))
    flip = draw_mask(batch, 0.5, seeded(2), "cpu")
    expected = oracle_crops(images, boxes, size)
    torch.testing.assert_close(resized_crop(images, boxes, size), expected, rtol=0, atol=1e-6)
    flipped = torch.where(flip[:, None, None, None], expected.flip(3), expected)
    torch.testing.assert_close(resized_crop(images, boxes, size, flip), flipped, rtol=0, atol=1e-6)


def test_resized_crop_equals_torchvision_for_every_box():
    sides = [(start, length) for length in range(1, 7) for start in range(7 - length)]
    boxes = torch.tensor([(top, left, h, w) for top, h in sides for left, w in sides])
    images = torch.rand(1, 3, 6, 6, dtype=torch.float64, generator=seeded())
    for size in (1, 4, 6, 11):
        expected = oracle_crops(images, boxes, size)
        torch.testing.assert_close(resized_crop(images, boxes, size), expected, rtol=0, atol=1e-13)


def test_full_crop_is_identity_and_double_flip_undoes():
    images = torch.rand(5, 3, 20, 20, generator=seeded())
    boxes = torch.tensor([[0, 0, 20, 20]]).expand(5, 4)
    everywhere = torch.ones(5, dtype=torch.bool)
    assert torch.equal(resized_crop(images, boxes, 20), images)
    once = resized_crop(images, boxes, 20, everywhere)
    assert torch.equal(once, images.flip(3))
    assert torch.equal(resized_crop(once, boxes, 20, everywhere), images)


def test_several_boxes_an_image_are_view_major():
    images = torch.rand(3, 3, 12, 10, generator=seeded())
    boxes = draw_boxes(6, 12, 10, generator=seeded(1))
    together = resized_crop(images, boxes, 8)
    apart = torch.cat([resized_crop(images, boxes[:3], 8), resized_crop(images, boxes[3:], 8)])
    assert torch.equal(together, apart)


def test_pixels_outside_the_box_never_contribute():
    images = torch.full((1, 3, 16, 16), math.inf)
    images[:, :, 4:9, 3:13] = 0.25
    made = resized_crop(images, torch.tensor([[4, 3, 5, 10]]), 7)
    torch.testing.assert_close(made, torch.full((1, 3, 7, 7), 0.25))


def test_resized_crop_keeps_precision_under_autocast():
    images = torch.rand(4, 3, 16, 16, generator=seeded())
    boxes = draw_boxes(4, 16, 16, generator=seeded(1))
    expected = resized_crop(images, boxes, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(resized_crop(images, boxes, 16), expected)
    half = images.bfloat16()
    assert torch.equal(resized_crop(half, boxes, 16), resized_crop(half.float(), boxes, 16).bfloat16())


def test_gradient_of_resized_crop():
    boxes = draw_boxes(3, 5, 4, generator=seeded())
    images = torch.rand(3, 3, 5, 4, dtype=torch.float64, generator=seeded(), requires_grad=True)
    assert torch.autograd.gradcheck(lambda pixels: resized_crop(pixels, boxes, 3), images)


def kolmogorov_smirnov(first: torch.Tensor, second: torch.Tensor) -> float:
    """Largest difference of the two empirical distribution functions."""
    points = torch.cat((first, second)).unique()
    steps = [torch.searchsorted(x.sort().values, points, right=True) / len(x) for x in (first, second)]
    return float((steps[0] - steps[1]).abs().max())


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [
        (32, 32, (0.2, 1.0), (3 / 4, 4 / 3)),
        (48, 40, (0.08, 1.0), (3 / 4, 4 / 3)),
        (20, 90, (0.5, 1.0), (3 / 4, 4 / 3)),  # falls back for about half of the images
        (90, 20, (0.6, 1.0), (0.5, 2.0)),
    ],
)
def test_boxes_are_distributed_as_in_torchvision(height, width, scale, ratio):
    count = 4000
    boxes = draw_boxes(count, height, width, scale, ratio, seeded(3)).double()
    image = torch.empty(3, height, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        theirs = torch.tensor([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(count)])
    # Two samples of one distribution differ by more than 1.95 sqrt(2 / n) once in a thousand.
    bound = 1.95 * math.sqrt(2 / count)
    for column in range(4):
        assert kolmogorov_smirnov(boxes[:, column], theirs[:, column].double()) < bound
    for statistic in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2], lambda b: b[:, 0] / (b[:, 2] + 1)):
        assert kolmogorov_smirnov(statistic(boxes), statistic(theirs.double())) < bound


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 3), (5, 64), (64, 5)])
def test_boxes_lie_within_the_image(height, width):
    top, left, box_height, box_width = draw_boxes(5000, height, width, (0.01, 1.0), (0.1, 9.0), seeded()).unbind(1)
    assert int(top.min()) >= 0
    assert int(left.min()) >= 0
    assert int(box_height.min()) >= 1
    assert int(box_width.min()) >= 1
    assert int((top + box_height).max()) <= height
    assert int((left + box_width).max()) <= width


def test_fallback_is_largest_central_crop():
    wide = draw_boxes(3, 10, 100, (1.0, 1.0), (1.0, 2.0), seeded())
    assert wide.tolist() == [[0, 40, 10, 20]] * 3
    tall = draw_boxes(3, 100, 10, (1.0, 1.0), (0.5, 1.0), seeded())
    assert tall.tolist() == [[40, 0, 20, 10]] * 3


def chi_squared(values: torch.Tensor, kinds: int) -> float:
    """Pearson's statistic of integers against the uniform distribution on 0 .. kinds - 1."""
    counts = torch.bincount(values, minlength=kinds).double()
    assert len(counts) == kinds
    expected = len(values) / kinds
    return float(((counts - expected) ** 2 / expected).sum())


def test_boxes_are_uniform_over_places():
    boxes = draw_boxes(9000, 8, 12, (1 / 6, 1 / 6), (1.0, 1.0), seeded())
    assert torch.equal(boxes[:, 2:], torch.full((9000, 2), 4))
    assert chi_squared(boxes[:, 0], 5) < 18.5  # 4 degrees of freedom, p = 0.001
    assert chi_squared(boxes[:, 1], 9) < 26.1  # 8 degrees of freedom
    assert chi_squared(boxes[:, 0] * 9 + boxes[:, 1], 45) < 78.7  # 44 degrees of freedom


def test_padded_crop_equals_padding_and_slicing():
    images = torch.rand(30, 3, 9, 7, generator=seeded())
    offsets = draw_offsets(30, 4, seeded(1))
    flip = draw_mask(30, 0.5, seeded(2), "cpu")
    padded = oracle.pad(images, [4, 4, 4, 4])
    for image, made, (top, left), flipped in zip(
        padded, padded_crop(images, offsets, 4, flip), offsets.tolist(), flip.tolist(), strict=True
    ):
        expected = image[:, top : top + 9, left : left + 7]
        assert torch.equal(made, expected.flip(2) if flipped else expected)


def test_offsets_are_uniform_over_every_shift():
    offsets = draw_offsets(18_000, 4, seeded())
    for column in offsets.unbind(1):
        assert chi_squared(column, 9) < 26.1  # 8 degrees of freedom, p = 0.001


def test_random_crop_without_padding_is_the_identity():
    images = torch.rand(4, 3, 8, 8, generator=seeded())
    assert torch.equal(random_crop(images, 0), images)
    assert random_crop(images.half(), 2, seeded()).dtype == torch.float16


def test_flip():
    images = torch.rand(6, 3, 4, 5, generator=seeded())
    flip = torch.tensor([True, False, True, True, False, False])
    once = horizontal_flip(images, flip)
    assert torch.equal(once[flip], images[flip].flip(3))
    assert torch.equal(once[~flip], images[~flip])
    assert torch.equal(horizontal_flip(once, flip), images)
    assert torch.equal(random_horizontal_flip(images, 1.0), images.flip(3))
    assert torch.equal(random_horizontal_flip(images, 0.0), images)
    share = draw_mask(10_000, 0.3, seeded(), "cpu").float().mean()
    assert abs(float(share) - 0.3) < 4 * math.sqrt(0.3 * 0.7 / 10_000)


def test_errors_say_what_to_do():
    images, boxes = torch.rand(2, 3, 8, 8), torch.tensor([[0, 0, 8, 8], [0, 0, 4, 4]])
    with pytest.raises(TypeError, match=r"torch.uint8: use images.float\(\) / 255"):
        resized_crop((images * 255).byte(), boxes, 8)
    with pytest.raises(ValueError, match=r"got shape \(3, 8, 8\): add the batch dimension"):
        resized_crop(images[0], boxes, 8)
    with pytest.raises(ValueError, match=r"with 1 channels: repeat the grey channel"):
        random_crop(images[:, :1], 4)
    with pytest.raises(TypeError, match=r"got ndarray"):
        random_crop(images.numpy(), 4)
    with pytest.raises(ValueError, match=r"boxes must be \(N, 4\) with N a multiple of the 2 images"):
        resized_crop(images, boxes[:1], 8)
    with pytest.raises(TypeError, match=r"boxes must be whole pixels"):
        resized_crop(images, boxes.float(), 8)
    with pytest.raises(ValueError, match=r"flip must be \(2,\)"):
        resized_crop(images, boxes, 8, torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"size must be a whole number >= 1; got 0"):
        resized_crop(images, boxes, 0)
    with pytest.raises(ValueError, match=r"padding must be a whole number >= 0; got -1"):
        random_crop(images, -1)
    with pytest.raises(ValueError, match=r"offsets must be \(2, 2\)"):
        padded_crop(images, torch.zeros(1, 2, dtype=torch.long), 1)
    with pytest.raises(ValueError, match=r"scale must be .*; got \(0.5, 0.2\)"):
        draw_boxes(1, 8, 8, (0.5, 0.2))
    with pytest.raises(ValueError, match=r"p must be a probability in \[0, 1\]; got 1.5"):
        random_horizontal_flip(images, 1.5)
