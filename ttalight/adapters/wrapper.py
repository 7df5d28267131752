"""A plain network that adapts whenever it is called."""

from __future__ import annotations

import threading
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ttalight.adapters.handle import Handle
from ttalight.adapters.window import Window
from ttalight.engine.engine import Engine
from ttalight.engine.export import source_of
from ttalight.engine.schedule import run_scheduled
from ttalight.errors import InputTypeError, UsageError
from ttalight.models.attaching.call import split_call

__all__ = ["AdaptedNetwork"]


class _Adapter(Protocol):
    seed: int | None

    def wrap(self, network: nn.Module, window: int | None = None) -> AdaptedNetwork: ...
    def end(self) -> None: ...


class AdaptedNetwork(Handle):
    """The result of ``Adapter.wrap(network)``: a call with images returns logits and adapts the network.

    The network is adapted in place. ``release()``, the end of a ``with`` block, or the end of this object restore it
    bit for bit. Calls are serialised by a lock. Copies (``copy.deepcopy``, ``pickle``) hold a network of their own.

    Args:
        adapter: The method.
        engine: The engine that adapts the network.
        window: Number of images of the window; see ``Adapter.wrap``.
    """

    def __init__(self, adapter: _Adapter, engine: Engine, window: int | None = None) -> None:
        self._adapter, self._window = adapter, Window(window)
        self._engine: Engine | None = engine
        self._lock = threading.RLock()
        self._finalizer = weakref.finalize(self, adapter.end)
        self._finalizer.atexit = False

    @property
    def engine(self) -> Engine:
        """The engine behind the network. There is none after ``release()``."""
        if self._engine is None:
            raise UsageError("this network was released: wrap it again to adapt it again")
        return self._engine

    def __call__(self, images: Tensor | None = None, *args: Any, adapt: bool = True, **kwargs: Any) -> Any:
        """Adapt to a batch and return its logits, in the structure that the network returns.

        Args:
            images: (B, 3, H, W), as the network expects them. Without it they are the first tensor among the keyword
                arguments.
            args: Further arguments of the network.
            adapt: False predicts with the present state and changes nothing; see ``Engine.predict``.
            kwargs: Further keyword arguments of the network.
        """
        with self._lock:
            call = None
            if args or kwargs or images is None:
                images, call = split_call(() if images is None else (images, *args), kwargs)
            if not isinstance(images, Tensor):
                raise InputTypeError(f"images must be a tensor of shape (B, 3, H, W), got {type(images).__name__}")
            engine, adapt = self._engine or self.engine, adapt and not self.is_frozen
            if self._window.size is not None:
                return self._window(engine, images, call, adapt)
            return run_scheduled(engine, images, call, adapt) if engine.schedules else engine(images, call, adapt)

    def reset(self) -> None:
        """Restore the source weights and begin a new domain."""
        with self._lock:
            self.engine.reset()
            self.engine.announce()
            self._window.images = None

    def state_dict(self) -> dict[str, Any]:
        """Return copies of everything that adaptation has changed, and the images of the window."""
        with self._lock:
            return self.engine.capture() | self._window.capture()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what ``state_dict()`` returned, of this network or an equal one; otherwise a ValueError."""
        with self._lock:
            self._window.restore(self.engine, state)

    def to(self, device: torch.device | str) -> AdaptedNetwork:
        """Move the network and all adaptation state to a device."""
        with self._lock:
            self.engine.to(torch.device(device))
            self._window.to(torch.device(device))
        return self

    def release(self) -> nn.Module:
        """Stop adapting and return the network as it was before ``wrap``."""
        with self._lock:
            network = self.module
            self._finalizer()
            self._engine = None
            return network

    def __enter__(self) -> AdaptedNetwork:
        return self

    def __exit__(self, *error: object) -> None:
        if self._engine is not None:
            self.release()

    def __reduce__(self) -> tuple[Any, ...]:
        with self._lock:
            engine, options = self.engine, (self._window.size, self.is_frozen)
            return _rebuilt, (self._adapter, source_of(engine), engine.net.seed, self.state_dict(), *options)


def _rebuilt(
    adapter: _Adapter, network: nn.Module, seed: int, state: dict[str, Any], window: int | None, is_frozen: bool
) -> AdaptedNetwork:
    adapter.seed = seed
    adapted = adapter.wrap(network, window)
    adapted.load_state_dict(state)
    adapted.is_frozen = is_frozen
    return adapted
