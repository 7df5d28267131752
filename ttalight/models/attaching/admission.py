"""Images that a network takes: type, size and finite values; and warnings of what is not finite."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ttalight.errors import InputError, InputTypeError

__all__ = ["Admission", "pixel_fault", "warn_of_bad_batch", "warn_of_recovery"]


class Admission:
    """Checks type and size of batches, and makes images of them that a network takes.

    Args:
        dtype: Floating-point type that bytes are converted to.
        try_network: Runs the network on one image, and changes nothing.
    """

    def __init__(self, dtype: torch.dtype, try_network: Callable[[Tensor], object]) -> None:
        self._dtype, self._try = dtype, try_network
        #: (C, H, W) of the batches that the network has taken, the first one first.
        self.sizes: list[torch.Size] = []

    def admit(self, images: Tensor) -> tuple[Tensor, Exception | None]:
        """Return images as finite floating-point ones of a size that the network takes, and what was wrong with them.

        Bytes are divided by 255, pixels that are not finite become 0, and other sizes are scaled to the first one.

        Args:
            images: (B, C, H, W).

        Raises:
            TypeError: If they are neither floating point nor uint8.
            ValueError: If there is none, or they have no batch dimension.
        """
        size, fault = images.shape[1:], self._type_fault(images)
        images = images if images.is_floating_point() else images.to(self._dtype).div(255)
        fault = self._size_fault(images) or fault
        finite = images.detach().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        if fault is not None and self._is_new(size):
            finite = F.interpolate(finite, self.sizes[0][1:], mode="bilinear", align_corners=False, antialias=True)
        return finite, fault

    def _type_fault(self, images: Tensor) -> Exception | None:
        shape = tuple(images.shape)
        if images.ndim == 3 and len(images) <= 4:
            raise InputError(f"expected images (B, C, H, W), got one of shape {shape}: add a dimension, images[None]")
        if images.ndim == 0 or images.numel() == 0:
            raise InputError(f"a batch of shape {shape} has no pixels: leave it out of the stream")
        if images.is_floating_point():
            return None
        advice = "use images.float() / 255" if images.dtype == torch.uint8 else "convert them first"
        fault = InputTypeError(
            f"images must be floating point, as the network expects them; got {images.dtype}: {advice}"
        )
        if images.dtype != torch.uint8:
            raise fault
        return fault

    def _is_new(self, size: torch.Size) -> bool:
        # Other channels or dimensions are the network's own to refuse: there is nothing to scale.
        known = bool(self.sizes) and len(self.sizes[0]) == len(size) == 3 and self.sizes[0][0] == size[0]
        return known and size not in self.sizes

    def _size_fault(self, images: Tensor) -> Exception | None:
        """Return why the network cannot take images of another size than usual, None if it can."""
        if not self._is_new(images.shape[1:]):
            return None
        try:
            self._try(images[:1].nan_to_num(0.0, 0.0, 0.0))
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
            fault = InputError(
                f"images of shape {tuple(images.shape[1:])} came after those of {tuple(self.sizes[0])}, and the "
                f"network does not take them ({reason}): scale all images of the stream to one size"
            )
            fault.__cause__ = error
            return fault
        self.sizes.append(images.shape[1:])
        return None


def pixel_fault(images: Tensor, batch: int, visit: int) -> ValueError:
    """Return the error of a batch with pixels that are not finite.

    Args:
        images: (B, C, H, W).
        batch: Number of the batch in its visit.
        visit: Number of the visit.
    """
    bad = int(images.isfinite().flatten(1).all(1).logical_not_().sum())
    return InputError(
        f"{bad} of {len(images)} images in batch {batch} of visit {max(visit, 0)} (counted from 0) have NaN or "
        "infinite pixels: repair or remove them. Nothing was adapted to this batch"
    )


def warn_of_bad_batch(fault: Exception, policy: str) -> None:
    """Warn of a batch that is predicted without adapting to it.

    Args:
        fault: What is wrong with it.
        policy: ``skip`` or ``source``: which model predicts it.
    """
    model = "the source model" if policy == "source" else "the model as it is"
    more = f"predicted with {model}, as on_bad_batch={policy!r} says. Further such batches are only counted"
    warnings.warn(f"{fault}: {more}", stacklevel=3)


def warn_of_recovery(method: str, batch: int, visit: int) -> None:
    """Warn of weights that are not finite, from which adaptation cannot continue.

    Args:
        method: Name of the method that left them.
        batch: Number of the next batch in its visit.
        visit: Number of the visit.
    """
    warnings.warn(
        f"{method} has left weights or statistics that are not finite, before batch {batch} of visit {max(visit, 0)}: "
        "it continues from the source, as after a reset. Is the learning rate too high?",
        stacklevel=4,
    )
