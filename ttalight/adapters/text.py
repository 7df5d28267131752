"""The base of the methods that adapt a vision-language model with texts that its text tower encodes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttalight.adapters.components.image_predictions import check_image_predictions
from ttalight.adapters.self_training import SelfTrainingAdapter
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError
from ttalight.models.class_prompts import ClassPrompts
from ttalight.models.network import Network, Outputs
from ttalight.models.norm import NormMode

__all__ = ["TextAdapter", "class_prompts_of", "set_classifier"]


class TextAdapter(SelfTrainingAdapter):
    """Steps on the image tower of a vision-language model, with texts of its classes.

    Args:
        kwargs: See ``SelfTrainingAdapter``, ``GradientAdapter`` and ``Adapter``.

    Raises:
        ValueError: In ``wrap``, if the network has no text tower.
    """

    norm: NormMode = "source"

    def check(self, net: Network) -> None:
        """Check that there are a text tower and parameters to adapt."""
        super().check(net)
        class_prompts_of(net, type(self).__name__)

    def configure(self, net: AdaptiveNetwork) -> None:
        """Set the parameters to adapt and the statistics, and find the classifier and the text tower."""
        super().configure(net)
        net.set_norm_mode(self.norm)
        self._head = net.head
        prompts = class_prompts_of(net, type(self).__name__)
        self._prompts = prompts._replace(tower=prompts.tower.converted(self._head.weight))

    def read(self, net: AdaptiveNetwork, images: Tensor) -> Outputs:
        """Return logits, (B, C), and unit vectors, (B, D), of a batch."""
        outputs = net(images)
        check_image_predictions(outputs.logits, type(self).__name__, "compares images with texts", "texts")
        return Outputs(outputs.logits, F.normalize(outputs.vectors, dim=1))

    def cosine_logits(self, features: Tensor, texts: Tensor) -> Tensor:
        """Return the scaled cosines of unit vectors, (B, D), and text features, (C, D)."""
        return self._head.scale * features @ texts.T

    @torch.no_grad()
    def encode(self, texts: list[str]) -> Tensor:
        """Return unit vectors of texts, (N, D)."""
        tower = self._prompts.tower
        return F.normalize(tower.encode_text(tower.tokenize(texts)), dim=1).to(self._head.weight.dtype)


def class_prompts_of(net: Network, method: str) -> ClassPrompts:
    """Return the names, templates and text tower of a network.

    Args:
        net: The network.
        method: Name of the method, for the message.

    Raises:
        ValueError: If it has no text tower.
    """
    prompts = getattr(net.module, "class_prompts", None)
    if not isinstance(prompts, ClassPrompts):
        raise InputError(
            f"{method} encodes texts, and {type(net.module).__name__} has no text tower: adapt a VisionLanguageTask "
            "that was made with class_names"
        )
    return prompts


@torch.no_grad()
def set_classifier(net: Network, module: nn.Module, texts: Tensor) -> None:
    """Let a copy of a network's module classify by other text features.

    Args:
        net: The network, its classifier found.
        module: The copy, changed in place.
        texts: Unit vectors, (C, D).
    """
    assert net.classifier.found is not None, "the classifier is found in configure"
    weight: Tensor = module.get_submodule(net.classifier.found.name).weight  # type: ignore[assignment]
    weight.copy_(texts)
