"""Checks a checkpoint of an adaptation before anything of its run is changed.

Whoever edits the file can make its digest fit. Places, counts and names follow from the stream and have to be those;
sums and shares have to be possible.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ttalight.callbacks.measurement import visit_starts
from ttalight.data.streams import Stream
from ttalight.errors import InputError
from ttalight.files.difference import Between, difference
from ttalight.metrics import ClassificationValues, RunningCurve
from ttalight.metrics.functional import classification_sums
from ttalight.reporting.predictions import writer_fault
from ttalight.reporting.validation import check_value

__all__ = ["check_recorded", "check_states", "read_identity"]

_CLASSES = Between(1, 2**31)
_SIZE = Between(0, 2**62)
_TIME = Between(0.0, 1e12)
#: Rounding of sums.
_SLACK = 1e-6


def read_identity(text: str) -> dict[str, Any]:
    """Return what tells a run from others, as a checkpoint holds it; a ValueError if it is something else."""
    try:
        identity = json.loads(text)
    except (ValueError, RecursionError):
        identity = None
    if not isinstance(identity, dict):
        raise InputError("does not say which run it is of: start the run again")
    return identity


def check_states(random: dict[str, Any], events: dict[str, Any]) -> None:
    """Check random states, and the sizes of event files by logger and name.

    Raises:
        ValueError: If they are none.
    """
    fault = difference({"cpu": torch.get_rng_state(), "cuda": list}, random, "random")
    if fault is None and not _is_state("cpu", random["cpu"]):
        fault = "random.cpu is no state of a generator"
    if fault is None and torch.cuda.is_available() and not all(_is_state("cuda", state) for state in random["cuda"]):
        fault = "random.cuda has an entry that is no state of a generator"
    for name, sizes in events.items():
        fault = fault or difference(dict, sizes, "events") or difference(dict.fromkeys(sizes, _SIZE), sizes, "events")
        fault = fault or difference(str, name, "events")
    if fault is not None:
        raise _refusal(fault)


def _refusal(fault: str) -> ValueError:
    return InputError(f"was changed ({fault}): remove the file to resume from the one before, or start the run again")


def _is_state(device: str, state: Any) -> bool:
    try:
        torch.Generator(device).set_state(state)
    except (RuntimeError, TypeError):
        return False
    return True


def check_recorded(
    recorded: Any, batches: int, stream: Stream, read_at: Sequence[int], predictions: bool, every_label: bool
) -> None:
    """Check what was recorded in the first batches of a stream.

    Args:
        recorded: What ``Recorder.run_state`` returned, or what is in a file instead.
        batches: Number of batches, at least 1.
        stream: The stream.
        read_at: Numbers of steps after which predictions were read.
        predictions: Whether predictions are written.
        every_label: Whether each label counts.

    Raises:
        ValueError: If it is not what these batches lead to.
    """
    fault = difference({"measurement": {"counts": {"classes": _CLASSES}, "readings": dict}}, recorded)
    if fault is not None:
        raise _refusal(fault)
    measured = recorded["measurement"]
    form, seen = _measurement_form(measured["counts"]["classes"], batches, stream, read_at)
    fault = difference({"measurement": form}, recorded)
    for name in ("metrics", "readings", "visits"):
        fault = fault or difference(form[name], measured[name], name, whole=True)
    fault = fault or difference(list, measured.get("missed"), "missed")
    if fault is None and not all(type(number) is int for number in measured["missed"]):
        fault = "missed has entries that are no integers"
    if fault is None and measured["missed"] != sorted({*measured["missed"]} & {*range(batches)}):
        fault = "missed has numbers that are none of the batches, or do not rise"
    fault = fault or _agreement_fault(measured["visits"], seen)
    written = recorded.get("predictions")
    if predictions:
        fault = fault or writer_fault(written, int(stream.offsets[batches]), measured["counts"]["classes"])
    fault = fault or (None if predictions else difference(type(None), written, "predictions"))
    if fault is not None:
        raise _refusal(fault)
    for metrics in (measured["metrics"], *measured["readings"].values()):
        counts = seen if every_label and not metrics["dense"] else None
        _check_metrics(metrics, counts, stream)


def _measurement_form(
    classes: int, batches: int, stream: Stream, read_at: Sequence[int]
) -> tuple[dict[str, Any], dict[int, int]]:
    """Return the form of ``Measurement.state_dict`` after some batches, and the number of images of each visit."""
    counts, whole, starts = stream.counts(np.arange(batches)), stream.counts(), visit_starts(stream)
    seen = {visit: int(counts[visit]) for visit in np.flatnonzero(counts).tolist()}
    closed = [visit for visit, images in seen.items() if images == whole[visit]]
    sizes, shown = np.diff(stream.offsets[: batches + 1]).tolist(), [stream.batch(index) for index in range(batches)]
    curve = RunningCurve()
    for index, size in enumerate(sizes):
        if not stream.is_probe(index):
            curve.add(size, 0.0)
    counted = curve.state_dict()
    sums = classification_sums(torch.zeros(0, classes), torch.zeros(0, dtype=torch.int64))
    metrics = {
        "closed": {visit: dict.fromkeys(ClassificationValues.__annotations__) for visit in closed},
        "open": {visit: sums for visit in seen if visit not in closed},
        "total": sums if any(not stream.visits[visit].probe for visit in closed) else type(None),
        "dense": bool,
    }
    exact = {
        "batches": batches,
        "largest_batch": max(part.stop - part.start for part in shown),
        "_images": sum(sizes),
        "_counted": sum(counted["images"]),
        "_loader": 0,
    }
    form = {
        "metrics": metrics,
        "readings": dict.fromkeys(read_at, metrics),
        "curve": _exactly(counted) | {"hits": [Between(0.0, float(images)) for images in counted["images"]]},
        "counts": _exactly(exact) | {"classes": _CLASSES, "unwritten": Between(0, len(seen))},
        "visits": {
            "_seconds": dict.fromkeys(seen, _TIME),
            "_seen": _exactly(seen),
            "_hits": {visit: Between(0.0, float(images)) for visit, images in seen.items()},
            "_starts": _exactly({visit: starts[visit] for visit in seen}),
            "_compared": dict,
            "_agreed": dict,
        },
    }
    return form, seen


def _agreement_fault(visits: dict[str, Any], seen: dict[int, int]) -> str | None:
    """Return what is wrong with the counts of predictions that are the source's; None where nothing is."""
    compared, agreed = visits["_compared"], visits["_agreed"]
    known = {visit: images for visit, images in seen.items() if visit in compared}
    fault = difference(_exactly(known), compared, "visits._compared", whole=True)
    shares = {visit: Between(0.0, float(images)) for visit, images in known.items()}
    return fault or difference(shares, agreed, "visits._agreed", whole=True)


