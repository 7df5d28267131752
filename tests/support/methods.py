"""All adaptation methods, with settings under which they have something to do on small networks of random weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from ttalight import adapters
from ttalight.adapters import Adapter, EntropyAdapter, GradientAdapter, SelfTrainingAdapter, Tent

Settings = Mapping[str, Mapping[str, Any]]

BASES = {Adapter, GradientAdapter, SelfTrainingAdapter, EntropyAdapter}
#: All methods by name, test-time training among them.
EVERY_CLASS: dict[str, type[Adapter]] = {
    name: value
    for name in adapters.__all__
    if isinstance(value := getattr(adapters, name), type) and issubclass(value, Adapter) and value not in BASES
}
#: Those that adapt vision transformers alone.
TRANSFORMER_ONLY = ("FOA", "CALIP")
#: Those that encode texts, with the text tower of a vision-language model.
TEXT_ONLY = ("BATCLIP", "CLIPArTT", "WATT", "TPT", "CTPT", "OTPT")
#: Those that train a self-supervised task.
TASK_ONLY = ("TestTimeTraining", "MaskedReconstruction")
#: Those that adapt any classifier, without a self-supervised task.
CLASSES = {name: cls for name, cls in EVERY_CLASS.items() if name not in (*TASK_ONLY, *TRANSFORMER_ONLY, *TEXT_ONLY)}
#: Without source images, that is: ActMAD takes what BatchNorm layers know of these.
BATCH_NORM_ONLY = ("PTBN", "AlphaBN", "EMABN", "FIND", "ActMAD")

#: One of each kind: statistics, entropy, importance of weights, a teacher, prototypes, a memory, layers of its own,
#: views of an image, views and a cache, a cache alone. They stand for all where the engine does the work.
KINDS = ("EMABN", "Tent", "EATA", "CoTTA", "RMT", "RoTTA", "MoETTA", "MEMO", "DPE", "TDA")
#: Few views and small memories, which are enough to see what a method does.
QUICK: Settings = {
    "AdaContrast": {"queue": 64, "refine_after": 6},
    "CoTTA": {"views": 2},
    "ECALP": {"memory": 8, "image_neighbors": 3},
    "MEMO": {"views": 3},
    "TTAug": {"views": 2},
    **{name: {"views": 3} for name in ("TPS", "ZERO", "VTE", "MTA", "BoostAdapter", "DPE")},
}
#: Random networks are sure of nothing, and their predictions for two images are much alike: with these settings methods
#: that leave samples out take some.
_OPEN = {"margin": 1.0, "redundancy": 0.99995}
SETTINGS: Settings = {
    **QUICK,
    "ETA": _OPEN,
    "EATA": {**_OPEN, "fisher": "stream", "fisher_samples": 8},
    "RDumb": _OPEN,
    "SAR": {"margin": 1.0},
    "DeYO": {"margin": 1.0, "threshold": -1.0},
    "RoTTA": {"memory": 4},
    "NOTE": {"memory": 4},
    "NCTTA": {"margin": 1.0},
    "MoETTA": {"frozen": []},
}


def methods(settings: Settings = SETTINGS, **more: Mapping[str, Any]) -> dict[str, Callable[..., Adapter]]:
    """Return makers of all methods by name, and of Tent with a term.

    Args:
        settings: Arguments by name.
        more: Arguments that are added to these, by name.
    """
    arguments = {name: {**settings.get(name, {}), **more.get(name, {})} for name in CLASSES}
    made = {name: partial(cls, **arguments[name]) for name, cls in CLASSES.items()}
    return made | {
        "Tent with STAG": partial(Tent, terms=[adapters.STAG()]),
        "ETA decoupled": partial(adapters.ETA, entropy="decoupled", **arguments["ETA"]),
    }
