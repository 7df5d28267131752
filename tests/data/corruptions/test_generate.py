"""The public functions: reproducibility, chunks, shapes and errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ttalight.data.corruptions import COMMON, EXTRA, TABLES, corrupt, corrupt_chunk, parameters

ALL = COMMON + EXTRA
DRAWS = {
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "glass_blur",
    "motion_blur",
    "snow",
    "frost",
    "fog",
    "elastic_transform",
    "speckle_noise",
    "spatter",
}


@pytest.mark.parametrize("corruption", ALL)
def test_the_seed_decides(corruption, pictures):
    images = pictures(6, 32, 32)
    first = corrupt(images, corruption, 5, seed=1)
    torch.manual_seed(123)
    np.random.seed(7)  # noqa: NPY002
    assert torch.equal(corrupt(images, corruption, 5, seed=1), first)
    assert torch.equal(corrupt(images, corruption, 5, seed=2), first) == (corruption not in DRAWS)
    assert not torch.equal(first, images)


@pytest.mark.parametrize("corruption", ALL)
def test_chunks_make_the_whole(corruption, pictures):
    images = pictures(7, 16, 18)
    whole = corrupt(images, corruption, 3, seed=4, chunk_size=3)
    parts = [corrupt_chunk(part, corruption, 3, chunk=k, seed=4) for k, part in enumerate(images.split(3))]
    assert torch.equal(torch.cat(parts), whole)


def test_draws_differ_by_chunk_corruption_severity():
    grey = torch.full((4, 3, 16, 16), 128, dtype=torch.uint8)
    noisy = corrupt(grey, "gaussian_noise", 1, chunk_size=2)
    assert not torch.equal(noisy[:2], noisy[2:])
    centred = [
        corrupt(grey, corruption, severity).float().sub(128).sign()
        for corruption, severity in (("gaussian_noise", 1), ("gaussian_noise", 2), ("speckle_noise", 1))
    ]
    for other in centred[1:]:
        assert (centred[0] == other).float().mean() < 0.6


@pytest.mark.parametrize("corruption", ALL)
def test_long_chunks_are_made_in_blocks(corruption, pictures, monkeypatch):
    from ttalight.data.corruptions import generate

    images = pictures(5, 16, 16)
    monkeypatch.setattr(generate, "_BLOCK_PIXELS", 2 * 16 * 16)
    small = corrupt(images, corruption, 5)
    assert not any(torch.equal(a, b) for a, b in zip(small, images, strict=True))
    if corruption not in DRAWS:
        monkeypatch.undo()
        assert torch.equal(corrupt(images, corruption, 5), small)


@pytest.mark.parametrize("corruption", ALL)
def test_generators_and_images_are_unchanged(corruption, pictures):
    images = pictures(3, 24, 24)
    copy = images.clone()
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()  # noqa: NPY002
    corrupt(images, corruption, 4)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), numpy_state, strict=True))  # noqa: NPY002
    assert torch.equal(images, copy)


@pytest.mark.parametrize("corruption", ALL)
def test_the_number_of_threads_does_not_matter(corruption, pictures):
    images = pictures(64, 32, 32)
    one = corrupt(images, corruption, 5)
    torch.set_num_threads(2)
    assert torch.equal(corrupt(images, corruption, 5), one)


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("shape", [(64, 64), (48, 20), (21, 40)])
def test_other_sizes(table, shape, pictures):
    images = pictures(2, *shape)
    for corruption in ALL:
        for severity in (1, 5):
            result = corrupt(images, corruption, severity, table=table)
            assert result.shape == images.shape
            assert result.dtype == torch.uint8
            assert result.is_contiguous()
            assert not torch.equal(result, images)


@pytest.mark.parametrize("table", TABLES)
def test_large_images(table, pictures):
    images = pictures(1, 224, 224)
    for corruption in ALL:
        result = corrupt(images, corruption, 3, table=table)
        assert result.shape == images.shape
        assert not torch.equal(result, images)


@pytest.mark.parametrize("corruption", ALL)
def test_memory_layout_does_not_matter(corruption, pictures):
    images = pictures(4, 20, 24)
    channels_last = images.to(memory_format=torch.channels_last)
    mirrored = images.flip(-1).flip(-1)
    expected = corrupt(images, corruption, 5)
    assert torch.equal(corrupt(channels_last, corruption, 5), expected)
    assert torch.equal(corrupt(mirrored[..., :], corruption, 5), expected)


def test_no_images_give_no_images():
    empty = torch.empty(0, 3, 32, 32, dtype=torch.uint8)
    assert corrupt(empty, "fog", 1).shape == empty.shape


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gausian_noise", "did you mean gaussian_noise"),
        ("motion-blur", "did you mean motion_blur"),
        ("jpeg", "choose one of gaussian_noise, .*, jpeg_compression, .*, saturate|did you mean jpeg_compression"),
        ("", "choose one of gaussian_noise"),
    ],
)
def test_unknown_corruption_names_the_nearest(name, message, pictures):
    with pytest.raises(ValueError, match=message):
        corrupt(pictures(1, 8, 8), name, 1)


@pytest.mark.parametrize("severity", [0, 6, -1, 2.0, "3", None, True])
def test_a_severity_outside_one_to_five_is_refused(severity, pictures):
    with pytest.raises(ValueError, match=r"from 1 \(mild\) to 5 \(strong\), not "):
        corrupt(pictures(1, 8, 8), "fog", severity)


def test_an_unknown_table_is_refused(pictures):
    with pytest.raises(ValueError, match="no parameter table 'cifar10': choose one of cifar, tiny_imagenet, imagenet"):
        corrupt(pictures(1, 8, 8), "fog", 1, table="cifar10")


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.rand(2, 3, 8, 8), TypeError, "uint8 tensor .* not a tensor of torch.float32"),
        (np.zeros((2, 3, 8, 8), dtype=np.uint8), TypeError, "not a ndarray"),
        (torch.zeros(3, 8, 8, dtype=torch.uint8), ValueError, r"\(N, 3, H, W\), not \(3, 8, 8\)"),
        (torch.zeros(2, 1, 8, 8, dtype=torch.uint8), ValueError, r"not \(2, 1, 8, 8\)"),
        (torch.zeros(2, 8, 8, 3, dtype=torch.uint8), ValueError, "move the channels to dimension 1"),
        (torch.zeros(2, 3, 0, 8, dtype=torch.uint8), ValueError, r"not \(2, 3, 0, 8\)"),
    ],
)
def test_wrong_images_are_refused(images, error, message):
    with pytest.raises(error, match=message):
        corrupt(images, "contrast", 1)
    with pytest.raises(error, match=message):
        corrupt_chunk(images, "contrast", 1, chunk=0)


def test_a_chunk_size_below_one_is_refused(pictures):
    with pytest.raises(ValueError, match="chunk_size must be at least 1, not 0"):
        corrupt(pictures(1, 8, 8), "contrast", 1, chunk_size=0)


@pytest.mark.parametrize(
    ("corruption", "table", "least"),
    [
        ("defocus_blur", "imagenet", 11),
        ("glass_blur", "imagenet", 9),
        ("elastic_transform", "cifar", 3),
        ("pixelate", "imagenet", 4),
    ],
)
def test_too_small_images_are_refused(corruption, table, least, pictures):
    corrupt(pictures(1, 16, 16)[..., :least, :], corruption, 5, table=table)
    with pytest.raises(ValueError, match=f"{corruption} .* at least {least} pixels, not {least - 1} x 16"):
        corrupt(pictures(1, 16, 16)[..., : least - 1, :], corruption, 5, table=table)


def test_tables_are_complete():
    assert len(COMMON) == 15
    assert len(EXTRA) == 4
    for table in TABLES.values():
        assert set(table) == set(ALL)
        assert all(len(levels) == 5 for levels in table.values())
    assert parameters("cifar", "motion_blur", 5) == (9, 2.5)
    assert parameters("tiny_imagenet", "pixelate", 2) == (0.8,)
    assert parameters("imagenet", "glass_blur", 3) == (1, 2, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("corruption", ALL)
def test_images_stay_on_their_device(corruption, pictures):
    images = pictures(8, 32, 32)
    result = corrupt(images.cuda(), corruption, 5)
    assert result.is_cuda
    difference = (result.cpu().float() - corrupt(images, corruption, 5).float()).abs()
    assert (difference > 0).float().mean() < 0.01


@pytest.mark.parametrize("corruption", sorted(DRAWS))
def test_the_default_type_of_torch_does_not_matter(corruption, pictures):
    images = pictures(3, 24, 24)
    expected = corrupt(images, corruption, 3)
    torch.set_default_dtype(torch.float64)
    try:
        result = corrupt(images, corruption, 3)
    finally:
        torch.set_default_dtype(torch.float32)
    assert (result != expected).float().mean() < 0.01
