"""A run's reports, as curves and as a file for Prometheus."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from ttalight.engine import Engine
from ttalight.errors import InputError
from ttalight.monitoring.observer import Monitoring
from ttalight.monitoring.prometheus import write_metrics
from ttalight.monitoring.report import Report, report_of

__all__ = ["Monitor"]


class Monitor(Monitoring):
    """Reports on a model every few batches: as curves of the run's loggers, and as a file for Prometheus.

    Every report reads the device once. The file is replaced as a whole, so that a reader never sees half of it.

    Args:
        every: Batches from one report to the next.
        prometheus: A file that ends with ``.prom``, in the folder of the node exporter's textfile collector.
        labels: Labels of every sample in that file.
    """

    def __init__(self, every: int = 10, prometheus: str | None = None, labels: Mapping[str, str] | None = None) -> None:
        if every < 1:
            raise InputError(f"every must be at least 1 batch, got {every}")
        self.every, self.prometheus, self.labels = every, prometheus, labels
        #: The last report.
        self.report: Report | None = None
        self._is_new = False

    def begin(self, engine: Engine) -> None:
        """Forget the reports of an earlier run."""
        self.report, self._is_new = None, False

    def see(self, engine: Engine, logits: Tensor) -> None:
        """Make a report with every ``every``-th batch."""
        if engine.batches % self.every:
            return
        self.report, self._is_new = report_of(engine), True
        if self.prometheus is not None:
            write_metrics(self.prometheus, self.report.prometheus(self.labels))

    def curves(self) -> dict[str, float]:
        """Return the numbers of a new report."""
        if self.report is None or not self._is_new:
            return {}
        self._is_new = False
        return {f"monitor/{name}": value for name, value in self.report.curves().items()}
