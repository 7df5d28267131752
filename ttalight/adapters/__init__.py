"""Adaptation methods as callbacks, and the engine that they share."""

from ttalight.adapters.adapter import Adapter
from ttalight.adapters.components.pixel_space import PixelSpace
from ttalight.adapters.ensemble import AdaptedEnsemble
from ttalight.adapters.entropy import EntropyAdapter
from ttalight.adapters.gradient import GradientAdapter
from ttalight.adapters.methods.actmad import ActMAD
from ttalight.adapters.methods.adacontrast import AdaContrast
from ttalight.adapters.methods.alpha_bn import AlphaBN
from ttalight.adapters.methods.batclip import BATCLIP
from ttalight.adapters.methods.bca import BCA
from ttalight.adapters.methods.boost_adapter import BoostAdapter
from ttalight.adapters.methods.calip import CALIP
from ttalight.adapters.methods.clipartt import CLIPArTT
from ttalight.adapters.methods.cmf import CMF
from ttalight.adapters.methods.cotta import CoTTA
from ttalight.adapters.methods.deyo import DeYO
from ttalight.adapters.methods.dmn import DMN
from ttalight.adapters.methods.dota import DoTA
from ttalight.adapters.methods.dpe import DPE
from ttalight.adapters.methods.eata import EATA
from ttalight.adapters.methods.ecalp import ECALP
from ttalight.adapters.methods.ema_bn import EMABN
from ttalight.adapters.methods.eta import ETA
from ttalight.adapters.methods.find import FIND
from ttalight.adapters.methods.foa import FOA
from ttalight.adapters.methods.lame import LAME
from ttalight.adapters.methods.masked_reconstruction import MaskedReconstruction
from ttalight.adapters.methods.memo import MEMO
from ttalight.adapters.methods.moetta import MoETTA
from ttalight.adapters.methods.mta import MTA
from ttalight.adapters.methods.nctta import NCTTA
from ttalight.adapters.methods.note import NOTE
from ttalight.adapters.methods.oga import OGA
from ttalight.adapters.methods.onzeta import OnZeta
from ttalight.adapters.methods.ptbn import PTBN
from ttalight.adapters.methods.rdumb import RDumb
from ttalight.adapters.methods.retrieval_fusion import RetrievalFusion
from ttalight.adapters.methods.rmt import RMT
from ttalight.adapters.methods.roid import ROID
from ttalight.adapters.methods.rotta import RoTTA
from ttalight.adapters.methods.rpl import RPL
from ttalight.adapters.methods.santa import SANTA
from ttalight.adapters.methods.sar import SAR
from ttalight.adapters.methods.shot import SHOT
from ttalight.adapters.methods.source import Source
from ttalight.adapters.methods.stag import STAG
from ttalight.adapters.methods.stata import StatA
from ttalight.adapters.methods.t3a import T3A
from ttalight.adapters.methods.tda import TDA
from ttalight.adapters.methods.tent import Tent
from ttalight.adapters.methods.test_time_training import TestTimeTraining
from ttalight.adapters.methods.tipi import TIPI
from ttalight.adapters.methods.tps import TPS
from ttalight.adapters.methods.tpt import CTPT, OTPT, TPT
from ttalight.adapters.methods.ttaug import TTAug
from ttalight.adapters.methods.vte import VTE
from ttalight.adapters.methods.watt import WATT
from ttalight.adapters.methods.zero import ZERO
from ttalight.adapters.self_training import SelfTrainingAdapter
from ttalight.adapters.term import Term
from ttalight.adapters.wrapper import AdaptedNetwork
from ttalight.engine import AdaptiveNetwork, release
from ttalight.models.passes.fast_pass import FastPass
from ttalight.models.passes.recompute import RecomputedBlocks

__all__ = [
    "Adapter",
    "GradientAdapter",
    "SelfTrainingAdapter",
    "EntropyAdapter",
    "AdaptedNetwork",
    "AdaptedEnsemble",
    "AdaptiveNetwork",
    "FastPass",
    "RecomputedBlocks",
    "release",
    "Term",
    "Source",
    "PTBN",
    "AlphaBN",
    "EMABN",
    "FIND",
    "T3A",
    "LAME",
    "RetrievalFusion",
    "TDA",
    "BoostAdapter",
    "DoTA",
    "OnZeta",
    "ECALP",
    "BCA",
    "OGA",
    "DMN",
    "StatA",
    "DPE",
    "TPS",
    "ZERO",
    "VTE",
    "MTA",
    "CALIP",
    "TTAug",
    "FOA",
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
    "CoTTA",
    "RoTTA",
    "NOTE",
    "SANTA",
    "RMT",
    "AdaContrast",
    "ActMAD",
    "MaskedReconstruction",
    "MEMO",
    "NCTTA",
    "MoETTA",
    "TPT",
    "CTPT",
    "OTPT",
    "BATCLIP",
    "CLIPArTT",
    "WATT",
    "STAG",
    "TestTimeTraining",
    "PixelSpace",
]
