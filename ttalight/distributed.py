"""Collectives that gradients flow through."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["gather_with_gradients", "rank_and_world_size"]


def rank_and_world_size() -> tuple[int, int]:
    """Rank of this process and number of processes; (0, 1) where nothing is distributed."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def gather_with_gradients(tensor: Tensor) -> Tensor:
    """Concatenate the tensors of all ranks along dimension 0, in rank order, differentiably.

    Backward gives each rank the sum over ranks of the gradients of its own slice. So where the loss of the whole
    batch is the mean over ranks of what each computes, gradients averaged over ranks (DistributedDataParallel's
    default) are those that one process would get from the whole batch.

    Backward is a collective too: every rank has to run it. Without an initialised process group, or alone in one, the
    tensor itself is returned.

    Args:
        tensor: (B, ...), of the same shape and type on every rank.

    Returns:
        (ranks * B, ...).
    """
    if rank_and_world_size()[1] == 1:
        return tensor
    gathered: Tensor = _Gather.apply(tensor)  # type: ignore[no-untyped-call]
    return gathered


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        rank, ranks = rank_and_world_size()
        ctx.rows = slice(rank * len(tensor), (rank + 1) * len(tensor))
        parts = [torch.empty_like(tensor, memory_format=torch.contiguous_format) for _ in range(ranks)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # All-reduce and slice: gloo has no reduce-scatter in the older torch versions supported.
        total = gradients[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        rows: Tensor = total[ctx.rows]
        return rows
