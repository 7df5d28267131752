"""Plots as text: small functions that write inline SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape as escape_html

from ttalight.reporting.text import printable

__all__ = ["Point", "Series", "bar_plot", "color", "escape", "line_plot", "nice_ticks", "scatter_plot"]

#: M. Okabe and K. Ito, "Color Universal Design", 2008: to be told apart by everybody; yellow and black left out.
_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#888888")
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 16, 14, 44
#: Width of a letter that is turned by 30 degrees.
_LETTER = 5.5


@dataclass(frozen=True)
class Series:
    """A line or a set of bars: ``y`` has None where there is no value, ``spread`` is the half-length of a whisker."""

    label: str
    x: Sequence[float]
    y: Sequence[float | None]
    spread: Sequence[float | None] = ()


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

    def across(self, value: float) -> float:
        low, high = self.x
        return _LEFT + (value - low) / ((high - low) or 1) * (self.width - _LEFT - _RIGHT)

    def up(self, value: float) -> float:
        low, high = self.y
        return self.height - _BOTTOM - (value - low) / ((high - low) or 1) * (self.height - _TOP - _BOTTOM)


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
    series: Sequence[Series], x_label: str, y_label: str, marks: Sequence[tuple[float, str]] = (), width: int = 960
) -> str:
    """Draw lines.

    Args:
        series: The lines; a value that is missing interrupts one.
        x_label: What runs to the right.
        y_label: What runs upwards.
        marks: Places on the x axis with their names.
        width: Width in pixels.

    Returns:
        An ``svg`` element.
    """
    values = [value for line in series for value in line.y if value is not None]
    places = [place for line in series for place in line.x]
    x_ticks, y_ticks = nice_ticks(0, max(places)), nice_ticks(min(values), max(values))
    axes = _Axes(width, 320, (0, max(places)), (y_ticks[0], y_ticks[-1]))
    parts = [_frame(axes, [tick for tick in x_ticks if tick <= max(places)], y_ticks, x_label, y_label)]
    for place, name in marks:
        at = axes.across(place)
        parts.append(f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="{_TOP}" y2="{axes.height - _BOTTOM}"/>')
        parts.append(_text(at + 3, _TOP + 3, name, "mark", rotate=90, anchor="start"))
    for index, line in enumerate(series):
        for piece in _pieces(line):
            path = " ".join(f"{axes.across(x):.1f},{axes.up(y):.1f}" for x, y in piece)
            title = f"<title>{escape(line.label)}</title>"
            parts.append(f'<polyline points="{path}" stroke="{color(index)}">{title}</polyline>')
    return _svg(axes, parts, f"{y_label} against {x_label}")


def bar_plot(series: Sequence[Series], names: Sequence[str], y_label: str) -> str:
    """Draw bars in groups: one group a name, one bar a series, from zero.

    Args:
        series: The bars; ``x`` does not matter.
        names: Names of the groups, as many as values in a series.
        y_label: What the height says.

    Returns:
        An ``svg`` element.
    """
    group = max(44, 13 * len(series) + 12)
    highest = max(0.0, *(value for line in series for value in line.y if value is not None))
    y_ticks = nice_ticks(0, highest)
    axes = _Axes(max(420, _LEFT + _RIGHT + group * len(names)), 360, (0, len(names)), (0, y_ticks[-1]))
    parts, right = [_frame(axes, [], y_ticks, "", y_label)], axes.width
    size = (axes.across(1) - axes.across(0)) * 0.84 / len(series)
    for position, name in enumerate(names):
        left = axes.across(position + 0.08)
        for index, line in enumerate(series):
            parts += _bar(axes, left + index * size, size, line, position, f"{name}, {line.label}", color(index))
        middle = left + len(series) * size / 2
        parts.append(_text(middle, axes.height - _BOTTOM + 14, name, rotate=30, anchor="start"))
        right = max(right, middle + _LETTER * len(name))
    return _svg(axes, parts, f"{y_label} by domain", below=60, beside=right - axes.width)


def scatter_plot(points: Sequence[Point], x_label: str, y_label: str) -> str:
    """Draw points, which have their names as tooltips; the x axis is logarithmic.

    Args:
        points: The points; x above 0.
        x_label: What runs to the right.
        y_label: What runs upwards.

    Returns:
        An ``svg`` element.
    """
    logs = [math.log10(point.x) for point in points]
    low, high = math.floor(min(logs)), max(math.ceil(max(logs)), math.floor(min(logs)) + 1)
    y_ticks = nice_ticks(min(point.y for point in points), max(point.y for point in points))
    axes = _Axes(640, 340, (low, high), (y_ticks[0], y_ticks[-1]))
    ticks = [power + shift for power in range(low, high) for shift in (0, math.log10(2), math.log10(5))] + [high]
    parts = [_frame(axes, ticks, y_ticks, x_label, y_label, names=[f"{float(f'{10**tick:.2g}'):,g}" for tick in ticks])]
    for point, place in zip(points, logs, strict=True):
        x, y = axes.across(place), axes.up(point.y)
        title = f"<title>{escape(point.label)}: {point.y:.2f} at {point.x:.0f}</title>"
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill="{color(point.index)}">{title}</circle>')
    return _svg(axes, parts, f"{y_label} against {x_label}")


def _pieces(line: Series) -> list[list[tuple[float, float]]]:
    pieces: list[list[tuple[float, float]]] = [[]]
    for x, y in zip(line.x, line.y, strict=True):
        if y is None:
            pieces.append([])
        else:
            pieces[-1].append((x, y))
    return [piece for piece in pieces if piece]


def _bar(axes: _Axes, left: float, size: float, line: Series, position: int, name: str, fill: str) -> list[str]:
    value = line.y[position]
    if value is None:
        return []
    spread = line.spread[position] if line.spread else None
    top, foot, middle = axes.up(value), axes.up(0), left + size / 2
    title = f"<title>{escape(name)}: {value:.2f}{'' if spread is None else f' ± {spread:.2f}'}</title>"
    place = f'x="{left:.1f}" y="{top:.1f}" width="{size * 0.92:.1f}" height="{foot - top:.1f}"'
    parts = [f'<rect {place} fill="{fill}">{title}</rect>']
    if spread:
        ends = axes.up(value + spread), axes.up(max(0.0, value - spread))
        parts.append(
            f'<line class="whisker" x1="{middle:.1f}" x2="{middle:.1f}" y1="{ends[0]:.1f}" y2="{ends[1]:.1f}"/>'
        )
    return parts


def _frame(
    axes: _Axes,
    x_ticks: Sequence[float],
    y_ticks: Sequence[float],
    x_label: str,
    y_label: str,
    names: Sequence[str] | None = None,
) -> str:
    foot = axes.height - _BOTTOM
    parts = []
    for tick in y_ticks:
        y = axes.up(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{axes.width - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(_text(_LEFT - 6, y + 4, f"{tick:g}", anchor="end"))
    for tick, name in zip(x_ticks, names or [f"{tick:,.10g}" for tick in x_ticks], strict=True):
        parts.append(_text(axes.across(tick), foot + 16, name))
    parts.append(f'<line class="axis" x1="{_LEFT}" x2="{axes.width - _RIGHT}" y1="{foot}" y2="{foot}"/>')
    parts.append(_text((_LEFT + axes.width - _RIGHT) / 2, axes.height - 8, x_label))
    parts.append(_text(13, (_TOP + foot) / 2, y_label, rotate=-90))
    return "".join(parts)


def _text(x: float, y: float, text: str, kind: str = "", rotate: int = 0, anchor: str = "middle") -> str:
    turn = f' transform="rotate({rotate} {x:.1f} {y:.1f})"' if rotate else ""
    name = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{name}{turn}>{escape(text)}</text>'


def _svg(axes: _Axes, parts: Sequence[str], label: str, below: int = 0, beside: float = 0.0) -> str:
    width, height = f"{axes.width + beside:.0f}", f"{axes.height + below:.0f}"
    size, box = f'width="{width}" height="{height}"', f'viewBox="0 0 {width} {height}"'
    return f'<svg role="img" aria-label="{escape(label)}" {size} {box}>{"".join(parts)}</svg>'
