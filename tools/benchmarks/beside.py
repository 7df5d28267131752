"""Time a step of adaptation in this checkout beside another one, batch by batch in turns.

    python tools/benchmarks/beside.py --other CHECKOUT [--methods Tent EATA] [--batches 1 16 200] [--turns 60]

Two processes, each with the package of one checkout, make the same network and the same images (ResNet-20 in float32,
one thread) and adapt through ``wrap``. They take turns: one process runs while the other waits, and which goes first
changes with every turn. A time is the process time of the CPU that one batch takes. Printed are the median of the
ratios this / other over the turns, the middle half of them, their number, and the updates that each side made. Settings
are such that methods keep every sample and step on every batch.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

THIS = Path(__file__).resolve().parents[2]
LR = 1e-6
#: Settings under which a network with random weights keeps samples, so that methods step.
SETTINGS: dict[str, dict[str, Any]] = {
    "ETA": {"margin": 1.0, "redundancy": 1.0},
    "EATA": {"margin": 1.0, "redundancy": 1.0, "fisher": "stream", "fisher_samples": 8},
    "RDumb": {"margin": 1.0, "redundancy": 1.0},
    "SAR": {"margin": 1.0, "recovery": 0.0, "parameters": "norm"},
    "DeYO": {"margin": 1.0, "threshold": -0.99, "parameters": "norm"},
    "NCTTA": {"margin": 1.0},
}
METHODS = ("Tent", "EATA", "SAR", "DeYO", "ROID")
#: Turns by batch size, about as many as a minute holds; and batches of each side before the first.
TURNS, WARM_UP = {1: 200, 16: 100, 200: 15}, 4


def work() -> None:
    """Adapt to a batch for each line read, and print the time that it took; the first line says to what."""
    answers, sys.stdout = sys.stdout, sys.stderr
    import ttalight  # isort: skip  (first: it makes torchvision importable)
    import timm
    import torch

    import ttalight.models  # registers the network
    from ttalight import adapters

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    method, size = json.loads(sys.stdin.readline())
    torch.manual_seed(0)
    network = timm.create_model("cifar_resnet20", num_classes=10).eval()
    torch.nn.init.normal_(network.get_classifier().weight, std=0.5)
    stepped = {"lr": LR} if issubclass(getattr(adapters, method), adapters.GradientAdapter) else {}
    adapter = getattr(adapters, method)(reset="never", seed=0, **stepped, **SETTINGS.get(method, {}))
    adapted = adapter.wrap(network)
    generator = torch.Generator().manual_seed(1)
    batches = [torch.rand(size, 3, 32, 32, generator=generator) for _ in range(8)]
    print(json.dumps(str(Path(ttalight.__file__).parents[1])), file=answers, flush=True)
    for turn, _ in enumerate(sys.stdin):
        images = batches[turn % len(batches)]
        began = time.process_time()
        adapted(images)
        took = time.process_time() - began
        print(json.dumps([took, adapted.engine.updates, adapted.engine.batches]), file=answers, flush=True)


class Side:
    """A process with the package of one checkout.

    Args:
        checkout: Folder that holds the package.
        method: Name of the adapter.
        size: Images in a batch.

    Raises:
        RuntimeError: If the process ends, or imports another package.
    """

    def __init__(self, checkout: Path, method: str, size: int) -> None:
        environment = {**os.environ, "PYTHONPATH": str(checkout), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, __file__, "--work"], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip
        self.updates = self.batches = 0
        found = Path(self._ask(json.dumps([method, size])))
        if found != checkout:
            raise RuntimeError(f"the package comes from {found}, expected {checkout}: is that a checkout of ttalight?")

    def batch(self) -> float:
        """Adapt to the next batch and return the seconds that it took."""
        took, self.updates, self.batches = self._ask("")
        return took

    def _ask(self, line: str) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            print(line, file=self.process.stdin, flush=True)
        except BrokenPipeError:
            pass
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process ended with {self.process.wait()}; its error stands above")
        return json.loads(answer)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()


def measure(other: Path, method: str, size: int, turns: int) -> str:
    """Return a line with the ratio of this checkout's time to the other's."""
    sides: list[Side] = []
    try:
        for checkout in (THIS, other):
            sides.append(Side(checkout, method, size))
        for _ in range(WARM_UP):
            for side in sides:
                side.batch()
        ratios, times = [], ([], [])
        for turn in range(turns):
            for which in (0, 1) if turn % 2 == 0 else (1, 0):
                times[which].append(sides[which].batch())
            ratios.append(times[0][-1] / times[1][-1])
    finally:
        for side in sides:
            side.end()
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    mine, theirs = (1e3 * statistics.median(part) for part in times)
    steps = " and ".join(f"{side.updates} of {side.batches}" for side in sides)
    return (
        f"{method}, batch of {size}: {middle:.3f} (middle half {low:.3f} to {high:.3f}, n={turns}), "
        f"{mine:.2f} ms beside {theirs:.2f} ms, updates {steps}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--other", type=Path, help="folder of the checkout to compare with")
    parser.add_argument("--methods", nargs="+", default=METHODS, help="names of adapters")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 200], help="images in a batch")
    parser.add_argument("--turns", type=int, help="batches of each side, at least 2; by default as the size allows")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work()
        return
    if arguments.other is None or not (arguments.other / "ttalight").is_dir():
        parser.error(f"--other must be a checkout, a folder with ttalight in it, got {arguments.other}")
    if arguments.turns is not None and arguments.turns < 2:
        parser.error(f"--turns must be at least 2, got {arguments.turns}")
    print(f"time of a batch in {THIS} / {arguments.other.resolve()}")
    for method in arguments.methods:
        for size in arguments.batches:
            turns = arguments.turns or TURNS.get(size, max(15, 1500 // size))
            print(measure(arguments.other.resolve(), method, size, turns), flush=True)


if __name__ == "__main__":
    main()
