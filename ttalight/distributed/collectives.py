"""Collectives that gradients flow through."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["average", "gather_with_gradients", "global_moments", "rank_and_world_size"]


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


def global_moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and biased variance of each channel over all ranks, (C,), and the number of values behind them, (1,).

    Differentiable. Ranks may have different numbers of rows, or none at all: the moments of each are combined by their
    counts, as T. F. Chan, G. H. Golub and R. J. LeVeque, *Algorithms for Computing the Sample Variance: Analysis and
    Recommendations*, The American Statistician 37, 1983, do it, which loses no digits where a mean is large.

    Args:
        x: (B, C, *) in float32 or float64; C is the same on every rank.
    """
    dims, channels = [0, *range(2, x.ndim)], x.shape[1]
    count = x.new_full((1,), x.numel() // channels)
    mean = x.sum(dims) / count.clamp(min=1)
    squares = (x - mean.view(1, -1, *[1] * (x.ndim - 2))).square().sum(dims)
    ranks = rank_and_world_size()[1]
    gathered = gather_with_gradients(torch.cat((count, mean, squares))).view(ranks, -1)
    counts, means, within = torch.split(gathered, [1, channels, channels], dim=1)
    total = counts.sum(0)
    mean = (counts * means).sum(0) / total
    var = (within + counts * (means - mean).square()).sum(0) / total
    return mean, var, total


@torch.no_grad()
def average(tensors: list[Tensor]) -> None:
    """Put the mean over ranks into tensors of one type and the same shapes everywhere, in one collective.

    Args:
        tensors: At least one.
    """
    ranks = rank_and_world_size()[1]
    if ranks == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    dist.all_reduce(flat)
    sizes = [tensor.numel() for tensor in tensors]
    for tensor, values in zip(tensors, torch.split(flat.div_(ranks), sizes), strict=True):
        tensor.copy_(values.view_as(tensor))


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
