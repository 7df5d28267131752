"""Measure what adaptation costs beyond the passes that a method needs.

    python tools/bench_adapters.py [--methods Tent EATA] [--networks resnet20 vit lite0] [--batches 200 1]
                                   [--through wrap trainer] [--fast no yes] [--recompute no yes] [--threads 1]
                                   [--seconds 10] [--rounds 5] [--device cpu]

Prints a Markdown table: passes and images per second of every method, the ratio of its time to that of its bare passes,
peak memory beside that of the bare passes, and the time of a reset, with its share of the time of a batch.

The bare passes are plain torch on a copy of the same network: the forwards that the method has just made of this batch
(as many, each with as many images, with gradients or without, on statistics of the batch or running ones), for each
pass that it went backward through the mean entropy of the logits and a backward to the same parameters (or pixels), and
for each update a step of the same optimizer. What a method computes besides counts as its own: filters, other losses,
views, averages, resets between images, layers that it brings along (the affines of all layers take the place of their
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
import logging
import multiprocessing
import platform
import resource
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import torch
from bench_corruptions import processor
from lightning import Callback, LightningModule, Trainer
from timm.models import VisionTransformer, create_model
from torch import nn
from torch.utils.data import DataLoader

from ttalight import adapters
from ttalight.adapters import Adapter, GradientAdapter, SelfTrainingAdapter
from ttalight.engine import Engine
from ttalight.models.cifar_resnet import cifar_resnet20
from ttalight.models.fast_pass import FastPass
from ttalight.models.recompute import RecomputedBlocks
from ttalight.tasks import CrossTaskTTT

NOT_MEASURED = (Adapter, GradientAdapter, SelfTrainingAdapter)
METHODS: dict[str, type[Adapter]] = {
    name: value
    for name in adapters.__all__
    if isinstance(value := getattr(adapters, name), type) and issubclass(value, Adapter) and value not in NOT_MEASURED
}
NETWORKS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "resnet20": (32, cifar_resnet20),
    "vit": (64, lambda: VisionTransformer(64, 8, embed_dim=128, depth=6, num_heads=4, num_classes=10)),
    "lite0": (224, lambda: create_model("tf_efficientnet_lite0", num_classes=10)),
}
#: The same as encoders of a task, by name.
ENCODERS = {"resnet20": "cifar_resnet20", "lite0": "tf_efficientnet_lite0"}
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


class Pass(NamedTuple):
    """A forward that a method made."""

    images: int
    gradients: bool
    to_pixels: bool
    norm: str


class Auxiliary(NamedTuple):
    """A pass of the task's auxiliary loss."""


class Backward(NamedTuple):
    """A backward through one of the passes of the batch, by its number."""

    index: int


class Step(NamedTuple):
    """A step of the optimizer."""


Event = Pass | Auxiliary | Backward | Step


