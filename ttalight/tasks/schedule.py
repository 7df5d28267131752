"""The learning rate's schedule of source training."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

__all__ = ["warmup_cosine"]


def warmup_cosine(optimizer: Optimizer, steps: int, warmup_steps: int, final_lr: float) -> LRScheduler:
    """Return a linear warm-up from the final learning rate, followed by cosine annealing back to it.

    Args:
        optimizer: Its learning rate is the one after the warm-up.
        steps: Number of all steps, at least 1; the schedule is stepped after each.
        warmup_steps: Number of steps of the warm-up, of which one less than ``steps`` is the most.
        final_lr: Learning rate at the start of the warm-up and at the end.
    """
    warmup = min(warmup_steps, steps - 1)
    cosine = CosineAnnealingLR(optimizer, T_max=steps - warmup, eta_min=final_lr)
    if warmup == 0:
        return cosine
    start = min(1.0, final_lr / optimizer.param_groups[0]["initial_lr"])
    linear = LinearLR(optimizer, start_factor=start, total_iters=warmup)
    return SequentialLR(optimizer, [linear, cosine], milestones=[warmup])
