"""The doctor: measurements of a network and unlabelled images before anything is adapted, with advice."""

from ttalight.doctor.command import diagnose
from ttalight.doctor.verdict import Advice, Findings, advise, conclude, judge

__all__ = ["Advice", "Findings", "advise", "conclude", "diagnose", "judge"]
