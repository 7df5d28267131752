"""Measure training over slow links: DistributedDataParallel, a fixed setting of DeCoHook, and its own choice.

    python tools/benchmarks/slow_links.py [--links none 0.1:5e5] [--settings plain 0.05:2 adaptive]
                                          [--network perceptron] [--epochs 10] [--batches 16] [--batch-size 32]
                                          [--rounds 1] [--lr 0.005] [--forward 0.3] [--every 50]

Two processes train on the embedded digits for every link and setting, by ``ttalight.Trainer`` and gloo. A link is
``SECONDS:BYTES_PER_SECOND``, or ``none``. It is emulated in the process group, so all collectives of a step pay for it:
gloo moves the tensors, then a thread sleeps for the bytes that a process sends, where the groups of a process take
turns as connections do, and a second one for the latency, which messages share. The source of a broadcast does not wait
for it. BatchNorm layers keep to their own process. With a link, forward passes take ``--forward`` seconds at least, by
sleeping: the small network stands for a larger one. It needs ``os.fork``.

Prints one line for each: the median seconds of a step behind the first 12, plain DDP's on the same link as a multiple
of it, ratio and delay at the end, and the accuracy on the validation images after the last epoch. With ``--rounds``
fits of one link take turns with other seeds, and medians over them are printed, of accuracies also the range.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import queue
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import Any

import ttalight  # isort: skip  (first: it makes torchvision importable)
import lightning
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from measuring import quiet
from torch._C._distributed_c10d import _create_work_from_future
from torch.futures import Future

from ttalight.data import DigitsDataModule
from ttalight.distributed.deco import DeCoHook

RANKS, FIRST = 2, 12
#: Bytes, and seconds, that a flow sends at least before the next one has its turn.
PACKET, TURN = 1500, 0.002


@dataclasses.dataclass
class Message:
    """A message of a flow: bytes that are left to send, and the call at its arrival."""

    left: float
    latency: bool
    arrived: Callable[[], None]


class Link:
    """The link of this process: flows take turns to send a part of their oldest message, which arrives later."""

    def __init__(self) -> None:
        self.latency, self.bandwidth = 0.0, float("inf")
        self.flows: dict[Any, deque[Message]] = {}
        self.changed = threading.Condition()
        self.arriving: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def begin(self) -> None:
        for target in (self.send, self.arrive):
            threading.Thread(target=target, daemon=True).start()

    def carry(self, flow: Any, message: Message) -> None:
        with self.changed:
            self.flows.setdefault(flow, deque()).append(message)
            self.changed.notify()

    def send(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: any(self.flows.values()))
                waiting = [flow for flow in self.flows.values() if flow]
            for flow in waiting:
                part = min(flow[0].left, max(PACKET, self.bandwidth * TURN))
                time.sleep(part / self.bandwidth)
                flow[0].left -= part
                if flow[0].left <= 0:
                    with self.changed:
                        message = flow.popleft()
                    self.arriving.put((time.perf_counter() + self.latency * message.latency, message.arrived))

    def arrive(self) -> None:
        while True:
            at, arrived = self.arriving.get()
            time.sleep(max(0.0, at - time.perf_counter()))
            arrived()


LINK = Link()


class SlowGroup(dist.ProcessGroup):
    """Gloo behind a slow link."""

    def __init__(self, store: Any, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self.gloo, self.ranks = dist.ProcessGroupGloo(store, rank, size, timeout), size

    def carry(self, work: Any, size: float, result: Any, latency: bool = True, divisor: int = 1) -> Any:
        """Return the work that is done when a message has been sent by gloo and by the link."""
        future: Future[Any] = Future()

        def moved(done: Any) -> None:
            if divisor != 1:
                result[0].copy_(result[0] / divisor)
            LINK.carry(self, Message(size, latency, lambda: future.set_result(result)))

        work.get_future().add_done_callback(moved)
        return _create_work_from_future(future)

    def allreduce(self, tensors: list[torch.Tensor], opts: Any) -> Any:
        sent = 2 * (self.ranks - 1) / self.ranks * size_of(tensors)
        divisor = 1
        if opts.reduceOp == dist.ReduceOp.AVG:  # which gloo lacks; of gloo alone Lightning asks for sums
            opts.reduceOp, divisor = dist.ReduceOp.SUM, self.ranks
        return self.carry(self.gloo.allreduce(tensors, opts), sent, tensors, divisor=divisor)

    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor], opts: Any) -> Any:
        return self.carry(self.gloo.allgather(outputs, inputs, opts), (self.ranks - 1) * size_of(inputs), outputs)

    def broadcast(self, tensors: list[torch.Tensor], opts: Any) -> Any:
        waits = opts.rootRank != self.rank()
        return self.carry(self.gloo.broadcast(tensors, opts), size_of(tensors), tensors, waits)

    def barrier(self, opts: Any) -> Any:
        return self.carry(self.gloo.barrier(opts), 0, [])

    def getBackendName(self) -> str:
        return "slow"

    @property
    def pg_name(self) -> str:
        return self.group_name


def size_of(tensors: list[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class StepTimes(lightning.Callback):
    """Keeps the seconds between the beginnings of consecutive batches of an epoch, and makes forward passes longer."""

    def __init__(self, forward: float) -> None:
        self.forward = forward
        self.seconds: list[float] = []
        self.began = 0.0

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        now = time.perf_counter()
        if batch_idx:
            self.seconds.append(now - self.began)
        self.began = now

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: torch.Tensor) -> None:
        if LINK.latency:
            time.sleep(max(0.0, self.began + self.forward - time.perf_counter()))


class Perceptron(lightning.LightningModule):
    """A small network with one hidden layer, which costs little beside the messages."""

    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer]) -> None:
        super().__init__()
        self.optimizer = optimizer
        self.net = torch.nn.Sequential(torch.nn.Linear(32 * 32, 100), torch.nn.ReLU(), torch.nn.Linear(100, 10))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.net(images[:, 0].flatten(1))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        correct = (self(batch[0]).argmax(1) == batch[1]).float().mean()
        self.log("val/accuracy", correct, batch_size=len(batch[1]), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.optimizer(self.parameters())


def fit(arguments: argparse.Namespace, setting: str, seed: int) -> tuple[float, str, float]:
    """Return seconds of a step, the setting at the end, and the validation accuracy."""
    hook = None
    if setting == "adaptive":
        hook = DeCoHook(every=arguments.every)
    elif setting != "plain":
        ratio, delay = setting.split(":")
        hook = DeCoHook(ratio=float(ratio), delay=int(delay))
    lightning.seed_everything(seed, verbose=False)
    optimizer = partial(torch.optim.SGD, lr=arguments.lr, momentum=0.9, weight_decay=5e-4)
    task: lightning.LightningModule = Perceptron(optimizer)
    if arguments.network != "perceptron":
        from ttalight.tasks import SupervisedTask

        task = SupervisedTask(encoder=f"cifar_{arguments.network}", optimizer=optimizer, crop="none", flip=0.0)
    times = StepTimes(arguments.forward)
    with tempfile.TemporaryDirectory() as folder:
        trainer = ttalight.Trainer(
            default_root_dir=folder,
            accelerator="cpu",
            devices=RANKS,
            strategy=DDPStrategy(process_group_backend="slow"),
            max_epochs=arguments.epochs,
            limit_train_batches=arguments.batches,
            callbacks=[times] if hook is None else [times, hook],
            sync_batchnorm=False,
            num_sanity_val_steps=0,
            check_val_every_n_epoch=arguments.epochs,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(task, datamodule=DigitsDataModule(batch_size=arguments.batch_size))
    shown = "-" if hook is None else f"{hook.setting.ratio:.3g}, {hook.setting.delay}"
    accuracy = 100 * float(trainer.callback_metrics["val/accuracy"])
    return statistics.median(times.seconds[FIRST:]), shown, accuracy


def work(arguments: argparse.Namespace, rank: int) -> None:
    """Take part in all fits, and print on the first process."""
    quiet(threads=1)
    LINK.begin()
    dist.Backend.register_backend("slow", SlowGroup, devices=["cpu"])
    for link in arguments.links:
        rows: dict[str, list[tuple[float, str, float]]] = {setting: [] for setting in arguments.settings}
        for seed in range(arguments.rounds):
            for setting in arguments.settings:
                latency, bandwidth = (0.0, float("inf")) if link == "none" else map(float, link.split(":"))
                LINK.latency, LINK.bandwidth = latency, bandwidth
                rows[setting].append(fit(arguments, setting, seed))
                LINK.latency, LINK.bandwidth = 0.0, float("inf")
        steps = {setting: statistics.median(row[0] for row in done) for setting, done in rows.items()}
        for setting, done in rows.items():
            accuracies = sorted(row[2] for row in done)
            faster = f"{steps['plain'] / steps[setting]:.2f}" if "plain" in steps else "-"
            if rank == 0:
                sys.stdout.write(
                    f"link {link} | {setting} | {steps[setting]:.3f} s | {faster} | {done[-1][1]} | "
                    f"{statistics.median(accuracies):.1f} ({accuracies[0]:.1f} to {accuracies[-1]:.1f}) %\n"
                )
                sys.stdout.flush()
    dist.barrier()
    os._exit(0)  # tearing down gloo can deadlock


def main() -> None:
    """Read the arguments and become two processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--links", nargs="+", default=["none", "0.1:5e5"])
    parser.add_argument("--settings", nargs="+", default=["plain", "0.05:2", "adaptive"])
    parser.add_argument("--network", default="perceptron")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batches", type=int, help="batches of an epoch, by default all")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--lr", type=float, default=0.005)
    parser.add_argument("--forward", type=float, default=0.3)
    parser.add_argument("--every", type=int, default=50)
    arguments = parser.parse_args()
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    rank = 0 if os.fork() else 1
    os.environ["LOCAL_RANK"] = str(rank)
    work(arguments, rank)


if __name__ == "__main__":
    main()
