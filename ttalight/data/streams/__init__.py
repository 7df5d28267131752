"""Streams: which sample of which domain arrives when."""

from ttalight.data.streams.batch_mixing import BatchMixing
from ttalight.data.streams.clocked import Clocked
from ttalight.data.streams.continual import Continual
from ttalight.data.streams.correlated import Correlated, PracticalTTA
from ttalight.data.streams.cross import Cross
from ttalight.data.streams.gradual import Gradual
from ttalight.data.streams.in_out import InOut
from ttalight.data.streams.label_shift import LabelShift
from ttalight.data.streams.mixed import Mixed, Potpourri
from ttalight.data.streams.per_domain import PerDomain
from ttalight.data.streams.probed import Probed
from ttalight.data.streams.recurring import Recurring
from ttalight.data.streams.saved import SavedStream
from ttalight.data.streams.single_sample import SingleSample
from ttalight.data.streams.stream import Domain, Stream, StreamOrder, StreamSampler, Timing, Visit

__all__ = [
    "Domain",
    "Visit",
    "Timing",
    "Stream",
    "StreamSampler",
    "StreamOrder",
    "PerDomain",
    "Continual",
    "Gradual",
    "Mixed",
    "Potpourri",
    "InOut",
    "Correlated",
    "PracticalTTA",
    "LabelShift",
    "SingleSample",
    "Cross",
    "BatchMixing",
    "Recurring",
    "Probed",
    "Clocked",
    "SavedStream",
]
