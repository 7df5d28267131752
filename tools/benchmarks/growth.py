"""Measure how the cost of adaptation grows: with the stream, its domains, the batch, the network, and what adapts.

    python tools/benchmarks/growth.py [--method Tent] [--axes length domains batch width parameters] [--rounds 3]
                                      [--images 16384] [--figure growth.png]

Prints a Markdown table: for every point milliseconds an image, peak memory above images and network, and the number of
adapted parameters. ``--figure`` draws them too, which needs matplotlib.

Each point is a run of Trainer.adapt with all that it writes by default, in a fresh process, on the CPU, one thread: a
ResNet-8 (CIFAR) of random weights, random images of 32 pixels, batches of 64, one domain, the affines of the
normalisation layers, and one of these varied:

- length: images of the stream, up to ``--images``;
- domains: announced ones, which share a quarter of these in batches of 16, each with a reset and a row of results;
- batch: images in a batch;
- width: channels of the first stage, of which the other two have twice and four times as many;
- parameters: affines in front of the last block, of all normalisation layers, all weights but the classifier's, or all,
  of a network four times as wide.

Times are those that the process was running, from the third batch to the last; the median over the rounds counts, with
the lowest and the highest. The rounds go through all points in turn, so that a busy neighbour does not decide on one.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any, NamedTuple

import ttalight  # isort: skip  (first: it makes torchvision importable)
import torch
from lightning import Callback
from measuring import fresh, peak, print_head, print_machine, quiet
from networks import METHODS, Classifier
from random_images import RandomImages

from ttalight.adapters import Adapter
from ttalight.data import ImageArrays
from ttalight.data.streams import Domain
from ttalight.models.cifar.cifar_resnet import cifar_resnet8
from ttalight.reporting.figures import require_matplotlib

#: Batches before the measured ones.
WARM_UP = 2
X_LABELS = {
    "length": "images of the stream",
    "domains": "domains",
    "batch": "images in a batch",
    "width": "channels of the first stage",
    "parameters": "adapted parameters",
}


class Point(NamedTuple):
    """Measurements of one run."""

    axis: str
    label: str
    images: int
    method: str
    domains: int = 1
    batch: int = 64
    width: int = 16
    parameters: str = "norm"


class Cost(NamedTuple):
    """Costs of a run."""

    milliseconds: float
    mebibytes: float
    parameters: int


class RandomDomains(RandomImages):
    """Random images, shared out among so many domains."""

    def __init__(self, images: int, count: int, batch_size: int) -> None:
        super().__init__(images, batch_size=batch_size)
        self.count = count

    def load_domains(self) -> list[tuple[Domain, ImageArrays]]:
        whole = self.load("test")
        parts = zip(whole.images.chunk(self.count), whole.labels.chunk(self.count), strict=True)
        return [(Domain(f"domain_{index}"), ImageArrays(*part)) for index, part in enumerate(parts)]


class LabelledClassifier(Classifier):
    """A classifier that is tested on images with labels, which can be recorded."""

    def test_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        self(batch[0])


class Clock(Callback):
    """Notes when the first measured batch begins and when the last one is over."""

    begin = end = 0.0
    parameters = 0

    def __init__(self, method: Adapter) -> None:
        self.method = method

    def on_test_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int, loader: int = 0) -> None:
        if batch_idx == WARM_UP:
            self.begin = time.process_time()

    def on_test_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int, loader: int = 0
    ) -> None:
        self.end = time.process_time()
        if self.method.engine is not None:
            self.parameters = sum(parameter.numel() for parameter in self.method.engine.net.parameters)


def measure(point: Point) -> Cost:
    """Measure one point; to be called in a fresh process."""
    quiet(threads=1)
    torch.manual_seed(0)
    settings: dict[str, Any] = {} if point.parameters == "norm" else {"parameters": point.parameters}
    method = METHODS[point.method](reset="domain", **settings)
    data = RandomDomains(point.images, point.domains, point.batch)
    data.setup("test")
    assert data.stream is not None
    classifier, clock = LabelledClassifier(cifar_resnet8(width=point.width)), Clock(method)
    with tempfile.TemporaryDirectory() as folder:
        trainer = ttalight.Trainer(
            default_root_dir=folder,
            callbacks=[clock],
            accelerator="cpu",
            devices=1,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        before = peak("cpu")
        trainer.adapt(classifier, data, method)
        memory = peak("cpu") - before
    first = data.stream.batch(WARM_UP).start
    return Cost(1e3 * (clock.end - clock.begin) / (point.images - first), memory, clock.parameters)


def points(axis: str, method: str, images: int) -> list[Point]:
    """Return the points of an axis, from small to large."""
    if axis == "length":
        return [Point(axis, f"{count:,}", count, method) for count in powers(256, images)]
    if axis == "domains":
        return [Point(axis, f"{count:,}", images // 4, method, count, 16) for count in powers(1, images // 64)]
    if axis == "batch":
        sizes = powers(1, max(1, images // 16))
        return [Point(axis, f"{size:,}", max(256, 8 * size), method, batch=size) for size in sizes]
    few = min(images, 512)
    if axis == "width":
        return [Point(axis, str(width), few, method, width=width) for width in (4, 8, 16, 32, 64)]
    chosen = ("norm_before_last_block", "norm", "features", "all")
    return [Point(axis, name, few, method, width=64, parameters=name) for name in chosen]


def powers(low: int, high: int, factor: int = 4) -> list[int]:
    """Return ``low`` and its multiples by powers of ``factor`` up to ``high``."""
    values = [low]
    while values[-1] * factor <= high:
        values.append(values[-1] * factor)
    return values


def row(point: Point, costs: list[Cost]) -> str:
    times = [cost.milliseconds for cost in costs]
    memory = statistics.median(cost.mebibytes for cost in costs)
    spread = f"{statistics.median(times):.3f} ({min(times):.3f} to {max(times):.3f})"
    return f"| {point.axis} | {point.label} | {spread} | {len(costs)} | {memory:.0f} | {costs[0].parameters:,} |"


def draw(seen: dict[Point, list[Cost]], path: str) -> None:
    """Draw time and memory against every axis, whose points are evenly spaced."""
    from matplotlib.figure import Figure

    axes = list(dict.fromkeys(point.axis for point in seen))
    figure = Figure(figsize=(2.6 * len(axes), 5.5), layout="constrained")
    plots = figure.subplots(2, len(axes), sharex="col", squeeze=False)
    for column, axis in enumerate(axes):
        chosen = [point for point in seen if point.axis == axis]
        for plot, what in zip(plots[:, column], ("milliseconds", "mebibytes"), strict=True):
            values = [[getattr(cost, what) for cost in seen[point]] for point in chosen]
            plot.plot([statistics.median(each) for each in values], "o-")
            plot.fill_between(range(len(values)), list(map(min, values)), list(map(max, values)), alpha=0.25)
            plot.set_yscale("log", base=2)
            plot.set_ylim(min(map(min, values)) / 2, max(map(max, values)) * 2)
            plot.yaxis.set_major_formatter("{x:g}")
            plot.set_xticks(
                range(len(values)),
                [point.label.replace("_before_", " before\n").replace("_", " ") for point in chosen],
                rotation=40,
                ha="right",
            )
            plot.grid(alpha=0.3)
        plots[1, column].set_xlabel(X_LABELS[axis])
    plots[0, 0].set_ylabel("ms an image")
    plots[1, 0].set_ylabel("peak MiB")
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="Tent", choices=METHODS, metavar="NAME", help="the method")
    parser.add_argument("--axes", nargs="+", default=list(X_LABELS), choices=X_LABELS, help="what grows")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each point")
    parser.add_argument("--images", type=int, default=16384, help="most images of a stream")
    parser.add_argument("--figure", help="file to draw to, for example growth.png")
    arguments = parser.parse_args()
    if arguments.images < 256:
        parser.error(f"--images must be at least 256, four batches, got {arguments.images}")
    if arguments.figure is not None:
        require_matplotlib()

    print_machine("cpu", 1, arguments.method)
    chosen = [point for axis in arguments.axes for point in points(axis, arguments.method, arguments.images)]
    seen: dict[Point, list[Cost]] = {point: [] for point in chosen}
    for _ in range(arguments.rounds):
        for point in chosen:
            seen[point].append(fresh(measure, point))
    print_head(("axis", "value", "ms an image (lowest to highest)", "n", "MiB", "adapted parameters"))
    for point, costs in seen.items():
        print(row(point, costs))
    if arguments.figure is not None:
        draw(seen, arguments.figure)


if __name__ == "__main__":
    main()
