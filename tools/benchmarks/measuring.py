"""Parts of the benches: clocks, peak memory, fresh processes, medians, and the lines above a table."""

from __future__ import annotations

import logging
import multiprocessing
import platform
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, Protocol

import torch


class Place(Protocol):
    """The device of a measurement."""

    @property
    def device(self) -> str: ...

    @property
    def threads(self) -> int: ...


def now(place: Place) -> float:
    """Return the seconds of a clock: with one thread of the CPU those that the process was running."""
    if place.device != "cpu":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if place.threads == 1 else time.perf_counter()


def peak(device: str) -> float:
    """Return the most memory that this process has held so far, in MiB."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    unit = 2**20 if platform.system() == "Darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def fresh(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of its own, forked from one that has done nothing but import."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ttalight.adapters", "ttalight.trainer", "timm"])
    with ProcessPoolExecutor(1, context) as pool:  # unlike those of a Pool its processes may have workers
        return pool.submit(function, *arguments).result()


def quiet(threads: int) -> None:
    """Set the threads of torch, and silence warnings and Lightning's remarks."""
    torch.set_num_threads(threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def spread(values: Sequence[float]) -> str:
    """Return the median of values and the range of their middle half."""
    low, middle, high = statistics.quantiles(values, n=4)
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def processor() -> str:
    """Return the name of the processor, as far as the system tells."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def print_machine(device: str, threads: int, *more: str) -> None:
    """Print what a measurement was made on."""
    print(f"{processor()}, {platform.system()} {platform.machine()}, Python {platform.python_version()}")
    print(", ".join([f"torch {torch.__version__}", *more, device, f"{threads} thread(s)"]))


def print_head(columns: Sequence[str]) -> None:
    """Print the first two lines of a Markdown table."""
    print(f"\n| {' | '.join(columns)} |")
    print("|" + "---|" * len(columns), flush=True)
