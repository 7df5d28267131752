"""Count how often the host waits for the device."""

from __future__ import annotations

import collections
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: Operations that read values, or sizes that depend on values.
READS = ("_local_scalar_dense", "nonzero", "equal", "_unique2", "unique_dim", "masked_select")


class _Reads(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = (
            [index for index in args[1] if index is not None and index.dtype == torch.bool] if name == "index" else []
        )
        if name in READS or masks:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def count_host_reads(function: Callable[[], Any], device: str) -> collections.Counter[str]:
    """Return how often a function waits for the device, by place in the code; on the CPU how often it would, by name.

    On the CPU the operations are counted that read a value or a size from their tensor, ``tolist`` among them. Copies
    to the host are not seen there, and tensors that are in host memory on a GPU count too.
    """
    return _on_cuda(function) if device != "cpu" else _on_cpu(function)


def _on_cuda(function: Callable[[], Any]) -> collections.Counter[str]:
    with warnings.catch_warnings(record=True) as caught, sync_debug_mode("warn"):
        warnings.simplefilter("always")
        function()
    places = [warning for warning in caught if "synchronizing CUDA operation" in str(warning.message)]
    return collections.Counter("/".join(place.filename.split("/")[-2:]) + f":{place.lineno}" for place in places)


def _on_cpu(function: Callable[[], Any]) -> collections.Counter[str]:
    reads, tolist = _Reads(), Tensor.tolist

    def counted(tensor: Tensor) -> Any:
        reads.counts["tolist"] += 1
        return tolist(tensor)

    with mock.patch.object(Tensor, "tolist", counted), reads:
        function()
    return reads.counts


@contextmanager
def sync_debug_mode(mode: str) -> Iterator[None]:
    """Let torch warn of what waits for the device, or refuse it."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
