"""Checks a result file against its schema before anything is computed from it.

Rows are checked a column at a time, so that the time for a file grows with its length and is short beside that of
reading it.
"""

from __future__ import annotations

import math
import reprlib
import types
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Union, get_args, get_origin, get_type_hints, is_typeddict

from ttalight.errors import InputError

__all__ = ["check_curve", "check_free", "check_readings", "check_value"]

#: Characters of a string, and mappings and lists inside each other.
_LONGEST = 4096
_DEEPEST = 20

#: Beyond these a sum or a square of measures may be infinite, and an integer no index.
_FLOATS = (-1e60, 1e60)
_INTEGERS = (-(2**63), 2**63 - 1)
#: Rounding that a share of 0 or 1 may have.
_SLACK = 1e-6

_SHARES = (
    "accuracy", "error", "top5", "ece", "diversity", "agreement", "miou", "iou", "domain_accuracy", "group_accuracy",
    "first", "last", "lowest",
)  # fmt: skip
_NOT_NEGATIVE = (
    "samples", "visit", "start", "rows", "probes", "classes", "bad_batches", "missed_batches", "missed", "batch_size",
    "seconds", "images_per_second", "forwards_per_batch", "backwards_per_batch", "peak_memory_bytes",
    "adapted_parameters",
)  # fmt: skip
#: Lowest and highest value of the numbers of a name.
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(_SHARES, (0.0, 1.0)),
    **dict.fromkeys(_NOT_NEGATIVE, (0.0, math.inf)),
    "nll": (0.0, math.inf),
    "entropy": (0.0, math.inf),
    "brier": (0.0, 2.0),
    "forgotten": (-1.0, 1.0),
}

#: Where a value of a column stands, by its index.
_Place = Callable[[int], str]


def check_value(value: Any, kind: Any, where: str = "") -> None:
    """Compare a tree of plain values with the type hints of a schema.

    Args:
        value: What a file holds.
        kind: A TypedDict, a list, a dict, a plain type or a union of plain types.
        where: Path of the value, for messages.

    Raises:
        ValueError: If something is missing, of another type, or out of its range.
    """
    _check_column([value], kind, lambda _: where)


def check_curve(curve: dict[str, list[Any]]) -> None:
    """Check that the stretches of a curve follow each other.

    Raises:
        ValueError: If the lists have several lengths, or the numbers of images do not rise from above 0.
    """
    images = curve["images"]
    lengths = {name: len(curve[name]) for name in ("images", "accuracy", "running")}
    if len(set(lengths.values())) > 1:
        counts = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise InputError(f"curve has lists of several lengths ({counts})")
    if any(later <= earlier for earlier, later in zip([0, *images], images, strict=False)):
        raise InputError("curve.images must rise from above 0, it counts the images to the end of each stretch")
    for name in ("accuracy", "running"):
        _check_range(curve[name], "accuracy", False, lambda index, name=name: f"curve.{name}[{index}]")  # type: ignore[misc]


def check_readings(readings: Sequence[Any], rows: int) -> None:
    """Check that every reading has the rows of the run.

    Raises:
        ValueError: If one has more or fewer.
    """
    for index, reading in enumerate(readings):
        if len(reading["domains"]) != rows:
            raise InputError(f"readings[{index}] has {len(reading['domains'])} domains, the run has {rows}")


def check_free(value: Any, where: str) -> None:
    """Check a value of which the schema says little: how deep it is nested, and its integers.

    Raises:
        ValueError: If it is nested too deep, or an integer is too large to compute with.
    """
    level = [value]
    for _ in range(_DEEPEST):
        for part in level:
            if isinstance(part, int) and not _INTEGERS[0] <= part <= _INTEGERS[1]:
                raise InputError(f"{where} has {part!r:.60}, expected integers of 64 bits")
        level = [part for outer in level if isinstance(outer, (dict, list)) for part in _parts(outer)]
        if not level:
            return
    raise InputError(f"{where} is nested more than {_DEEPEST} deep")


def _parts(value: dict[str, Any] | list[Any]) -> Sequence[Any]:
    return list(value.values()) if isinstance(value, dict) else value


