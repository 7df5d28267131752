"""Features of the patches of images, from image towers that have them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ttalight.models.image_tower import ImageTower

__all__ = ["encode_tokens", "has_tokens"]


def has_tokens(encoder: nn.Module) -> bool:
    """Return whether ``encode_tokens`` can be called with an encoder."""
    model: Any = encoder.model if isinstance(encoder, ImageTower) else encoder
    return _is_open_clip(model) or hasattr(model, "encode_tokens") or _is_timm(model)


def encode_tokens(encoder: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return features of images, (B, D), and of their patches, (B, P, D), in the same space, by one pass.

    Args:
        encoder: A vision transformer of timm, or an ``ImageTower`` with one of open_clip or with a model that has a
            method ``encode_tokens``, which returns both.
        images: Normalised, (B, 3, H, W).
    """
    model: Any = encoder.model if isinstance(encoder, ImageTower) else encoder
    if hasattr(model, "encode_tokens"):
        features, tokens = model.encode_tokens(images)
        return features, tokens
    if _is_open_clip(model):
        visual = getattr(model, "visual", model)
        before, visual.output_tokens = visual.output_tokens, True
        try:
            features, tokens = visual(images)
        finally:
            visual.output_tokens = before
        return features, tokens if visual.proj is None else tokens @ visual.proj
    tokens = model.forward_features(images)
    features, patches = model.forward_head(tokens), tokens[:, model.num_prefix_tokens :]
    return features, model.fc_norm(patches)


def _is_open_clip(model: Any) -> bool:
    visual = getattr(model, "visual", model)
    return all(hasattr(visual, name) for name in ("output_tokens", "proj", "ln_post"))


def _is_timm(model: Any) -> bool:
    return all(hasattr(model, name) for name in ("forward_features", "forward_head", "num_prefix_tokens", "fc_norm"))
