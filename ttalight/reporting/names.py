"""Names of domains as columns of tables: corruptions by the abbreviations that papers use."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from ttalight.reporting.overview import domain_names
from ttalight.reporting.results import DomainResult

__all__ = ["column_names", "full_names", "short_names"]

#: Abbreviations of D. Hendrycks and T. Dietterich's tables (arXiv 1903.12261) as later papers print them, then names
#: for the four extra corruptions and for frost that is drawn over procedural textures.
_SHORT = {
    "gaussian_noise": "Gauss.",
    "shot_noise": "Shot",
    "impulse_noise": "Impul.",
    "defocus_blur": "Defoc.",
    "glass_blur": "Glass",
    "motion_blur": "Motion",
    "zoom_blur": "Zoom",
    "snow": "Snow",
    "frost": "Frost",
    "fog": "Fog",
    "brightness": "Brit.",
    "contrast": "Contr.",
    "elastic_transform": "Elastic",
    "pixelate": "Pixel",
    "jpeg_compression": "JPEG",
    "speckle_noise": "Speckle",
    "gaussian_blur": "G.blur",
    "spatter": "Spatter",
    "saturate": "Satur.",
    "frost_procedural": "Frost",
}


def short_names(names: Sequence[str]) -> list[str]:
    """Abbreviate the names of corruptions; other names, and those that would be equal to another one, stay."""
    short = [_SHORT.get(name, name) for name in names]
    times = Counter(dict(zip(names, short, strict=True)).values())
    return [name if times[own] > 1 else own for name, own in zip(names, short, strict=True)]


def column_names(rows: Sequence[DomainResult]) -> dict[tuple[str, int | None], str]:
    """Name the columns of a table, ``name`` or, where a name has several severities, ``name-severity``.

    Args:
        rows: Rows of all runs together.

    Returns:
        (name, severity) -> text, in order of first appearance.
    """
    known = domain_names(rows)
    short = dict(zip([name for name, _ in known], short_names([name for name, _ in known]), strict=True))
    return {place: short[place[0]] + text.removeprefix(place[0]) for place, text in known.items()}


def full_names(columns: Mapping[tuple[str, int | None], str]) -> list[str]:
    """Say in words what each column of a table is."""
    return [name if severity is None else f"{name}, severity {severity}" for name, severity in columns]
