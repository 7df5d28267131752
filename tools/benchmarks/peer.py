"""Time our methods beside those of another framework, batch by batch in turns.

    git clone https://github.com/mariodoebler/test-time-adaptation ../test-time-adaptation
    pip install einops iopath yacs
    python tools/benchmarks/peer.py --peer ../test-time-adaptation [--methods Tent SAR] [--networks resnet20]
                                    [--batches 200] [--precisions 32 bf16] [--fast no layout bf16] [--threads 1]
                                    [--seconds 10] [--rounds 5] [--device cpu]

Prints a Markdown table: images per second of ours, through ``wrap``, and of the peer's class of the same method, the
ratio of ours to theirs as the median over the rounds with the range of the middle half, and the forwards that each side
makes of a batch. Nothing of the peer is part of this repository: its classes are imported from the checkout. Its zoo of
networks and its data sets are not: both sides take the network and the images of ``adapters.py``, random ones.

Each row is a process of its own, in which both sides adapt copies of one network to the same batches. They take turns,
and which goes first changes with every round. The settings are the peer's for CIFAR-10 and are the same on both sides,
but for three: the learning rate is tiny, so that the work of a batch stays the same, SAR never restores the source, and
ETA and EATA take no sample as redundant. The peer runs in float32 and in its own layout always. ``--precisions bf16``
(autocast) and ``--fast`` change our side. The latter is ``FastPass``, which tries layouts (``layout``, and ``bf16`` in
bfloat16), layouts and compilation (``compile``), or layouts and bfloat16 (``auto``). Networks are random here, so that
``auto`` may find other predictions in bfloat16 and keep float32. With one thread of the CPU, times are those that the
process was running.
"""

from __future__ import annotations

import argparse
import copy
import importlib
import itertools
import statistics
import sys
import time
import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import ttalight  # noqa: F401  # isort: skip  (first: it makes torchvision importable)
import torch
from adapters import WARM_UP, batches
from measuring import fresh, now, print_head, print_machine, quiet, spread
from networks import NETWORKS, make_network
from torch import Tensor, nn
from torchvision import transforms

from ttalight import adapters
from ttalight.models.passes.fast_pass import FastPass

RATE = 1e-8
#: Our side by ``FastPass``: its arguments.
FAST: dict[str, dict[str, Any]] = {
    "layout": {"compile": False}, "compile": {}, "bf16": {"precision": "bf16-mixed", "compile": False},
    "auto": {"precision": "auto", "compile": False},
}  # fmt: skip
#: Name of the method -> the peer's module and class, our arguments, and the peer's settings of the same meaning.
METHODS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "Tent": ("tent.Tent", {}, {}),
    "RPL": ("rpl.RPL", {}, {}),
    "ETA": ("eata.EATA", {"redundancy": 1.0}, {"EATA.D_MARGIN": 1.0, "EATA.FISHER_ALPHA": 0.0}),
    "EATA": ("eata.EATA", {"redundancy": 1.0}, {"EATA.D_MARGIN": 1.0, "EATA.FISHER_ALPHA": 1.0}),
    "SAR": ("sar.SAR", {"recovery": 0.0}, {"SAR.RESET_CONSTANT_EM": 0.0}),
    "DeYO": ("deyo.DeYO", {}, {"OPTIM.METHOD": "SGD", "OPTIM.NESTEROV": False}),
    "ROID": ("roid.ROID", {}, {}),
    "CMF": ("cmf.CMF", {}, {}),
}
#: What the peer's modules and packages are called.
NAMES = ("augmentations", "conf", "datasets", "methods", "models", "utils")
Side = Callable[[Tensor], Tensor]


class Setting(NamedTuple):
    """Measurements of one row of the table."""

    method: str
    network: str
    batch: int
    precision: str
    fast: str
    peer: Path
    threads: int
    seconds: float
    rounds: int
    device: str


