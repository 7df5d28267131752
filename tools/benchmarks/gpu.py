"""Check and measure the methods and the training stages on a GPU, in a few minutes that can be continued.

    tools/benchmarks/gpu.sh OUT [--peer CHECKOUT] [--steps tests methods ...] [--tiny]

Writes tables to the folder OUT, Markdown and JSON, after every row, and stops in front of the row that there is no time
left for (LIMIT=480 seconds for the command). The same command continues there. A row that failed says why and is not
measured again: to measure a table again, remove its files. The steps, in this order:

- tests: the tests marked gpu.
- synchronisations: how often a batch of each method makes the host wait for the device, and where.
- compiled: passes of each network as CUDA graphs and compiled with ``mode="reduce-overhead"``, and Tent through
  ``FastPass`` and on a compiled network, against the network's own: largest difference, and speed.
- precision: each method under bfloat16 autocast against float32: equal predictions, largest difference, speed.
- training: steps of CTA's three training stages and of its test time at the paper's recipe (``configs/cifar10``, with
  random images and weights), what an epoch or a domain takes, and the whole recipe.
- methods: a table for each network and batch: bare forward, bare forward and backward, each method beside its bare
  passes (see ``adapters.py``), and beside the peer's class (see ``peer.py``) where its checkout is given.

Without a CUDA device all of it runs on the CPU, where only ``--tiny`` is small enough: it shows that the steps work.
The exit status is 75 where an error left the device unusable, so that another process has to continue.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import ttalight  # noqa: F401  # isort: skip  (first: it makes torchvision importable)
import adapters
import gpu_training
import gpu_ways
import peer
import torch
from gpu_tests import marked_tests
from host_reads import count_host_reads
from measuring import now, processor, quiet, spread
from networks import METHODS, make_network
from step_tables import Row, Tables, TimeIsUpError

BROKEN = 75
TESTS = Path(__file__).resolve().parents[2] / "tests"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Sizes(NamedTuple):
    """Sizes of the measurement, by default all of it."""

    networks: tuple[str, ...] = ("resnet20", "resnet50", "vit_b")
    batches: tuple[int, ...] = (64, 200, 1)
    methods: tuple[str, ...] = tuple(METHODS)
    #: Network and batch of the steps that compare a method with itself; the batch of compiled passes.
    network: str = "resnet20"
    batch: int = 64
    #: Least time and number of rounds of a row.
    seconds: float = 0.2
    rounds: int = 3
    #: Other ways to make the same passes.
    ways: tuple[str, ...] = gpu_ways.WAYS
    #: Encoder, batch and steps at test time of the stages of training. None for those of the recipe.
    encoder: str | None = None
    training_batch: int | None = None
    test_steps: int | None = None


TINY = Sizes(
    networks=("resnet20",), batches=(2,), methods=("Source", "Tent", "MEMO"), batch=2, seconds=0.0, rounds=2,
    ways=("CUDA graph",), encoder="cifar_resnet8", training_batch=4, test_steps=1,
)  # fmt: skip


def setting_of(sizes: Sizes, method: str, network: str, batch: int) -> adapters.Setting:
    return adapters.Setting(method, network, batch, "wrap", "no", "no", 1, sizes.seconds, sizes.rounds, DEVICE)


def adapted_network(setting: adapters.Setting) -> Any:
    """Return a network that the method of a setting adapts."""
    return adapters.make_method(setting).wrap(make_network(setting.method, setting.network, setting.device))


def device_after_error() -> None:
    """Free the memory of what failed, and end the process where the device cannot be used any more."""
    if DEVICE == "cpu":
        return
    try:
        torch.cuda.empty_cache()
        torch.ones(1, device=DEVICE).item()
    except Exception as error:
        print(f"the device cannot be used any more: {error}", flush=True)
        sys.exit(BROKEN)


def synchronisations(sizes: Sizes, method: str) -> Row:
    """Return how often the fourth batch of a method makes the host wait."""
    setting = setting_of(sizes, method, sizes.network, sizes.batch)
    adapted, images = adapted_network(setting), adapters.batches(setting)
    for batch in images[:3]:
        adapted(batch)
    places = count_host_reads(lambda: adapted(images[3]), DEVICE)
    return {"host waits": sum(places.values()), "where": ", ".join(f"{name} {n}" for name, n in places.most_common(6))}


def precision(sizes: Sizes, method: str) -> Row:
    """Compare a method in bfloat16 with itself in float32."""
    setting = setting_of(sizes, method, sizes.network, sizes.batch)
    sides, images = [adapted_network(setting) for _ in range(2)], adapters.batches(setting)
    times, logits = [], []
    for number in range(adapters.WARM_UP + max(sizes.rounds, len(images))):
        taken, made = [], []
        for side, is_low in zip(sides, (False, True), strict=True):
            start = now(setting)
            with torch.autocast(DEVICE, torch.bfloat16, enabled=is_low):
                made.append(side(images[number % len(images)]).float())
            taken.append(now(setting) - start)
        if number >= adapters.WARM_UP:
            times.append(taken)
            logits.append(made)
    full, low = (torch.cat(side) for side in zip(*logits, strict=True))
    return {
        "equal predictions in %": 100 * float((full.argmax(1) == low.argmax(1)).float().mean()),
        "largest difference of logits": float((full - low).abs().max() / full.abs().max()),
        "speed of bf16 (middle half)": spread([own / other for own, other in times]),
    }


def method_row(sizes: Sizes, method: str, network: str, batch: int, checkout: Path | None) -> Row:
    """Return a method's times beside those of its bare passes and of the peer."""
    if method == "MEMO" and batch > 1:
        return {"note": "a batch is as many batches of one"}
    setting = setting_of(sizes, method, network, batch)
    if DEVICE != "cpu":
        torch.cuda.reset_peak_memory_stats()
    try:
        seen = adapters.time_method(setting)
    except ValueError as error:
        return {"note": f"not for this network: {str(error).splitlines()[0][:120]}"}
    rates = [batch / statistics.median(side) for side in zip(*seen["times"], strict=True)]
    cells: Row = {
        "images/s": round(rates[0]), "bare images/s": round(rates[1]),
        "ratio of times (middle half)": spread([own / bare for own, bare in seen["times"]]), "n": len(seen["times"]),
        "forwards, backwards": f"{seen['forwards']:.2f}, {seen['backwards']:.2f}",
    }  # fmt: skip
    if DEVICE != "cpu":
        cells["MiB, with bare passes"] = round(torch.cuda.max_memory_allocated() / 2**20)
    if checkout is not None and method in peer.METHODS:
        beside = peer.Setting(method, network, batch, "32", "no", checkout, 1, sizes.seconds, sizes.rounds, DEVICE)
        compared = peer.row(beside, peer.compare(beside))
        names = ("their images/s", "ours over theirs (middle half)", "forwards, ours and theirs")
        cells |= {name: compared[name] for name in names}
    return cells


