from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as oracle

from ttalight.transforms import affine_matrices, warp
from ttalight.transforms.augmix import OPERATIONS, _matrices


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def parameters(count: int, generator: torch.Generator):
    angles = torch.rand(count, generator=generator) * 60 - 30
    shifts = torch.randint(-3, 4, (count, 2), generator=generator).float()
    return angles, shifts, 0.8 + 0.5 * torch.rand(count, generator=generator)


@pytest.mark.parametrize(("outside", "padding"), [("reflection", "reflect"), ("border", "edge")])
@pytest.mark.parametrize(("height", "width"), [(16, 16), (13, 20)])
def test_warp_equals_torchvision_affine(outside, padding, height, width):
    images = torch.rand(8, 3, height, width, generator=seeded())
    angles, shifts, scales = parameters(8, seeded(1))
    made = warp(images, affine_matrices(angles, shifts, scales), outside)
    for n, image in enumerate(images):
        padded = oracle.pad(image[None], [width - 1, height - 1], padding_mode=padding)
        turned = oracle.affine(
            padded, angles[n].item(), shifts[n].int().tolist(), scales[n].item(), [0.0, 0.0],
            interpolation=oracle.InterpolationMode.BILINEAR,
        )  # fmt: skip
        expected = oracle.center_crop(turned, [height, width])
        torch.testing.assert_close(made[n : n + 1], expected, rtol=0, atol=2e-4)


def test_identity_and_whole_shifts_copy_pixels():
    images = torch.rand(4, 3, 7, 9, dtype=torch.float64, generator=seeded())
    one = torch.ones(4)
    made = warp(images, affine_matrices(0 * one, torch.zeros(4, 2), one))
    torch.testing.assert_close(made, images, rtol=0, atol=1e-12)
    made = warp(images, affine_matrices(0 * one, torch.tensor([[2.0, -1.0]] * 4), one), 0.25)
    torch.testing.assert_close(made[:, :, :-1, 2:], images[:, :, 1:, :-2], rtol=0, atol=1e-12)
    assert (made[:, :, -1] == 0.25).all()
    assert (made[:, :, :, :2] == 0.25).all()


def test_a_half_turn_is_two_flips():
    images = torch.rand(2, 3, 6, 8, dtype=torch.float64, generator=seeded())
    made = warp(images, affine_matrices(torch.tensor([180.0, 180.0]), torch.zeros(2, 2), torch.ones(2)))
    torch.testing.assert_close(made, images.flip(2, 3), rtol=0, atol=1e-5)


def test_one_pixel_and_identity_warps():
    point = torch.rand(2, 3, 1, 1, generator=seeded())
    matrices = affine_matrices(torch.tensor([20.0, -7.0]), torch.zeros(2, 2), torch.ones(2))
    for outside in ("reflection", "border"):
        assert torch.equal(warp(point, matrices, outside), point)
    images = torch.rand(2, 3, 8, 8, generator=seeded())
    made = warp(images, matrices, applied=torch.tensor([True, False]))
    assert torch.equal(made[1], images[1])
    assert torch.equal(made[0], warp(images, matrices)[0])


@pytest.mark.parametrize("name", OPERATIONS[4:])
def test_moves_of_augmix_equal_those_of_pillow(name):
    size = (24, 32)  # height, width
    bytes_ = torch.randint(0, 256, (6, 3, *size), generator=seeded(), dtype=torch.uint8)
    level = torch.tensor([0.1, 0.4, 0.7, 1.0, 3.0, 10.0])
    for negative in (False, True):
        operation = torch.full((6,), OPERATIONS.index(name))
        matrices = _matrices(bytes_, operation, level, torch.full((6,), negative))
        made = warp(bytes_.double() / 255, matrices, 128 / 255)
        for n, image in enumerate(bytes_):
            picture = Image.fromarray(image.permute(1, 2, 0).numpy())
            expected = pillow(picture, name, level[n].item(), -1 if negative else 1)
            theirs = torch.from_numpy(np.array(expected)).permute(2, 0, 1) / 255
            assert (made[n] - theirs).abs().max() < 1.6 / 255


def pillow(picture: Image.Image, name: str, level: float, sign: int) -> Image.Image:
    grey = (128, 128, 128)
    if name == "rotate":
        return picture.rotate(sign * int(level * 3 + 1e-5), Image.Resampling.BILINEAR, fillcolor=grey)
    shear = sign * level * 0.03
    side = {"translate_x": picture.width, "translate_y": picture.height}.get(name, 0)
    shift = sign * int(level * side / 30 + 1e-5)
    data = {
        "shear_x": (1, shear, 0, 0, 1, 0), "shear_y": (1, 0, 0, shear, 1, 0),
        "translate_x": (1, 0, shift, 0, 1, 0), "translate_y": (1, 0, 0, 0, 1, shift),
    }[name]  # fmt: skip
    return picture.transform(
        picture.size, Image.Transform.AFFINE, data, resample=Image.Resampling.BILINEAR, fillcolor=grey
    )


def test_errors_say_what_to_do():
    images = torch.rand(2, 3, 8, 8)
    matrices = torch.eye(2, 3).expand(2, 2, 3)
    with pytest.raises(ValueError, match="outside must be 'reflection', 'border' or a number, got 'wrap'"):
        warp(images, matrices, "wrap")
    with pytest.raises(ValueError, match=r"matrices must be \(2, 2, 3\), one row an image"):
        warp(images, matrices[:1])
    with pytest.raises(TypeError, match=r"got torch.uint8: use images.float\(\) / 255"):
        warp((images * 255).byte(), matrices)
