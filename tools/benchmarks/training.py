"""Measure what training costs beyond the steps of its network.

    python tools/benchmarks/training.py [--stages supervised simclr alignment] [--networks cifar_resnet20]
                                        [--batches 256] [--precisions bf16-mixed] [--channels-last yes] [--compile no]
                                        [--rounds 5] [--turn 3] [--workers 2] [--threads 1] [--images 45000]
                                        [--root FOLDER] [--device cpu]

Prints a Markdown table and, below it, what Lightning costs a step. Each row is a fit by our Trainer as ``ttalight fit``
runs it, logger and progress bar included, of SupervisedTask (padded crops, flips), ContrastiveTask or AlignmentTask on
random images of 32 pixels, or on CIFAR-10 where ``--root`` names its folder. A step of it is all between the ends of
two batches: reading the batch, augmentation, loss, optimizer, schedule, logging. After it come those of others:

- bare: the network step of the same shapes in plain torch, on a copy of encoder and classifier (or projector) with the
  same precision and layout: forward of ready images (2B of them where there are two views), cross-entropy of the
  outputs, backward, Adam. ``--compile yes`` is the task's option; the bare step stays uncompiled.
- usual: after every ``--turn`` batches, as many batches of torchvision's transforms on one PIL image after another in a
  DataLoader with workers, and a plain loop: the same network, precision, layout and loss. For alignment the teacher
  takes part in every step; ours has its features from one pass before the first step, whose time is a column.

All take turns in one process, so that a busy neighbour slows all alike. Ratios are medians over the turns, with the
range of the middle half. On the CPU with one thread, times are CPU times, those of the workers included: where all
cores are busy, as they are with a process a core, that is what a step takes from the others. Otherwise they are wall
times: workers count as far as the loop waits for them, which ``--turn`` should be large for. Starting workers and the
ends of epochs (validation, checkpoint) are not in. Peak memory is that of fresh processes over two batches, above
network and images, without workers.

Lightning's cost is that of a fit of one number, with the tasks' log call, above the same steps in a plain loop, as a
share of the bare supervised step, which comes after each, so that caches are as cold as in training.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import statistics
import tempfile
from typing import Any

import ttalight  # isort: skip  (first: it makes torchvision importable)
import timm
import torch
import torch.utils.tensorboard  # what importing it takes is no step's memory
from lightning import Callback, LightningModule
from measuring import fresh, now, peak, print_head, print_machine, quiet, spread
from random_images import RandomImages
from torch import Tensor, nn
from training_rivals import CLASSES, RATE, STAGES, Bare, Setting, Step, Usual

from ttalight.data import CIFARDataModule, ImageDataModule
from ttalight.tasks import AlignmentTask, ContrastiveTask, SupervisedTask

#: Batches before the measured ones, and those that peak memory is read after.
WARM_UP = 2
Times = dict[str, list[float]]


class Turns(Callback):
    """Lets others make steps after each of the Trainer's, and times all of them.

    Args:
        setting: What is measured.
        others: Makes a step, after every batch.
        rounds: Makes as many as there were since the last time, after every ``turn`` batches.
    """

    def __init__(self, setting: Setting, others: dict[str, Step], rounds: dict[str, Step]) -> None:
        self.setting, self.others, self.rounds = setting, others, rounds
        self.times: Times = {name: [] for name in ("ours", "start", *others, *rounds)}
        self.since = 0.0

    def on_train_start(self, trainer: Any, pl_module: LightningModule) -> None:
        self.since = now(self.setting)

    def on_train_batch_start(self, trainer: Any, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self.times["start"].append(now(self.setting) - self.since)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        measured = batch_idx + 1 - WARM_UP
        if measured > 0:
            self.times["ours"].append(now(self.setting) - self.since)
        due = self.rounds if measured >= 0 and measured % self.setting.turn == 0 else {}
        for name, step in (*self.others.items(), *due.items()):
            start = now(self.setting)
            elsewhere = step()
            if measured > 0:
                self.times[name].append(now(self.setting) - start + elsewhere)
        self.since = now(self.setting)


class OneNumber(LightningModule):
    """The least that a Trainer can fit."""

    def __init__(self) -> None:
        super().__init__()
        self.number = nn.Parameter(torch.ones(()))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.number.square()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=RATE)


def make_task(setting: Setting) -> LightningModule:
    torch.manual_seed(0)
    shared: dict[str, Any] = {"encoder": setting.network, "stem": "cifar", "lr": RATE}
    shared |= {"channels_last": setting.channels_last == "yes", "compile": setting.compile == "yes"}
    if setting.stage == "supervised":
        return SupervisedTask(num_classes=CLASSES, crop="padded", **shared)
    if setting.stage == "simclr":
        return ContrastiveTask(temperature=0.1, **shared)
    with tempfile.TemporaryDirectory() as folder:
        teacher = os.path.join(folder, "teacher.pt")
        torch.save(timm.create_model(setting.network, num_classes=CLASSES).state_dict(), teacher)
        return AlignmentTask(supervised=teacher, num_classes=CLASSES, temperature=0.5, **shared)


def make_data(setting: Setting) -> ImageDataModule:
    data: ImageDataModule = (
        RandomImages(setting.images, batch_size=setting.batch)
        if setting.root is None
        else CIFARDataModule(root=setting.root, batch_size=setting.batch)
    )
    data.setup("fit")
    return data


def fit(setting: Setting, module: LightningModule, batches: int, *callbacks: Callback, **data: Any) -> None:
    """Train on some batches as ``ttalight fit`` does, all output but files' thrown away."""
    with (
        tempfile.TemporaryDirectory() as folder,
        open(os.devnull, "w", encoding="utf-8") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        trainer = ttalight.Trainer(
            default_root_dir=folder,
            accelerator="cpu" if setting.device == "cpu" else "gpu",
            devices=1,
            precision=setting.precision,
            max_epochs=1,
            limit_train_batches=batches,
            limit_val_batches=0,
            log_every_n_steps=25,
            callbacks=list(callbacks),
        )
        trainer.fit(module, **data)


def time_stage(setting: Setting) -> Times:
    """Measure the times of a row; to be called in a fresh process."""
    quiet(setting.threads)
    task, data = make_task(setting), make_data(setting)
    turns = Turns(setting, {"bare": Bare(setting, task)}, {"usual": Usual(setting, task, data)})
    fit(setting, task, WARM_UP + setting.rounds * setting.turn, turns, datamodule=data)
    return turns.times


def memory(setting: Setting, way: str) -> float:
    """Measure the peak memory of a few batches, in MiB; to be called in a fresh process."""
    quiet(setting.threads)
    task, data = make_task(setting), make_data(setting)
    if way == "ours":
        before = peak(setting.device)
        fit(setting, task, WARM_UP, datamodule=data)
    elif way == "bare":
        bare = Bare(setting, task)
        before = peak(setting.device)
        for _ in range(WARM_UP):
            bare()
    else:
        usual = Usual(setting._replace(turn=WARM_UP), task, data)
        before = peak(setting.device)
        usual()
    return peak(setting.device) - before


def time_lightning(setting: Setting) -> Times:
    """Measure the Trainer's steps without work, the same in a plain loop, and the network's; in a fresh process."""
    quiet(setting.threads)
    module = OneNumber()
    optimizer = module.configure_optimizers()

    def plain() -> float:
        optimizer.zero_grad()
        module.number.square().backward()
        optimizer.step()
        return 0.0

    network = Bare(setting, make_task(setting))
    turns = Turns(setting, {"plain": plain, "network": network}, {})
    batches = WARM_UP + setting.rounds * setting.turn
    fit(setting, OneNumber(), batches, turns, train_dataloaders=range(batches))
    return turns.times


def row(setting: Setting) -> str:
    """Measure a row of the table."""
    times = fresh(time_stage, setting)
    ours, turn = times["ours"], setting.turn
    rounds = [sum(ours[first : first + turn]) for first in range(0, len(ours), turn)]
    rates = [setting.batch / statistics.median(times[name]) for name in ("ours", "bare")]
    rates.append(setting.batch * turn / statistics.median(times["usual"]))
    cells = [*setting[:6], *(f"{rate:,.0f}" for rate in rates)]
    cells.append(spread([bare / own for bare, own in zip(times["bare"], ours, strict=True)]))
    cells.append(spread([usual / own for usual, own in zip(times["usual"], rounds, strict=True)]))
    cells += [f"{len(ours)}, {len(rounds)}", f"{times['start'][0]:.1f}"]
    cells += [f"{fresh(memory, setting, way):.0f}" for way in ("ours", "bare", "usual")]
    return f"| {' | '.join(map(str, cells))} |"


def lightning_line(setting: Setting) -> str:
    """Measure Lightning's own cost."""
    times = fresh(time_lightning, setting)
    own = [ours - plain for ours, plain in zip(times["ours"], times["plain"], strict=True)]
    share = [100 * cost / network for cost, network in zip(own, times["network"], strict=True)]
    return (
        f"Lightning's own cost a step: {spread([1e3 * cost for cost in own])} ms, "
        f"{spread(share)} % of the bare step of {setting.network} at batch {setting.batch}, {setting.precision}, "
        f"channels_last {setting.channels_last} ({1e3 * statistics.median(times['network']):.0f} ms); n = {len(own)}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=STAGES, help="stages of training")
    parser.add_argument("--networks", nargs="+", default=["cifar_resnet20"], help="names of timm, for small images")
    parser.add_argument("--batches", nargs="+", type=int, default=[256], help="images a batch")
    parser.add_argument("--precisions", nargs="+", default=["bf16-mixed"], choices=["bf16-mixed", "32-true"])
    parser.add_argument("--channels-last", nargs="+", default=["yes"], choices=["no", "yes"], help="all ways' layout")
    parser.add_argument("--compile", nargs="+", default=["no"], choices=["no", "yes"], help="the tasks' option compile")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the usual pipeline, at least 2")
    parser.add_argument("--turn", type=int, default=3, help="batches between two rounds")
    parser.add_argument("--workers", type=int, default=2, help="workers of the usual pipeline")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on the CPU")
    parser.add_argument("--images", type=int, default=45_000, help="random images; fewer where the batches need fewer")
    parser.add_argument("--root", help="folder of CIFAR-10, in the place of random images")
    parser.add_argument("--device", default="cpu", help="where the networks are, cpu or cuda")
    arguments = parser.parse_args()
    needed = max(arguments.batches) * (WARM_UP + arguments.rounds * arguments.turn)
    if arguments.rounds < 2 or needed > arguments.images:
        parser.error(f"needs at least 2 rounds, and {needed} images for one epoch, got {arguments.images}")

    print_machine(arguments.device, arguments.threads)
    columns = ("stage", "network", "batch", "precision", "channels_last", "compile", "images/s", "bare images/s")
    columns += ("usual images/s", "speed against bare (middle half)", "against usual (middle half)", "n", "start s")
    columns += ("MiB", "bare MiB", "usual MiB")
    print_head(columns)
    names = ("rounds", "turn", "workers", "threads", "images", "root", "device")
    rest = [getattr(arguments, name) for name in names]
    ways = (arguments.networks, arguments.batches, arguments.precisions, arguments.channels_last)
    for stage, way, compiled in itertools.product(arguments.stages, itertools.product(*ways), arguments.compile):
        print(row(Setting(stage, *way, compiled, *rest)), flush=True)
    print()
    for way in itertools.product(*ways):
        print(lightning_line(Setting("supervised", *way, "no", *rest)), flush=True)


if __name__ == "__main__":
    main()
