from __future__ import annotations

import itertools
import math

import pytest
import torch
from torchvision.transforms.v2 import ColorJitter
from torchvision.transforms.v2 import functional as oracle

from ttalight.transforms import (
    JitterParameters,
    adjust_hue,
    color_jitter,
    draw_color_jitter,
    draw_sigmas,
    gaussian_blur,
    grayscale,
    random_grayscale,
)

ORDERS = torch.tensor(list(itertools.permutations(range(4))))
OPERATIONS = (oracle.adjust_brightness, oracle.adjust_contrast, oracle.adjust_saturation, oracle.adjust_hue)
# Corners of the colour cube, greys, and pixels with two equal channels: where the hue's branches meet.
CUBE = torch.tensor(list(itertools.product((0.0, 0.25, 0.5, 1.0), repeat=3)))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def special_images(batch: int) -> torch.Tensor:
    """Images of 8 x 8 pixels, each the 64 special colours in its own order."""
    orders = torch.rand(batch, 64, generator=seeded(9)).argsort(dim=1)
    return CUBE[orders].permute(0, 2, 1).reshape(batch, 3, 8, 8)


def oracle_jitter(images: torch.Tensor, parameters: JitterParameters) -> torch.Tensor:
    made = []
    for n, image in enumerate(images):
        if parameters.applied is None or parameters.applied[n]:
            for operation in parameters.order[n].tolist():
                factors = parameters[operation]
                if factors is not None:
                    image = OPERATIONS[operation](image, factors[n].item())
        made.append(image)
    return torch.stack(made)


def images_for_orders(kind: str, copies: int) -> torch.Tensor:
    count = 24 * copies
    if kind == "special":
        return special_images(count)
    images = torch.rand(count, 3, 7, 9, generator=seeded())
    return images[:, :1].expand(-1, 3, -1, -1) if kind == "grey" else images


@pytest.mark.parametrize("kind", ["random", "special", "grey"])
@pytest.mark.parametrize("strengths", [(0.4, 0.4, 0.4, 0.1), (1.0, 1.0, 1.0, 0.5)])
def test_jitter_equals_torchvision_in_all_orders(kind, strengths):
    images = images_for_orders(kind, copies=4)
    drawn = draw_color_jitter(len(images), strengths, 0.8, seeded(1))
    parameters = drawn._replace(order=ORDERS.repeat(4, 1))
    torch.testing.assert_close(color_jitter(images, parameters), oracle_jitter(images, parameters), rtol=0, atol=1e-5)


@pytest.mark.parametrize("kept", [c for n in range(5) for c in itertools.combinations(range(4), n)])
def test_operations_that_are_left_out(kept):
    strengths = [0.5 if operation in kept else 0.0 for operation in range(4)]
    images = torch.rand(24, 3, 6, 6, generator=seeded())
    parameters = draw_color_jitter(24, strengths, generator=seeded(1))._replace(order=ORDERS)
    assert [factor is not None for factor in parameters[:4]] == [operation in kept for operation in range(4)]
    torch.testing.assert_close(color_jitter(images, parameters), oracle_jitter(images, parameters), rtol=0, atol=1e-5)


def test_float64_jitter_equals_slow_reference():
    """colorsys, one pixel at a time: torchvision computes hue in float32 only."""
    import colorsys

    images = torch.rand(24, 3, 3, 3, dtype=torch.float64, generator=seeded())
    parameters = draw_color_jitter(24, (0.9, 0.9, 0.9, 0.5), generator=seeded(1))._replace(order=ORDERS)

    def grey(pixel):
        return 0.2989 * pixel[0] + 0.587 * pixel[1] + 0.114 * pixel[2]

    expected = []
    for n, image in enumerate(images):
        pixels = image.flatten(1).T.tolist()
        for operation in ORDERS[n].tolist():
            factor = float(parameters[operation][n])
            mean = sum(map(grey, pixels)) / len(pixels)
            if operation == 3:
                turned = [colorsys.rgb_to_hsv(*pixel) for pixel in pixels]
                pixels = [list(colorsys.hsv_to_rgb((h + factor) % 1.0, s, v)) for h, s, v in turned]
                continue
            targets = {0: lambda _: 0.0, 1: lambda _, mean=mean: mean, 2: grey}
            goals = [targets[operation](pixel) for pixel in pixels]
            pixels = [
                [min(max(factor * channel + (1 - factor) * goal, 0.0), 1.0) for channel in pixel]
                for pixel, goal in zip(pixels, goals, strict=True)
            ]
        expected.append(torch.tensor(pixels, dtype=torch.float64).T.view(3, 3, 3))
    torch.testing.assert_close(color_jitter(images, parameters), torch.stack(expected), rtol=0, atol=1e-12)


