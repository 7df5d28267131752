"""Tables of ``docs/results/monitoring.md`` from the cases that ``monitoring.py record`` has kept.

python tools/benchmarks/monitoring_tables.py watch --out runs
python tools/benchmarks/monitoring_tables.py risk --out runs
python tools/benchmarks/monitoring_tables.py estimates --out runs
"""

from __future__ import annotations

import argparse
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import ttalight  # isort: skip # noqa: F401  (first: it makes torchvision importable)
import torch
from torch import Tensor

from ttalight.models.network import Head
from ttalight.monitoring import Watch
from ttalight.monitoring.estimates import (
    agreement,
    confidence_threshold,
    disagreement_accuracy,
    dropout_predictions,
    thresholded_accuracy,
)
from ttalight.monitoring.hysteresis import SIGNALS, Limit, Readings, Reference, crossings
from ttalight.monitoring.risk import Calibration, calibrate, error_bounds, uncertainty

LEVEL, TOLERANCE, FALSE_FLAGS, EVERY = 0.05, 0.05, 0.05, 5
RUNS, STREAM, BATCH = 1000, 2000, 100


def read(out: Path, name: str) -> dict[str, Any]:
    case: dict[str, Any] = torch.load(out / f"case-{name}.pt", weights_only=False)
    return case


def names(out: Path) -> list[str]:
    return sorted(path.stem.removeprefix("case-") for path in out.glob("case-*.pt"))


def error(case: dict[str, Any]) -> float:
    wrong = [logits.argmax(1) != labels for logits, labels in zip(case["logits"], case["labels"], strict=True)]
    return float(torch.cat(wrong).double().mean())


def rows(columns: list[str]) -> None:
    print(f"\n| {' | '.join(columns)} |\n| --- |{' ---: |' * (len(columns) - 1)}")


def trips(case: dict[str, Any]) -> list[tuple[int, str]]:
    """Return which signals trip in which batch, from the recorded signals and by the present rule of ``Watch``."""
    found, watched = [], Watch()
    reference = Reference(case["reference"]["entropy"], case["reference"]["effective_classes"])
    states = {name: Limit(watched.patience) for name in SIGNALS}
    sizes = [len(logits) for logits in case["logits"]]
    for batch, seen in enumerate(case["signals"]):  # each was read with the batch after its own
        if not seen:
            continue
        images = sum(sizes[max(0, batch - math.ceil(watched.window / sizes[0])) : batch])
        share, classes, entropy = seen["commonest_share"], seen["effective_classes"], seen["low_entropy"]
        readings = Readings(
            images, case["logits"][0].shape[1], entropy, round(share * images), classes, seen["drift"], seen["step"]
        )
        for name, (*_, is_beyond, is_calm) in crossings(readings, reference, **watched.limits).items():
            if states[name].update(is_beyond, is_calm):
                found.append((batch, name))
    return found


def watch(out: Path) -> None:
    """Print how near each signal came to its limit, and what tripped."""
    rows(["method", "batches", "error", "share < 0.55", "classes", "entropy", "drift < 1", "step < 0.25", "trips"])
    for name in names(out):
        case = read(out, name)
        seen = [signals for signals in case["signals"] if signals]
        extremes = [
            max(s["commonest_share"] for s in seen),
            (min(s["effective_classes"] for s in seen) - 1) / (case["reference"]["effective_classes"] - 1),
            min(s["low_entropy"] for s in seen) / case["reference"]["entropy"],
            max(s["drift"] for s in seen),
            max(s["step"] for s in seen),
        ]
        tripped = "; ".join(f"{signal} in batch {batch}" for batch, signal in trips(case)) or "none"
        numbers = " | ".join(f"{value:.3f}" for value in extremes)
        print(f"| {name} | {len(case['logits'])} | {100 * error(case):.2f} | {numbers} | {tripped} |")


# -- risk


def first_alarm(flags: Tensor, predicted: Tensor, calibration: Calibration) -> tuple[int | None, list[float]]:
    """Return with which look the alarm comes, None without one, and the bounds after the last.

    Args:
        flags: Flags until each look, (T,).
        predicted: Predictions by class until each look, (T, C).
        calibration: The bounds of the labelled images.
    """
    bounds = torch.stack(list(error_bounds(flags, predicted, calibration, FALSE_FLAGS).values()))
    alarms = (bounds > calibration.limit).any(0)
    return int(alarms.int().argmax()) if alarms.any() else None, bounds[:, -1].clamp(min=0).tolist()


def counts(logits: Tensor) -> Tensor:
    """Return the predictions by class, (C,)."""
    return torch.bincount(logits.argmax(1), minlength=logits.shape[1])


def seen_by_monitor(case: dict[str, Any], start: Calibration, labels: Tensor, every: bool) -> tuple[Tensor, Tensor]:
    """Return flags and predictions until each batch, with the source's threshold or with those of the present model."""
    threshold, flags = start.threshold, []
    for number, logits in enumerate(case["logits"]):
        flags.append((uncertainty(logits) > threshold).sum())
        seen = case["rows"][number].get("calibration")  # of the model after this batch
        if every and seen is not None:
            threshold = calibrate(seen, labels, LEVEL, TOLERANCE, FALSE_FLAGS, start.shares is None).threshold
    return torch.stack(flags).cumsum(0), torch.stack([counts(logits) for logits in case["logits"]]).cumsum(0)