def measure(step: str, tables: Tables, sizes: Sizes, arguments: argparse.Namespace) -> None:
    """Measure the rows of a step that are missing."""
    if step == "tests":
        if not tables.is_finished(step):
            marked_tests(tables, arguments.tests)
    elif step in ("synchronisations", "precision"):
        for method in sizes.methods:
            if method != "MEMO":
                function = synchronisations if step == "synchronisations" else precision
                tables.measure(step, {"method": method}, partial(function, sizes, method))
    elif step == "compiled":
        for network in sizes.networks:
            for way in sizes.ways:
                setting = setting_of(sizes, "Tent", network, sizes.batch)
                key = {"network": network, "batch": sizes.batch, "way": way}
                tables.measure(step, key, partial(gpu_ways.compare, setting, way))
    elif step == "training":
        for stage in gpu_training.STAGES:
            tables.measure(step, {"stage": stage}, partial(gpu_training.stage_row, stage, sizes, DEVICE))
    for network in sizes.networks if step == "methods" else ():
        for batch in sizes.batches:
            name = f"methods-{network}-{batch}"
            for passes in gpu_ways.BARE:
                function = partial(gpu_ways.bare, setting_of(sizes, "Tent", network, batch), passes)
                tables.measure(name, {"method": passes}, function)
            for method in sizes.methods:
                function = partial(method_row, sizes, method, network, batch, arguments.peer)
                tables.measure(name, {"method": method}, function)
            tables.finish(name)
    if step != "methods":
        tables.finish(step)


STEPS = ("tests", "synchronisations", "compiled", "precision", "training", "methods")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder of the tables")
    parser.add_argument("--peer", type=Path, help="folder of the peer's checkout")
    parser.add_argument("--steps", nargs="+", default=STEPS, choices=STEPS, help="which steps, in this order")
    parser.add_argument("--tests", type=Path, default=TESTS, help="folder of the tests")
    parser.add_argument("--seconds", type=float, default=480, help="time until no further row is begun")
    parser.add_argument("--tiny", action="store_true", help="the smallest sizes, to see that all steps work")
    arguments = parser.parse_args()
    fault = None if arguments.peer is None else peer.check_checkout(arguments.peer)
    if fault is not None:
        parser.error(fault)

    quiet(1)
    sizes = TINY if arguments.tiny else Sizes()
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else f"{processor()} (no CUDA device)"
    caption = f"{device}, torch {torch.__version__}, Python {platform.python_version()}"
    tables = Tables(arguments.out, arguments.seconds, caption + (", tiny sizes" if arguments.tiny else ""),
                    device_after_error)  # fmt: skip
    for step in arguments.steps:
        print(f"{step}, {tables.seconds_left:.0f} seconds left", flush=True)
        try:
            measure(step, tables, sizes, arguments)
        except TimeIsUpError as error:
            print(error)
            return
    print(f"all is measured: see {arguments.out}")


if __name__ == "__main__":
    main()
