"""Weighted sums of image rows: the one primitive that crops with resizing and blurs are made of."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def weighted_rows(images: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """Make every output row a weighted sum of a few input rows, chosen per image.

    ``out[n, c, i] = sum_k weight[n, i, k] * images[n % B, c, index[n, i, k]]``. Only the taps are read, in the images'
    own precision: a product with interpolation matrices costs H multiplications a pixel instead of K, and would be
    rounded to TF32 or bfloat16 wherever a training run allows that for its matrix products.

    Args:
        images: (B, C, H, W) float32 or float64.
        index: (N, S, K) int64 row numbers in [0, H), N a multiple of B.
        weight: (N, S, K) in the dtype of the images.

    Returns:
        (N, C, S, W).
    """
    batch, channels, height, width = images.shape
    count, size, taps = index.shape
    if count == 0:
        return images.new_empty(0, channels, size, width)
    source = torch.arange(count, device=index.device) % batch
    plane = source[:, None] * channels + torch.arange(channels, device=index.device)
    rows = plane[:, :, None, None] * height + index[:, None]
    weights = weight[:, None].expand(count, channels, size, taps)
    summed = functional.embedding_bag(
        rows.reshape(-1, taps), images.reshape(-1, width), mode="sum", per_sample_weights=weights.reshape(-1, taps)
    )
    return summed.view(count, channels, size, width)


def weighted_sums(images: Tensor, rows: tuple[Tensor, Tensor], columns: tuple[Tensor, Tensor]) -> Tensor:
    """Apply `weighted_rows` along the height and then along the width.

    Args:
        images: (B, C, H, W) float32 or float64.
        rows: index and weight, each (N, S, K), along the height.
        columns: index and weight, each (N, S', K'), along the width.

    Returns:
        (N, C, S, S').
    """
    tall = weighted_rows(images, *rows).transpose(2, 3)
    return weighted_rows(tall, *columns).transpose(2, 3).contiguous()
