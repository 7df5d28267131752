"""A loader of some batches of a stream, which keep their numbers."""

from __future__ import annotations

from typing import Any

import numpy as np
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from ttalight.data.streams import StreamSampler

__all__ = ["PartialLoader"]


class PartialLoader(CombinedLoader):
    """Delivers some batches of a stream under the numbers that they have in the whole of it.

    These are the rest of the stream for a run that is resumed, and one process's share where several divide it.
    Lightning's evaluation loop takes ``batch_idx`` from the loader, so that steps, callbacks and progress bars count
    from the beginning of the stream.

    Args:
        loader: Loader of the stream, with a ``StreamSampler`` that knows which batches to yield.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        assert isinstance(loader.sampler, StreamSampler), "only streams are delivered in part"
        super().__init__(loader, "sequential")
        self._numbers = loader.sampler.numbers

    def __next__(self) -> tuple[Any, int, int]:
        """Return a batch, its number and that of its loader."""
        batch, index, loader = super().__next__()
        return batch, int(self._numbers[index]), loader

    @property
    def limits(self) -> list[int | float] | None:
        """The largest number of batches left to deliver, set as a number counted from the beginning of the stream."""
        return super().limits

    @limits.setter
    def limits(self, limits: int | float | list[int | float] | None) -> None:
        if limits is not None:
            counted = limits if isinstance(limits, list) else [limits]
            limits = [int(np.searchsorted(self._numbers, limit)) for limit in counted]
        CombinedLoader.limits.fset(self, limits)  # type: ignore[attr-defined]
