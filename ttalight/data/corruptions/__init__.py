"""Common corruptions of images: the fifteen of the public benchmarks and the four extra ones, at five severities."""

from __future__ import annotations

from ttalight.data.corruptions.frost import FROST_FILES, FROST_PICTURES, FROST_PROCEDURAL, frost_source
from ttalight.data.corruptions.generate import corrupt, corrupt_chunk
from ttalight.data.corruptions.tables import COMMON, EXTRA, TABLES, parameters

__all__ = [
    "COMMON",
    "EXTRA",
    "FROST_FILES",
    "FROST_PICTURES",
    "FROST_PROCEDURAL",
    "TABLES",
    "corrupt",
    "corrupt_chunk",
    "frost_source",
    "parameters",
]
