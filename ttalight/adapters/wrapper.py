"""A plain network that adapts whenever it is called."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from ttalight.adapters.engine import Engine

__all__ = ["AdaptedNetwork"]


class AdaptedNetwork:
    """What ``Adapter.wrap(network)`` returns: call it with images, get logits, the network has adapted.

    The network is adapted in place; ``release()`` gives it back bit for bit. Calls are serialised by a lock. Copies
    (``copy.deepcopy``, ``pickle``) are complete and independent: they hold their own network.

    Args:
        engine: The engine that adapts the network.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine: Engine | None = engine
        self._lock = threading.RLock()

    @property
    def engine(self) -> Engine:
        """The engine behind the network.

        Raises:
            RuntimeError: After ``release()``.
        """
        if self._engine is None:
            raise RuntimeError("this network was released: wrap it again to adapt it again")
        return self._engine

    @property
    def module(self) -> nn.Module:
        """The network itself."""
        return self.engine.net.module

    def __call__(self, images: Tensor) -> Any:
        """Adapt to a batch and return its logits, in the structure that the network returns.

        Args:
            images: (B, 3, H, W), as the network expects them.
        """
        with self._lock:
            if not isinstance(images, Tensor):
                raise TypeError(f"images must be a tensor of shape (B, 3, H, W), got {type(images).__name__}")
            return self.engine(images)

    def reset(self) -> None:
        """Go back to the source weights and begin a new domain."""
        with self._lock:
            self.engine.reset()
            self.engine.announce()

    def state_dict(self) -> dict[str, Any]:
        """Return copies of everything that adaptation has changed."""
        with self._lock:
            return self.engine.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what ``state_dict()`` returned, of this network or of an equal one."""
        with self._lock:
            self.engine.load_state_dict(state)

    def to(self, device: torch.device | str) -> AdaptedNetwork:
        """Move the network and all adaptation state to a device."""
        with self._lock:
            self.engine.to(torch.device(device))
        return self

    def release(self) -> nn.Module:
        """Stop adapting and return the network as it was before ``wrap``."""
        with self._lock:
            network = self.module
            self.engine.adapter._end()
            self._engine = None
            return network

    def __getstate__(self) -> dict[str, Any]:
        return {"_engine": self._engine}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._engine = state["_engine"]
        self._lock = threading.RLock()
