"""Modes, parameters, export and reports of adapted networks."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from ttalight.adapters.window import Window
from ttalight.engine.engine import Engine
from ttalight.engine.export import exported
from ttalight.monitoring import Monitoring, Report, report_of

__all__ = ["Handle"]

H = TypeVar("H", bound="Handle")


class Handle(ABC):
    """Base of ``AdaptedNetwork`` with its modes, parameters, export and reports."""

    _adapter: object
    _engine: Engine | None
    _lock: threading.RLock
    _window: Window
    #: Whether calls predict without adapting; see ``freeze``.
    is_frozen: bool = False

    @property
    @abstractmethod
    def engine(self) -> Engine:
        """The engine behind the network."""

    @property
    def module(self) -> nn.Module:
        """The network itself."""
        return self.engine.net.module

    def freeze(self: H) -> H:
        """Let calls predict with the present state and change nothing, as with ``adapt=False``, and return ``self``."""
        self.is_frozen = True
        return self

    def unfreeze(self: H) -> H:
        """Let calls adapt again, and return ``self``."""
        self.is_frozen = False
        return self

    def train(self: H, mode: bool = True) -> H:
        """Set the training mode that the network has after ``release()``. It always adapts in eval mode."""
        with self._lock:
            engine = self.engine
            if engine.takeover is None:
                engine.net.module.train(mode)
            else:
                engine.takeover.train(engine.net.module, mode)
        return self

    def eval(self: H) -> H:
        """Return ``train(False)``. This does not stop the adaptation: use ``freeze()`` for that."""
        return self.train(False)

    @property
    def training(self) -> bool:
        """The training mode that the network has after ``release()``."""
        engine = self.engine
        return engine.net.module.training if engine.takeover is None else engine.takeover.training

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters of the network, with their present values."""
        return self.module.parameters()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Return the parameters of the network by name."""
        return self.module.named_parameters()

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return self.engine.net.device

    @property
    def window(self) -> Tensor | None:
        """The images of the window, the newest last; None without one, or before the first batch."""
        return self._window.images

    def export(self, statistics_from: Tensor | None = None) -> nn.Module:
        """Return an ordinary module, a copy in eval mode, that predicts what ``self(images, adapt=False)`` returns.

        It is the network with the adapted weights. BatchNorm layers that a method normalises with statistics of the
        batch become layers that do the same (``ttalight.models.exported_norm``), under keys of their own in
        ``state_dict()``. Other changes of a method, such as T3A's classifier, are included. ``torch.export.export``,
        ``torch.save``, ``pickle`` and ``copy.deepcopy`` give the same numbers. Where a reset is due, which with
        ``reset="batch"`` it always is, the module is the source with the method's normalisation.

        Args:
            statistics_from: Images, (B, 3, H, W), whose statistics are folded into the running ones of ordinary
                BatchNorm layers. The module then predicts each image by itself, and its ``state_dict()`` loads into a
                new network of the same class.

        Raises:
            RuntimeError: Before the first batch.
            TypeError: If the method's prediction is not that of a network (LAME), or its statistics cannot be folded.
        """
        with self._lock:
            return exported(self.engine, statistics_from)

    def report(self, images: Tensor | None = None) -> Report:
        """Return what can be said without labels of the model, see ``Report``; one read from the device.

        Args:
            images: A sample, (B, 3, H, W), to compare with the source model on, which costs two passes.
        """
        with self._lock:
            return report_of(self.engine, images)

    def watch(self: H, *monitors: Monitoring) -> H:
        """Let monitors, such as ``Watch()``, see every batch from now on; copies have none."""
        with self._lock:
            for monitor in monitors:
                monitor.attach(self.engine)
        return self

    def __repr__(self) -> str:
        if self._engine is None:
            return f"{type(self).__name__}({self._adapter!r}, released)"
        engine, window = self._engine, [] if self._window.size is None else [f"window of {self._window.size}"]
        counts = [f"{engine.batches:,} batches", f"{engine.updates:,} updates"]
        frozen = ["frozen"] if self.is_frozen else []
        parts = [repr(self._adapter), type(engine.net.module).__name__, *counts, *window, *frozen]
        return f"{type(self).__name__}({', '.join(parts)})"
