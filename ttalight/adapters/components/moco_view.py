"""The strong view of methods that contrast views as MoCo does."""

from __future__ import annotations

import torch
from torch import Tensor

from ttalight.transforms import (
    color_jitter,
    draw_color_jitter,
    draw_mask,
    draw_sigmas,
    gaussian_blur,
    random_grayscale,
    random_horizontal_flip,
)

__all__ = ["moco_view"]


def moco_view(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return a strong view of each image without a crop, (B, 3, H, W): jitter, greyscale, blur, flip.

    Strengths and chances are those of X. Chen, H. Fan, R. Girshick, K. He, *Improved Baselines with Momentum
    Contrastive Learning*, arXiv 2003.04297.

    Args:
        images: (B, 3, H, W) in [0, 1].
        generator: Source of all draws, on the images' device.
    """
    count, device = len(images), images.device
    jitter = draw_color_jitter(count, (0.4, 0.4, 0.4, 0.1), 0.8, generator, device)
    views = random_grayscale(color_jitter(images, jitter), 0.2, generator)
    sigmas, blurred = draw_sigmas(count, (0.1, 2.0), generator, device), draw_mask(count, 0.5, generator, device)
    # A kernel of three standard deviations to each side, or as wide as small images allow.
    views = gaussian_blur(views, sigmas, min(13, 2 * min(images.shape[2:]) - 1), blurred)
    return random_horizontal_flip(views, 0.5, generator)
