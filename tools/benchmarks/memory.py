"""Growth of memory over a long stream of single images, for every method.

    python tools/benchmarks/memory.py --batches 100000

A tiny network adapts to one image after another; every method has a process of its own. After the first ``--warm``
batches the table compares with the end: the resident memory of the process, what the storages of all live tensors hold
(with ``--trace`` what Python holds too, by ``tracemalloc``, which takes several times as long), the number of live
tensors, and the number of Python's memory blocks. Memory is bounded where none of these grows.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
import tracemalloc
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ttalight import adapters
from ttalight.adapters import Adapter, Tent

#: Arguments with which methods have something to do, and not much, on single images of a network with random weights.
SETTINGS = {
    "ETA": {"margin": 1.0, "redundancy": 0.99995},
    "EATA": {"margin": 1.0, "redundancy": 0.99995, "fisher": "stream"},
    "RDumb": {"margin": 1.0, "redundancy": 0.99995},
    "SAR": {"margin": 1.0},
    "DeYO": {"margin": 1.0, "threshold": -1.0},
    "CoTTA": {"views": 2},
    "RoTTA": {"memory": 4},
    "NOTE": {"memory": 4},
    "AdaContrast": {"queue": 20, "refine_after": 6},
    "NCTTA": {"margin": 1.0},
    "MoETTA": {"frozen": []},
    "MEMO": {"views": 2},
    "TTAug": {"views": 2},
    "T3A": {"supports": 20},
    "TestTimeTraining": {"steps": 1},
}
#: Bases, and methods for vision transformers or for models that encode texts alone.
NOT_MEASURED = {
    *("Adapter", "GradientAdapter", "SelfTrainingAdapter", "EntropyAdapter", "FOA", "MaskedReconstruction", "CALIP"),
    *("BATCLIP", "CLIPArTT", "WATT", "TPT", "CTPT", "OTPT"),
}
#: The last entry adapts with a window.
WINDOW = "Tent, window of 8"


class Growth(NamedTuple):
    method: str
    rss: float
    held: float
    tensors: int
    blocks: int
    milliseconds: float


class Task(nn.Module):
    """A tiny network with a self-supervised loss."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(3, 4, 3, stride=2),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(16, 3),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def adaptable_parameters(self) -> list[nn.Parameter]:
        return list(self.net[:2].parameters())

    def auxiliary_loss(self, images: Tensor, generator: torch.Generator) -> Tensor:
        return self.net(images + torch.rand(images.shape, generator=generator)).square().mean(1)


def methods() -> dict[str, Callable[[], adapters.AdaptedNetwork]]:
    """Return makers of adapted networks, by the name of the method."""
    named = {name: getattr(adapters, name) for name in adapters.__all__}
    found = {name: cls for name, cls in named.items() if isinstance(cls, type) and issubclass(cls, Adapter)}
    made = {
        name: lambda name=name, cls=cls: cls(reset="never", **SETTINGS.get(name, {})).wrap(Task())
        for name, cls in found.items()
        if name not in NOT_MEASURED
    }
    return made | {WINDOW: lambda: Tent(reset="never").wrap(Task(), window=8)}


def resident() -> float:
    """Return the resident memory of the process, in MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def held() -> tuple[float, int]:
    """Return what Python and the storages of live tensors hold, in MB, and the number of live tensors."""
    gc.collect()
    tensors = [value for value in gc.get_objects() if type(value) in (Tensor, nn.Parameter)]
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors}
    return (tracemalloc.get_traced_memory()[0] + sum(storages.values())) / 1e6, len(tensors)


def grow(name: str, batches: int, warm: int, trace: bool = False) -> Growth:
    """Adapt to a stream of single images and return how memory has grown since the first of them."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    adapted, images = methods()[name](), torch.rand(64, 1, 3, 12, 12)
    if trace:
        tracemalloc.start()
    start = time.process_time()
    for index in range(batches):
        if index == warm:
            first, before, blocks = held(), resident(), sys.getallocatedblocks()
        adapted(images[index % len(images)])
    seconds = time.process_time() - start
    # Counting takes memory itself, so that the resident memory is read after the first count and before the last.
    after, blocks = resident(), sys.getallocatedblocks() - blocks
    last = held()
    return Growth(name, after - before, last[0] - first[0], last[1] - first[1], blocks, 1e3 * seconds / batches)


def main() -> None:
    """Print a line for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, default=100_000)
    parser.add_argument("--warm", type=int, default=1000, help="batches before memory is first looked at")
    parser.add_argument("--methods", nargs="*", help="all by default")
    parser.add_argument("--trace", action="store_true", help="count what Python holds, by tracemalloc")
    args = parser.parse_args()
    if not 0 <= args.warm < args.batches:
        parser.error(f"--warm must be at least 0 and less than --batches, got {args.warm} and {args.batches}")
    names = args.methods or list(methods())
    print(f"{args.batches:,} batches of one image, growth after the first {args.warm:,}", flush=True)
    print(
        f"{'method':20s} {'RSS, MB':>9s} {'held, MB':>9s} {'tensors':>8s} {'blocks':>8s} {'ms/batch':>9s}", flush=True
    )
    seen = []
    for name in names:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            row = pool.submit(grow, name, args.batches, args.warm, args.trace).result()
        numbers = f"{row.rss:9.2f} {row.held:9.3f} {row.tensors:8d} {row.blocks:8d} {row.milliseconds:9.2f}"
        print(f"{row.method:20s} {numbers}", flush=True)
        seen.append(row)
    growths = [row.rss for row in seen]
    print(f"median of RSS {statistics.median(growths):.2f} MB, largest {max(growths):.2f} MB")


if __name__ == "__main__":
    main()
