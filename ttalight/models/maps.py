"""The feature maps between an encoder's stages, taken during a pass."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ttalight.errors import InputError

__all__ = ["Stage", "capture_maps", "find_stages", "parameters_through", "select_stages"]


class Stage(NamedTuple):
    """A stage of a network: the blocks that work at one resolution.

    Attributes:
        number: Its place, from 1 on: 2 is ``layer2`` of a ResNet.
        name: Name of the module whose output is the stage's map.
        channels: Channels of that map.
        reduction: Pixels of the image for one of the map, along a side, as timm says; a replaced stem changes that of
            all stages alike.
    """

    number: int
    name: str
    channels: int
    reduction: int


def find_stages(encoder: nn.Module) -> list[Stage]:
    """Return the stages of a network in order, by its ``feature_info``, which timm's networks have.

    Entries that name a layer without parts, such as the activation behind the stem of a ResNet, are no stages.

    Args:
        encoder: A network as ``create_encoder`` makes it.

    Raises:
        ValueError: If the network does not say what its stages are.
    """
    entries: Any = getattr(encoder, "feature_info", None)
    modules = dict(encoder.named_modules())
    found = [entry for entry in entries or () if any(modules[entry["module"]].children())]
    if not found:
        raise InputError(
            f"{type(encoder).__name__} does not say where its stages end (timm's feature_info): use a ResNet or cifar_*"
        )
    return [
        Stage(number, entry["module"], entry["num_chs"], entry["reduction"])
        for number, entry in enumerate(found, start=1)
    ]


def select_stages(encoder: nn.Module, numbers: Sequence[int]) -> list[Stage]:
    """Return some of the stages of a network, in the network's order.

    Args:
        encoder: A network as ``create_encoder`` makes it.
        numbers: Different numbers from 1 on.

    Raises:
        ValueError: If a number is none of the network's, occurs twice, or there is none.
    """
    stages = find_stages(encoder)
    if not numbers or len(set(numbers)) < len(numbers) or not set(numbers) <= {stage.number for stage in stages}:
        raise InputError(
            f"layers must be different numbers from 1 to {len(stages)}, the stages of this encoder, got {list(numbers)}"
        )
    return [stage for stage in stages if stage.number in numbers]


def parameters_through(encoder: nn.Module, stage: Stage) -> list[nn.Parameter]:
    """Return the parameters from the first layer to the end of a stage, in the order in which they were registered.

    Args:
        encoder: A network that registers its layers in the order in which it runs them, as timm's convolutional ones.
        stage: One of its stages.
    """
    named = list(encoder.named_parameters())
    last = max(index for index, (name, _) in enumerate(named) if name.startswith(f"{stage.name}."))
    return [parameter for _, parameter in named[: last + 1]]


@contextmanager
def capture_maps(encoder: nn.Module, stages: Sequence[Stage]) -> Iterator[dict[int, Tensor]]:
    """Collect the maps of the passes made inside, (B, C, H, W) by number of the stage; a later pass overwrites.

    Hooks stand for the time of the passes only, so that copies, checkpoints and plain passes know nothing of them. A
    compiled encoder runs uncompiled inside: compiled code does not see hooks that came later.

    Args:
        encoder: The network.
        stages: Those whose maps are wanted.

    Raises:
        ValueError: If a stage puts out something other than maps, such as the tokens of a transformer.
    """
    maps: dict[int, Tensor] = {}
    handles = [encoder.get_submodule(stage.name).register_forward_hook(partial(_keep, maps, stage)) for stage in stages]
    try:
        with torch.compiler.set_stance("force_eager"):
            yield maps
    finally:
        for handle in handles:
            handle.remove()


def _keep(maps: dict[int, Tensor], stage: Stage, module: nn.Module, inputs: Any, output: Any) -> None:
    if not isinstance(output, Tensor) or output.ndim != 4 or output.shape[1] != stage.channels:
        seen = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"a {type(output).__name__}"
        raise InputError(
            f"stage {stage.number} ({stage.name}) puts out {seen}, expected maps (B, {stage.channels}, H, W): use a "
            "convolutional encoder, such as a ResNet"
        )
    maps[stage.number] = output
