"""The loss of a masked autoencoder."""

from __future__ import annotations

import torch
from torch import Tensor

from ttalight.errors import InputError

__all__ = ["masked_patch_loss"]


def masked_patch_loss(predicted: Tensor, patches: Tensor, visible: Tensor) -> Tensor:
    """Mean squared error of the masked patches of each image, whose pixels are normalised patch by patch.

    The numbers of a patch, those of all its pixels and channels, are the prediction's target after their mean was
    subtracted and they were divided by their standard deviation (the unbiased variance plus 1e-6, under the root).

    Source: K. He et al., *Masked Autoencoders Are Scalable Vision Learners*, CVPR 2022, arXiv 2111.06377, with
    normalised pixels. Here each image has a mean of its own. It is the mean over the batch there, and the same one as
    the mean of these, since all images have as many masked patches.

    Args:
        predicted: (N, L, M).
        patches: Pixels of the patches, (N, L, M), or (1, L, M) for several masks of one image.
        visible: Places of the patches that were visible, int64 (N, K), K < L.

    Returns:
        (N,).

    Raises:
        ValueError: If shapes do not fit.
    """
    shapes = tuple(predicted.shape), tuple(patches.shape), tuple(visible.shape)
    if predicted.ndim != 3 or shapes[0][1:] != shapes[1][1:] or len(visible) != len(predicted):
        raise InputError(
            f"expected predictions (N, L, M), patches (N, L, M) or (1, L, M) and places (N, K), got {shapes}"
        )
    if visible.shape[1] >= predicted.shape[1]:
        raise InputError(f"no patch is masked: {visible.shape[1]} of {predicted.shape[1]} are visible")
    predicted, patches = (part if part.dtype == torch.float64 else part.float() for part in (predicted, patches))
    variance, mean = torch.var_mean(patches, dim=2, keepdim=True)
    errors = (predicted - (patches - mean) * (variance + 1e-6).rsqrt()).square().mean(2)
    masked = torch.ones_like(errors).scatter(1, visible, 0.0)
    return (errors * masked).sum(1) / (errors.shape[1] - visible.shape[1])
