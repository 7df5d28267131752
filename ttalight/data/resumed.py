"""A loader of the rest of a stream, whose batches keep their numbers."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

from ttalight.data.streams import StreamSampler

__all__ = ["ResumedLoader"]


class ResumedLoader(CombinedLoader):
    """Delivers the batches that a stream has left, under the numbers they have in the whole stream.

    Lightning's evaluation loop takes ``batch_idx`` from the loader, so that steps, callbacks and progress bars count
    from the beginning of the stream.

    Args:
        loader: Loader of the stream, with a ``StreamSampler`` that knows where to start.
    """

    def __init__(self, loader: DataLoader[Any]) -> None:
        assert isinstance(loader.sampler, StreamSampler), "only a stream is resumed"
        super().__init__(loader, "sequential")
        self._start = loader.sampler.start

    def __next__(self) -> tuple[Any, int, int]:
        """Return a batch, its number and that of its loader."""
        batch, index, loader = super().__next__()
        return batch, self._start + index, loader

    @property
    def limits(self) -> list[int | float] | None:
        """How many batches are left to deliver, at most; set as a number counted from the beginning of the stream."""
        return super().limits

    @limits.setter
    def limits(self, limits: int | float | list[int | float] | None) -> None:
        if limits is not None:
            counted = limits if isinstance(limits, list) else [limits]
            limits = [max(0, limit - self._start) for limit in counted]
        CombinedLoader.limits.fset(self, limits)  # type: ignore[attr-defined]
