"""The doctor: a look at a network and at unlabelled images before anything is adapted."""

from ttalight.doctor.command import diagnose
from ttalight.doctor.verdict import Advice, Findings, advise, conclude, judge

__all__ = ["Advice", "Findings", "advise", "conclude", "diagnose", "judge"]
