"""Adaptation methods as callbacks, and the engine that they share."""

from ttalight.adapters.adapter import Adapter, GradientAdapter
from ttalight.adapters.alpha_bn import AlphaBN
from ttalight.adapters.cmf import CMF
from ttalight.adapters.deyo import DeYO
from ttalight.adapters.eata import EATA
from ttalight.adapters.ema_bn import EMABN
from ttalight.adapters.eta import ETA
from ttalight.adapters.find import FIND
from ttalight.adapters.lame import LAME
from ttalight.adapters.memo import MEMO
from ttalight.adapters.moetta import MoETTA
from ttalight.adapters.nctta import NCTTA
from ttalight.adapters.ptbn import PTBN
from ttalight.adapters.rdumb import RDumb
from ttalight.adapters.roid import ROID
from ttalight.adapters.rpl import RPL
from ttalight.adapters.sar import SAR
from ttalight.adapters.self_training import SelfTrainingAdapter
from ttalight.adapters.shot import SHOT
from ttalight.adapters.source import Source
from ttalight.adapters.stag import STAG
from ttalight.adapters.t3a import T3A
from ttalight.adapters.tent import Tent
from ttalight.adapters.term import Term
from ttalight.adapters.test_time_training import TestTimeTraining
from ttalight.adapters.tipi import TIPI
from ttalight.adapters.views import PixelSpace
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
    "ETA",
    "EATA",
    "RDumb",
    "SAR",
    "DeYO",
    "SHOT",
    "TIPI",
    "ROID",
    "CMF",
    "MEMO",
    "NCTTA",
    "MoETTA",
    "STAG",
    "TestTimeTraining",
    "PixelSpace",
]
