"""Compressed and delayed gradients for training over slow links."""

# No postponed annotations: DistributedDataParallel compares those of a communication hook with its own types.
import time
from collections import deque
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from ttalight.arguments import CheckedArguments
from ttalight.distributed.collectives import average, rank_and_world_size
from ttalight.distributed.slow_links import Setting, choose_setting, top_k
from ttalight.errors import InputError
from ttalight.files.difference import Between, difference

__all__ = ["DeCoHook"]

_PLAIN = Setting(1.0, 0)
#: Steps before the first choice of a setting, and bytes of the message that measures the bandwidth.
_WARMUP, _PROBE = 5, 2**18


class DeCoHook(CheckedArguments, Callback):
    """Sends a part of the gradients, and applies their sum some steps later, in ``fit`` under DDP over slow links.

    Each process adds its gradient to what it has not sent yet, sends the values of largest magnitude with their
    indices, and keeps the rest (error feedback). The sum over processes replaces the gradient ``delay`` steps later, so
    that messages travel while the next steps are computed. Until the first arrives gradients are zero, and the last
    ``delay`` sums of a fit are not applied. A ratio of 1 without delay is plain DDP, bit for bit.

    Without ``ratio`` and ``delay`` both are chosen while training, by ``choose_setting``. Latency and bandwidth are
    measured by messages of their own. The slowest link and the shortest computation of all processes count.

    A checkpoint holds what has not been sent and what is on its way, so that a fit with fixed ratio and delay resumes
    with the numbers of an uninterrupted one. What has not been sent is averaged over processes whenever a checkpoint is
    written, which costs one all-reduce of the size of the gradient.

    After R. Lu, J. Jiang, C. Li, X. Wei and Z. Wang, *Taming Latency and Bandwidth: A Theoretical Framework and
    Adaptive Algorithm for Communication-Constrained Training*, arXiv:2507.17346 (DeCo-SGD). The values of largest
    magnitude are those of the whole gradient, in one message a step.

    Args:
        ratio: Fraction of the gradient's values that is sent, in (0, 1]; below 1 it must be less than 1 / processes,
            since a value travels with its index.
        delay: Steps until the sum is applied.
        max_delay: Longest delay that is chosen.
        min_ratio: Smallest ratio that is chosen.
        every: Steps between two choices.

    Raises:
        ValueError: If only one of ``ratio`` and ``delay`` is given, or a value is out of its range; at the start of
            ``fit``, if the strategy is not DDP, the precision scales losses, or the checkpoint is of another model.
    """

    def __init__(
        self,
        ratio: float | None = None,
        delay: int | None = None,
        max_delay: int = 8,
        min_ratio: float = 0.01,
        every: int = 200,
    ) -> None:
        super().__init__()
        if (ratio is None) != (delay is None):
            raise InputError(f"give ratio and delay, or neither to have both chosen, got ratio={ratio}, delay={delay}")
        self.adaptive = ratio is None
        self.setting = _PLAIN if ratio is None or delay is None else Setting(float(ratio), delay)
        if not (0 < self.setting.ratio <= 1 and self.setting.delay >= 0):
            raise InputError(f"ratio must be in (0, 1] and delay at least 0, got ratio={ratio}, delay={delay}")
        if not (0 < min_ratio <= 1 and max_delay >= 0 and every > _WARMUP):
            raise InputError(
                f"min_ratio must be in (0, 1], max_delay at least 0 and every above {_WARMUP}, got "
                f"min_ratio={min_ratio}, max_delay={max_delay}, every={every}"
            )
        self.max_delay, self.min_ratio, self.every = max_delay, min_ratio, every
        self._groups: deque[Any] = deque()
        self._slices: dict[Tensor, slice] = {}
        self._unsent: Tensor | None = None
        self._in_flight: deque[_Message] = deque()
        self._flags: deque[tuple[Any, Tensor]] = deque()
        self._buckets: list[tuple[Any, Future[Tensor], Any]] = []
        self._sends_buckets = True
        self._left = 0.0
        self._computed: deque[float] = deque(maxlen=16)
        self._until_choice = _WARMUP

    # -- the callback

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the run and register the hook."""
        model: Any = trainer.strategy.model
        if not isinstance(model, DistributedDataParallel):
            raise InputError(
                f"DeCoHook works with strategy='ddp' (trainer.strategy: ddp), got {type(trainer.strategy).__name__}: "
                "leave it out"
            )
        if getattr(trainer.precision_plugin, "scaler", None) is not None:
            raise InputError(
                f"precision {trainer.precision!r} scales losses, by a factor that changes before a delayed gradient is "
                "applied: use 'bf16-mixed' or '32-true' with DeCoHook"
            )
        ranks, ratio = rank_and_world_size()[1], self.setting.ratio
        if 1 / ranks <= ratio < 1:
            raise InputError(
                f"ratio is {ratio} in {ranks} processes, but a value that is sent with its index saves nothing from "
                f"1/{ranks} on: use a smaller ratio, or 1"
            )
        if any(_is_synchronized(module) for module in model.modules()):
            rank_zero_warn(
                "BatchNorm layers wait for the statistics of all processes, each layer twice a step, which DeCoHook "
                "cannot hide: use sync_batchnorm=False (trainer.sync_batchnorm: false) on slow links"
            )
        self._slices, start = {}, 0
        for parameter in model.module.parameters():
            if parameter.requires_grad:
                self._slices[parameter] = slice(start, start + parameter.numel())
                start += parameter.numel()
        self._take_over(start)
        self._flags.clear()
        self._buckets, self._left, self._until_choice = [], 0.0, _WARMUP
        self._computed.clear()
        self._open_groups()
        model.register_comm_hook(self, _communicate)  # Lightning registers hooks of its strategy on CUDA only

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait for messages on their way: they would disturb the end of the process group."""
        for message in self._in_flight:
            message.wait()
        for work, _ in self._flags:
            work.wait()

    def any_process(self, flag: bool) -> bool:
        """Return whether any process has given true ``delay`` calls ago, so that no step waits for the link.

        ``Trainer`` asks so after each batch whether a process has got SIGTERM. Every process has to call.
        """
        given, found = torch.tensor(int(flag)), False
        self._flags.append((dist.all_reduce(given, dist.ReduceOp.MAX, group=self._groups[0], async_op=True), given))
        while len(self._flags) > self.setting.delay:
            work, given = self._flags.popleft()
            began = time.perf_counter()
            work.wait()
            self._left += time.perf_counter() - began  # no computation
            found = found or bool(given)
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return what has not been sent, averaged over processes, and what is on its way. Every process has to call."""
        if self._unsent is not None and self._slices:
            average([self._unsent])
        return {
            "ratio": self.setting.ratio,
            "delay": self.setting.delay,
            "unsent": None if self._unsent is None else self._unsent.cpu(),
            "in_flight": [message.state() for message in self._in_flight],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume; shapes are checked at the start of ``fit``.

        Raises:
            ValueError: If it is not the state of a DeCoHook.
        """
        message = {"values": list, "indices": list}
        form = {"ratio": Between(0.0, 1.0), "delay": Between(0, 2**62), "unsent": None, "in_flight": list}
        fault = difference(form, state_dict)
        fault = fault or difference([message] * len(state_dict["in_flight"]), state_dict["in_flight"], "in_flight")
        if fault is not None:
            raise InputError(f"the checkpoint's state of DeCoHook is damaged ({fault}): use another checkpoint")
        if self.adaptive:
            self.setting = Setting(state_dict["ratio"], min(state_dict["delay"], self.max_delay))
        self._unsent = state_dict["unsent"]
        self._in_flight = deque(_Message(None, **state) for state in state_dict["in_flight"])

    def _take_over(self, size: int) -> None:
        """Move the state to the parameters' device; a second fit of the same hook continues with it."""
        like = next(iter(self._slices))
        whole = torch.empty(size, device="meta", dtype=like.dtype)
        fault = None if self._unsent is None else difference(whole, self._unsent, "unsent")
        for message in self._in_flight:
            fault = fault or message.fault(whole)
        if fault is not None:
            raise InputError(
                f"DeCoHook has gradients of another model ({fault}): resume the run that wrote the checkpoint, or make "
                "a new hook"
            )
        if self._unsent is not None:
            self._unsent = self._unsent.to(like, copy=True)
        for message in self._in_flight:
            message.to(like)

    # -- a step

    def _open_groups(self) -> None:
        """Make a process group for each message in flight: within one, messages follow each other."""
        device = next(iter(self._slices)).device
        while len(self._groups) < self.setting.delay + 1:
            self._groups.append(dist.new_group(backend="gloo" if device.type == "cuda" else None))

    def _add_bucket(self, bucket: Any) -> Future[Tensor]:
        """Take part of a gradient; with the last one all futures are completed."""
        buffer = bucket.buffer()
        future: Future[Tensor] = Future(devices=[buffer.device] if buffer.is_cuda else None)
        if not self._buckets:
            self._sends_buckets = self.setting == _PLAIN and self._unsent is None and not self._in_flight
        work = None
        if self._sends_buckets:  # the arithmetic of DDP without a hook: a product before the sum
            work = dist.all_reduce(buffer.mul_(1 / dist.get_world_size()), async_op=True)
        self._buckets.append((bucket, future, work))
        if bucket.is_last():
            self._finish_step()
        return future

    def _finish_step(self) -> None:
        if self._left:
            self._computed.append(time.perf_counter() - self._left)
        if self._sends_buckets:
            for _, _, work in self._buckets:
                work.wait()
        else:
            self._exchange()
        for bucket, future, _ in self._buckets:
            future.set_result(bucket.buffer())
        self._buckets = []
        if self.adaptive and dist.get_world_size() > 1:
            self._until_choice -= 1
            if self._until_choice == 0:
                self._choose()
        self._left = time.perf_counter()

    def _exchange(self) -> None:
        """Send this step's gradient, and put the sums that are due in its place."""
        views = [
            (gradient, self._slices[parameter])
            for bucket, _, _ in self._buckets
            for parameter, gradient in zip(bucket.parameters(), bucket.gradients(), strict=True)
        ]
        like = views[0][0]
        size = sum(part.stop - part.start for part in self._slices.values())
        total = like.new_zeros(size)
        gradient = torch.zeros_like(total) if self._unsent is None else self._unsent
        for view, part in views:
            gradient[part].view(view.shape).add_(view)
        self._send(gradient)
        while len(self._in_flight) > self.setting.delay:
            self._in_flight.popleft().add_to(total)
        for view, part in views:
            view.copy_(total[part].view(view.shape))

    def _send(self, gradient: Tensor) -> None:
        """Send a vector or its largest values, divided by the number of processes, and keep the rest of it."""
        group, ranks = self._groups[0], dist.get_world_size()
        self._groups.rotate(-1)
        if self.setting.ratio == 1:
            self._unsent = None
            work = dist.all_reduce(gradient.mul_(1 / ranks), group=group, async_op=True)
            self._in_flight.append(_Message(work, [gradient], []))
            return
        values, indices = top_k(gradient, self.setting.ratio)
        self._unsent = gradient.index_fill_(0, indices, 0)
        packed = torch.cat((values.mul_(1 / ranks).view(torch.uint8), indices.int().view(torch.uint8)))
        received = [torch.empty_like(packed) for _ in range(ranks)]
        work = dist.all_gather(received, packed, group=group, async_op=True)
        size = values.numel() * values.element_size()
        self._in_flight.append(
            _Message(
                work,
                [part[:size].view(values.dtype) for part in received],
                [part[size:].view(torch.int32) for part in received],
            )
        )

    # -- the choice of a setting

    def _choose(self) -> None:
        """Measure the link and choose; all processes choose alike."""
        self._until_choice = self.every
        ranks, like = dist.get_world_size(), next(iter(self._slices))
        for message in self._in_flight:  # the link has to be idle
            message.wait()
        small, large = torch.zeros(1, device=like.device), torch.zeros(_PROBE // 4, device=like.device)
        self._seconds(small)  # the processes meet here
        latency = min(self._seconds(small) for _ in range(3))
        transfer = max(min(self._seconds(large) for _ in range(2)) - latency, 1e-9)
        # The shortest computation: the first process does not wait for the broadcast that begins a step of Lightning.
        measured = torch.tensor([-median(self._computed), latency, transfer], device=like.device, dtype=torch.float64)
        dist.all_reduce(measured, dist.ReduceOp.MAX, group=self._groups[0])
        compute, latency, transfer = (abs(value) for value in measured.tolist())
        size = 4 * sum(part.stop - part.start for part in self._slices.values())
        bandwidth = 2 * (ranks - 1) / ranks * _PROBE / transfer
        self.setting = choose_setting(
            compute, latency, bandwidth, size, ranks, max_delay=self.max_delay, min_ratio=self.min_ratio
        )
        self._open_groups()
        rank_zero_info(
            f"DeCoHook: a step computes for {compute:.3g} s, latency {latency:.3g} s, {bandwidth:.3g} bytes/s: "
            f"ratio {self.setting.ratio:.3g}, delay {self.setting.delay}"
        )

    def _seconds(self, tensor: Tensor) -> float:
        """Return the time of a message behind a broadcast, with which Lightning begins each step."""
        group = self._groups[0]
        began = time.perf_counter()
        dist.broadcast(tensor[:1], dist.get_global_rank(group, 0), group=group)
        dist.all_reduce(tensor, group=group)
        if tensor.is_cuda:
            torch.cuda.synchronize(tensor.device)
        return time.perf_counter() - began


class _Message:
    """The gradients of a step on their way: values of each process and their indices, or the sum of all values."""

    def __init__(self, work: Any, values: list[Tensor], indices: list[Tensor]) -> None:
        self.work, self.values, self.indices = work, values, indices

    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()
            self.work = None

    def add_to(self, total: Tensor) -> None:
        """Add the sum over processes, in the order of ranks."""
        self.wait()
        if not self.indices:
            total.add_(self.values[0])
        for values, indices in zip(self.values, self.indices, strict=False):
            total.index_add_(0, indices, values)

    def to(self, like: Tensor) -> None:
        self.values = [values.to(like) for values in self.values]
        self.indices = [indices.to(like.device) for indices in self.indices]

    def state(self) -> dict[str, list[Tensor]]:
        self.wait()  # clones, since values and indices share their memory
        return {
            "values": [values.to("cpu", copy=True) for values in self.values],
            "indices": [indices.to("cpu", copy=True) for indices in self.indices],
        }

    def fault(self, whole: Tensor) -> str | None:
        """Return why this is no message about a vector, None if it is one."""
        if not self.indices:
            return difference([whole], self.values, "in_flight")
        if len(self.values) != len(self.indices):
            return f"in_flight has values of {len(self.values)} processes and indices of {len(self.indices)}"
        for values, indices in zip(self.values, self.indices, strict=True):
            if not isinstance(indices, Tensor) or indices.dtype != torch.int32 or indices.ndim != 1:
                return "in_flight has no indices"
            if len(indices) and not 0 <= int(indices.min()) <= int(indices.max()) < len(whole):
                return f"in_flight has indices beyond {len(whole)} values"
            if fault := difference(whole[: len(indices)], values, "in_flight"):
                return fault
        return None


def _is_synchronized(module: nn.Module) -> bool:
    """Return whether it is a BatchNorm layer of torch for several processes, or one that ``BatchNormSync`` changed."""
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and (
        isinstance(module, nn.SyncBatchNorm) or "forward" in vars(module)
    )


def _communicate(state: DeCoHook, bucket: dist.GradBucket) -> Future[Tensor]:  # type: ignore[name-defined]
    return state._add_bucket(bucket)
