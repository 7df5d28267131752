"""Streaming metrics beyond torchmetrics."""

from ttalight.metrics.streaming import ClassificationValues, StreamingClassification

__all__ = ["StreamingClassification", "ClassificationValues"]
