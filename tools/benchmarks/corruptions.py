"""Measure how many images a second the corruptions make.

    python tools/benchmarks/corruptions.py [--images 1000] [--side 32] [--table cifar] [--threads 1] [--rounds 3]

Prints images per second for every corruption (all five severities together), the mean over the fifteen common ones
(all images over all seconds), and, where one image at a time takes only a few lines of numpy or Pillow, the ratio to
that. The two take turns and the faster of the rounds counts, so that a busy neighbour does not decide.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable

import numpy as np
import PIL
import torch
from measuring import print_machine
from PIL import Image

from ttalight.data.corruptions import COMMON, EXTRA, corrupt, parameters

RANDOM = np.random.default_rng(0)


def gaussian_noise(image: np.ndarray, scale: float) -> np.ndarray:
    return np.clip(image / 255 + RANDOM.normal(size=image.shape, scale=scale), 0, 1) * 255


def shot_noise(image: np.ndarray, photons: float) -> np.ndarray:
    return np.clip(RANDOM.poisson(image / 255 * photons) / photons, 0, 1) * 255


def impulse_noise(image: np.ndarray, amount: float) -> np.ndarray:
    draw = RANDOM.random(image.shape)
    return np.where(draw < amount / 2, 0, np.where(draw > 1 - amount / 2, 255, image))


def speckle_noise(image: np.ndarray, scale: float) -> np.ndarray:
    levels = image / 255
    return np.clip(levels + levels * RANDOM.normal(size=image.shape, scale=scale), 0, 1) * 255


def contrast(image: np.ndarray, factor: float) -> np.ndarray:
    levels = image / 255
    mean = levels.mean(axis=(0, 1), keepdims=True)
    return np.clip((levels - mean) * factor + mean, 0, 1) * 255


def pixelate(image: np.ndarray, factor: float) -> np.ndarray:
    height, width = image.shape[:2]
    small = Image.fromarray(image).resize((int(width * factor), int(height * factor)), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.BOX))


def jpeg_compression(image: np.ndarray, quality: float) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=int(quality))
    return np.asarray(Image.open(file))


ONE_BY_ONE: dict[str, Callable[..., np.ndarray]] = {
    function.__name__: function
    for function in (gaussian_noise, shot_noise, impulse_noise, contrast, pixelate, jpeg_compression, speckle_noise)
}


def example_images(count: int, side: int) -> torch.Tensor:
    """Soft colour gradients with a little grain: what JPEG files cost depends on the picture."""
    coarse = torch.rand(count, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=True)
    grain = torch.randn(smooth.shape, generator=torch.Generator().manual_seed(1))
    return (255 * smooth + 8 * grain).clamp_(0, 255).to(torch.uint8)


def seconds(make: Callable[[int], object]) -> float:
    """Time of one call for each severity."""
    start = time.perf_counter()
    for severity in range(1, 6):
        make(severity)
    return time.perf_counter() - start


def slow(corruption: str, images: np.ndarray, table: str) -> Callable[[int], object]:
    """Corrupt the images one at a time and put them together again."""
    function = ONE_BY_ONE[corruption]

    def make(severity: int) -> np.ndarray:
        values = parameters(table, corruption, severity)
        return np.stack([np.uint8(function(image, *values)) for image in images])

    return make


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1000, help="images a severity")
    parser.add_argument("--side", type=int, default=32, help="side of the images in pixels")
    parser.add_argument("--table", default="cifar", help="cifar, tiny_imagenet or imagenet")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds; the fastest counts")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    images = example_images(arguments.images, arguments.side)
    pictures = images[:200].permute(0, 2, 3, 1).contiguous().numpy()
    print_machine("cpu", arguments.threads, f"numpy {np.__version__}", f"Pillow {PIL.__version__}")
    print(f"{arguments.images} images of {arguments.side} x {arguments.side} a severity, table {arguments.table}\n")
    print(f"{'corruption':20s} {'images/s':>10s} {'one by one':>12s} {'ratio':>7s}")

    total = 0.0
    for corruption in COMMON + EXTRA:

        def fast(severity: int, corruption: str = corruption) -> torch.Tensor:
            return corrupt(images, corruption, severity, table=arguments.table)

        corrupt(images[:64], corruption, 5, table=arguments.table)
        batched, single = float("inf"), float("inf")
        for _ in range(arguments.rounds):
            batched = min(batched, seconds(fast))
            if corruption in ONE_BY_ONE:
                single = min(single, seconds(slow(corruption, pictures, arguments.table)))
        total += batched if corruption in COMMON else 0.0
        rate, other = 5 * len(images) / batched, 5 * len(pictures) / single
        comparison = f"{other:12,.0f} {rate / other:6.1f}x" if other else ""
        print(f"{corruption:20s} {rate:10,.0f} {comparison}", flush=True)
    print(f"\nmean over the {len(COMMON)} common ones: {len(COMMON) * 5 * len(images) / total:,.0f} images/s")


if __name__ == "__main__":
    main()
