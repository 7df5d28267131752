"""Common corruptions of images: the fifteen of the public benchmarks and the four extra ones, at five severities."""

from __future__ import annotations

from ttalight.data.corruptions.generate import corrupt, corrupt_chunk
from ttalight.data.corruptions.tables import COMMON, EXTRA, TABLES, parameters

__all__ = ["COMMON", "EXTRA", "TABLES", "corrupt", "corrupt_chunk", "parameters"]
