"""The centre of images as the first layer of a network."""

from __future__ import annotations

from torch import Tensor, nn

from ttalight.errors import InputError

__all__ = ["CenterCrop"]


class CenterCrop(nn.Module):
    """Cut out the square centre of images.

    Networks for 224 pixels are fed with images of 256, of which they see the centre. A method that makes views of the
    images sees all of them. Views that are already of the right size, or smaller, pass unchanged.

    Args:
        size: Side of the centre in pixels; None passes images unchanged.

    Raises:
        ValueError: If the size is below 1.
    """

    def __init__(self, size: int | None = None) -> None:
        super().__init__()
        if size is not None and size < 1:
            raise InputError(f"size must be at least 1 pixel, got {size}")
        self.size = size

    def forward(self, images: Tensor) -> Tensor:
        """Return the centre, (B, C, min(H, size), min(W, size)), of images (B, C, H, W)."""
        if self.size is None:
            return images
        height, width = (min(side, self.size) for side in images.shape[-2:])
        top, left = round((images.shape[-2] - height) / 2), round((images.shape[-1] - width) / 2)
        return images[..., top : top + height, left : left + width]

    def extra_repr(self) -> str:
        """Name the size in ``print(module)``."""
        return f"size={self.size}"