def check_checkout(folder: Path | None) -> str | None:
    """Return what is wrong with the folder of the peer, None if nothing is."""
    if folder is not None and (folder / "classification" / "methods" / "base.py").is_file():
        return None
    return (
        "--peer must be a checkout of mariodoebler/test-time-adaptation, a folder with classification/methods/base.py, "
        f"got {folder}: git clone https://github.com/mariodoebler/test-time-adaptation, and give its path"
    )


@contextmanager
def importable(folder: Path, source: list[Tensor]) -> Iterator[None]:
    """Let modules of the checkout be imported, with stand-ins for its zoo of networks and its data sets.

    Args:
        folder: The checkout.
        source: Batches of source images, which the peer's loader returns.
    """
    root = folder / "classification"
    modules = {name: types.ModuleType(name) for name in ("models", "models.model", "datasets", "datasets.data_loading")}
    # A class that no network is of. These methods ask for nothing else of the zoo.
    modules["models.model"].ResNetDomainNet126 = type("ResNetDomainNet126", (), {})  # type: ignore[attr-defined]
    loader = [(images,) for images in source]
    modules["datasets.data_loading"].get_source_loader = lambda **_: (None, loader)  # type: ignore[attr-defined]
    for name in ("methods", "utils", "augmentations"):  # without their __init__, which imports all methods
        modules[name] = types.ModuleType(name)
        modules[name].__path__ = [str(root / name)]
    others = take_modules()
    sys.modules.update(modules)
    try:
        with mock.patch.object(sys, "path", [str(root), *sys.path]):
            yield
    finally:
        take_modules()
        sys.modules.update(others)


def take_modules() -> dict[str, types.ModuleType]:
    """Remove all modules with a name of the peer's from those that are imported, and return them."""
    return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in NAMES}


@contextmanager
def without_cuda() -> Iterator[None]:
    """Let the peer, which takes a GPU where there is one and sometimes where there is none, work on the CPU."""
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch.cuda, "is_available", return_value=False))
        for cls in (Tensor, nn.Module):
            stack.enter_context(mock.patch.object(cls, "cuda", lambda self, *args, **kwargs: self))
        yield


def make_theirs(setting: Any, network: nn.Module, images: list[Tensor]) -> nn.Module:
    """Return the peer's method on a network.

    Args:
        setting: Has ``method``, ``batch``, ``peer`` and ``device``.
        network: The network, which is adapted in place.
        images: Batches, (B, 3, H, W), whose first ones are EATA's source images too.

    Raises:
        ModuleNotFoundError: If a package that the checkout needs is missing.
    """
    place, _, settings = METHODS[setting.method]
    name, cls = place.split(".")
    side = images[0].shape[-1]
    network.model_preprocess = transforms.Compose([transforms.CenterCrop(side)])  # where the peer looks for the size
    with ExitStack() as stack:
        stack.enter_context(importable(setting.peer, images[:4]))
        if setting.device == "cpu":
            stack.enter_context(without_cuda())
        config = copy.deepcopy(importlib.import_module("conf").cfg)
        common = {"OPTIM.LR": RATE, "TEST.BATCH_SIZE": setting.batch, "SOURCE.NUM_SAMPLES": 4 * setting.batch}
        for key, value in (common | settings).items():
            section, entry = key.split(".")
            setattr(getattr(config, section), entry, value)
        make = getattr(importlib.import_module(f"methods.{name}"), cls)
        with torch.no_grad():
            classes = network(images[0][:2]).shape[1]
        return make(config, network, classes)


def make_ours(setting: Setting, network: nn.Module, images: list[Tensor]) -> Side:
    """Return our method on a network, in the precision asked for."""
    arguments = dict(METHODS[setting.method][1])
    if setting.method == "EATA":
        arguments |= {"source": images[:4], "fisher_samples": 4 * setting.batch}
    passes = FastPass(**FAST[setting.fast]) if setting.fast != "no" else None
    adapted = getattr(adapters, setting.method)(lr=RATE, reset="never", passes=passes, **arguments).wrap(network)

    def step(batch: Tensor) -> Tensor:
        with torch.autocast(setting.device, torch.bfloat16, enabled=setting.precision == "bf16"):
            return adapted(batch)

    step.engine = adapted.engine  # type: ignore[attr-defined]
    return step


