"""Plots as text: small functions that write inline SVG, readable from the width of a phone on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape as escape_html
from itertools import pairwise

from ttalight.reporting.text import printable

__all__ = ["Point", "Series", "bar_plot", "color", "escape", "line_plot", "nice_ticks", "scatter_plot"]

#: M. Okabe and K. Ito, "Color Universal Design", 2008: to be told apart by everybody; yellow and black left out.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#888888")
#: Width of a letter and height of a line in pixels, generously.
_LETTER, _LINE = 6.6, 15.0
#: Letters of the longest label beside a point.
_LABEL = 20


@dataclass(frozen=True)
class Series:
    """A line or a set of bars.

    ``y`` has None where there is no value, ``spread`` is the half-length of a whisker. ``index`` chooses the colour,
    None is the one of what others are compared with.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    spread: Sequence[float | None] = ()
    index: int | None = 0

    @property
    def stroke(self) -> str:
        """The colour."""
        return "currentColor" if self.index is None else color(self.index)


@dataclass(frozen=True)
class Point:
    """A named point of a scatter plot; ``index`` chooses its colour."""

    label: str
    x: float
    y: float
    index: int


@dataclass(frozen=True)
class _Axes:
    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]
    left: float = 46
    right: float = 20
    top: float = 12
    bottom: float = 42

    def across(self, value: float) -> float:
        low, high = self.x
        return self.left + (value - low) / ((high - low) or 1) * (self.width - self.left - self.right)

    def up(self, value: float) -> float:
        low, high = self.y
        return self.height - self.bottom - (value - low) / ((high - low) or 1) * (self.height - self.top - self.bottom)


def escape(text: str) -> str:
    """Write text as HTML and SVG show it: no tags, no control characters."""
    return escape_html(printable(text))


def color(index: int) -> str:
    """Return the colour of a row of the table."""
    return _COLORS[index % len(_COLORS)]