class Recorder:
    """Notes the passes, backwards and steps of an engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.events: list[Event] = []
        self.passes = 0
        self.run, self.auxiliary = engine.net.run, engine.net.auxiliary_loss
        self.optimizer_step = engine.net.optimizer_step
        self.norm = next((layer for layer in engine.net.norms if layer.is_batch_norm), None)
        engine.net.run = self.forward
        engine.net.auxiliary_loss = self.loss
        engine.net.optimizer_step = self.step

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = self.run(images)
        norm = "source" if self.norm is None else self.norm.mode
        self.note(Pass(len(images), logits.requires_grad, images.requires_grad, norm), logits)
        return logits

    def loss(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        loss = self.auxiliary(images, generator)
        self.note(Auxiliary(), loss)
        return loss

    def note(self, event: Event, output: torch.Tensor) -> None:
        self.events.append(event)
        if output.requires_grad:
            number = self.passes
            output.register_hook(lambda _: self.events.append(Backward(number)))
        self.passes += 1

    def step(self) -> bool:
        moved = self.optimizer_step()
        if moved:
            self.events.append(Step())
        return moved

    def take(self) -> list[Event]:
        """Return the events since the last time."""
        events, self.events, self.passes = self.events, [], 0
        return events


class Bare:
    """Repeats recorded passes in plain torch."""

    def __init__(self, network: nn.Module, names: list[str], method: Adapter, images: torch.Tensor) -> None:
        self.network = network.requires_grad_(False)
        self.draws = torch.Generator(images.device).manual_seed(0)
        self.norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
        self.images = {len(images): images}
        self.optimizer: torch.optim.Optimizer | None = None
        parameters = dict(network.named_parameters())
        if names:
            free = [parameters[name].requires_grad_() for name in names]
            self.optimizer = method.make_optimizer(free)

    def prepare(self, events: list[Event]) -> None:
        """Have images ready for passes of any size."""
        (images,) = list(self.images.values())[:1]
        for event in events:
            if isinstance(event, Pass) and event.images not in self.images:
                copies = -(-event.images // len(images))
                self.images[event.images] = images.repeat(copies, 1, 1, 1)[: event.images]

    @torch.enable_grad()  # the Trainer evaluates without
    def __call__(self, events: list[Event]) -> None:
        passes: list[tuple[torch.Tensor, torch.Tensor]] = []
        norm = ""
        for event in events:
            if isinstance(event, Pass):
                if event.norm != norm:
                    norm = self.use(event.norm)
                images = self.images[event.images]
                if event.to_pixels:
                    images = images.detach().requires_grad_()
                with torch.set_grad_enabled(event.gradients):
                    passes.append((images, self.network(images)))
            elif isinstance(event, Auxiliary):
                norm = self.use("ema")
                images = next(iter(self.images.values()))
                passes.append((images, self.network.auxiliary_loss(images, self.draws)))
            elif isinstance(event, Backward):
                images, output = passes[event.index]
                loss = output if output.ndim == 0 else mean_entropy(output)
                if images.requires_grad:
                    torch.autograd.grad(loss, images)
                else:
                    loss.backward()
            elif self.optimizer is not None:
                self.optimizer.step()
                self.optimizer.zero_grad()

    def use(self, norm: str) -> str:
        """Set the layers as torch has them: running statistics, those of the batch, or both as in training."""
        for module in self.norms:
            module.training = norm != "source"
            module.track_running_stats = norm in ("source", "ema")
        return norm


def mean_entropy(logits: torch.Tensor) -> torch.Tensor:
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()


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
                self.names = free_names(self.network, engine)
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


class Classifier(LightningModule):
    """The least that the Trainer can test."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images)

    def test_step(self, images: torch.Tensor, batch_idx: int) -> None:
        self(images)


class Task(CrossTaskTTT):
    """The task of test-time training, without the labels that its own step asks for."""

    def test_step(self, images: torch.Tensor, batch_idx: int) -> None:
        self(images)

    on_test_batch_start = LightningModule.on_test_batch_start


class Listen(Callback):
    """Puts the recorder behind an adapter that the Trainer runs."""

    def __init__(self, rounds: Rounds) -> None:
        self.rounds = rounds

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert self.rounds.method.engine is not None
        self.rounds.recorder = Recorder(self.rounds.method.engine)


def now(setting: Setting) -> float:
    if setting.device != "cpu":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if setting.threads == 1 else time.perf_counter()