@pytest.mark.parametrize("share", [-0.5, -1 / 3, -0.1, 1 / 6, 0.25, 0.5])
def test_hue_equals_torchvision(share):
    images = torch.cat((special_images(2), torch.rand(6, 3, 8, 8, generator=seeded())))
    made = adjust_hue(images, torch.full((8,), share))
    torch.testing.assert_close(made, oracle.adjust_hue(images, share), rtol=0, atol=1e-5)


def test_hue_angle_of_each_image_keeps_greys():
    hue = torch.linspace(-0.5, 0.5, 11)
    images = torch.rand(11, 3, 8, 8, generator=seeded())
    expected = torch.stack([oracle.adjust_hue(i, h) for i, h in zip(images, hue.tolist(), strict=True)])
    torch.testing.assert_close(adjust_hue(images, hue), expected, rtol=0, atol=1e-5)
    for level in (0.0, 0.3, 1.0):
        grey = torch.full((11, 3, 2, 2), level)
        assert torch.equal(adjust_hue(grey, hue), grey)


def test_images_without_a_hue_rest_from_it():
    images = torch.rand(6, 3, 5, 7, generator=torch.Generator().manual_seed(0))
    hue = torch.tensor([0.0, 0.2, 0.0, -0.3, 0.1, 0.0])
    parameters = JitterParameters(None, None, None, hue, torch.arange(4).expand(6, 4), None)
    made = color_jitter(images, parameters)
    assert torch.equal(made[hue == 0], images[hue == 0])
    torch.testing.assert_close(made, adjust_hue(images, hue), rtol=0, atol=1e-6)
    still = parameters._replace(hue=torch.zeros(6))
    assert torch.equal(color_jitter(images, still), images)


def test_hue_third_turn_permutes_channels():
    images = torch.rand(4, 3, 8, 8, dtype=torch.float64, generator=seeded())
    turned = adjust_hue(images, torch.full((4,), 1 / 3, dtype=torch.float64))
    torch.testing.assert_close(turned, images[:, [2, 0, 1]], rtol=0, atol=1e-12)


def test_neutral_factors_change_nothing():
    images = torch.cat((special_images(12), torch.rand(12, 3, 8, 8, generator=seeded())))
    one, zero = torch.ones(24), torch.zeros(24)
    neutral = JitterParameters(one, one, one, None, ORDERS)
    assert torch.equal(color_jitter(images, neutral), images)
    torch.testing.assert_close(color_jitter(images, neutral._replace(hue=zero)), images, rtol=0, atol=1e-6)
    applied = torch.arange(24) % 2 == 0
    made = color_jitter(images, draw_color_jitter(24, generator=seeded())._replace(applied=applied))
    assert torch.equal(made[~applied], images[~applied])
    assert bool((made[applied] != images[applied]).flatten(1).any(1).all())


def test_an_image_alone_is_what_it_is_in_a_batch():
    images = torch.rand(24, 3, 8, 8, generator=seeded())
    drawn = draw_color_jitter(24, generator=seeded())._replace(order=ORDERS)
    parts = JitterParameters(*(part if part is None else part.split(1) for part in drawn))
    alone = [color_jitter(images[i : i + 1], JitterParameters(*(p and p[i] for p in parts))) for i in range(24)]
    assert torch.equal(torch.cat(alone), color_jitter(images, drawn))


def test_input_is_left_alone():
    images = torch.rand(8, 3, 4, 4, generator=seeded())
    before = images.clone()
    color_jitter(images, draw_color_jitter(8, generator=seeded()))
    adjust_hue(images, torch.full((8,), 0.2))
    grayscale(images, torch.ones(8, dtype=torch.bool))
    assert torch.equal(images, before)


