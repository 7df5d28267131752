"""One rank of the distributed loss tests: python two_processes.py RANK PORT FOLDER."""

from __future__ import annotations

import os
import sys
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import ttalight  # noqa: F401  (first: it makes torchvision importable)
from ttalight.distributed import gather_with_gradients
from ttalight.losses import alignment_loss, barlow_twins_loss, contrastive_loss

# Each takes (first, second, target) and the value of gather.
LOSSES = {
    "contrastive": lambda a, b, w, gather: contrastive_loss(a, b, 0.1, gather=gather),
    "contrastive, one-sided": lambda a, b, w, gather: contrastive_loss(a, b, 0.1, symmetric=False, gather=gather),
    "barlow twins": lambda a, b, w, gather: barlow_twins_loss(a, b, gather=gather),
    "alignment": lambda a, b, w, gather: alignment_loss(a, b, w, 0.2, gather=gather),
    "alignment, exclude": lambda a, b, w, gather: alignment_loss(a, b, w, 0.2, sibling="exclude", gather=gather),
    "alignment, positive": lambda a, b, w, gather: alignment_loss(a, b, w, 0.2, sibling="positive", gather=gather),
    "alignment, frozen": lambda a, b, w, gather: alignment_loss(a, b, w.detach(), 0.2, gather=gather),
}
RANKS = 2
SIZE = 6  # images of the whole batch


class Encoders(nn.Module):
    """Two small encoders with the same start everywhere."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 4)).double()
        self.teacher = nn.Linear(5, 4).double()

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return self.student(images[0]), self.student(images[1]), self.teacher(images[2])


def batch(size: int) -> Tensor:
    return torch.randn(3, size, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def gradients(encoders: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in encoders.parameters()]


def main(rank: int, port: str, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS, timeout=timedelta(seconds=60)
    )
    results = {}
    for size in (SIZE, RANKS):  # the second has one image a rank, which is enough when vectors are gathered
        images = batch(size).chunk(RANKS, dim=1)[rank]
        for name, loss_of in LOSSES.items():
            encoders = Encoders()
            encoders.teacher.requires_grad_(name in ("alignment", "alignment, exclude", "alignment, positive"))
            encoders = DistributedDataParallel(encoders)
            loss = loss_of(*encoders(images), True)
            loss.backward()
            results[name, size] = (loss.detach(), gradients(encoders))

    rows = torch.full((2, 3), float(rank), requires_grad=True)
    gathered = gather_with_gradients(rows)
    weights = (rank + 1) * torch.arange(12.0).view(4, 3)
    (gathered * weights).sum().backward()
    results["gather"] = (gathered.detach(), rows.grad)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    # Tearing down gloo beside a DistributedDataParallel can deadlock: its thread and the interpreter's wait mutually.
    os._exit(0)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
