"""Public weight files: what they are wrapped in, and their names in terms of the network they are for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from timm.models import ResNet
from torch import Tensor, nn

from ttalight.errors import InputError

__all__ = ["PublicWeights", "classifier_names", "convert_state_dict", "numbers_allowed", "public_weights"]

#: Where files have their weights: most, timm's, those of test-time training and MEMO, and K. Kireev et al.'s.
_CONTAINERS = ("state_dict", "model", "net", "last")
_PREFIXES = ("module.", "model.")
#: Names of a normalisation of images in [0, 1] in a file.
_NORMALISATIONS = (("mu", "sigma"), ("normalize.mean", "normalize.std"), ("mean", "std"))
#: ResNets for 32-pixel images, as kuangliu/pytorch-cifar and RobustBench name them, in timm's names.
_RESNET_NAMES = ((r"\.shortcut\.", ".downsample."), (r"^linear\.", "fc."))
_CLASSIFIERS = ("fc", "linear", "classifier", "head")


class PublicWeights(NamedTuple):
    """The content of a weight file.

    Attributes:
        weights: By the network's own names.
        mean: Channel means of the normalisation in the file. None if it has none.
        std: Its standard deviations.
    """

    weights: dict[str, Tensor]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None


def public_weights(content: Any, network: nn.Module) -> PublicWeights:
    """Take the weights of a network out of what a file holds.

    Args:
        content: A state dict, or a dict with one under "state_dict", "model", "net" or "last"; keys may have the
            prefixes "module." and "model.".
        network: The network that they are for.

    Raises:
        ValueError: If there are no tensors.
    """
    state = content
    for name in _CONTAINERS:
        if isinstance(state, Mapping) and isinstance(state.get(name), Mapping):
            state = state[name]
    found: dict[str, Tensor] = {}
    for name, value in state.items() if isinstance(state, Mapping) else ():
        if isinstance(value, Tensor):
            for prefix in _PREFIXES:
                name = str(name).removeprefix(prefix)
            found[name] = value
    if not found:
        raise InputError(f"a {type(content).__name__} without tensors")
    mean, std = _take_normalisation(found, network)
    return PublicWeights(convert_state_dict(found, network), mean, std)


def convert_state_dict(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """Return weights by the names of the network instead of those of its public files.

    Names that are the network's own already, or unknown, stay as they are.

    Args:
        state: Weights by the names in the file.
        network: One of the networks for 32-pixel images here, or a ResNet of timm's; others change nothing.
    """
    names = _RESNET_NAMES if isinstance(network, ResNet) else getattr(network, "public_names", ())
    converted = {_rename(name, names): value for name, value in state.items()}
    converted.pop("", None)
    return converted


def _rename(name: str, names: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in names:
        name = re.sub(pattern, replacement, name)
    return name


def _take_normalisation(
    found: dict[str, Tensor], network: nn.Module
) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
    own = network.state_dict()
    for names in _NORMALISATIONS:
        if all(name in found and name not in own and found[name].numel() == 3 for name in names):
            mean, std = (tuple(found.pop(name).double().flatten().tolist()) for name in names)
            return mean, std
    return None, None


def classifier_names(network: nn.Module) -> set[str]:
    """Return the names that a network's classifier may have: its own by timm's description, and those in common use."""
    own = getattr(network, "pretrained_cfg", {}).get("classifier") or ()
    return {*_CLASSIFIERS, *((own,) if isinstance(own, str) else own)}


def numbers_allowed() -> Any:
    """Return a context in which ``torch.load(weights_only=True)`` also takes NumPy's numbers, which cannot run code.

    Training scripts save their accuracy beside the weights, often as a NumPy scalar.
    """
    scalar: Any = np.float64(0).__reduce__()[0]
    kinds = [type(np.dtype(name)) for name in ("float16", "float32", "float64", "int32", "int64", "bool")]
    old, new = "numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar"
    return torch.serialization.safe_globals([(scalar, old), (scalar, new), np.dtype, *kinds])
