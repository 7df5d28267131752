from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from ttalight.transforms import (
    adjust_gamma,
    autocontrast_tables,
    equalize_tables,
    look_up,
    posterize_tables,
    solarize_tables,
    to_tones,
)


def special_bytes() -> torch.Tensor:
    """Noise, few tones, one tone, two tones, a ramp, and an image that is nearly all of one tone."""
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, 256, (3, 16, 16), generator=generator)
    few = torch.randint(90, 97, (3, 16, 16), generator=generator)
    two = torch.where(noise > 100, 200, 40)
    ramp = torch.arange(256).view(16, 16).expand(3, 16, 16)
    nearly = torch.full((3, 16, 16), 250)
    nearly[:, 0, :3] = torch.tensor([3, 80, 81])
    return torch.stack((noise, few, torch.full_like(noise, 17), two, ramp, nearly))


def pillow(image: torch.Tensor, function) -> torch.Tensor:
    picture = Image.fromarray(image.byte().permute(1, 2, 0).numpy())
    return torch.from_numpy(np.array(function(picture))).permute(2, 0, 1).long()


def apply(tones: torch.Tensor, tables: torch.Tensor) -> torch.Tensor:
    return (look_up(tones, tables) * 255).round().long()


def test_tones_of_every_byte_and_of_values_outside():
    every = torch.arange(256).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(to_tones(every / 255), every)
    assert to_tones(torch.tensor([-0.2, 1.3, 0.5]).view(1, 3, 1, 1)).flatten().tolist() == [0, 255, 128]


@pytest.mark.parametrize("value", [0, 1, 4, 8])
def test_posterize_and_solarize_equal_pillow(value):
    tones = special_bytes()
    bits = torch.full((6,), value)
    thresholds = torch.full((6,), 32 * value)
    for n, image in enumerate(tones):
        theirs = pillow(image, lambda picture: ImageOps.posterize(picture, value)) if value else 0 * image
        assert torch.equal(apply(tones, posterize_tables(bits))[n], theirs)
        theirs = pillow(image, lambda picture: ImageOps.solarize(picture, 32 * value))
        assert torch.equal(apply(tones, solarize_tables(thresholds))[n], theirs)


def test_equalize_equals_pillow():
    tones = special_bytes()
    made = apply(tones, equalize_tables(tones))
    for n, image in enumerate(tones):
        assert torch.equal(made[n], pillow(image, ImageOps.equalize))


def test_autocontrast_equals_pillow_up_to_its_rounding():
    tones = special_bytes()
    made = apply(tones, autocontrast_tables(tones))
    for n, image in enumerate(tones):
        difference = made[n] - pillow(image, ImageOps.autocontrast)
        assert ((difference == 0) | (difference == 1)).all()
    low, high = tones[1].amin().item(), tones[1].amax().item()
    expected = [int((tone - low) * 255 / (high - low) + 1e-9) for tone in tones[1, 0].flatten().tolist()]
    if (tones[1, 0].amin(), tones[1, 0].amax()) == (low, high):
        assert made[1, 0].flatten().tolist() == expected


def test_gamma_is_a_power_of_each_image():
    images = torch.rand(3, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gamma = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    made = adjust_gamma(images, gamma)
    torch.testing.assert_close(made[0], images[0].sqrt(), rtol=1e-12, atol=0)
    torch.testing.assert_close(made[1:], torch.stack((images[1], images[2] ** 2)), rtol=1e-12, atol=0)
    black = torch.zeros(1, 3, 2, 2, requires_grad=True)
    adjust_gamma(black, torch.tensor([0.7])).sum().backward()
    assert black.grad.isfinite().all()


def test_tables_of_another_shape_are_refused():
    tones = special_bytes()
    with pytest.raises(ValueError, match=r"tables must be \(6, 3, 256\)"):
        look_up(tones, torch.zeros(6, 256, dtype=torch.int64))
