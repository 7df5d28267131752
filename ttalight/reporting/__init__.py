"""From result files to tables."""

from ttalight.reporting.ensemble import ensemble_predictions
from ttalight.reporting.overview import by_domain, domain_table, protocol_header
from ttalight.reporting.predictions import PredictionWriter, read_predictions
from ttalight.reporting.results import (
    Cost,
    Curve,
    DomainResult,
    Forgetting,
    GroupResult,
    Overall,
    Reading,
    Results,
    Round,
    RunProtocol,
    Source,
    Summary,
    Worst,
    write_results,
)
from ttalight.reporting.shown import ShownResults, read_results
from ttalight.reporting.summary import digest, summarize

__all__ = [
    "Results",
    "ShownResults",
    "DomainResult",
    "Overall",
    "GroupResult",
    "Worst",
    "Round",
    "Forgetting",
    "Curve",
    "Reading",
    "RunProtocol",
    "Summary",
    "Cost",
    "Source",
    "read_results",
    "write_results",
    "PredictionWriter",
    "read_predictions",
    "ensemble_predictions",
    "summarize",
    "digest",
    "by_domain",
    "protocol_header",
    "domain_table",
]
