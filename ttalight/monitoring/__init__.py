"""Watches models that adapt: reports, alarms with actions, risk, and estimates of accuracy; all without labels."""

from ttalight.monitoring.monitor import Monitor
from ttalight.monitoring.observer import Monitoring
from ttalight.monitoring.report import Report, report_of
from ttalight.monitoring.watch import Trip, Watch

__all__ = ["Monitor", "Monitoring", "Report", "Trip", "Watch", "report_of"]
