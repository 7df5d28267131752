"""Numbers in the text exposition format of Prometheus."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ttalight.errors import InputError
from ttalight.files.atomic import write_files

__all__ = ["Metric", "exposition", "write_metrics"]

_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")
_LABEL = re.compile(r"(?!__)[a-zA-Z_][a-zA-Z0-9_]*")


class Metric(NamedTuple):
    """A metric with one sample.

    Args:
        name: Letters, digits, ``_`` and ``:``; of a counter it ends with ``_total``.
        kind: ``counter`` or ``gauge``.
        help: One line on what it counts or measures, and in which unit.
        value: The number. NaN and infinities are allowed.
    """

    name: str
    kind: str
    help: str
    value: float


def exposition(metrics: Sequence[Metric], labels: Mapping[str, str] | None = None) -> str:
    """Return metrics in the text exposition format, version 0.0.4, which Prometheus and the node exporter read.

    Args:
        metrics: The metrics.
        labels: Labels of every sample, name -> value.

    Raises:
        ValueError: If a name is not one that the format allows, or occurs twice.
    """
    names = [metric.name for metric in metrics]
    for name in names:
        if not _NAME.fullmatch(name) or names.count(name) > 1:
            raise InputError(f"a metric needs a name of its own of letters, digits, _ and :, got {name!r}")
    pairs = []
    for name, value in (labels or {}).items():
        if not _LABEL.fullmatch(name):
            raise InputError(f"a label needs a name of letters, digits and _, without __ in front, got {name!r}")
        escaped = value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
        pairs.append(f'{name}="{escaped}"')
    shown = f"{{{','.join(pairs)}}}" if pairs else ""
    lines = []
    for metric in metrics:
        text = metric.help.replace("\\", "\\\\").replace("\n", "\\n")
        lines += [f"# HELP {metric.name} {text}", f"# TYPE {metric.name} {metric.kind}"]
        lines.append(f"{metric.name}{shown} {_number(metric.value)}")
    return "".join(f"{line}\n" for line in lines)


def write_metrics(path: str | Path, text: str) -> None:
    """Write a file for the textfile collector of the node exporter, which reads either the old or the new one.

    Args:
        path: A file that ends with ``.prom``, the ending that the collector looks for.
        text: What ``exposition`` returned.

    Raises:
        ValueError: If it ends otherwise.
    """
    path = Path(path)
    if path.suffix != ".prom":
        raise InputError(f"the textfile collector reads files that end with .prom, got {path.name!r}")
    write_files(path.parent, {path.name: text})


def _number(value: float) -> str:
    if math.isfinite(value):
        return str(value) if isinstance(value, int) else repr(float(value))
    return "NaN" if math.isnan(value) else ("+Inf" if value > 0 else "-Inf")
