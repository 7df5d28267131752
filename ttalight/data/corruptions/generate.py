"""Corrupt whole image sets, chunk by chunk, reproducibly."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import Generator, Tensor

from ttalight.data.corruptions import blur, digital, noise, weather
from ttalight.data.corruptions.frost import frost
from ttalight.data.corruptions.spatter import spatter
from ttalight.data.corruptions.tables import parameters
from ttalight.errors import InputError, InputTypeError

_FIXED: Mapping[str, Callable[..., Tensor]] = {
    "defocus_blur": blur.defocus_blur,
    "zoom_blur": blur.zoom_blur,
    "brightness": digital.brightness,
    "contrast": digital.contrast,
    "pixelate": digital.pixelate,
    "jpeg_compression": digital.jpeg_compression,
    "gaussian_blur": blur.gaussian_blur,
    "saturate": digital.saturate,
}
_RANDOM: Mapping[str, Callable[..., Tensor]] = {
    "gaussian_noise": noise.gaussian_noise,
    "shot_noise": noise.shot_noise,
    "impulse_noise": noise.impulse_noise,
    "glass_blur": blur.glass_blur,
    "motion_blur": blur.motion_blur,
    "snow": weather.snow,
    "fog": weather.fog,
    "elastic_transform": digital.elastic_transform,
    "speckle_noise": noise.speckle_noise,
    "spatter": spatter,
}

# Working memory is a few times this many pixels, and draws come in blocks of this size: part of the result.
_BLOCK_PIXELS = 2**18


def corrupt(
    images: Tensor,
    corruption: str,
    severity: int,
    *,
    seed: int = 0,
    table: str = "cifar",
    frost_dir: str | None = None,
    chunk_size: int = 1000,
) -> Tensor:
    """Corrupt images as in the public corruption benchmarks.

    The result is a function of the arguments alone: every chunk of ``chunk_size`` images has its own generator,
    seeded from (seed, corruption, severity, index of the chunk). `corrupt_chunk` gives the same images one chunk at
    a time.

    D. Hendrycks and T. Dietterich, Benchmarking Neural Network Robustness to Common Corruptions and Perturbations,
    ICLR 2019, arXiv:1903.12261. The arithmetic is that of the authors' scripts (results are truncated to uint8), done
    for whole batches. Random draws come from torch, not numpy, so that images agree with the published files in
    distribution and not byte for byte. The authors then save 64- and 224-pixel images as JPEG files of quality 85;
    this function does not.

    Args:
        images: RGB images, uint8, shape (N, 3, H, W), on any device.
        corruption: One of `COMMON` or `EXTRA`.
        severity: 1 (mild) to 5 (strong).
        seed: Any integer.
        table: Whose strengths to use: ``"cifar"``, ``"tiny_imagenet"`` or ``"imagenet"``.
        frost_dir: Folder with the pictures frost1.png to frost5.jpg of the authors' repository; None takes procedural
            textures (see `frost_source`).
        chunk_size: Images per chunk; another size gives other random draws.

    Returns:
        uint8 tensor of the same shape on the same device.

    Raises:
        TypeError: If the images are not a uint8 tensor.
        ValueError: If shape, corruption, severity, table or chunk size is not as above, or the images are too small
            for the corruption.
        FileNotFoundError: If ``frost_dir`` lacks a picture.
    """
    _check(images)
    parameters(table, corruption, severity)
    if chunk_size < 1:
        raise InputError(f"chunk_size must be at least 1, not {chunk_size}")
    corrupted = torch.empty_like(images, memory_format=torch.contiguous_format)
    for chunk, start in enumerate(range(0, len(images), chunk_size)):
        part = slice(start, start + chunk_size)
        corrupted[part] = corrupt_chunk(
            images[part], corruption, severity, chunk=chunk, seed=seed, table=table, frost_dir=frost_dir
        )
    return corrupted


def corrupt_chunk(
    images: Tensor,
    corruption: str,
    severity: int,
    *,
    chunk: int,
    seed: int = 0,
    table: str = "cifar",
    frost_dir: str | None = None,
) -> Tensor:
    """Corrupt the images of one chunk: for progress bars and writers that resume.

    Args:
        images: The images of this chunk, all of them, uint8 (n, 3, H, W).
        corruption: As in `corrupt`.
        severity: As in `corrupt`.
        chunk: Index of the chunk, from 0.
        seed: As in `corrupt`.
        table: As in `corrupt`.
        frost_dir: As in `corrupt`.

    Returns:
        uint8 tensor of the same shape: rows ``chunk * chunk_size`` onwards of what `corrupt` returns for the whole set.

    Raises:
        TypeError: As `corrupt`.
        ValueError: As `corrupt`.
        FileNotFoundError: As `corrupt`.
    """
    _check(images)
    values = parameters(table, corruption, severity)
    function = _FIXED.get(corruption)
    if function is None:
        generator = _generator(seed, corruption, severity, chunk)
        random = partial(frost, frost_dir=frost_dir) if corruption == "frost" else _RANDOM[corruption]
        function = partial(random, generator=generator)
    block = max(1, _BLOCK_PIXELS // (images.shape[-1] * images.shape[-2]))
    corrupted = torch.empty_like(images, memory_format=torch.contiguous_format)
    for start in range(0, len(images), block):
        part = slice(start, start + block)
        corrupted[part] = function(images[part], *values)
    return corrupted


def _generator(seed: int, corruption: str, severity: int, chunk: int) -> Generator:
    digest = hashlib.sha256(f"{seed} {corruption} {severity} {chunk}".encode()).digest()
    return Generator("cpu").manual_seed(int.from_bytes(digest[:4], "little"))


def _check(images: Tensor) -> None:
    if not isinstance(images, Tensor) or images.dtype != torch.uint8:
        seen = f"a tensor of {images.dtype}" if isinstance(images, Tensor) else f"a {type(images).__name__}"
        raise InputTypeError(f"images must be a uint8 tensor with grey levels 0 to 255, not {seen}")
    if images.ndim != 4 or images.shape[1] != 3 or 0 in images.shape[2:]:
        hint = ": move the channels to dimension 1" if images.ndim == 4 and images.shape[-1] == 3 else ""
        raise InputError(f"images must be RGB of shape (N, 3, H, W), not {tuple(images.shape)}{hint}")
