"""Prompts among the tokens of a vision transformer, and its class tokens behind every block."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ttalight.errors import InputError
from ttalight.models.parts import all_modules

__all__ = ["ClassTokens", "PromptedTransformer"]

#: Modules that define the class ``VisionTransformer``. A network can only be of those that are imported.
_TIMM, _TORCHVISION = "timm.models.vision_transformer", "torchvision.models.vision_transformer"


class _Parts(NamedTuple):
    """The parts of a vision transformer: blocks, what their outputs are normalised by, and sizes."""

    blocks: list[nn.Module]
    norms: list[nn.Module]
    before: nn.Module
    width: int
    patch: int


class ClassTokens:
    """Class tokens of the last pass, behind each block.

    Args:
        blocks: Number L of blocks.
    """

    def __init__(self, blocks: int) -> None:
        self._by_block: list[Tensor | None] = [None] * blocks

    def keep(self, block: int, tokens: Tensor) -> None:
        """Keep the class tokens behind one block, (B, D)."""
        self._by_block[block] = tokens

    def take(self) -> Tensor:
        """Return the class tokens of all blocks side by side, (B, L * D), in fp32 (fp64 stays), and drop them.

        Raises:
            ValueError: If a block did not run.
        """
        seen = [tokens for tokens in self._by_block if tokens is not None]
        if len(seen) != len(self._by_block):
            raise InputError(
                f"{len(seen)} of {len(self._by_block)} blocks of the vision transformer ran in a pass, and class tokens"
                " are read behind each: give a network that calls its blocks, and all of them"
            )
        self._by_block = [None] * len(seen)
        tokens = torch.cat(seen, dim=1)
        return tokens if tokens.dtype == torch.float64 else tokens.float()


class PromptedTransformer:
    """The vision transformer in a network, whose passes can take prompts.

    Prompts stand behind the class token, from the first block to the last one. What follows sees the usual tokens, so
    that any pooling works. Class tokens behind a block are normalised as its successor does, the last ones as the
    transformer does. Both are done by hooks that are there for the passes inside ``prompted`` alone.

    Args:
        network: Has one VisionTransformer of timm or torchvision, as itself or as a part.

    Raises:
        ValueError: If it has none or several, or one without a class token or without a ``norm1`` in each block.
    """

    def __init__(self, network: nn.Module) -> None:
        self.parts = _parts_of(network)

    def limit(self) -> float:
        """Return the bound b of prompts that are drawn uniformly from [-b, b], that of Xavier initialisation.

        Source: M. Jia, L. Tang, B. Chen, C. Cardie, S. Belongie, B. Hariharan, S. Lim, *Visual Prompt Tuning*,
        ECCV 2022, arXiv 2203.12119.
        """
        return float((6 / (3 * self.parts.patch + self.parts.width)) ** 0.5)

    @contextmanager
    def prompted(self, prompts: Tensor | None = None) -> Iterator[ClassTokens]:
        """Let the passes inside take prompts, and keep their class tokens.

        Args:
            prompts: (P, D); read in every pass, so that it can be changed in place. None for none.
        """
        blocks, norms, before = self.parts[:3]
        tokens = ClassTokens(len(blocks))
        with ExitStack() as hooks:
            hooks.enter_context(torch.compiler.set_stance("force_eager"))  # compiled code would leave out new hooks
            if prompts is not None:
                insert = partial(_insert, prompts, before)
                hooks.callback(blocks[0].register_forward_pre_hook(insert).remove)
            for place, (block, norm) in enumerate(zip(blocks, norms, strict=True)):
                hooks.callback(block.register_forward_hook(partial(_keep, tokens, place, norm)).remove)
            if prompts is not None:
                hooks.callback(blocks[-1].register_forward_hook(partial(_drop, len(prompts))).remove)
            yield tokens


def _insert(prompts: Tensor, before: nn.Module, block: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the inputs of a block with prompts behind the class token, normalised as the other tokens were."""
    x = inputs[0]
    inserted = before(prompts.to(x.dtype)[None]).to(x.dtype).expand(len(x), -1, -1)
    return torch.cat([x[:, :1], inserted, x[:, 1:]], dim=1), *inputs[1:]


def _keep(tokens: ClassTokens, place: int, norm: nn.Module, block: nn.Module, inputs: object, output: Tensor) -> None:
    tokens.keep(place, norm(output[:, 0]))


def _drop(count: int, block: nn.Module, inputs: object, output: Tensor) -> Tensor:
    return torch.cat([output[:, :1], output[:, 1 + count :]], dim=1)


def _parts_of(network: nn.Module) -> _Parts:
    found = [
        (name, part)
        for part in all_modules(network)
        for name in (_TIMM, _TORCHVISION)
        if name in sys.modules and isinstance(part, sys.modules[name].VisionTransformer)
    ]
    if len(found) != 1:
        raise InputError(
            f"{type(network).__name__} has {len(found) or 'no'} VisionTransformer{'s' * (len(found) > 1)} of timm or "
            "torchvision, and this method works on the tokens of one: use such a network, or another method"
        )
    name, transformer = found[0]
    parts = _of_timm(transformer) if name == _TIMM else _of_torchvision(transformer)
    if parts is None:
        raise InputError(
            f"the {type(transformer).__name__} in {type(network).__name__} has no class token, or blocks without a "
            "norm1, and this method reads normalised class tokens: use a network like vit_base_patch16_224, or another "
            "method"
        )
    return parts


def _of_timm(transformer: Any) -> _Parts | None:
    blocks = list(transformer.blocks)
    if transformer.cls_token is None or not all(hasattr(block, "norm1") for block in blocks):
        return None
    norms = [*(block.norm1 for block in blocks[1:]), transformer.norm]
    height, width = transformer.patch_embed.patch_size
    return _Parts(blocks, norms, transformer.norm_pre, transformer.embed_dim, height * width)


def _of_torchvision(transformer: Any) -> _Parts | None:
    blocks = list(transformer.encoder.layers)
    if not all(hasattr(block, "ln_1") for block in blocks):
        return None
    norms = [*(block.ln_1 for block in blocks[1:]), transformer.encoder.ln]
    return _Parts(blocks, norms, nn.Identity(), transformer.hidden_dim, transformer.patch_size**2)
