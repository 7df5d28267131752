"""Handling of invalid batches: number types, sizes, pixels."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["BatchCheck"]


class BatchCheck:
    """Finds batches that a network cannot take as they are, and makes images of them that it can.

    Args:
        try_network: Runs the source model on one image, and changes nothing.
        dtype: Floating-point type that bytes become.
    """

    def __init__(self, try_network: Callable[[Tensor], object], dtype: torch.dtype) -> None:
        self._try_network = try_network
        self.dtype = dtype
        #: (C, H, W) of the first batch.
        self.usual: tuple[int, ...] | None = None
        self._accepted: set[tuple[int, ...]] = set()

    def fault(self, images: Tensor) -> Exception | None:
        """Return what is wrong with the type or the size of a batch, None if nothing is.

        Args:
            images: (B, C, H, W).

        Raises:
            TypeError: If it is neither floating point nor uint8: nothing sensible could be predicted.
            ValueError: If there is no image in it.
        """
        if images.ndim == 3 and len(images) <= 4:  # channels, where images belong
            raise ValueError(
                f"expected a batch of images (B, C, H, W), got a tensor of shape {tuple(images.shape)}: add the batch "
                "dimension with images[None]"
            )
        if images.ndim == 0 or images.numel() == 0:
            raise ValueError(f"a batch of shape {tuple(images.shape)} has no pixels: leave it out of the stream")
        if not images.is_floating_point():
            advice = "use images.float() / 255" if images.dtype == torch.uint8 else "convert them first"
            fault = TypeError(
                f"images must be floating point, as the network expects them; got {images.dtype}: {advice}"
            )
            if images.dtype != torch.uint8:
                raise fault
            return self._refusal(images) or fault
        return self._refusal(images)

    def repaired(self, images: Tensor, fault: Exception | None) -> Tensor:
        """Return finite floating-point images of a size that the network takes.

        Bytes are divided by 255, pixels that are not finite become 0, and other sizes are scaled to the usual one.

        Args:
            images: (B, C, H, W).
            fault: What ``fault`` returned.
        """
        if not images.is_floating_point():
            images = images.to(self.dtype).div(255)
        images = images.detach().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        if fault is not None and self.usual is not None and self._is_new_size(images):
            images = F.interpolate(images, size=self.usual[1:], mode="bilinear", align_corners=False, antialias=True)
        return images

    def accept(self, shape: tuple[int, ...]) -> None:
        """Note that the network has taken images of a size, (C, H, W)."""
        self.usual = self.usual or shape
        self._accepted.add(shape)

    def _is_new_size(self, images: Tensor) -> bool:
        shape, usual = tuple(images.shape[1:]), self.usual
        # Other channels or dimensions are the network's own to refuse: there is nothing to scale.
        return (
            usual is not None and len(usual) == len(shape) == 3 and usual[0] == shape[0] and shape not in self._accepted
        )

    def _refusal(self, images: Tensor) -> Exception | None:
        """Return why the network cannot take images of another size than usual, None if it can."""
        if not self._is_new_size(images):
            return None
        try:
            self._try_network(self.repaired(images[:1], None))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            fault = ValueError(
                f"images of shape {tuple(images.shape[1:])} came after those of {self.usual}, and the network does not "
                f"take them ({reason}): scale all images of the stream to one size"
            )
            fault.__cause__ = error
            return fault
        self._accepted.add(tuple(images.shape[1:]))
        return None
