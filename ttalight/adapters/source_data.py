"""The base of the methods that measure something on source images before they adapt."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning import LightningModule, Trainer

from ttalight.adapters.adapter import Adapter
from ttalight.adapters.components.source_images import SourceImages

__all__ = ["SourceDataAdapter"]


class SourceDataAdapter(Adapter):
    """Takes source images: those of the user, or in a Lightning run those of the data module's validation set.

    Args:
        source: Batches of source images (B, 3, H, W), or tuples that begin with them, as the network's forward takes
            them; read once a run, so lists and data loaders serve any number of runs.
        kwargs: See ``Adapter``.
    """

    def __init__(self, source: Iterable[Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._images = SourceImages(source)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make gradients possible in the coming evaluation, and note where source images are."""
        super().setup(trainer, pl_module, stage)
        self._images.trainer = trainer

    def end(self) -> None:
        """End the adaptation of a network, and keep its state."""
        super().end()
        self._images.trainer = None