def risk(out: Path) -> None:
    """Print when the alarm came, and the bounds at the end."""
    source, labels = read(out, "Source")["rows"][0]["calibration"], torch.load(out / "calibration-labels.pt")
    rows(["case", "label shift", "threshold", "error", "bounds at the end", "alarm after images", "error until then"])
    for label_shift in (False, True):
        calibration = calibrate(source, labels, LEVEL, TOLERANCE, FALSE_FLAGS, label_shift)
        for name in names(out):
            case = read(out, name)
            if not any("calibration" in row for row in case["rows"]):
                continue
            for every in (False, True):
                flags, predicted = seen_by_monitor(case, calibration, labels, every)
                first, bounds = first_alarm(flags, predicted, calibration)
                where, until = "none", ""
                if first is not None:
                    where = f"{int(predicted[first].sum())} ({case['domain'][first]})"
                    until = f"{error({key: case[key][: first + 1] for key in ('logits', 'labels')}):.3f}"
                shown = " | ".join(f"{bound:.3f}" for bound in bounds)
                print(f"| {name} | {label_shift} | {every} | {error(case):.3f} | {shown} | {where} | {until} |")
        clean = read(out, "Source-clean")
        logits = torch.cat(clean["logits"])[torch.cat(clean["labels"]).argsort(stable=True)]
        flags = (uncertainty(logits) > calibration.threshold).cumsum(0)[199::200]
        predicted = torch.nn.functional.one_hot(logits.argmax(1), logits.shape[1]).cumsum(0)[199::200]
        bounds = error_bounds(flags, predicted, calibration, FALSE_FLAGS)
        print(
            f"Source-clean in the order of its classes: { ({name: bound.tolist() for name, bound in bounds.items()}) }"
        )
        rate = false_alarms(out, source, labels, label_shift)
        print(f"limit {calibration.limit:.4f}; alarms of {RUNS} clean streams of {STREAM} images: {rate:.3f}\n")


def false_alarms(out: Path, source: Tensor, labels: Tensor, label_shift: bool) -> float:
    """Return the share of alarms on streams drawn, like their labelled images, from the source's clean predictions."""
    clean = read(out, "Source-clean")
    logits, truth = torch.cat([source, *clean["logits"]]), torch.cat([labels, *clean["labels"]])
    doubts, classes = uncertainty(logits), torch.nn.functional.one_hot(logits.argmax(1), logits.shape[1])
    generator, alarms = torch.Generator().manual_seed(0), 0
    for _ in range(RUNS):
        drawn = torch.randint(len(doubts), (500 + STREAM,), generator=generator)
        own, stream = drawn[:500], drawn[500:]
        # Tolerance 0 is the hardest case.
        calibration = calibrate(logits[own], truth[own], LEVEL, 0.0, FALSE_FLAGS, label_shift)
        looks = slice(BATCH - 1, None, BATCH)
        flags, predicted = (doubts[stream] > calibration.threshold).cumsum(0), classes[stream].cumsum(0)
        alarms += first_alarm(flags[looks], predicted[looks], calibration)[0] is not None
    return alarms / RUNS


# -- accuracy


def by_domain(case: dict[str, Any], values: list[float]) -> list[float]:
    """Return the means of batch values over each stretch of one domain."""
    edges = [0, *(i + 1 for i, (a, b) in enumerate(pairwise(case["domain"])) if a != b), len(values)]
    return [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]


def dropout_values(case: dict[str, Any], head: Head, power: float, momentum: float) -> list[float]:
    generator, mean, found = torch.Generator().manual_seed(0), None, []
    for row, logits in zip(case["rows"], case["logits"], strict=True):
        dropped = dropout_predictions(row["features"], head, 0.4, 10, generator)
        value = float(disagreement_accuracy(logits, dropped, power))
        mean = value if mean is None else mean + momentum * (value - mean)
        found.append(mean)
    return found


def estimates(out: Path, weights: Path) -> None:
    """Print how far estimates are from the accuracy of each corruption."""
    state = torch.load(weights, map_location="cpu", weights_only=True)["state_dict"]
    head = Head(state["module.linear.weight"], state["module.linear.bias"])
    labels, cases = torch.load(out / "calibration-labels.pt"), {}
    for name in ("Source", "PTBN", "Tent"):
        if name in names(out):
            cases[name] = read(out, name)
    rows(["method", "estimate", "accuracy", "estimated", "mean absolute error", "largest", "correlation"])
    for name, case in cases.items():
        pairs = list(zip(case["logits"], case["labels"], strict=True))
        truth = by_domain(case, [float((logits.argmax(1) == y).double().mean()) for logits, y in pairs])
        threshold = confidence_threshold(case["rows"][0]["calibration"], labels)
        found = {
            "ATC": [float(thresholded_accuracy(logits, threshold)) for logits, _ in pairs],
            "mean confidence": [float(logits.softmax(1).amax(1).mean()) for logits, _ in pairs],
            "drop-out": dropout_values(case, head, 3.0, 0.4),
            "drop-out, no correction": dropout_values(case, head, 0.0, 1.0),
        }
        for other, member in cases.items():
            if other != name:
                found[f"agreement with {other}"] = [
                    float(agreement(a, b)) for a, b in zip(case["logits"], member["logits"], strict=True)
                ]
        for kind, values in found.items():
            guesses = torch.tensor(by_domain(case, values))
            true = torch.tensor(truth)
            apart = (guesses - true).abs()
            together = float(torch.corrcoef(torch.stack([guesses, true]))[0, 1])
            print(
                f"| {name} | {kind} | {100 * true.mean():.1f} | {100 * guesses.mean():.1f} | "
                f"{100 * apart.mean():.1f} | {100 * apart.max():.1f} | {together:.2f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["watch", "risk", "estimates"])
    parser.add_argument("--out", type=Path, required=True, help="folder of the recorded cases")
    parser.add_argument("--weights", type=Path, help="resnet20-12fca82f.th, for estimates")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.what == "estimates":
        estimates(arguments.out, arguments.weights)
    else:
        {"watch": watch, "risk": risk}[arguments.what](arguments.out)


if __name__ == "__main__":
    main()