def nice_ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Choose round numbers from at or below the lowest to at or above the highest value.

    Args:
        low: The lowest value.
        high: The highest value, not below it.
        most: Largest number of steps between them.
    """
    span = (high - low) or abs(high) or 1.0
    raw = max(span / most, 1e-300)  # less may be 0
    unit = 10 ** math.floor(math.log10(raw))
    step = next(factor * unit for factor in (1, 2, 2.5, 5, 10) if factor * unit >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(step * index, 10) for index in range(first, max(last, first + 1) + 1)]


def line_plot(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    marks: Sequence[tuple[float, str]] = (),
    values: Sequence[float] = (),
    width: int = 340,
) -> str:
    """Draw lines.

    Args:
        series: The lines; a value that is missing interrupts one.
        x_label: What runs to the right.
        y_label: What runs upwards.
        marks: Places on the x axis with their names, which are left out where they would overlap.
        values: Values that the y axis has to hold beside those of the lines, in steps that several plots share.
        width: Width in pixels.

    Returns:
        An ``svg`` element.
    """
    known = [value for line in series for value in line.y if value is not None] + list(values)
    places = [place for line in series for place in line.x]
    y_ticks = nice_ticks(min(known), max(known))
    x_ticks = [tick for tick in nice_ticks(0, max(places), 4) if tick <= max(places)]
    axes = _Axes(width, 0, (0, max(places)), (y_ticks[0], y_ticks[-1]), left=_margin(y_ticks))
    named = _spaced([axes.across(place) for place, _ in marks])
    top = 12 + (_LETTER * max(len(_cut(name)) for _, name in marks) if named else 0)
    axes = _Axes(width, 190 + top, axes.x, axes.y, left=axes.left, top=top)
    parts = [_frame(axes, x_ticks, y_ticks, x_label, y_label, [_compact(tick) for tick in x_ticks])]
    for place, name in marks:
        at = axes.across(place)
        title = f"<title>{escape(name)} begins</title>"
        parts.append(
            f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{top:.1f}" y2="{axes.height - axes.bottom:.1f}">'
            f"{title}</line>"
        )
        if named:
            parts.append(_text(at + 9, top - 5, _cut(name), "mark", rotate=-90, anchor="start"))
    for line in series:
        for piece in _pieces(line):
            path = " ".join(f"{axes.across(x):.1f},{axes.up(y):.1f}" for x, y in piece)
            kind = ' class="reference"' if line.index is None else ""
            title = f"<title>{escape(line.label)}</title>"
            parts.append(f'<polyline points="{path}" stroke="{line.stroke}"{kind}>{title}</polyline>')
    return _svg(axes, parts, f"{y_label} against {x_label}")


def bar_plot(
    bars: Series,
    names: Sequence[str],
    label: str,
    reference: Sequence[float | None] = (),
    values: Sequence[float] = (),
    width: int = 340,
) -> str:
    """Draw one bar a name, from zero to the right, with its number.

    Args:
        bars: The bars; ``x`` does not matter.
        names: Names of the bars, from above.
        label: What the length says.
        reference: Lengths that are marked across the bars, one a name.
        values: Values that the axis has to hold beside those of the bars, so that several plots share it.
        width: Width in pixels.

    Returns:
        An ``svg`` element.
    """
    spreads = bars.spread or [None] * len(names)
    known = [value for value in (*bars.y, *reference) if value is not None]
    ticks = nice_ticks(0, max([*known, *values], default=1.0), 4)
    shown = [_cut(name, int(0.38 * width / _LETTER)) for name in names]
    left = 12 + _LETTER * max(map(len, shown), default=0)
    axes = _Axes(width, _LINE * len(names) + 52, (0, ticks[-1]), (len(names), 0), left=left, right=44, top=8, bottom=44)
    parts = [_frame(axes, ticks, (), label, "")]
    for position, (name, value, spread) in enumerate(zip(names, bars.y, spreads, strict=True)):
        top = axes.up(position) + 2
        parts.append(_text(left - 6, top + 9.5, shown[position], anchor="end"))
        if value is not None:
            title = f"{name}, {bars.label}: {value:.2f}{'' if not spread else f' ± {spread:.2f}'}"
            parts += _bar(axes, top, value, spread or 0.0, bars.stroke, title)
        other = reference[position] if reference else None
        if other is not None:
            at = axes.across(other)
            parts.append(
                f'<line class="reference" x1="{at:.1f}" x2="{at:.1f}" y1="{top - 1:.1f}" y2="{top + 12:.1f}"/>'
            )
    return _svg(axes, parts, f"{label} by domain")


def scatter_plot(points: Sequence[Point], x_label: str, y_label: str, width: int = 400) -> str:
    """Draw points with their names beside the plot and a line to each; the x axis is logarithmic.

    Args:
        points: The points; x above 0.
        x_label: What runs to the right.
        y_label: What runs upwards.
        width: Width in pixels.

    Returns:
        An ``svg`` element.
    """
    logs = [math.log10(point.x) for point in points]
    low, high = math.floor(min(logs)), max(math.ceil(max(logs)), math.floor(min(logs)) + 1)
    y_ticks = nice_ticks(min(point.y for point in points), max(point.y for point in points))
    right = 26 + _LETTER * max(len(_cut(point.label)) for point in points)
    height = max(260.0, _LINE * len(points) + 60)
    axes = _Axes(width, height, (low, high), (y_ticks[0], y_ticks[-1]), left=_margin(y_ticks), right=right)
    fine = [power + shift for power in range(low, high) for shift in (0, math.log10(2), math.log10(5))] + [high]
    choices = (fine, range(low, high + 1), (low, high))
    ticks = next((one for one in choices if _spaced([axes.across(tick) for tick in one], 34)), (low, high))
    names = [f"{float(f'{10**tick:.2g}'):,g}" for tick in ticks]
    parts = [_frame(axes, ticks, y_ticks, x_label, y_label, names)]
    order = sorted(range(len(points)), key=lambda index: -points[index].y)
    heights = _apart([axes.up(points[index].y) for index in order], axes.top, height - axes.bottom)
    labels = dict(zip(order, heights, strict=True))
    for index, point in enumerate(points):
        x, y, beside = axes.across(logs[index]), axes.up(point.y), labels[index]
        fill, end = color(point.index), width - right + 14
        title = f"<title>{escape(point.label)}: {point.y:.2f} at {point.x:.0f}</title>"
        parts.append(f'<line class="leader" x1="{x:.1f}" y1="{y:.1f}" x2="{end:.1f}" y2="{beside:.1f}"/>')
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{fill}">{title}</circle>')
        parts.append(_text(end + 4, beside + 4, _cut(point.label), anchor="start"))
    return _svg(axes, parts, f"{y_label} against {x_label}")


def _margin(ticks: Sequence[float]) -> float:
    """Return the room for the label and the numbers of a vertical axis."""
    return 28 + _LETTER * max(len(f"{tick:g}") for tick in ticks)


def _cut(name: str, most: int = _LABEL) -> str:
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _compact(value: float) -> str:
    """Write a number of images or steps in few letters."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 10 * size or (value >= size and letter != "k"):
            return f"{value / size:.4g}{letter}"
    return f"{value:,.10g}"


