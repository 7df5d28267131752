"""The two towers of a vision-language model, each as a module of its own."""

from __future__ import annotations

import copy

from torch import nn

__all__ = ["image_half", "text_half"]

#: Submodules that images pass through, of open_clip and of transformers, and those by which such a model is known.
_IMAGE_PARTS = ("visual", "vision_model", "visual_projection")
_KNOWN = ({"visual", "text"}, {"visual", "transformer", "token_embedding"}, {"vision_model", "text_model"})


def image_half(model: nn.Module) -> nn.Module:
    """Return a model with the modules that images pass through alone; they are shared, not copied.

    A model whose parts have other names than those of open_clip and transformers is returned as it is.

    Args:
        model: A model with ``encode_image`` or ``get_image_features``.
    """
    names = [name for name, _ in model.named_children()]
    if not any(known <= {*names} for known in _KNOWN):
        return model
    half = _with_modules(model, [name for name in names if name in _IMAGE_PARTS])
    half._parameters, half._buffers = {}, {}
    return half


def text_half(model: nn.Module) -> nn.Module:
    """Return a model without the modules that images pass through; the others are shared, not copied.

    Args:
        model: A model with ``encode_text`` or ``get_text_features``.
    """
    return _with_modules(model, [name for name, _ in model.named_children() if name not in _IMAGE_PARTS])


def _with_modules(model: nn.Module, names: list[str]) -> nn.Module:
    half = copy.copy(model)
    half._modules = {name: model._modules[name] for name in names}
    half._parameters, half._buffers = dict(model._parameters), dict(model._buffers)
    return half
