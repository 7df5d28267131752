"""Streaming metrics beyond torchmetrics."""

from ttalight.metrics.curve import RunningCurve
from ttalight.metrics.streaming import ClassificationValues, StreamingClassification
from ttalight.metrics.visits import VisitMetrics

__all__ = ["StreamingClassification", "ClassificationValues", "VisitMetrics", "RunningCurve"]
