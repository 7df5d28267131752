"""WATT: adapted weights are averaged over prompt templates."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttalight.adapters.text import TextAdapter, set_classifier
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.engine.method import Reset
from ttalight.errors import InputError
from ttalight.losses.text_alignment import transductive_loss
from ttalight.models.class_names import templates_of
from ttalight.models.network import Outputs

__all__ = ["WATT"]

_TEMPLATES = (
    "a photo of a {}", "itap of a {}", "a bad photo of the {}.", "a origami {}.", "a photo of the large {}.",
    "a {} in a video game.", "art of the {}.", "a photo of the small {}.",
)  # fmt: skip


class WATT(TextAdapter):
    """Trains on the pairs of images and predicted classes in several prompt templates, and averages the weights.

    For each template the weights make two steps on ``transductive_loss``, with the class that the present model
    predicts as the text of an image. Then the weights behind all templates are averaged. Five such rounds make an
    episode. ``merge="parallel"`` (WATT-P) begins with the same weights for each template, ``"sequential"`` (WATT-S)
    with those that the template before has left. Predictions compare images with the mean of the text features over the
    templates, which stand in place of the task's own. The published protocol is episodic: each batch is adapted to from
    the source weights. The weights and biases of the normalisation layers of the image tower adapt; BatchNorm keeps the
    source's statistics. 81 forwards and 80 backwards a batch. Texts are encoded once.

    Source: D. Osowiechi, M. Noori, G. A. Vargas Hakim, M. Yazdanpanah, A. Bahri, M. Cheraghalikhani, S. Dastani,
    F. Beizaee, I. Ben Ayed, C. Desrosiers, *WATT: Weight Average Test-Time Adaptation of CLIP*, NeurIPS 2024,
    arXiv 2406.13875, after the authors' code. Adam's moments begin at zero with each batch, and with each template of
    the first round of ``parallel``; apart from that they are kept from step to step, as there. There a second forward
    of the same weights finds the classes.

    Args:
        lr: Learning rate of Adam; 0.001 by default.
        merge: ``sequential`` or ``parallel``.
        templates: Prompts with ``{}`` in the place of a name, or the name of a list; see ``VisionLanguageTask``. By
            default the paper's eight.
        rounds: Averages of an episode.
        temperature: Of the targets.
        steps: Gradient steps for each template in each round.
        reset: See ``Adapter``.
        kwargs: See ``GradientAdapter`` and ``Adapter``; ``parameters`` as in ``SelfTrainingAdapter``.

    Raises:
        ValueError: If an argument is out of range; in ``wrap``, if the network has no text tower.
    """

    published: ClassVar[dict[str, dict[str, Any]]] = {"cifar": {"optimizer": "Adam", "lr": 1e-3, "batch_size": 128}}

    def __init__(
        self,
        lr: float | None = None,
        merge: Literal["sequential", "parallel"] = "sequential",
        templates: str | list[str] | None = None,
        rounds: int = 5,
        temperature: float = 0.01,
        steps: int = 2,
        reset: Reset = "batch",
        **kwargs: Any,
    ) -> None:
        super().__init__(lr=lr, steps=steps, prediction="after", reset=reset, **kwargs)
        if merge not in ("sequential", "parallel"):
            raise InputError(f"merge must be 'sequential' or 'parallel', got {merge!r}")
        if rounds < 1:
            raise InputError(f"rounds must be at least 1, got {rounds}")
        if not 0 < temperature < float("inf"):
            raise InputError(f"temperature must be positive and finite, got {temperature}")
        self.merge, self.rounds, self.temperature = merge, rounds, temperature
        self.templates = templates_of(list(_TEMPLATES) if templates is None else templates)

    def configure(self, net: AdaptiveNetwork) -> None:
        """Encode the class names in all templates."""
        super().configure(net)
        #: Unit vectors of each template, (T, C, D), and their mean, unit vectors as well.
        self._texts = torch.stack([self.encode(self._prompts.texts(template)) for template in self.templates])
        self._mean = F.normalize(self._texts.mean(0), dim=1)

    def adapt(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Adapt to the batch in all rounds, and predict it."""
        for number in range(self.rounds):
            self._round(net, images, is_first=number == 0)
        return self.predict(net, images)

    def _round(self, net: AdaptiveNetwork, images: Tensor, is_first: bool) -> None:
        """Step with each template, and set the weights to the mean of what they have left."""
        begin = [leaf.detach().clone() for leaf in net.leaves]
        total = [torch.zeros_like(leaf) for leaf in begin]
        for number, texts in enumerate(self._texts):
            if self.merge == "parallel" and number > 0:
                _set(net, begin)
                if is_first and net.optimizer is not None:
                    net.optimizer.state.clear()
            for _ in range(self.steps):
                self._step(net, images, texts)
            torch._foreach_add_(total, [leaf.detach() for leaf in net.leaves])
        torch._foreach_div_(total, len(self._texts))
        _set(net, total)

    def _step(self, net: AdaptiveNetwork, images: Tensor, texts: Tensor) -> None:
        features = self.read(net, images).vectors
        logits = self.cosine_logits(features, texts)
        own = texts[logits.detach().argmax(1)]
        losses = transductive_loss(features, own, self._head.scale, self.temperature)
        self.backward(net, losses, None, Outputs(logits, features))
        self.optimizer_step(net)

    def losses(self, net: AdaptiveNetwork, images: Tensor, outputs: Outputs) -> Tensor:
        """Return the entropy of each prediction: steps are made on the losses of templates."""
        return outputs.entropies

    @torch.no_grad()
    def predict(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Predict the batch by the mean of the text features of all templates."""
        return self.cosine_logits(self.read(net, images).vectors, self._mean)

    def export(self, net: AdaptiveNetwork, module: nn.Module) -> None:
        """Let the copy have the mean of the text features of all templates."""
        super().export(net, module)
        set_classifier(net, module, self._mean)

    def protocol(self) -> dict[str, Any]:
        """Return the settings that are saved with a result, so that results can be compared."""
        names = ("merge", "templates", "rounds", "temperature")
        return super().protocol() | {name: getattr(self, name) for name in names}


@torch.no_grad()
def _set(net: AdaptiveNetwork, values: list[Tensor]) -> None:
    """Set what the optimizer moves to other values."""
    torch._foreach_copy_(list[Tensor](net.leaves), values)
