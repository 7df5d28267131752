"""Procedural frost textures, and the original pictures from a folder."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ttalight.data.corruptions import FROST_FILES, FROST_PICTURES, FROST_PROCEDURAL, corrupt, frost_source
from ttalight.data.corruptions.frost import _textures, frost

# Of the five pictures of the reference at scale 0.2: mean colour, standard deviation of grey inside crops of 32 pixels,
# standard deviation of the crops' means, correlation of neighbouring pixels.
MEASURED = [
    ((77, 149, 165), 14, 11, 0.70),
    ((198, 202, 212), 18, 9, 0.49),
    ((198, 202, 212), 18, 9, 0.49),
    ((143, 157, 170), 26, 11, 0.34),
    ((102, 113, 125), 34, 16, 0.46),
]


@pytest.mark.parametrize("index", range(5))
def test_textures_have_the_statistics_of_the_pictures(index):
    colour, inside, between, correlation = MEASURED[index]
    texture = _textures(0.2)[index]
    assert texture.shape == (3, 128, 128)
    assert texture.mean(dim=(1, 2)).tolist() == pytest.approx(colour, abs=2)
    grey = texture.mean(dim=0)
    crops = grey.unfold(0, 32, 4).unfold(1, 32, 4).flatten(0, 1)
    assert crops.std(dim=(1, 2)).mean() == pytest.approx(inside, rel=0.08)
    assert crops.mean(dim=(1, 2)).std() == pytest.approx(between, rel=0.18)
    relief = grey - grey.mean()
    assert (relief * relief.roll(1, 0)).mean() / relief.square().mean() == pytest.approx(correlation, abs=0.09)


def test_textures_repeat_without_a_seam():
    for texture in _textures(1.0):
        step = (texture - texture.roll(1, 2)).abs().mean(dim=(0, 1))
        assert step[0] < 1.5 * step[1:].mean()


def test_frost_is_a_piece_of_a_texture():
    black = torch.zeros(20, 3, 8, 8, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(5)
    result = frost(black, 0.9, 0.5, 0.2, generator=generator)
    generator.manual_seed(5)
    choice = torch.randint(5, (20,), generator=generator)
    place = torch.rand((20, 2), generator=generator, dtype=torch.float64)
    assert choice.unique().numel() == 5
    for k in range(20):
        texture = _textures(0.2)[choice[k]]
        top, left = (int(place[k, axis] * 128) for axis in (0, 1))
        piece = texture.roll((-top, -left), (1, 2))[:, :8, :8]
        assert torch.equal(result[k], (0.5 * piece).to(torch.uint8))


def test_frost_source_tells_the_two_apart():
    assert frost_source(None) == FROST_PROCEDURAL
    assert frost_source("somewhere") == FROST_PICTURES
    assert FROST_PROCEDURAL != FROST_PICTURES


@pytest.fixture
def folder(tmp_path):
    """Five pictures in flat colours with a column and a row index in two channels, as PNG whatever they are called."""
    for k, name in enumerate(FROST_FILES):
        picture = np.empty((90, 120, 3 + (k == 0)), dtype=np.uint8)
        picture[..., 0] = 40 * (k + 1)
        picture[..., 1] = np.arange(90)[:, None]
        picture[..., 2:] = np.arange(120)[:, None]
        Image.fromarray(picture).save(tmp_path / name, "PNG")
    return tmp_path


def test_pictures_are_read_at_the_tables_scale(folder):
    black = torch.zeros(40, 3, 6, 9, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(0)
    result = frost(black, 1.0, 1.0, 0.2, generator=generator, frost_dir=str(folder)).long()
    assert set(result[:, 0].unique().tolist()) == {40, 80, 120, 160, 200}
    # One pixel in five, the middle one: 18 x 24 of them.
    assert torch.equal(result[:, 1].diff(dim=1), torch.full((40, 5, 9), 5))
    assert torch.equal(result[:, 2].diff(dim=2), torch.full((40, 6, 8), 5))
    top, left = result[:, 1, 0, 0], result[:, 2, 0, 0]
    assert ((top % 5 == 2) & (top >= 2) & (top <= 2 + 5 * 11)).all()
    assert ((left % 5 == 2) & (left <= 2 + 5 * 14)).all()
    assert top.unique().numel() > 6
    assert torch.equal(
        corrupt(black, "frost", 1, frost_dir=str(folder)).amax(dim=(2, 3))[:, 0].unique().float(),
        torch.tensor((8.0, 16.0, 24.0, 32.0, 40.0)),
    )


def test_a_missing_picture_is_an_error(folder, pictures):
    (folder / "frost4.jpg").unlink()
    with pytest.raises(FileNotFoundError, match=r"no frost4.jpg in frost_dir .* copy frost1.png to frost5.jpg"):
        corrupt(pictures(1, 8, 8), "frost", 1, frost_dir=str(folder))
    corrupt(pictures(1, 8, 8), "fog", 1, frost_dir=str(folder))


def test_images_larger_than_a_picture_are_an_error(folder, pictures):
    with pytest.raises(ValueError, match=r"frost1\.png has 18 x 24 pixels after scaling by 0\.2, too few .* 18 x 20"):
        corrupt(pictures(1, 18, 20), "frost", 1, frost_dir=str(folder))
    corrupt(pictures(1, 18, 20), "frost", 1, table="imagenet", frost_dir=str(folder))
