"""BATCLIP: normalisation layers of the image tower and of the text tower adapt together."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttalight.adapters.term import add_terms
from ttalight.adapters.text import TextAdapter, set_classifier
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError
from ttalight.losses.text_alignment import prototype_losses
from ttalight.models.network import Network, Outputs

__all__ = ["BATCLIP"]


class BATCLIP(TextAdapter):
    """Minimises the entropy, and draws the mean image feature of each predicted class to its text and from the others.

    The weights and biases of the normalisation layers of both towers adapt. The class names are encoded again in each
    step, with the present text tower, and the predictions compare images with these. The class means are those of the
    features before they become unit vectors. BatchNorm layers normalise with the batch's statistics. The published
    protocol scores the forward that the loss was made from (``prediction="before"``): one forward and one backward of
    the images, and of the texts of all classes, a batch.

    Source: S. K. Maharana, B. Zhang, L. Karlinsky, R. Feris, Y. Guo, *BATCLIP: Bimodal Online Test-Time Adaptation for
    CLIP*, ICCV 2025, arXiv 2412.02837, after the authors' code. There the passes run under autocast in 16 bits. The
    model's own prompts are averaged, theirs is "a photo of a {}." alone, the default of ``VisionLanguageTask``.

    Args:
        lr: Learning rate of AdamW; 0.001 by default.
        agreement_weight: Weight of the agreement of class means with texts.
        separation_weight: Weight of the separation of class means.
        kwargs: See ``SelfTrainingAdapter``, ``GradientAdapter`` and ``Adapter``. ``parameters`` are those of the image
            tower.

    Raises:
        ValueError: If an argument is out of range; in ``wrap``, if the network has no text tower.
    """

    norm = "batch"
    published: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar": {"optimizer": "AdamW", "lr": 1e-3, "weight_decay": 0.01, "batch_size": 200},
        "imagenet": {"optimizer": "AdamW", "lr": 5e-4, "weight_decay": 0.01, "batch_size": 64},
    }

    def __init__(
        self,
        lr: float | None = None,
        agreement_weight: float = 1.0,
        separation_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(lr=lr, **kwargs)
        for name, value in (("agreement_weight", agreement_weight), ("separation_weight", separation_weight)):
            if not 0 <= value < float("inf"):
                raise InputError(f"{name} must be at least 0 and finite, got {value}")
        self.agreement_weight, self.separation_weight = agreement_weight, separation_weight

    def check(self, net: Network) -> None:
        """Check that there are both towers, and a layer whose output the image features are."""
        super().check(net)
        if not isinstance(getattr(net.module, "projection", None), nn.Module):
            raise InputError(f"BATCLIP needs a VisionLanguageTask, got {type(net.module).__name__}")

    def configure(self, net: AdaptiveNetwork) -> None:
        """Let the normalisation layers of the image tower and copies of those of the text tower adapt."""
        super().configure(net)
        prompts = self._prompts
        self._tokens = prompts.tower.tokenize([text for each in prompts.templates for text in prompts.texts(each)])
        own = {name: nn.Parameter(value.detach().clone()) for name, value in prompts.tower.norm_affines().items()}
        net.set_trainable(net.parameters, own)

    def texts(self, net: AdaptiveNetwork) -> Tensor:
        """Return the text features of the classes by the present text tower, unit vectors (C, D), with gradients."""
        with net.precision():
            encoded = self._prompts.tower.encode_text(self._tokens, parameters=net.own)
        units = F.normalize(encoded.to(self._head.weight.dtype), dim=1)
        return F.normalize(units.view(len(self._prompts.templates), len(self._prompts.names), -1).mean(0), dim=1)

    def losses(self, net: AdaptiveNetwork, images: Tensor, outputs: Outputs) -> Tensor:
        """Return the entropy of each prediction."""
        return outputs.entropies

    def update(self, net: AdaptiveNetwork, images: Tensor, step: int) -> Tensor:
        """Make one step; see ``SelfTrainingAdapter``."""
        seen: list[Tensor] = []
        projection: nn.Module = net.module.projection  # type: ignore[assignment]
        hook = projection.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
        try:
            units = self.read(net, images).vectors
        finally:
            hook.remove()
        texts = self.texts(net)
        outputs = Outputs(self.cosine_logits(units, texts), units)
        features = seen[0].to(units.dtype)
        agreement, separation = prototype_losses(features, outputs.logits.argmax(1), texts)
        penalty = -self.agreement_weight * agreement - self.separation_weight * separation
        losses = add_terms(self.losses(net, images, outputs), self.terms, net, outputs)
        net.backward(losses, penalty=penalty)
        self.optimizer_step(net)
        return outputs.logits

    @torch.no_grad()
    def predict(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Predict the batch with both towers as they are."""
        return self.cosine_logits(self.read(net, images).vectors, self.texts(net))

    def export(self, net: AdaptiveNetwork, module: nn.Module) -> None:
        """Let the copy have the text features of the present text tower."""
        super().export(net, module)
        with torch.no_grad():
            set_classifier(net, module, self.texts(net))

    def protocol(self) -> dict[str, Any]:
        """Return the settings that are saved with a result, so that results can be compared."""
        weights = {name: getattr(self, name) for name in ("agreement_weight", "separation_weight")}
        return super().protocol() | weights
