"""CALIP: attention between patches of the image and texts of the classes, without parameters."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttalight.adapters.feature import FeatureAdapter
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError, InputTypeError
from ttalight.models.network import Network
from ttalight.models.patch_tokens import has_tokens

__all__ = ["CALIP", "attention_logits"]


class CALIP(FeatureAdapter):
    """Adds two predictions by attention between the patches of an image and the texts of the classes.

    The first compares the image with the patches that attend to a class, the second compares with the classes what the
    patches see of them. Nothing is learned and there is no state. One forward a batch. It needs a
    ``VisionLanguageTask`` whose image tower gives features of its patches in the space of the texts: a vision
    transformer of timm or of open_clip, or a tower with ``encode_tokens``.

    Source: Z. Guo, R. Zhang, L. Qiu, X. Ma, X. Miao, X. He, B. Cui, *CALIP: Zero-Shot Enhancement of CLIP with
    Parameter-free Attention*, AAAI 2023, arXiv 2209.14169, after the authors' code. The code searches both weights with
    the labels that it reports the accuracy of. Here they are arguments, and the defaults are those for ImageNet.

    Args:
        visual_weight: Weight of the prediction by attended patches.
        text_weight: Weight of the prediction by attended texts.
        kwargs: See ``FeatureAdapter``. There is no ``cache``.

    Raises:
        ValueError: If an argument is out of range, or the network has no features of patches.
    """

    def __init__(self, visual_weight: float = 1.12, text_weight: float = 0.02, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        for name, value in (("visual_weight", visual_weight), ("text_weight", text_weight)):
            if not 0 <= value < math.inf:
                raise InputError(f"{name} must be at least 0 and finite, got {value}")
        if self.cache is not None:
            raise InputError("CALIP reads features of patches, which cache does not keep: leave it out")
        self.visual_weight, self.text_weight = visual_weight, text_weight

    def check(self, net: Network) -> None:
        """Check that the network gives features of patches."""
        super().check(net)
        encoder = getattr(net.module, "encoder", None)
        if not hasattr(net.module, "keep_tokens") or encoder is None or not has_tokens(encoder):
            raise InputError(
                "CALIP needs features of patches in the space of the texts, and "
                f"{type(net.module).__name__} has none: use a VisionLanguageTask with a vision transformer of timm or "
                "open_clip, or with an image tower that has encode_tokens"
            )

    def configure(self, net: AdaptiveNetwork) -> None:
        """Find the classifier and its classes."""
        super().configure(net)
        self._possible = net.possible_classes

    @torch.no_grad()
    def adapt(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Predict the batch by its features and those of its patches."""
        module: Any = net.module
        with module.keep_tokens() as kept:
            logits, features = self.pass_images(net, images)
        if not kept:
            raise InputError("the pass kept no features of patches: leave passes out")
        weight, _, scale = net.head
        units, tokens = (F.normalize(each, dim=-1).to(weight.dtype) for each in (features, kept[-1]))
        by_patches, by_texts = attention_logits(units, tokens, weight, self._possible)
        return logits + (scale * (self.visual_weight * by_patches + self.text_weight * by_texts)).to(logits.dtype)

    def predict(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Return what ``adapt`` returns: there is no state."""
        return self.adapt(net, images)

    def export(self, net: AdaptiveNetwork, module: nn.Module) -> None:
        """Raise a TypeError: the prediction is no network's."""
        raise InputTypeError("CALIP predicts by patches as well, so there is no network to export")

    def protocol(self) -> dict[str, Any]:
        """Return the settings that are saved with a result, so that results can be compared."""
        return super().protocol() | {"visual_weight": self.visual_weight, "text_weight": self.text_weight}


def attention_logits(units: Tensor, tokens: Tensor, texts: Tensor, possible: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines by attended patches and by attended texts, (B, C) each.

    Args:
        units: Unit vectors of the images, (B, D).
        tokens: Unit vectors of their patches, (B, P, D).
        texts: Unit vectors of the classes, (C, D).
        possible: Classes that are not masked, (C,).
    """
    attention = 2 * tokens @ texts.T
    by_patches = torch.einsum("bpc,bp->bc", attention.softmax(1), (tokens @ units[:, :, None])[:, :, 0])
    seen = attention.masked_fill(~possible, -torch.inf).softmax(2) @ texts
    return by_patches, (seen.mean(1) + seen.amax(1)) @ texts.T