def test_parameters_are_distributed_as_in_torchvision():
    count = 4000
    parameters = draw_color_jitter(count, (0.4, 1.5, 0.4, 0.1), 0.8, seeded(1))
    jitter = ColorJitter(0.4, 1.5, 0.4, 0.1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        theirs = [jitter.make_params([]) for _ in range(count)]
    names = ("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")
    bound = 1.95 * math.sqrt(2 / count)  # Kolmogorov-Smirnov distance at p = 0.001
    for mine, name in zip(parameters[:4], names, strict=True):
        reference = torch.tensor([their[name] for their in theirs]).sort().values
        points = torch.cat((mine, reference))
        distance = torch.searchsorted(mine.sort().values, points) - torch.searchsorted(reference, points)
        assert float(distance.abs().max()) / count < bound
    assert abs(float(parameters.applied.float().mean()) - 0.8) < 4 * math.sqrt(0.16 / count)


def test_every_order_is_equally_likely():
    order = draw_color_jitter(24_000, generator=seeded()).order
    assert torch.equal(order.sort(dim=1).values, torch.arange(4).expand(24_000, 4))
    counts = torch.bincount((order * torch.tensor([64, 16, 4, 1])).sum(1))
    counts = counts[counts > 0].float()
    assert len(counts) == 24
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 49.7  # chi-squared, 23 degrees of freedom, p = 0.001


def test_grayscale_equals_torchvision():
    images = special_images(6)
    grey = oracle.rgb_to_grayscale(images, num_output_channels=3)
    torch.testing.assert_close(grayscale(images), grey, rtol=0, atol=1e-6)
    applied = torch.tensor([True, False, True, False, False, True])
    made = grayscale(images, applied)
    assert torch.equal(made[~applied], images[~applied])
    assert torch.equal(made[applied], grayscale(images)[applied])
    assert torch.equal(random_grayscale(images, 0.0), images)
    assert torch.equal(random_grayscale(images, 1.0), grayscale(images))


@pytest.mark.parametrize(("height", "width", "kernel"), [(20, 13, 7), (32, 32, 3), (12, 12, 23), (9, 9, 1)])
def test_blur_equals_torchvision(height, width, kernel):
    images = torch.rand(8, 3, height, width, generator=seeded())
    sigmas = draw_sigmas(8, (0.1, 2.0), seeded(1))
    expected = torch.stack(
        [oracle.gaussian_blur(i, [kernel] * 2, [s] * 2) for i, s in zip(images, sigmas.tolist(), strict=True)]
    )
    torch.testing.assert_close(gaussian_blur(images, sigmas, kernel), expected, rtol=0, atol=1e-6)
    applied = torch.arange(8) < 3
    made = gaussian_blur(images, sigmas, kernel, applied)
    assert torch.equal(made[3:], images[3:])
    torch.testing.assert_close(made[:3], expected[:3], rtol=0, atol=1e-6)


def test_gradients():
    images = torch.rand(3, 3, 4, 4, dtype=torch.float64, generator=seeded()) * 0.6 + 0.2
    images.requires_grad_()
    parameters = draw_color_jitter(3, (0.2, 0.2, 0.2, 0.1), generator=seeded(1))
    assert torch.autograd.gradcheck(lambda pixels: color_jitter(pixels, parameters), images)
    assert torch.autograd.gradcheck(lambda pixels: gaussian_blur(pixels, draw_sigmas(3, generator=seeded()), 3), images)
    grey = torch.full((3, 3, 4, 4), 0.5, requires_grad=True)
    color_jitter(grey, parameters).sum().backward()
    assert bool(grey.grad.isfinite().all())


def test_errors_say_what_to_do():
    images = torch.rand(2, 3, 8, 8)
    with pytest.raises(
        ValueError, match=r"jitter must be four numbers >= 0 .* hue at most 0.5; got \(0.4, 0.4, 0.4, 0.6\)"
    ):
        draw_color_jitter(2, (0.4, 0.4, 0.4, 0.6))
    with pytest.raises(ValueError, match=r"jitter must be four numbers"):
        draw_color_jitter(2, 0.4)
    with pytest.raises(ValueError, match=r"p must be a probability in \[0, 1\]; got -0.1"):
        draw_color_jitter(2, p=-0.1)
    with pytest.raises(ValueError, match=r"order must be \(2, 4\), one row an image; got shape \(3, 4\)"):
        color_jitter(images, draw_color_jitter(3))
    with pytest.raises(ValueError, match=r"brightness must be \(2,\)"):
        color_jitter(images, draw_color_jitter(2)._replace(brightness=torch.ones(1)))
    with pytest.raises(TypeError, match=r"got torch.uint8: use images.float\(\) / 255"):
        color_jitter((images * 255).byte(), draw_color_jitter(2))
    with pytest.raises(TypeError, match=r"got torch.int64: convert them to float"):
        grayscale((images * 255).long())
    with pytest.raises(ValueError, match=r"with 4 channels: pass RGB images"):
        adjust_hue(torch.rand(2, 4, 8, 8), torch.zeros(2))
    with pytest.raises(ValueError, match=r"kernel_size must be odd.*got 4"):
        gaussian_blur(images, torch.ones(2), 4)
    with pytest.raises(ValueError, match=r"less than twice the shorter side of 8 x 8 images; got 17"):
        gaussian_blur(images, torch.ones(2), 17)
    with pytest.raises(ValueError, match=r"sigma must be two finite numbers .*got \(0.0, 2.0\)"):
        draw_sigmas(2, (0.0, 2.0))
