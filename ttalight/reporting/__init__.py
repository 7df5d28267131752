"""From result files to tables."""

from ttalight.reporting.overview import domain_table, protocol_header
from ttalight.reporting.results import (
    Cost,
    DomainResult,
    Reading,
    Results,
    RunProtocol,
    Source,
    Summary,
    read_results,
    summarize,
    write_results,
)

__all__ = [
    "Results",
    "DomainResult",
    "Reading",
    "RunProtocol",
    "Summary",
    "Cost",
    "Source",
    "read_results",
    "write_results",
    "summarize",
    "protocol_header",
    "domain_table",
]
