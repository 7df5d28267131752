"""Adaptation methods as callbacks, and the engine that they share."""

from ttalight.adapters.adapter import Adapter, GradientAdapter
from ttalight.adapters.alpha_bn import AlphaBN
from ttalight.adapters.ema_bn import EMABN
from ttalight.adapters.find import FIND
from ttalight.adapters.lame import LAME
from ttalight.adapters.ptbn import PTBN
from ttalight.adapters.rpl import RPL
from ttalight.adapters.self_training import SelfTrainingAdapter
from ttalight.adapters.source import Source
from ttalight.adapters.t3a import T3A
from ttalight.adapters.tent import Tent
from ttalight.adapters.term import Term
from ttalight.adapters.test_time_training import TestTimeTraining
from ttalight.adapters.wrapper import AdaptedNetwork

__all__ = [
    "Adapter",
    "GradientAdapter",
    "SelfTrainingAdapter",
    "AdaptedNetwork",
    "Term",
    "Source",
    "PTBN",
    "AlphaBN",
    "EMABN",
    "FIND",
    "T3A",
    "LAME",
    "RPL",
    "Tent",
    "TestTimeTraining",
]
