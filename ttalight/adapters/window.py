"""A window of the last images of a stream, with which small batches are adapted to and predicted."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ttalight.engine.engine import Engine
from ttalight.engine.schedule import run_scheduled
from ttalight.errors import InputError, InputTypeError
from ttalight.models.attaching.call import Call
from ttalight.models.outputs import map_tensors

__all__ = ["Window", "check_window"]


class Window:
    """Adapts to the last images of a stream and returns the outputs of the newest, as ``SingleSample(window=)`` does.

    An announced boundary of the stream begins a new window. Images of a bad batch are not kept.

    Args:
        size: Images that it holds; None for no window. A larger batch is adapted to as it is.
    """

    def __init__(self, size: int | None) -> None:
        self.size = size
        #: The images, (N, 3, H, W), the newest last, and the visit that they are of.
        self.images: Tensor | None = None
        self._visit = 0

    def __call__(self, engine: Engine, images: Tensor, call: Call | None, adapt: bool) -> Any:
        """Return the network's output for the newest images.

        Args:
            engine: Adapts to the window, or predicts it.
            images: (B, 3, H, W), the newest.
            call: How the network is called with them.
            adapt: Whether it adapts. Otherwise the window does not change.
        """
        if call is not None and (call.args or call.kwargs):
            raise InputTypeError("a window keeps images alone: wrap without window= to pass more arguments")
        if images.ndim < 2 or len(images) == 0 or (self.images is not None and images.ndim < self.images.ndim):
            return run_scheduled(engine, images, call, adapt)  # which says what is wrong
        whole, bad = torch.cat([self._earlier(engine, images), images.detach()]), engine.bad_batches
        output = run_scheduled(engine, whole, call, adapt)
        if adapt and engine.bad_batches == bad:
            self.images = whole if len(whole) <= self._size else whole[-self._size :].clone()
            self._visit = engine.net.counters.visit
        return map_tensors(output, partial(_newest, len(whole), len(images)))

    def _earlier(self, engine: Engine, images: Tensor) -> Tensor:
        """Return the images of the window that come before others."""
        if self.images is None or self._visit != engine.net.counters.visit:
            return images[:0].detach()
        ours, theirs = ((value.shape[1:], value.dtype, value.device) for value in (self.images, images))
        if ours != theirs:
            raise InputError(
                f"the window holds images {_described(self.images)} and got {_described(images)}: scale and convert "
                "all images of the stream alike, or call reset() between them"
            )
        return self.images[max(0, len(self.images) - max(0, self._size - len(images))) :]

    @property
    def _size(self) -> int:
        return self.size or 0

    def to(self, device: torch.device) -> None:
        """Move the images to a device."""
        self.images = None if self.images is None else self.images.to(device)

    def capture(self) -> dict[str, Any]:
        """Return the window's part of a state, which is empty without a window."""
        images = None if self.images is None else self.images.clone()
        return {} if self.size is None else {"window": images}

    def restore(self, engine: Engine, state: dict[str, Any]) -> None:
        """Restore an engine and the images of the window from a state.

        Raises:
            ValueError: If the state does not fit. Nothing has changed then.
        """
        own = {name: value for name, value in state.items() if name != "window"}
        images = state.get("window")
        size = state.get("size")
        dimensions = 1 + len(size) if isinstance(size, list) else 4
        is_window = isinstance(images, Tensor) and images.ndim == dimensions and images.is_floating_point()
        if images is not None and not (is_window and 0 < len(images) <= self._size and bool(images.isfinite().all())):
            raise InputError(
                f"the window of the state does not fit one of {self._size} images: wrap with the window that it had"
            )
        engine.restore(own)
        self.images = None if images is None else images.to(engine.net.device, copy=True)
        self._visit = engine.net.counters.visit


def check_window(size: int | None) -> None:
    """Check that a window has at least one image; None is no window.

    Raises:
        ValueError: If it does not.
    """
    if size is not None and (type(size) is not int or size < 1):
        raise InputError(f"window must be a whole number of images, at least 1, or None, got {size!r:.60}")


def _newest(whole: int, count: int, value: Tensor) -> Tensor:
    return value[-count:] if value.ndim and len(value) == whole else value


def _described(images: Tensor) -> str:
    return f"of shape {tuple(images.shape[1:])}, {str(images.dtype).removeprefix('torch.')}, on {images.device}"
