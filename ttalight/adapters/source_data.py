"""The base of the methods that measure something on source images before they adapt."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

from lightning import LightningModule, Trainer

from ttalight.adapters.adapter import Adapter
from ttalight.adapters.components.source_images import SourceBatch, SourceImages
from ttalight.engine.adaptive_network import AdaptiveNetwork

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

    def source_batches(
        self, net: AdaptiveNetwork, count: int, without: str, instead: str = ""
    ) -> Iterable[SourceBatch] | None:
        """Return batches of at most ``count`` source images. Without any, warn and return None.

        Args:
            net: The network.
            count: Number of images.
            without: What the method does without them, for the warning.
            instead: What else a user can do, for the warning.
        """
        batches = self._images.batches(count, net.seed)
        if batches is None:
            warnings.warn(
                f"{type(self).__name__} found no source images, so {without}. Give source= (an iterable of batches of "
                f"images, or of images and labels), or a data module with validation images{instead}",
                stacklevel=2,
            )
        return batches

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make gradients possible in the coming evaluation, and note where source images are."""
        super().setup(trainer, pl_module, stage)
        self._images.trainer = trainer

    def end(self) -> None:
        """End the adaptation of a network, and keep its state."""
        super().end()
        self._images.trainer = None
