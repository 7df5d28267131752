"""CLIPArTT: each image learns from a prompt of its likeliest classes."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ttalight.adapters.text import TextAdapter
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.engine.method import Reset
from ttalight.errors import InputError
from ttalight.losses.text_alignment import transductive_loss
from ttalight.models.network import Outputs

__all__ = ["CLIPArTT"]


class CLIPArTT(TextAdapter):
    """Pairs each image with a prompt of the names of its likeliest classes, and trains on the pairs of the batch.

    The prompt of three classes is "a photo of a cat or dog or frog". Targets are the similarities of the batch's images
    and of its prompts, so that images of the same classes share them; see ``transductive_loss``. The published protocol
    is episodic: each batch is adapted to from the source weights in ten steps, then predicted. The weights and biases
    of the normalisation layers of the image tower adapt; BatchNorm keeps the source's statistics.

    In each step the classes are those of the present model. One forward serves for them and for the loss, and a prompt
    is encoded once a batch. Eleven forwards and ten backwards a batch.

    Source: G. A. Vargas Hakim, D. Osowiechi, M. Noori, M. Cheraghalikhani, A. Bahri, M. Yazdanpanah, I. Ben Ayed,
    C. Desrosiers, *CLIPArTT: Adaptation of CLIP to New Domains at Test Time*, WACV 2025, arXiv 2405.00754, from the
    paper.

    Args:
        lr: Learning rate of Adam; 0.001 by default.
        classes: Names in a prompt, K.
        template: Prompt with ``{}`` in the place of the names.
        temperature: Of the targets.
        steps: Gradient steps for each batch.
        prediction: ``after``, or ``before`` for the forward of the last step.
        reset: See ``Adapter``.
        kwargs: See ``SelfTrainingAdapter``, ``GradientAdapter`` and ``Adapter``.

    Raises:
        ValueError: If an argument is out of range; in ``wrap``, if the network has no text tower.
    """

    published: ClassVar[dict[str, dict[str, Any]]] = {"cifar": {"optimizer": "Adam", "lr": 1e-3, "batch_size": 128}}

    def __init__(
        self,
        lr: float | None = None,
        classes: int = 3,
        template: str = "a photo of a {}",
        temperature: float = 0.01,
        steps: int = 10,
        prediction: Literal["before", "after"] = "after",
        reset: Reset = "batch",
        **kwargs: Any,
    ) -> None:
        super().__init__(lr=lr, steps=steps, prediction=prediction, reset=reset, **kwargs)
        if classes < 1:
            raise InputError(f"classes must be at least 1, got {classes}")
        if "{}" not in template:
            raise InputError(f"template needs {{}} in the place of the names, got {template!r}")
        if not 0 < temperature < float("inf"):
            raise InputError(f"temperature must be positive and finite, got {temperature}")
        self.classes, self.template, self.temperature = classes, template, temperature

    def adapt(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Step on the batch."""
        # No prompt is kept longer: its last bits depend on the prompts beside it, and a resumed run has none of before.
        self._encoded: dict[tuple[int, ...], Tensor] = {}
        return super().adapt(net, images)

    def losses(self, net: AdaptiveNetwork, images: Tensor, outputs: Outputs) -> Tensor:
        """Return the loss of each image with its own prompt."""
        count = min(self.classes, outputs.logits.shape[1])
        likeliest = outputs.logits.detach().topk(count, dim=1).indices
        texts = self._texts([tuple(row) for row in likeliest.tolist()])
        return transductive_loss(outputs.vectors, texts, self._head.scale, self.temperature)

    def update(self, net: AdaptiveNetwork, images: Tensor, step: int) -> Tensor:
        """Make one step; see ``SelfTrainingAdapter``."""
        outputs = self.read(net, images)
        self.backward(net, self.losses(net, images, outputs), None, outputs)
        self.optimizer_step(net)
        return outputs.logits

    def _texts(self, groups: list[tuple[int, ...]]) -> Tensor:
        """Return unit vectors of prompts, (B, D), of the classes of each image."""
        if missing := [group for group in dict.fromkeys(groups) if group not in self._encoded]:
            names = self._prompts.names
            texts = [self.template.replace("{}", " or ".join(names[place] for place in group)) for group in missing]
            self._encoded |= dict(zip(missing, self.encode(texts), strict=True))
        return torch.stack([self._encoded[group] for group in groups])

    def protocol(self) -> dict[str, Any]:
        """Return the settings that are saved with a result, so that results can be compared."""
        return super().protocol() | {name: getattr(self, name) for name in ("classes", "template", "temperature")}
