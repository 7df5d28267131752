"""Measure what adaptation costs beyond the passes that a method needs.

    python tools/benchmarks/adapters.py [--methods Tent EATA] [--networks resnet20 vit lite0] [--batches 200 1]
                                        [--through wrap trainer] [--fast no yes] [--recompute no yes] [--threads 1]
                                        [--seconds 10] [--rounds 5] [--device cpu]

Prints a Markdown table: passes and images per second of every method, the ratio of its time to that of its bare passes,
peak memory beside that of the bare passes, and the time of a reset, with its share of the time of a batch.

The bare passes are plain torch on a copy of the same network: the forwards that the method has just made of this batch
(as many, each with as many images, with gradients or without, on statistics of the batch or running ones), for each
pass that it went backward through the mean entropy of the logits and a backward to the same parameters (or pixels), and
for each update a step of the same optimizer. What a method computes besides counts as its own: filters, other losses,
views, averages, resets between images, layers of its own (the affines of all layers take the place of their
parameters, statistics of the batch that of mixed ones). What the Trainer does around a batch counts too: the row of
Source shows it. TestTimeTraining, 20 steps a batch, runs on a CrossTaskTTT with the network as its encoder; its bare
passes are a plain loop over the task's auxiliary loss, views included. ``--fast yes`` and ``--recompute yes`` compute
the method's passes by ``FastPass`` and ``RecomputedBlocks``, beside the same bare passes, which stay as they are.

Method and bare passes take turns, batch by batch, in one process, so that a busy neighbour slows both alike. Ratios are
medians over the rounds, with the range of the middle half. With one thread of the CPU, times are those that the process
was running. Peak memory is that of fresh processes, above network and images. The network's weights are random, its
classifier is scaled so that random images are classified with confidence; the learning rate is tiny, so that this stays
so. The networks are a ResNet-20 for images of 32 pixels a side, a small vision transformer for 64 and
EfficientNet-Lite0 for 224.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import ttalight  # noqa: F401  # isort: skip  (first: it makes torchvision importable)
import torch
from bare_passes import Bare, Event, Recorder, adapted_names
from lightning import Callback, LightningModule, Trainer
from measuring import fresh, now, peak, print_head, print_machine, quiet, spread
from networks import METHODS, NETWORKS, SMALL, Classifier, make_network
from torch import nn
from torch.utils.data import DataLoader

from ttalight import adapters
from ttalight.adapters import Adapter, GradientAdapter
from ttalight.models.passes.fast_pass import FastPass
from ttalight.models.passes.recompute import RecomputedBlocks

#: Rounds before the measured ones, and before peak memory is read.
WARM_UP = 2


class Setting(NamedTuple):
    """Measurements of one row of the table."""

    method: str
    network: str
    batch: int
    through: str
    fast: str
    recompute: str
    threads: int
    seconds: float
    rounds: int
    device: str


class Rounds:
    """Hands out batches to a method and makes the bare passes in between; a loader for the Trainer, too."""

    def __init__(self, setting: Setting, network: nn.Module, method: Adapter) -> None:
        self.setting, self.network, self.method = setting, network, method
        self.copy = copy.deepcopy(network)
        self.batches = batches(setting)
        self.times: list[tuple[float, float]] = []
        self.names: list[str] = []
        self.events: list[Event] = []
        self.cost = (0.0, 0.0)
        self.recorder: Recorder | None = None

    def __len__(self) -> int:
        return 10**9  # the Trainer prefetches from loaders without a length

    def __iter__(self) -> Iterator[torch.Tensor]:
        bare: Bare | None = None
        number, begin = 0, time.perf_counter()
        counted = (0.0, 0.0)
        while number < WARM_UP + self.setting.rounds or time.perf_counter() - begin < self.setting.seconds:
            start = now(self.setting)
            yield self.batches[number % len(self.batches)]
            taken = now(self.setting) - start
            number += 1
            if self.recorder is None:  # there is an engine from the first batch on
                continue
            engine = self.recorder.engine
            if bare is None:
                self.names = adapted_names(self.network, engine)
                bare = Bare(self.copy, self.names, self.method, self.batches[0])
            events = self.recorder.take()
            bare.prepare(events)
            start = now(self.setting)
            bare(events)
            if number > WARM_UP:
                self.times.append((taken, now(self.setting) - start))
            elif number == WARM_UP:
                begin, counted = time.perf_counter(), (engine.net.forwards, engine.backwards)
            self.events = max(events, self.events, key=len)
            self.cost = (engine.net.forwards - counted[0], engine.backwards - counted[1])


class Listen(Callback):
    """Puts the recorder behind an adapter that the Trainer runs."""

    def __init__(self, rounds: Rounds) -> None:
        self.rounds = rounds

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.rounds.method.engine is not None
        self.rounds.recorder = Recorder(self.rounds.method.engine)


def batches(setting: Setting) -> list[torch.Tensor]:
    """Random images; single ones differ in what a method does with them, so there are more of these."""
    generator = torch.Generator().manual_seed(0)
    shape = (max(4, 32 // setting.batch), setting.batch, 3, *[NETWORKS[setting.network][0]] * 2)
    return list(torch.rand(shape, generator=generator).to(setting.device))


def make_method(setting: Setting) -> Adapter:
    cls = METHODS[setting.method]
    settings: dict[str, Any] = {
        "passes": FastPass() if setting.fast == "yes" else RecomputedBlocks() if setting.recompute == "yes" else None
    }
    if issubclass(cls, GradientAdapter):
        settings["lr"] = 1e-8
    if setting.method == "EATA":
        settings["source"] = batches(setting)
        settings["fisher_samples"] = 4 * setting.batch
    return cls(reset="batch" if setting.method == "MEMO" else "never", **settings)


def make_trainer(setting: Setting, *callbacks: Callback) -> Trainer:
    return Trainer(
        accelerator="cpu" if setting.device == "cpu" else "gpu", devices=1, callbacks=list(callbacks), logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def run(setting: Setting, rounds: Rounds) -> adapters.AdaptedNetwork | None:
    """Send the rounds through ``wrap``, and return the adapted network, or through the Trainer."""
    if setting.through == "wrap":
        adapted = rounds.method.wrap(rounds.network)
        rounds.recorder = Recorder(adapted.engine)
        for images in rounds:
            adapted(images)
        return adapted
    trainer = make_trainer(setting, rounds.method, Listen(rounds))
    trainer.test(as_module(rounds.network), dataloaders=rounds, verbose=False)
    return None


def as_module(network: nn.Module) -> LightningModule:
    return network if isinstance(network, LightningModule) else Classifier(network)


def time_method(setting: Setting) -> dict[str, Any]:
    """Measure times; to be called in a fresh process."""
    quiet(setting.threads)
    rounds = Rounds(setting, make_network(setting.method, setting.network, setting.device), make_method(setting))
    adapted = run(setting, rounds)
    resets = []
    for images in rounds.batches if adapted is not None else []:
        assert adapted is not None
        adapted(images)
        start = now(setting)
        adapted.reset()
        resets.append(now(setting) - start)
    return {
        "times": rounds.times,
        "forwards": rounds.cost[0] / len(rounds.times),
        "backwards": rounds.cost[1] / len(rounds.times),
        "reset": statistics.median(resets) if resets else None,
        "events": rounds.events,
        "names": rounds.names,
    }


def memory_of_method(setting: Setting) -> float:
    """Measure the peak memory of a few batches, in MiB; to be called in a fresh process."""
    quiet(setting.threads)
    network, method = make_network(setting.method, setting.network, setting.device), make_method(setting)
    images = batches(setting)[:WARM_UP]
    if setting.through == "wrap":
        before = peak(setting.device)
        adapted = method.wrap(network)
        for batch in images:
            adapted(batch)
        return peak(setting.device) - before
    trainer = make_trainer(setting, method)
    before = peak(setting.device)
    trainer.test(as_module(network), dataloaders=DataLoader(images, batch_size=None), verbose=False)
    return peak(setting.device) - before


def memory_of_bare(setting: Setting, events: list[Event], names: list[str]) -> float:
    """Measure the peak memory of the bare passes, in MiB; to be called in a fresh process."""
    quiet(setting.threads)
    bare = Bare(
        make_network(setting.method, setting.network, setting.device), names, make_method(setting), batches(setting)[0]
    )
    bare.prepare(events)
    before = peak(setting.device)
    for _ in range(WARM_UP):
        bare(events)
    return peak(setting.device) - before


def row(setting: Setting) -> str:
    """Measure a row of the table."""
    what = (setting.method, setting.network, setting.batch, setting.through, setting.fast, setting.recompute)
    head = f"| {' | '.join(map(str, what))} |"
    if setting.method == "MEMO" and setting.batch > 1:
        return f"{head} a batch is as many batches of one | | | | | | | |"
    try:
        seen = fresh(time_method, setting)
    except ValueError as error:
        return f"{head} not for this network: {str(error).split(':')[0].split(',')[0]} | | | | | | | |"
    ours = fresh(memory_of_method, setting)
    theirs = fresh(memory_of_bare, setting, seen["events"], seen["names"])
    ratios = [method / bare for method, bare in seen["times"]]
    rates = [setting.batch / statistics.median(times) for times in zip(*seen["times"], strict=True)]
    reset = ""
    if seen["reset"] is not None:
        reset = f"{1e3 * seen['reset']:.2f} ({100 * seen['reset'] * rates[0] / setting.batch:.2f}%)"
    return (
        f"{head} {seen['forwards']:.2f} / {seen['backwards']:.2f} | {rates[0]:,.0f} | {rates[1]:,.0f} | "
        f"{spread(ratios)} | {len(ratios)} | {ours:.0f} | {theirs:.0f} | {reset} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="NAME", help="methods")
    parser.add_argument("--networks", nargs="+", default=SMALL, choices=NETWORKS, help="networks")
    parser.add_argument("--batches", nargs="+", type=int, default=[200, 1], help="images a batch")
    parser.add_argument("--through", nargs="+", default=["wrap", "trainer"], choices=["wrap", "trainer"])
    parser.add_argument("--fast", nargs="+", default=["no"], choices=["no", "yes"], help="by FastPass")
    parser.add_argument("--recompute", nargs="+", default=["no"], choices=["no", "yes"], help="by RecomputedBlocks")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on the CPU")
    parser.add_argument("--seconds", type=float, default=10, help="least time for the rounds of a row")
    parser.add_argument("--rounds", type=int, default=5, help="least number of rounds of a row")
    parser.add_argument("--device", default="cpu", help="where the networks are, cpu or cuda")
    arguments = parser.parse_args()

    print_machine(arguments.device, arguments.threads)
    columns = ("method", "network", "batch", "through", "fast", "recompute", "forwards / backwards", "images/s")
    columns += ("bare images/s", "ratio (middle half)", "n", "MiB", "bare MiB", "reset ms (of a batch)")
    print_head(columns)
    for network in arguments.networks:
        for batch in arguments.batches:
            for through in arguments.through:
                for method, *options in itertools.product(arguments.methods, arguments.fast, arguments.recompute):
                    rest = (*options, arguments.threads, arguments.seconds, arguments.rounds, arguments.device)
                    print(row(Setting(method, network, batch, through, *rest)), flush=True)


if __name__ == "__main__":
    main()