def _exactly(value: Any) -> Any:
    """Return a form of integers that have to be these."""
    if isinstance(value, dict):
        return {name: _exactly(part) for name, part in value.items()}
    return [_exactly(part) for part in value] if isinstance(value, list) else Between(value, value)


def _check_metrics(metrics: dict[str, Any], counts: dict[int, int] | None, stream: Stream) -> None:
    """Check sums and shares of visits; ``counts`` are their numbers of samples where these are known."""
    for visit, values in metrics["closed"].items():
        finite = {
            name: 0.0 if isinstance(value, float) and math.isnan(value) else value for name, value in values.items()
        }
        try:
            check_value(finite, ClassificationValues, f"visit {visit}")
        except ValueError as error:
            raise _refusal(str(error)) from None
        if counts is not None and values["samples"] != counts[visit]:
            raise _refusal(f"visit {visit} has {values['samples']} samples, expected {counts[visit]}")
    for visit, sums in metrics["open"].items():
        _check_sums(sums, None if counts is None else counts[visit], f"visit {visit}")
    if metrics["total"] is not None:
        closed = [visit for visit in metrics["closed"] if not stream.visits[visit].probe]
        _check_sums(metrics["total"], None if counts is None else sum(counts[visit] for visit in closed), "total")


def _check_sums(sums: dict[str, Tensor], samples: int | None, where: str) -> None:
    """Check that sums are those of some predictions; NaN may be among them, where logits were not finite."""
    lower = {name: 0 if name != "lowest_label" else -math.inf for name in sums}
    total = int(sums["samples"])
    upper: dict[str, Any] = {
        "unlabelled": total,
        "correct": total,
        "top5_correct": total,
        "brier": 2 * total,
        "entropy": total * math.log(len(sums["predicted"])),
        "bin_confidence": sums["bin_count"],
        "bin_correct": sums["bin_count"],
        "hits": torch.minimum(sums["predicted"], sums["labelled"]),
        "lowest_label": 0,
    }
    odd = [name for name, value in sums.items() if bool((value < lower[name] - _SLACK).any())]
    odd += [name for name, limit in upper.items() if bool((sums[name] > limit + _SLACK * (1 + total)).any())]
    for name, parts in (("samples", ("bin_count", "predicted", "labelled")), ("correct", ("bin_correct", "hits"))):
        odd += [part for part in parts if int(sums[part].sum()) != int(sums[name])]
    if odd or samples not in (None, total):
        raise _refusal(f"{where} has {odd[0] if odd else 'samples'} that no predictions lead to")
