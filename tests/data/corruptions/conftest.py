"""Slow references, and images that need no files."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

REFERENCE = Path(__file__).resolve().parents[2] / "reference"


def _reference(name):
    sys.path.insert(0, str(REFERENCE))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(REFERENCE))


@pytest.fixture(scope="session")
def fixed():
    return _reference("corruptions_fixed")


@pytest.fixture(scope="session")
def drawn():
    return _reference("corruptions_drawn")


@pytest.fixture(scope="session")
def pictures():
    """A function that makes uint8 images (count, 3, height, width): soft colours, fine waves, a dark and a white bar.

    They come from sines of multiples of irrational numbers, so they are the same everywhere.
    """

    def make(count, height, width):
        y = np.linspace(0, 1, height)[:, None]
        x = np.linspace(0, 1, width)
        images = np.empty((count, 3, height, width))
        for k in range(count):
            turn = lambda i, k=k: (0.1 + (k + 1) * i * 0.6180339887498949) % 1  # noqa: E731
            for c in range(3):
                waves = sum(
                    np.sin(2 * np.pi * (f * (y * turn(f + 1) + x * turn(f + 2)) + turn(f + 3 + 0.1 * c))) / f**0.7
                    for f in (1, 2, 4, 8)
                )
                images[k, c] = 60 + 110 * turn(7 + c) + 35 * waves
            bar = int(turn(11) * (width - 5))
            images[k, :, height // 4 : height // 2, bar : bar + 4] = (0, 255)[k % 2]
            images[k, :, -height // 8 :] = images[k, :1, -height // 8 :]
        return torch.from_numpy(np.clip(images, 0, 255).astype(np.uint8))

    return make


@pytest.fixture(scope="session")
def check():
    """A function that compares one result (3, H, W) with grey levels (H, W, 3) before truncation.

    The result must be the truncated level; where the level lies within ``slack`` of a whole number, either
    neighbour will do. ``share`` of the values may miss by one more.
    """

    def compare(result, levels, *, slack=2e-3, share=0.0):
        got = result.permute(1, 2, 0).numpy().astype(float)
        wrong = np.maximum(got - levels, levels - 1 - got) > slack
        worst = np.abs(got + 0.5 - levels).max()
        assert wrong.mean() <= share, f"{wrong.mean():.2%} of the values are off, the worst by {worst - 0.5:.3f}"
        assert worst <= 0.5 + slack + bool(share)

    return compare
