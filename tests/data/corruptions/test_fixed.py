"""Corruptions without random draws, and the filters, against slow per-image references."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ttalight.data.corruptions import TABLES, corrupt, parameters
from ttalight.data.corruptions.blur import disc
from ttalight.data.corruptions.pixels import gaussian_matrix, interpolation_matrix, separable, zoom_matrix

FIXED = (
    "defocus_blur",
    "zoom_blur",
    "brightness",
    "contrast",
    "pixelate",
    "jpeg_compression",
    "gaussian_blur",
    "saturate",
)


@pytest.mark.parametrize("severity", range(1, 6))
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("corruption", FIXED)
def test_agrees_with_the_definition(corruption, table, severity, pictures, fixed, check):
    images = pictures(2, 24, 31)
    results = corrupt(images, corruption, severity, table=table)
    values = parameters(table, corruption, severity)
    if corruption == "jpeg_compression":
        values = (int(values[0]),)
    for image, result in zip(images, results, strict=True):
        levels = getattr(fixed, corruption)(image.permute(1, 2, 0).contiguous().numpy(), *values)
        check(result, levels)


@pytest.mark.parametrize("size", [32, 40])
def test_zoom_factors_that_coincide_are_all_counted(size, pictures, fixed, check):
    image = pictures(1, size, size)
    check(corrupt(image, "zoom_blur", 5)[0], fixed.zoom_blur(image[0].permute(1, 2, 0).numpy(), 1.26, 0.01))


@pytest.mark.parametrize("level", [0, 1, 127, 254, 255])
@pytest.mark.parametrize(
    "corruption", ["defocus_blur", "zoom_blur", "contrast", "pixelate", "gaussian_blur", "glass_blur"]
)
def test_flat_images_keep_their_level(corruption, level):
    images = torch.full((2, 3, 32, 32), level, dtype=torch.uint8)
    for severity in range(1, 6):
        assert torch.equal(corrupt(images, corruption, severity), images)


def test_added_saturation_of_grey_and_black():
    images = torch.tensor((0, 200), dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 4, 4).contiguous()
    result = corrupt(images, "saturate", 5)
    assert not result[0].any()
    assert result[1, :, 0, 0].tolist() == [200, 160, 160]


def test_black_turns_grey_when_brightened():
    black = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    assert corrupt(black, "brightness", 5).unique().tolist() == [76]


@pytest.mark.parametrize(("radius", "alias_blur"), sorted({v for t in TABLES.values() for v in t["defocus_blur"]}))
def test_disc_is_symmetric_and_has_no_empty_margin(radius, alias_blur):
    kernel = disc(radius, alias_blur)
    for other in (kernel.T, kernel.flip(0), kernel.flip(1)):
        torch.testing.assert_close(kernel, other, atol=1e-7, rtol=0)
    assert kernel[0].any()
    assert kernel.sum() == pytest.approx({8: 1.01298, 10: 1.01079}.get(radius, 1), abs=1e-5)  # OpenCV's sums


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("sigma", [0.0, 0.4, 2.0, 40.0])
def test_gaussian_matrix_smooths_along_both_axes(sigma, mirror, fixed):
    field = np.random.default_rng(0).random((5, 9))
    outside = fixed.mirror_double if mirror else (lambda index, size: min(max(index, 0), size - 1))
    expected = fixed.gaussian(field, sigma, truncate=3.0, outside=outside)
    rows, columns = (gaussian_matrix(size, sigma, truncate=3.0, mirror=mirror) for size in field.shape)
    result = separable(torch.from_numpy(field).float()[None], rows, columns)[0]
    torch.testing.assert_close(result, torch.from_numpy(expected).float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [1, 2, 7, 32, 224])
@pytest.mark.parametrize("factor", [1, 1.01, 1.25, 2.25, 4.5])
def test_zoom_matrix_averages_neighbours(size, factor):
    matrix = zoom_matrix(size, factor)
    assert matrix.shape == (size, size)
    assert (matrix >= 0).all()
    torch.testing.assert_close(matrix.sum(dim=1), torch.ones(size))
    assert ((matrix > 0).sum(dim=1) <= 2).all()


def test_interpolation_stops_at_the_ends():
    line = torch.tensor((10.0, 20.0, 40.0))
    matrix = interpolation_matrix(np.array((-1.0, 0.0, 0.25, 1.5, 2.0, 7.0)), 3)
    assert (matrix @ line).tolist() == [10.0, 10.0, 12.5, 30.0, 40.0, 40.0]