def compare(setting: Setting) -> dict[str, Any]:
    """Measure a row; to be called in a fresh process."""
    quiet(setting.threads)
    torch.manual_seed(0)
    images = batches(setting)
    network = make_network(setting.method, setting.network, setting.device)
    theirs = make_theirs(setting, copy.deepcopy(network), images)
    ours = make_ours(setting, network, images)
    passed: list[int] = []
    hook = theirs.model.register_forward_pre_hook(lambda _, inputs: passed.append(len(inputs[0])))
    for number in range(WARM_UP):
        for side in (ours, theirs):
            side(images[number % len(images)])
    hook.remove()
    engine = ours.engine  # type: ignore[attr-defined]
    before, times = engine.net.forwards, []
    number, begin = 0, time.perf_counter()
    while number < setting.rounds or time.perf_counter() - begin < setting.seconds:
        batch, taken = images[number % len(images)], [0.0, 0.0]
        for which in (0, 1) if number % 2 == 0 else (1, 0):
            start = now(setting)
            (ours, theirs)[which](batch)
            taken[which] = now(setting) - start
        times.append(taken)
        number += 1
    forwards = [(engine.net.forwards - before) / number, sum(passed) / setting.batch / WARM_UP]
    return {"times": times, "forwards": forwards}


def row(setting: Setting, compared: dict[str, Any]) -> dict[str, str]:
    """Return the cells of a row by column."""
    times = compared["times"]
    rates = [setting.batch / statistics.median(side) for side in zip(*times, strict=True)]
    return {
        "method": setting.method, "network": setting.network, "batch": str(setting.batch),
        "our precision": setting.precision, "our FastPass": setting.fast,
        "our images/s": f"{rates[0]:,.0f}", "their images/s": f"{rates[1]:,.0f}",
        "ours over theirs (middle half)": spread([theirs / ours for ours, theirs in times]),
        "n": str(len(times)),
        "forwards, ours and theirs": " and ".join(f"{count:.2f}" for count in compared["forwards"]),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", type=Path, help="folder of the peer's checkout")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS, metavar="NAME", help="methods")
    parser.add_argument("--networks", nargs="+", default=["resnet20"], choices=NETWORKS, help="networks")
    parser.add_argument("--batches", nargs="+", type=int, default=[200], help="images a batch")
    parser.add_argument("--precisions", nargs="+", default=["32"], choices=["32", "bf16"], help="of our side")
    parser.add_argument("--fast", nargs="+", default=["no"], choices=["no", *FAST], help="our side by FastPass")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on the CPU")
    parser.add_argument("--seconds", type=float, default=10, help="least time for the rounds of a row")
    parser.add_argument("--rounds", type=int, default=5, help="least number of rounds of a row, at least 2")
    parser.add_argument("--device", default="cpu", help="where the networks are, cpu or cuda")
    arguments = parser.parse_args()
    fault = check_checkout(arguments.peer)
    if fault is not None:
        parser.error(fault)
    if arguments.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {arguments.rounds}")

    print_machine(arguments.device, arguments.threads)
    rest = (arguments.peer, arguments.threads, arguments.seconds, arguments.rounds, arguments.device)
    ways = (arguments.networks, arguments.batches, arguments.precisions, arguments.fast, arguments.methods)
    for number, (*way, method) in enumerate(itertools.product(*ways)):
        setting = Setting(method, *way, *rest)
        try:
            cells = row(setting, fresh(compare, setting))
        except ModuleNotFoundError as error:
            parser.exit(1, f"the checkout needs a package that is not installed: pip install {error.name}\n")
        if number == 0:
            print_head(tuple(cells))
        print(f"| {' | '.join(cells.values())} |", flush=True)


if __name__ == "__main__":
    main()
