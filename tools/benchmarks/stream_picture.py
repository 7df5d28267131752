"""Picture of an adaptation: the images of a stream, and the accuracy of several runs along it.

    tools/demo.sh
    python tools/benchmarks/stream_picture.py runs/mnist_to_digits/{unadapted,ptbn,cta_consistency} \
        --labels "not adapted" "batch statistics" "test-time training" --output docs/images/adaptation.png

The images are the embedded digits, so the runs have to be on these. Needs the extra ``plots``.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot

from ttalight.data import DigitsDataModule
from ttalight.reporting import read_results

matplotlib.use("Agg")
COLOURS = ("#8c8c8c", "#0072b2", "#d55e00", "#009e73")
#: Digits shown of every domain.
SHOWN = 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--labels", nargs="+", help="a name for each run; by default the folder's")
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    if len(options.runs) > len(COLOURS) or (options.labels and len(options.labels) != len(options.runs)):
        parser.error(f"give at most {len(COLOURS)} runs, and as many labels as runs")
    results = [read_results(path) for path in options.runs]
    draw(results, options.labels or [path.name for path in options.runs]).savefig(options.output, dpi=140)


def draw(results: list[Any], labels: list[str]) -> Any:
    """Return the figure: a row of images above the curves, domain by domain."""
    domains = results[0]["domains"]
    total = sum(row["samples"] for row in domains)
    severity = max(row["severity"] or 0 for row in domains) or 5
    figure = pyplot.figure(figsize=(10, 4.2), layout="constrained")
    grid = figure.add_gridspec(2, SHOWN * len(domains), height_ratios=[1, 4.5])
    for place, image in enumerate(images([row["name"] for row in domains], severity)):
        axes = figure.add_subplot(grid[0, place])
        axes.imshow(image, interpolation="nearest")
        axes.axis("off")
    axes = figure.add_subplot(grid[1, :])
    for result, label, colour in zip(results, labels, COLOURS[: len(results)], strict=True):
        ends, accuracy = result["curve"]["images"], result["curve"]["accuracy"]
        for row in domains:  # a line of its own for each, since the methods start again
            chosen = [i for i, end in enumerate(ends) if row["start"] < end <= row["start"] + row["samples"]]
            middles = [(ends[i] + (ends[i - 1] if i else 0)) / 2 for i in chosen]
            values = [100 * accuracy[i] for i in chosen]
            axes.plot(middles, values, color=colour, marker="o", ms=3, label=label if row is domains[0] else None)
    for row in domains:
        axes.axvline(row["start"], color="#cccccc", lw=0.8, zorder=0)
        axes.text(row["start"] + row["samples"] / 2, 102, row["name"].replace("_", " "), ha="center")
    axes.set(xlim=(0, total), ylim=(0, 100), xlabel="images seen", ylabel="accuracy of each batch in %")
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def images(names: list[str], severity: int) -> list[Any]:
    """Return the first test images in every domain."""
    data = DigitsDataModule(domains=names, severity=severity, limit=SHOWN)
    return [image.permute(1, 2, 0).numpy() for _, domain in data.load_domains() for image in domain.images]


if __name__ == "__main__":
    main()
