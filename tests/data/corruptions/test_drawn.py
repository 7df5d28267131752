"""Random corruptions against slow per-image references that are given the same draws."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ttalight.data.corruptions import TABLES, parameters
from ttalight.data.corruptions.blur import copied_from, glass_blur, motion_blur
from ttalight.data.corruptions.digital import displace, elastic_transform, warp_affine
from ttalight.data.corruptions.motion import smear
from ttalight.data.corruptions.noise import gaussian_noise, impulse_noise, shot_noise, speckle_noise
from ttalight.data.corruptions.spatter import distance_to, equalise, outlines, shading, spatter
from ttalight.data.corruptions.weather import fog, plasma, snow

HEIGHT, WIDTH = 22, 27
EVERY_STRENGTH = [(table, severity) for table in TABLES for severity in range(1, 6)]


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


def array(image):
    return image.permute(1, 2, 0).numpy().astype(float)


@pytest.fixture
def images(pictures):
    return pictures(2, HEIGHT, WIDTH)


@pytest.mark.parametrize(("function", "name"), [(gaussian_noise, "gaussian_noise"), (speckle_noise, "speckle_noise")])
def test_gaussian_noises(function, name, images, drawn, check):
    noise = torch.randn(images.shape, generator=seeded())
    result = function(images, 0.2, generator=seeded())
    for k in range(len(images)):
        check(result[k], getattr(drawn, name)(array(images[k]), 0.2, noise=array(noise[k])))


def test_impulse_noise(images, drawn, check):
    uniform = torch.rand(images.shape, generator=seeded())
    result = impulse_noise(images, 0.2, generator=seeded())
    for k in range(len(images)):
        check(result[k], drawn.impulse_noise(array(images[k]), 0.2, uniform=array(uniform[k])))


def test_shot_noise_counts_photons():
    photons, level = 50, 102
    images = torch.full((100, 3, 16, 16), level, dtype=torch.uint8)
    result = shot_noise(images, photons, generator=seeded())
    counts = torch.bincount(result.flatten().long(), minlength=256)
    assert not counts[[v for v in range(256) if v not in {int(255 * k / photons + 1e-6) for k in range(51)}]].any()
    rate = torch.tensor(photons * level / 255, dtype=torch.float64)
    for k in (10, 20, 30):
        expected = torch.distributions.Poisson(rate).log_prob(torch.tensor(float(k))).exp().item()
        share = counts[int(255 * k / photons + 1e-6)].item() / result.numel()
        assert share == pytest.approx(expected, rel=0.12)


@pytest.mark.parametrize(("table", "severity"), EVERY_STRENGTH)
def test_glass_blur(table, severity, images, drawn, check):
    sigma, reach, rounds = parameters(table, "glass_blur", severity)
    shape = (len(images), rounds, HEIGHT - 2 * reach, WIDTH - 2 * reach, 2)
    offsets = torch.randint(-reach, reach, shape, generator=seeded())
    result = glass_blur(images, sigma, reach, rounds, generator=seeded())
    for k in range(len(images)):
        levels = drawn.glass_blur(array(images[k]), sigma, reach, rounds, offsets=offsets[k].numpy())
        check(result[k], levels, share=0.01)  # the blur before the copies is truncated as well


def test_chains_of_copies_are_followed_to_their_end():
    height, width, reach = 4, 7, 1
    offsets = torch.zeros(1, 1, 2, 5, 2, dtype=torch.long)
    offsets[..., 1] = -1  # every pixel copies its left neighbour, which is visited later
    source = copied_from(offsets, height, width, reach).view(height, width)
    pixels = torch.arange(height * width).view(height, width)
    assert torch.equal(source[2:, 2:], pixels[2:, 1:-1])
    assert torch.equal(source[:2], pixels[:2])
    wide = torch.zeros(1, 1, 5, 5, 2, dtype=torch.long)
    wide[..., 1] = 1  # every pixel copies its right neighbour, which was visited before: the margin's colour spreads
    source = copied_from(wide, 9, 9, 2).view(9, 9)
    assert torch.equal(source[3:8, 3:8], torch.arange(81).view(9, 9)[3:8, 8:].expand(5, 5))


@pytest.mark.parametrize(("table", "severity"), EVERY_STRENGTH)
def test_motion_blur(table, severity, pictures, drawn, check):
    images = pictures(3, HEIGHT, WIDTH)
    radius, sigma = parameters(table, "motion_blur", severity)
    angles = torch.rand(len(images), generator=seeded(), dtype=torch.float64) * 90 - 45
    result = motion_blur(images, radius, sigma, generator=seeded())
    for k in range(len(images)):
        check(result[k], drawn.motion_blur(array(images[k]), radius, sigma, angle=angles[k].item()))


def test_each_image_is_smeared_along_its_own_angle(drawn):
    angles = torch.tensor((100.0, -170.0, 0.0, 45.0, 30.0, -90.0), dtype=torch.float64)
    planes = torch.rand(len(angles), 2, 9, 12, generator=seeded())
    result = smear(planes, angles, 4, 2.5)
    for k, angle in enumerate(angles.tolist()):
        expected = drawn.smear(planes[k].permute(1, 2, 0).double().numpy(), angle, 4, 2.5)
        torch.testing.assert_close(result[k].permute(1, 2, 0).double(), torch.from_numpy(expected), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("table", "severity"), EVERY_STRENGTH)
def test_snow(table, severity, images, drawn, check):
    values = parameters(table, "snow", severity)
    generator = seeded()
    noise = torch.randn((len(images), HEIGHT, WIDTH), generator=generator)
    angles = torch.rand(len(images), generator=generator, dtype=torch.float64) * 90 - 135
    result = snow(images, *values, generator=seeded())
    for k in range(len(images)):
        extra = {"noise": noise[k].double().numpy(), "angle": angles[k].item()}
        check(result[k], drawn.snow(array(images[k]), *values, **extra), share=0.01)  # flakes are truncated twice


@pytest.mark.parametrize(("table", "severity"), EVERY_STRENGTH)
def test_fog(table, severity, images, drawn, check):
    values = parameters(table, "fog", severity)
    draws = torch.rand((len(images), 32 * 32 - 1), generator=seeded()).double() * 2 - 1
    result = fog(images, *values, generator=seeded())
    for k in range(len(images)):
        check(result[k], drawn.fog(array(images[k]), *values, draws=draws[k].tolist()))


@pytest.mark.parametrize("side", [2, 4, 16])
def test_plasma_is_the_diamond_square_algorithm(side, drawn):
    draws = torch.rand(3, side * side - 1, generator=seeded(), dtype=torch.float64) * 2 - 1
    result = plasma(draws, side, 1.75)
    for k in range(3):
        expected = drawn.plasma(draws[k].tolist(), side, 1.75)
        torch.testing.assert_close(result[k], torch.from_numpy(expected), atol=1e-12, rtol=0)


def test_fog_leaves_a_black_image_black():
    black = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    assert not fog(black, 1.0, 2.0, generator=seeded()).any()


@pytest.mark.parametrize(("table", "severity"), EVERY_STRENGTH)
def test_elastic_transform(table, severity, images, drawn, check):
    values = parameters(table, "elastic_transform", severity)
    generator = seeded()
    shifts = torch.rand((len(images), 3, 2), generator=generator, dtype=torch.float64) * 2 - 1
    field = torch.rand((len(images), 2, HEIGHT, WIDTH), generator=generator).double() * 2 - 1
    result = elastic_transform(images, *values, generator=seeded())
    for k in range(len(images)):
        extra = {"shifts": shifts[k].numpy(), "field": field[k].numpy()}
        check(result[k], drawn.elastic_transform(array(images[k]), *values, **extra), slack=0.02)


def test_warp_moves_the_image_with_the_points(images):
    levels = images.float()
    shifted = warp_affine(levels, torch.tensor((3.0, -2.0), dtype=torch.float64).expand(2, 3, 2))
    torch.testing.assert_close(shifted[..., :-2, 3:], levels[..., 2:, :-3], atol=0.01, rtol=0)
    torch.testing.assert_close(warp_affine(levels, torch.zeros(2, 3, 2).double()), levels, atol=0.01, rtol=0)


def test_displacement_reads_at_the_field(images):
    levels = images.float()
    field = torch.tensor((2.0, 1.0)).view(1, 2, 1, 1).expand(2, 2, HEIGHT, WIDTH)
    moved = displace(levels, field)
    torch.testing.assert_close(moved[..., :-1, :-2], levels[..., 1:, 2:], atol=0.01, rtol=0)
    torch.testing.assert_close(moved[..., :-1, -2:], levels[..., 1:, -2:].flip(-1), atol=0.01, rtol=0)


@pytest.mark.parametrize(("table", "severity"), EVERY_STRENGTH)
def test_spatter(table, severity, images, drawn, check):
    values = parameters(table, "spatter", severity)
    noise = torch.randn((len(images), HEIGHT, WIDTH), generator=seeded()).double()
    result = spatter(images, *values, generator=seeded())
    for k in range(len(images)):
        check(result[k], drawn.spatter(array(images[k]), *values, noise=noise[k].numpy()))


def drops(seed, threshold=0.5):
    """Blots with steep and shallow rims, as whole grey levels."""
    noise = torch.rand(4, 1, 18, 21, generator=seeded(seed))
    soft = torch.nn.functional.avg_pool2d(noise, 3, stride=1, padding=1).squeeze(1)
    return soft.masked_fill(soft < threshold, 0).mul(255).floor()


@pytest.mark.parametrize("seed", range(2))
def test_stages_of_the_drops_shading(seed, drawn):
    fields = drops(seed)
    edges = outlines(fields, low=50, high=150)
    assert edges.any()
    for k, field in enumerate(fields.double().numpy()):
        expected = drawn.outlines(field, 50, 150)
        np.testing.assert_array_equal(edges[k].numpy(), expected)
        np.testing.assert_allclose(distance_to(edges[k : k + 1])[0].numpy(), drawn.distances(expected), atol=1e-5)
        np.testing.assert_array_equal(shading(fields[k : k + 1])[0].numpy(), drawn.shading(field))


def test_weak_outlines_count_only_beside_strong_ones():
    ramp = torch.zeros(1, 12, 12)
    ramp[:, :, 6:] = 30.0
    assert not outlines(ramp, low=50, high=150).any()
    ramp[:, 5, 6:] = 80.0
    edges = outlines(ramp, low=50, high=150)
    assert edges[0, 5, 5] or edges[0, 5, 6]
    assert edges[0, :, 5:7].any(dim=1).sum() > 3


def test_distance_without_target_is_infinite():
    nowhere = torch.zeros(1, 5, 6, dtype=torch.bool)
    assert distance_to(nowhere).isinf().all()
    assert torch.equal(equalise(torch.full((1, 5, 6), 20.0), levels=21), torch.full((1, 5, 6), 20.0))
    grey = torch.full((1, 3, 8, 8), 90, dtype=torch.uint8)
    assert torch.equal(spatter(grey, 0.0, 0.01, 1.0, 0.7, 0.6, 0, generator=seeded()), grey)
