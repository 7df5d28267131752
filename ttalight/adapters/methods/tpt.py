"""TPT, C-TPT and O-TPT: prompt tokens tuned for each image through the text tower."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ttalight.adapters.text import class_prompts_of
from ttalight.adapters.views import EpisodicViewAdapter, check_share, surest_views
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError
from ttalight.losses.self_training import marginal_entropy
from ttalight.models.network import Network
from ttalight.models.tuned_prompts import TunedPrompts

__all__ = ["CTPT", "OTPT", "TPT", "text_dispersion", "text_orthogonality"]


class TPT(EpisodicViewAdapter):
    """Tunes the tokens of the prompt for each image by itself, and predicts the image with the tuned prompt.

    The prompt of a class is "a photo of a cat." The embeddings of its words "a photo of a" make steps on the entropy of
    the mean prediction over the views that are surest, through the text tower. Every image begins with the words
    themselves, and both towers are frozen. The images of a batch have prompts of their own that are tuned in one pass:
    the result is that of one image at a time. ``views`` forwards of the image tower a batch, and for each image
    ``steps`` + 1 forwards and ``steps`` backwards of the texts of all classes.

    Source: M. Shu, W. Nie, D.-A. Huang, Z. Yu, T. Goldstein, A. Anandkumar, C. Xiao, *Test-Time Prompt Tuning for
    Zero-Shot Generalization in Vision-Language Models*, NeurIPS 2022, arXiv 2209.07511, after the authors' code.
    Different from it: numbers are float32 or float64, not float16 with a scaled gradient. Views pass the image tower
    once, also with several steps.

    Args:
        lr: Learning rate of AdamW.
        steps: Gradient steps for each image.
        share: Share of the views in the loss, in (0, 1]. They are chosen with the prompt as it begins.
        prompt: Words in front of the class name. The task's own templates are not used.
        weight_decay: Of AdamW.
        text_pass_size: Greatest number of texts, of classes times images, in one pass of the text tower. The texts of
            one image are passed together in any case.
        kwargs: See ``ViewAdapter``.

    Raises:
        ValueError: If an argument is out of range; in ``wrap``, if the network has no text tower.
    """

    images_are_for = ("compares predictions of random crops", "views")
    prediction = "after"
    #: Name of the weight of what a subclass adds to the loss.
    penalty: ClassVar[str | None] = None

    def __init__(
        self,
        lr: float = 5e-3,
        steps: int = 1,
        share: float = 0.1,
        prompt: str = "a photo of a",
        weight_decay: float = 0.01,
        text_pass_size: int = 1024,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, value in (("lr", lr), ("weight_decay", weight_decay)):
            if not 0 <= value < math.inf:
                raise InputError(f"{name} must be at least 0 and finite, got {value}")
        for name, count in (("steps", steps), ("text_pass_size", text_pass_size)):
            if count < 1:
                raise InputError(f"{name} must be at least 1, got {count}")
        if not prompt.strip():
            raise InputError("prompt must have a word or more, got none")
        check_share(share)
        self.lr, self.steps, self.share, self.weight_decay = lr, steps, share, weight_decay
        self.prompt, self.text_pass_size = prompt.strip(), text_pass_size

    def check(self, net: Network) -> None:
        """Check that there are a text tower and layers whose statistics can be chosen."""
        super().check(net)
        class_prompts_of(net, type(self).__name__)

    def configure(self, net: AdaptiveNetwork) -> None:
        """Find the classifier and the text tower, and encode the prompts as they begin."""
        super().configure(net)
        prompts, weight = class_prompts_of(net, type(self).__name__), net.head.weight
        self._prompts = TunedPrompts(prompts.tower.converted(weight), prompts.names, self.prompt)
        self._texts = self._encode(net, self._prompts.initial[None])[0].detach()

    def merge(self, net: AdaptiveNetwork, logits: Tensor, features: Tensor) -> Tensor:
        """Return the logits of the images with their tuned prompts, (B, C)."""
        scale, count = net.head.scale, max(1, self.text_pass_size // len(self._texts))
        parts = torch.split(F.normalize(features, dim=2), count)
        return torch.cat([self._tune(net, part, scale) for part in parts])

    def regularizer(self, texts: Tensor) -> Tensor:
        """Return what is added to the loss of each image, (B,), of its text features, unit vectors (B, C, D)."""
        return texts.new_zeros(len(texts))

    def _tune(self, net: AdaptiveNetwork, units: Tensor, scale: float | Tensor) -> Tensor:
        """Return logits, (B, C), of the unit vectors of views, (B, V, D), the first of which is the image."""
        kept = surest_views(scale * units @ self._texts.T, self.share, units)[1]
        tokens = self._prompts.initial.expand(len(units), -1, -1).clone().requires_grad_()
        optimizer = torch.optim.AdamW([tokens], lr=self.lr, weight_decay=self.weight_decay)
        for _ in range(self.steps):
            with torch.enable_grad():
                texts = self._encode(net, tokens)
                losses = marginal_entropy(scale * kept @ texts.transpose(1, 2)) + self.regularizer(texts)
                (tokens.grad,) = torch.autograd.grad(losses.sum(), tokens)
            optimizer.step()
        with torch.no_grad():
            texts = self._encode(net, tokens)
        return torch.einsum("bd,bcd->bc", scale * units[:, 0], texts)

    def _encode(self, net: AdaptiveNetwork, tokens: Tensor) -> Tensor:
        """Return unit vectors of the classes, (B, C, D), by prompts of B images, (B, P, W)."""
        with net.precision():
            encoded = self._prompts.encode(tokens)
        return F.normalize(encoded.to(tokens.dtype), dim=2)

    def protocol(self) -> dict[str, Any]:
        """Return the settings that are saved with a result, so that results can be compared."""
        names = ("lr", "steps", "share", "prompt", "weight_decay")
        added = () if self.penalty is None else (self.penalty,)
        return super().protocol() | {"optimizer": "AdamW"} | {name: getattr(self, name) for name in (*names, *added)}


class CTPT(TPT):
    """TPT with text features that stay apart: their mean distance from their mean is rewarded.

    Source: H. S. Yoon, E. Yoon, J. T. J. Tee, M. Hasegawa-Johnson, Y. Li, C. D. Yoo, *C-TPT: Calibrated Test-Time
    Prompt Tuning for Vision-Language Models via Text Feature Dispersion*, ICLR 2024, arXiv 2403.14119, after the
    authors' code.

    Args:
        dispersion_weight: Weight of the dispersion; 50 for fine-grained sets and 20 for ImageNet's variants there.
        kwargs: See ``TPT``.

    Raises:
        ValueError: If an argument is out of range; in ``wrap``, if the network has no text tower.
    """

    penalty = "dispersion_weight"

    def __init__(self, dispersion_weight: float = 50.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 <= dispersion_weight < math.inf:
            raise InputError(f"dispersion_weight must be at least 0 and finite, got {dispersion_weight}")
        self.dispersion_weight = dispersion_weight

    def regularizer(self, texts: Tensor) -> Tensor:
        """Return the dispersion of the text features of each image, times minus its weight."""
        return -self.dispersion_weight * text_dispersion(texts)


class OTPT(TPT):
    """TPT with text features that are drawn towards right angles.

    Source: A. Sharifdeen, M. A. Munir, S. Baliah, S. Khan, M. H. Khan, *O-TPT: Orthogonality Constraints for
    Calibrating Test-time Prompt Tuning in Vision-Language Models*, CVPR 2025, arXiv 2503.12096, after public code with
    the authors' settings. The paper writes the squared Frobenius norm of the cosines less the identity. The code
    computes ``text_orthogonality``, which the weight belongs to.

    Args:
        orthogonality_weight: Weight of the distance from right angles.
        kwargs: See ``TPT``.

    Raises:
        ValueError: If an argument is out of range; in ``wrap``, if the network has no text tower.
    """

    penalty = "orthogonality_weight"

    def __init__(self, orthogonality_weight: float = 18.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if not 0 <= orthogonality_weight < math.inf:
            raise InputError(f"orthogonality_weight must be at least 0 and finite, got {orthogonality_weight}")
        self.orthogonality_weight = orthogonality_weight

    def regularizer(self, texts: Tensor) -> Tensor:
        """Return how far the text features of each image are from right angles, times the weight."""
        return self.orthogonality_weight * text_orthogonality(texts)


def text_dispersion(texts: Tensor) -> Tensor:
    """Return the mean distance of text features from their mean, (B,).

    Args:
        texts: Unit vectors, (B, C, D).
    """
    distances: Tensor = torch.linalg.vector_norm(texts - texts.mean(1, keepdim=True), dim=2)
    return distances.mean(1)


def text_orthogonality(texts: Tensor) -> Tensor:
    """Return how far text features are from right angles: the mean length of the rows of their cosines, less one, (B,).

    A row has the cosines of one class with all, itself included, so its length is one at right angles. The public code
    reflects each row onto its own axis by a Householder transformation and takes the distance to the row of the
    identity, which is the same number.

    Args:
        texts: Unit vectors, (B, C, D).
    """
    lengths: Tensor = torch.linalg.vector_norm(texts @ texts.transpose(1, 2), dim=2)
    return lengths.mean(1) - 1
