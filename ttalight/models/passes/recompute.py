"""Passes that keep less: activations inside a block are computed again when the gradient needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from ttalight.errors import InputError
from ttalight.models.attaching.attachment import attach_forward, detach_forward
from ttalight.models.network import Network
from ttalight.models.norm import NormLayer, NormMode
from ttalight.models.parts import all_modules
from ttalight.models.passes.pass_policy import PassPolicy

__all__ = ["RecomputedBlocks"]


class RecomputedBlocks(PassPolicy):
    """Keeps only the inputs of a network's blocks, and passes a block again on the way back.

    Blocks are those entries of the network's ``nn.Sequential`` and ``nn.ModuleList`` that have normalisation layers
    inside and are no such list, nor hold one of blocks: residual blocks, transformer blocks. The second pass of a block
    has the normalisation modes, the precision and the random state of the first, and updates no statistics, so that
    gradients are the same bit for bit where the device computes the same twice. It takes the weights as they are then.
    Passes without gradients, and those that several processes share, stay as they are.

    Source: T. Chen, B. Xu, C. Zhang, C. Guestrin, *Training Deep Nets with Sublinear Memory Cost*, arXiv 1604.06174.

    """

    def __init__(self) -> None:
        self.blocks: list[_Block] = []

    def attach(self, net: Network) -> None:
        """Replace the forwards of a network's blocks.

        Raises:
            ValueError: If the network has fewer than two blocks.
        """
        layers = {norm.module: norm for norm in net.norms}
        self.blocks = [_Block(module, layers) for module in _blocks(net.module, layers)]
        if len(self.blocks) < 2:
            raise InputError(
                f"RecomputedBlocks passes a network's blocks again, and {type(net.module).__name__} has "
                f"{len(self.blocks)}: entries of an nn.Sequential or nn.ModuleList with normalisation layers inside. "
                "Leave passes=None and take smaller batches, or another network"
            )
        for block in self.blocks:
            attach_forward(block.module, block.forward)

    def detach(self) -> None:
        """Restore the forwards of the blocks."""
        for block in self.blocks:
            detach_forward(block.module)

    def __getstate__(self) -> dict[str, Any]:
        return {"blocks": []}  # copies repeat the blocks of their own network


class _Block:
    """One block and the stand-in for its forward."""

    def __init__(self, module: nn.Module, layers: dict[nn.Module, NormLayer]) -> None:
        self.module = module
        self.norms = [layers[part] for part in all_modules(module) if part in layers]
        carried = vars(module).get("forward")
        self._own: Callable[..., Any] = partial(type(module).forward, module) if carried is None else carried

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled() or self.norms[0].passes.shard is not None:
            return self._own(*args, **kwargs)
        return checkpoint(self._own, *args, use_reentrant=False, context_fn=self._contexts, **kwargs)

    def _contexts(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), _Again(self.norms)


class _Again:
    """Sets the modes of normalisation layers to those of now; entered once for each backward."""

    def __init__(self, norms: list[NormLayer]) -> None:
        self.norms = norms
        self.modes = [norm.mode for norm in norms]

    def __enter__(self) -> None:
        self._later = [norm.mode for norm in self.norms]
        self._set(self.modes)

    def __exit__(self, *error: object) -> None:
        self._set(self._later)

    def _set(self, modes: list[NormMode]) -> None:
        for norm, mode in zip(self.norms, modes, strict=True):
            norm.mode = mode


def _blocks(module: nn.Module, layers: dict[nn.Module, NormLayer]) -> Iterator[nn.Module]:
    for child in module.children():
        if child in layers or not any(part in layers for part in all_modules(child)):
            continue
        inner = list(_blocks(child, layers))
        if not inner and isinstance(module, (nn.Sequential, nn.ModuleList)):
            inner = [child]
        yield from inner