def _check_column(values: Sequence[Any], kind: Any, where: _Place) -> None:
    if is_typeddict(kind):
        _expect(values, {dict}, "a mapping", where)
        _check_rows(values, kind, where)
    elif get_origin(kind) is list:
        _expect(values, {list}, "a list", where)
        for index, value in enumerate(values):
            _check_column(value, get_args(kind)[0], lambda part, index=index: f"{where(index)}[{part}]")  # type: ignore[misc]
    elif get_origin(kind) is dict:
        _expect(values, {dict}, "a mapping", where)
    else:
        _check_plain(values, kind, where)


def _check_rows(rows: Sequence[dict[str, Any]], kind: Any, where: _Place) -> None:
    required: frozenset[str] = kind.__required_keys__
    short = next((index for index, row in enumerate(rows) if not required <= row.keys()), None)
    if short is not None:
        missing = ", ".join(sorted(required - rows[short].keys()))
        raise InputError(f"{where(short) or 'the top level'} lacks {missing}")
    for key, hint in _hints(kind).items():
        owners = range(len(rows)) if key in required else [index for index, row in enumerate(rows) if key in row]
        values = [rows[index][key] for index in owners]

        def place(index: int, key: str = key, owners: Sequence[int] = owners) -> str:
            outer = where(owners[index])
            return f"{outer}.{key}" if outer else key

        _check_column(values, hint, place)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return get_type_hints(kind)


def _check_plain(values: Sequence[Any], kind: Any, where: _Place) -> None:
    branches = get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
    allowed = {get_origin(branch) or branch for branch in branches}
    if float in allowed:
        allowed.add(int)  # JSON has 1 for 1.0
    names = " or ".join("null" if branch is types.NoneType else _name(branch) for branch in branches)
    _expect(values, allowed, names, where)
    if list in allowed:
        inner = next(get_args(branch)[0] for branch in branches if get_origin(branch) is list)
        for index, value in enumerate(values):
            if isinstance(value, list):
                _expect(value, {inner}, names, lambda _, index=index: where(index), whole=value)  # type: ignore[misc]
    if str in allowed:
        long = next((i for i, value in enumerate(values) if type(value) is str and len(value) > _LONGEST), None)
        if long is not None:
            raise InputError(f"{where(long)} has {len(values[long]):,} characters, expected at most {_LONGEST:,}")
    if values and not allowed.isdisjoint((int, float)):
        key = where(0).rpartition(".")[2].partition("[")[0]
        _check_range(values, key, float not in allowed, where)


def _check_range(values: Sequence[Any], key: str, whole: bool, where: _Place) -> None:
    """Check numbers; ``whole`` ones are integers."""
    numbers = [value for value in values if type(value) in (int, float)]
    lowest, highest = _RANGES.get(key, (-math.inf, math.inf))
    low, high = _INTEGERS if whole else _FLOATS
    low, high = max(low, lowest - _SLACK), min(high, highest + _SLACK)
    if not numbers or (low <= min(numbers) and max(numbers) <= high):
        return
    index = next(i for i, value in enumerate(values) if type(value) in (int, float) and not low <= value <= high)
    bounds = f"{max(lowest, _FLOATS[0]):g} to {min(highest, _FLOATS[1]):g}"
    expected = f"at least {lowest:g}" if highest == math.inf and lowest > -math.inf else bounds
    raise InputError(f"{where(index)} is {_shown(values[index])}, expected {expected}")


def _expect(values: Sequence[Any], allowed: set[Any], expected: str, where: _Place, whole: Any = None) -> None:
    """Check types, which are exact: a bool is no int."""
    if set(map(type, values)) <= allowed:
        return
    index = next(i for i, value in enumerate(values) if type(value) not in allowed)
    seen = values[index] if whole is None else whole
    raise InputError(f"{where(index) or 'the top level'} is {_shown(seen)}, expected {expected}")


def _name(kind: Any) -> str:
    return f"list of {_name(get_args(kind)[0])}" if get_origin(kind) is list else str(kind.__name__)


def _shown(value: Any) -> str:
    return f"{reprlib.repr(value):.60}" if isinstance(value, (dict, list)) else f"{value!r:.60}"