def batches(setting: Setting) -> list[torch.Tensor]:
    """Random images; single ones differ in what a method does with them, so there are more of these."""
    generator = torch.Generator().manual_seed(0)
    shape = (max(4, 32 // setting.batch), setting.batch, 3, *[NETWORKS[setting.network][0]] * 2)
    return list(torch.rand(shape, generator=generator).to(setting.device))


def make_network(setting: Setting) -> nn.Module:
    """A network of random weights whose predictions of random images are confident, each class as often as another."""
    torch.manual_seed(0)
    size, make = NETWORKS[setting.network]
    if setting.method == "TestTimeTraining":
        if setting.network not in ENCODERS:
            raise ValueError("no task has this encoder")
        return Task(encoder=ENCODERS[setting.network], stem="imagenet").to(setting.device)
    network = make()
    few = torch.rand(4 if size > 100 else 16, 8, 3, size, size)  # little memory: the peak is that of the method
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # the plain mean of what it sees
        network.train()
        for images in few:
            network(images)
        network.eval()
        logits = torch.cat([network(images) for images in few])
        head: nn.Linear = network.get_classifier()  # type: ignore[operator]
        scale = 4 / logits.std(0)
        head.weight.mul_(scale[:, None])
        head.bias.copy_((head.bias - logits.mean(0)) * scale)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    return network.to(setting.device)


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


def free_names(network: nn.Module, engine: Engine) -> list[str]:
    """Names of the parameters that the method adapts; of all affines where it brings its own."""
    chosen = list(engine.net.parameters)
    if engine.net.own:
        chosen = engine.net.norm_affines()
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    return [names[id(parameter)] for parameter in chosen]


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


def quiet(setting: Setting) -> None:
    torch.set_num_threads(setting.threads)
    warnings.filterwarnings("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


def time_method(setting: Setting) -> dict[str, Any]:
    """Measure times; to be called in a fresh process."""
    quiet(setting)
    rounds = Rounds(setting, make_network(setting), make_method(setting))
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
    quiet(setting)
    network, method = make_network(setting), make_method(setting)
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
    quiet(setting)
    bare = Bare(make_network(setting), names, make_method(setting), batches(setting)[0])
    bare.prepare(events)
    before = peak(setting.device)
    for _ in range(WARM_UP):
        bare(events)
    return peak(setting.device) - before


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
    ratios = sorted(method / bare for method, bare in seen["times"])
    low, middle, high = statistics.quantiles(ratios, n=4)
    rates = [setting.batch / statistics.median(times) for times in zip(*seen["times"], strict=True)]
    reset = ""
    if seen["reset"] is not None:
        reset = f"{1e3 * seen['reset']:.2f} ({100 * seen['reset'] * rates[0] / setting.batch:.2f}%)"
    return (
        f"{head} {seen['forwards']:.2f} / {seen['backwards']:.2f} | {rates[0]:,.0f} | {rates[1]:,.0f} | "
        f"{middle:.3f} ({low:.3f} to {high:.3f}) | {len(ratios)} | {ours:.0f} | {theirs:.0f} | {reset} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="NAME", help="methods")
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS, help="networks")
    parser.add_argument("--batches", nargs="+", type=int, default=[200, 1], help="images a batch")
    parser.add_argument("--through", nargs="+", default=["wrap", "trainer"], choices=["wrap", "trainer"])
    parser.add_argument("--fast", nargs="+", default=["no"], choices=["no", "yes"], help="by FastPass")
    parser.add_argument("--recompute", nargs="+", default=["no"], choices=["no", "yes"], help="by RecomputedBlocks")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on the CPU")
    parser.add_argument("--seconds", type=float, default=10, help="least time for the rounds of a row")
    parser.add_argument("--rounds", type=int, default=5, help="least number of rounds of a row")
    parser.add_argument("--device", default="cpu", help="where the networks are, cpu or cuda")
    arguments = parser.parse_args()

    print(f"{processor()}, {platform.system()} {platform.machine()}, Python {platform.python_version()}")
    print(f"torch {torch.__version__}, {arguments.device}, {arguments.threads} thread(s)\n")
    columns = ("method", "network", "batch", "through", "fast", "recompute", "forwards / backwards", "images/s")
    columns += ("bare images/s", "ratio (middle half)", "n", "MiB", "bare MiB", "reset ms (of a batch)")
    print(f"| {' | '.join(columns)} |")
    print("|" + "---|" * len(columns), flush=True)
    for network in arguments.networks:
        for batch in arguments.batches:
            for through in arguments.through:
                for method, *options in itertools.product(arguments.methods, arguments.fast, arguments.recompute):
                    rest = (*options, arguments.threads, arguments.seconds, arguments.rounds, arguments.device)
                    print(row(Setting(method, network, batch, through, *rest)), flush=True)


if __name__ == "__main__":
    main()
