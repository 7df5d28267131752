"""Reports, watches, a risk alarm and estimates of accuracy for models that adapt; all without labels of the stream."""

from ttalight.monitoring.accuracy import (
    AccuracyEstimator,
    DropoutDisagreement,
    Estimate,
    MemberAgreement,
    ThresholdedConfidence,
)
from ttalight.monitoring.monitor import Monitor
from ttalight.monitoring.observer import Monitoring
from ttalight.monitoring.report import Report, report_of
from ttalight.monitoring.risk import RiskAlarm, RiskMonitor
from ttalight.monitoring.watch import Trip, Watch

__all__ = [
    "AccuracyEstimator",
    "DropoutDisagreement",
    "Estimate",
    "MemberAgreement",
    "Monitor",
    "Monitoring",
    "Report",
    "RiskAlarm",
    "RiskMonitor",
    "ThresholdedConfidence",
    "Trip",
    "Watch",
    "report_of",
]
