"""A batch whose images are divided over processes for the network's passes, and for nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ttalight.distributed import gather_with_gradients, rank_and_world_size
from ttalight.models.outputs import map_tensors

__all__ = ["BatchShard"]


class BatchShard:
    """Lets each rank pass its slice of a batch, and gives all of them the outputs of the whole batch.

    Slices are equally long: the last image is repeated behind them, and what comes of that is cut away. Normalisation
    layers leave it out of their statistics, see ``valid``. Gradients flow back to all ranks: where each computes the
    same loss from the outputs, gradients averaged over ranks are those of one process.
    """

    def __init__(self) -> None:
        self.rank, self.ranks = rank_and_world_size()
        #: Images of the pass in progress, of all ranks together; 0 outside of one.
        self.images = 0

    @property
    def rows(self) -> int:
        """Length of the slices of the pass in progress."""
        return -(-self.images // self.ranks)

    @property
    def valid(self) -> int:
        """The number of images at the beginning of this rank's slice that are not repeated ones."""
        return min(max(self.images - self.rank * self.rows, 0), self.rows)

    def __call__(self, forward: Callable[[Tensor], Any], images: Tensor) -> Any:
        """Run a forward on this rank's slice of images.

        Args:
            forward: Returns a tensor, or a dict, dataclass or tuple of such; dimension 1 is not touched.
            images: (B, ...), the whole batch.

        Returns:
            What the forward returned, each tensor of the slice's length being that of the whole batch.
        """
        if self.images:  # inside of a pass that is divided already
            return forward(images)
        self.images = len(images)
        try:
            index = torch.arange(self.rank * self.rows, (self.rank + 1) * self.rows, device=images.device)
            return map_tensors(forward(images[index.clamp(max=self.images - 1)]), self._gathered)
        finally:
            self.images = 0

    def whole(self, part: Tensor, images: int) -> Tensor:
        """Return the rows of all ranks, (images, ...), of those of this one; every rank has to call this."""
        return gather_with_gradients(part)[:images]

    def _gathered(self, part: Tensor) -> Tensor:
        return self.whole(part, self.images) if part.ndim and len(part) == self.rows else part

    @contextmanager
    def inside(self, modules: Sequence[nn.Module]) -> Iterator[None]:
        """Deal out what modules are given while a context lasts, each call a pass of its own."""
        before = [(module, vars(module).get("forward")) for module in modules]
        for module in modules:
            forward = module.forward
            module.forward = lambda images, forward=forward: self(forward, images)
        try:
            yield
        finally:
            for module, own in before:
                if own is None:
                    del module.forward
                else:
                    module.forward = own
