"""The published strengths of the corruptions, as data.

One table per benchmark: ``cifar`` (CIFAR-10-C and CIFAR-100-C, 32 pixels), ``tiny_imagenet`` (Tiny-ImageNet-C, 64
pixels) and ``imagenet`` (ImageNet-C, 224 pixels). Each entry holds the arguments of the function of the same name
for severities 1 to 5. D. Hendrycks and T. Dietterich, Benchmarking Neural Network Robustness to Common Corruptions
and Perturbations, ICLR 2019, arXiv:1903.12261; constants of the authors' make_cifar_c.py, make_tinyimagenet_c.py and
make_imagenet_c.py.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from ttalight.errors import InputError

COMMON: tuple[str, ...] = (
    "gaussian_noise",
    "shot_noise",
    "impulse_noise",
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "snow",
    "frost",
    "fog",
    "brightness",
    "contrast",
    "elastic_transform",
    "pixelate",
    "jpeg_compression",
)
"""The fifteen corruptions that benchmark results are averaged over, in the usual order."""

EXTRA: tuple[str, ...] = ("speckle_noise", "gaussian_blur", "spatter", "saturate")
"""The four corruptions that hyper-parameters may be chosen on."""

Levels = tuple[tuple[float, ...], ...]


def _scalars(*values: float) -> Levels:
    return tuple((value,) for value in values)


# ImageNet-C takes 244 instead of 224 for the side of the image; the fractions of the side keep that.
_SLIP = 244 / 224

TABLES: Mapping[str, Mapping[str, Levels]] = {
    "cifar": {
        "gaussian_noise": _scalars(0.04, 0.06, 0.08, 0.09, 0.10),
        "shot_noise": _scalars(500, 250, 100, 75, 50),
        "impulse_noise": _scalars(0.01, 0.02, 0.03, 0.05, 0.07),
        "defocus_blur": ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1)),
        "glass_blur": ((0.05, 1, 1), (0.25, 1, 1), (0.4, 1, 1), (0.25, 1, 2), (0.4, 1, 2)),
        "motion_blur": ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5)),
        "zoom_blur": ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        "snow": (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
        "frost": ((1, 0.2, 0.2), (1, 0.3, 0.2), (0.9, 0.4, 0.2), (0.85, 0.4, 0.2), (0.75, 0.45, 0.2)),
        "fog": ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75)),
        "brightness": _scalars(0.05, 0.1, 0.15, 0.2, 0.3),
        "contrast": _scalars(0.75, 0.5, 0.4, 0.3, 0.15),
        "elastic_transform": (
            (0, 0, 0.08),
            (0.05, 0.2, 0.07),
            (0.08, 0.06, 0.06),
            (0.1, 0.04, 0.05),
            (0.1, 0.03, 0.03),
        ),
        "pixelate": _scalars(0.95, 0.9, 0.85, 0.75, 0.65),
        "jpeg_compression": _scalars(80, 65, 58, 50, 40),
        "speckle_noise": _scalars(0.06, 0.1, 0.12, 0.16, 0.2),
        "gaussian_blur": _scalars(0.4, 0.6, 0.7, 0.8, 1),
        "spatter": (
            (0.62, 0.1, 0.7, 0.7, 0.5, 0),
            (0.65, 0.1, 0.8, 0.7, 0.5, 0),
            (0.65, 0.3, 1, 0.69, 0.5, 0),
            (0.65, 0.1, 0.7, 0.69, 0.6, 1),
            (0.65, 0.1, 0.5, 0.68, 0.6, 1),
        ),
        "saturate": ((0.3, 0), (0.1, 0), (1.5, 0), (2, 0.1), (2.5, 0.2)),
    },
    "tiny_imagenet": {
        "gaussian_noise": _scalars(0.04, 0.08, 0.12, 0.15, 0.18),
        "shot_noise": _scalars(250, 100, 50, 30, 15),
        "impulse_noise": _scalars(0.01, 0.02, 0.05, 0.08, 0.14),
        "defocus_blur": ((0.5, 0.6), (1, 0.1), (1.5, 0.1), (2.5, 0.01), (3, 0.1)),
        "glass_blur": ((0.1, 1, 1), (0.5, 1, 1), (0.6, 1, 2), (0.7, 2, 1), (0.9, 2, 2)),
        "motion_blur": ((10, 1), (10, 1.5), (10, 2), (10, 2.5), (12, 3)),
        "zoom_blur": ((1.06, 0.01), (1.11, 0.01), (1.16, 0.01), (1.21, 0.01), (1.26, 0.01)),
        "snow": (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.8),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.8),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.7),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.65),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.6),
        ),
        "frost": ((1, 0.3, 0.3), (0.9, 0.4, 0.3), (0.8, 0.45, 0.3), (0.75, 0.5, 0.3), (0.7, 0.55, 0.3)),
        "fog": ((0.4, 3), (0.7, 3), (1, 2.5), (1.5, 2), (2, 1.75)),
        "brightness": _scalars(0.1, 0.2, 0.3, 0.4, 0.5),
        "contrast": _scalars(0.4, 0.3, 0.2, 0.1, 0.05),
        "elastic_transform": (
            (0, 0, 0.08),
            (0.05, 0.3, 0.06),
            (0.1, 0.08, 0.06),
            (0.1, 0.03, 0.03),
            (0.16, 0.03, 0.02),
        ),
        "pixelate": _scalars(0.9, 0.8, 0.7, 0.6, 0.5),
        "jpeg_compression": _scalars(65, 58, 50, 40, 25),
        "speckle_noise": _scalars(0.15, 0.2, 0.25, 0.3, 0.35),
        "gaussian_blur": _scalars(0.5, 0.75, 1, 1.25, 1.5),
        "spatter": (
            (0.62, 0.1, 0.7, 0.7, 0.6, 0),
            (0.65, 0.1, 0.8, 0.7, 0.6, 0),
            (0.65, 0.3, 1, 0.69, 0.6, 0),
            (0.65, 0.1, 0.7, 0.68, 0.6, 1),
            (0.65, 0.1, 0.5, 0.67, 0.6, 1),
        ),
        "saturate": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (30, 0.2)),
    },
    "imagenet": {
        "gaussian_noise": _scalars(0.08, 0.12, 0.18, 0.26, 0.38),
        "shot_noise": _scalars(60, 25, 12, 5, 3),
        "impulse_noise": _scalars(0.03, 0.06, 0.09, 0.17, 0.27),
        "defocus_blur": ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5)),
        "glass_blur": ((0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2)),
        "motion_blur": ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15)),
        "zoom_blur": ((1.11, 0.01), (1.16, 0.01), (1.21, 0.02), (1.26, 0.02), (1.31, 0.03)),
        "snow": (
            (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
            (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
            (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
            (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
            (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
        ),
        "frost": ((1, 0.4, 1), (0.8, 0.6, 1), (0.7, 0.7, 1), (0.65, 0.7, 1), (0.6, 0.75, 1)),
        "fog": ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4)),
        "brightness": _scalars(0.1, 0.2, 0.3, 0.4, 0.5),
        "contrast": _scalars(0.4, 0.3, 0.2, 0.1, 0.05),
        "elastic_transform": (
            (2 * _SLIP, 0.7 * _SLIP, 0.1 * _SLIP),
            (2 * _SLIP, 0.08 * _SLIP, 0.2 * _SLIP),
            (0.05 * _SLIP, 0.01 * _SLIP, 0.02 * _SLIP),
            (0.07 * _SLIP, 0.01 * _SLIP, 0.02 * _SLIP),
            (0.12 * _SLIP, 0.01 * _SLIP, 0.02 * _SLIP),
        ),
        "pixelate": _scalars(0.6, 0.5, 0.4, 0.3, 0.25),
        "jpeg_compression": _scalars(25, 18, 15, 10, 7),
        "speckle_noise": _scalars(0.15, 0.2, 0.35, 0.45, 0.6),
        "gaussian_blur": _scalars(1, 2, 3, 4, 6),
        "spatter": (
            (0.65, 0.3, 4, 0.69, 0.6, 0),
            (0.65, 0.3, 3, 0.68, 0.6, 0),
            (0.65, 0.3, 2, 0.68, 0.5, 0),
            (0.65, 0.3, 1, 0.65, 1.5, 1),
            (0.67, 0.4, 1, 0.65, 1.5, 1),
        ),
        "saturate": ((0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2)),
    },
}


def parameters(table: str, corruption: str, severity: int) -> tuple[float, ...]:
    """Look up the arguments of a corruption.

    Args:
        table: Name of the table: ``"cifar"``, ``"tiny_imagenet"`` or ``"imagenet"``.
        corruption: One of `COMMON` or `EXTRA`.
        severity: 1 (mild) to 5 (strong).

    Returns:
        The arguments that the corruption's function takes at this severity.

    Raises:
        ValueError: If the table or the corruption is unknown, or the severity is not in 1..5.
    """
    if table not in TABLES:
        raise InputError(f"there is no parameter table {table!r}: choose one of {', '.join(TABLES)}")
    check_name(corruption)
    if isinstance(severity, bool) or not isinstance(severity, int) or not 1 <= severity <= 5:
        raise InputError(f"severity must be an integer from 1 (mild) to 5 (strong), not {severity!r}")
    return TABLES[table][corruption][severity - 1]


def check_name(corruption: str) -> None:
    """Refuse the name of a corruption that does not exist, and suggest the nearest ones."""
    known = COMMON + EXTRA
    if corruption not in known:
        near = difflib.get_close_matches(str(corruption), known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"choose one of {', '.join(known)}"
        raise InputError(f"there is no corruption {corruption!r}: {hint}")
