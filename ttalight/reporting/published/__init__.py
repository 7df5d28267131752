"""Published numbers, and the runs that they fit."""

from ttalight.reporting.published.match import Match, match_cells, match_published
from ttalight.reporting.published.rows import PublishedRow, published_rows

__all__ = ["PublishedRow", "published_rows", "Match", "match_published", "match_cells"]