def _spaced(places: Sequence[float], least: float = 13.0) -> bool:
    """Return whether there are places, and all are apart."""
    return bool(places) and all(right - left >= least for left, right in pairwise(places))


def _apart(heights: Sequence[float], low: float, high: float) -> list[float]:
    """Move rising heights as little as needed for a line of text at each, within limits that hold them all."""
    found: list[float] = []
    for height in heights:
        found.append(max(height, found[-1] + _LINE if found else low))
    for index in reversed(range(len(found))):
        found[index] = min(found[index], found[index + 1] - _LINE if index + 1 < len(found) else high)
    return found


def _pieces(line: Series) -> list[list[tuple[float, float]]]:
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(line.x, line.y, strict=True):
        if y is None:
            pieces.append([])
        else:
            pieces[-1].append((x, y))
    return [piece for piece in pieces if piece]


def _bar(axes: _Axes, top: float, value: float, spread: float, fill: str, title: str) -> list[str]:
    end, middle = axes.across(value), top + 5.5
    place = f'x="{axes.left:.1f}" y="{top:.1f}" width="{end - axes.left:.1f}" height="11"'
    parts = [f'<rect {place} fill="{fill}"><title>{escape(title)}</title></rect>']
    last = min(axes.across(value + spread), axes.width - axes.right + 8)
    if spread:
        first = axes.across(max(0.0, value - spread))
        parts.append(f'<line class="whisker" x1="{first:.1f}" x2="{last:.1f}" y1="{middle:.1f}" y2="{middle:.1f}"/>')
    return [*parts, _text(last + 4, top + 9.5, f"{value:.1f}" if value >= 10 else f"{value:.2f}", anchor="start")]


def _frame(
    axes: _Axes,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_label: str,
    y_label: str,
    names: Sequence[str] | None = None,
) -> str:
    foot, end = axes.height - axes.bottom, axes.width - axes.right
    parts = []
    for tick in y_ticks:
        y = axes.up(tick)
        parts.append(f'<line class="grid" x1="{axes.left:.1f}" x2="{end:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(axes.left - 6, y + 4, f"{tick:g}", anchor="end"))
    for tick, name in zip(x_ticks, names or [f"{tick:g}" for tick in x_ticks], strict=True):
        parts.append(_text(axes.across(tick), foot + 16, name))
    parts.append(f'<line class="axis" x1="{axes.left:.1f}" x2="{end:.1f}" y1="{foot:.1f}" y2="{foot:.1f}"/>')
    parts.append(_text((axes.left + end) / 2, axes.height - 8, x_label))
    if y_label:
        parts.append(_text(12, (axes.top + foot) / 2, y_label, rotate=-90))
    return "".join(parts)


def _text(x: float, y: float, text: str, kind: str = "", rotate: int = 0, anchor: str = "middle") -> str:
    turn = f' transform="rotate({rotate} {x:.1f} {y:.1f})"' if rotate else ""
    name = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{name}{turn}>{escape(text)}</text>'


def _svg(axes: _Axes, parts: Sequence[str], label: str) -> str:
    size = f'width="{axes.width:.0f}" height="{axes.height:.0f}" viewBox="0 0 {axes.width:.0f} {axes.height:.0f}"'
    return f'<svg role="img" aria-label="{escape(label)}" {size}>{"".join(parts)}</svg>'
