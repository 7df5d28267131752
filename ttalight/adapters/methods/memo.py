"""MEMO: one prediction for all views of an image."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ttalight.adapters.components.image_predictions import check_image_predictions
from ttalight.adapters.components.pixel_space import PixelSpace, check_normalization, pixel_space
from ttalight.adapters.gradient import GradientAdapter
from ttalight.adapters.self_training import check_selection
from ttalight.adapters.term import add_terms
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError
from ttalight.losses import marginal_entropy
from ttalight.models.network import Network, Selection
from ttalight.transforms import AugMixViews

__all__ = ["MEMO"]


class MEMO(GradientAdapter):
    """Minimises, for each image by itself, the entropy of the mean prediction over augmented views of it.

    The published protocol is episodic: an image is adapted to from the source weights, then predicted (``after``), and
    all is forgotten. A batch of B images is B such episodes, one after the other, which is why streams of single images
    cost the same: ``views`` forwards and backwards and one more forward for each image. ``joint=True`` makes one step
    on all views of all images instead, which is as many passes in two calls of the network: faster by far, with views
    and batch statistics shared, and not the published method. With ``reset`` other than ``batch`` what one image taught
    is kept for the next.

    BatchNorm normalises with statistics mixed of the source's and the views', which weigh 1 / (prior + 1); the image
    is then predicted with statistics mixed of the source's and its own.

    Source: M. Zhang, S. Levine, C. Finn, *MEMO: Test Time Robustness via Adaptation and Augmentation*, NeurIPS 2022,
    arXiv 2110.09506; the mixture of statistics is that of S. Schneider et al., NeurIPS 2020, arXiv 2006.16971. Views
    are those of ``AugMixViews``, where the differences to the authors' code are named. The variance of the views that
    is mixed is the biased one, over n values a channel; the authors' code mixes the unbiased one, n / (n - 1) times as
    large. The authors' network for CIFAR has GroupNorm, so that the mixture is their choice for ImageNet only.

    Args:
        lr: Learning rate of plain SGD; 0.005 by default.
        views: Views of an image.
        joint: Make one step on all images of a batch.
        prior: The images N that the source statistics count as, at least 0.
        crop: How views are cropped; see ``AugMixViews``.
        parameters: What may adapt; see ``SelfTrainingAdapter``.
        mean: Channel means of a normalisation outside the network; see ``pixel_space``.
        std: Channel standard deviations of it.
        reset: See ``Adapter``.
        kwargs: See ``GradientAdapter`` and ``Adapter``.

    Raises:
        ValueError: If an argument is out of range; at the first batch, if the network predicts pixel by pixel.
    """

    norm = "alpha"
    prediction = "after"
    published: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar": {"optimizer": "SGD", "lr": 0.005, "batch_size": 1, "views": 32},
        "imagenet": {"optimizer": "SGD", "lr": 2.5e-4, "batch_size": 1, "views": 64, "crop": "resized"},
    }

    def __init__(
        self,
        lr: float | None = None,
        views: int = 32,
        joint: bool = False,
        prior: float = 16.0,
        crop: Literal["padded", "resized"] = "padded",
        parameters: Selection = "all",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        reset: Literal["domain", "batch", "never"] | int = "batch",
        **kwargs: Any,
    ) -> None:
        super().__init__(lr=lr, reset=reset, **kwargs)
        if self.steps < 1:
            raise InputError(f"steps must be at least 1, got {self.steps}")
        if views < 1:
            raise InputError(f"views must be at least 1, got {views}")
        if prior < 0:
            raise InputError(f"prior must be at least 0, got {prior}")
        check_normalization(mean, std)
        self.views = views
        self.joint = joint
        self.prior = prior
        self.crop = crop
        self.parameters: Selection = parameters
        self.prediction_norm = "alpha" if joint else "image"
        self.mean, self.std = mean, std
        self._augmentation = AugMixViews(crop)
        self._space = PixelSpace()

    def check(self, net: Network) -> None:
        """Check that there are parameters to adapt, and layers whose statistics can be chosen."""
        check_selection(net, self.parameters)
        for layer in net.norms:
            layer.check()

    def configure(self, net: AdaptiveNetwork) -> None:
        """Set the trainable parameters and mix the statistics."""
        net.set_trainable(net.select(self.parameters))
        net.set_norm_mode("alpha")
        for layer in net.norms:
            layer.alpha = 1 / (self.prior + 1)
        self._space = pixel_space(net, self.mean, self.std)

    def adapt(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Adapt to each image and predict it, or to all at once."""
        if self.joint or len(images) == 1:
            return self._episode(net, images, 0, 1.0)
        logits = []
        for index in range(len(images)):
            if index and self.reset == "batch":
                net.reset()
            logits.append(self._episode(net, images[index : index + 1], index, 1 / len(images)))
        return torch.cat(logits)

    def _episode(self, net: AdaptiveNetwork, images: Tensor, index: int, batches: float) -> Tensor:
        """Step on the views of some images, then predict these.

        Args:
            net: The network.
            images: (B, 3, H, W).
            index: Number of the episode within the batch.
            batches: The images as a share of the batch, for the cost.
        """
        pixels = self._space.to_pixels(images)
        for step in range(self.steps):
            views = self._augmentation(pixels, net.draws(index * self.steps + step), self.views)
            outputs = net(self._space.from_pixels(views), batches=self.views * batches)
            logits = outputs.logits
            check_image_predictions(logits, "MEMO", "averages predictions over cropped and turned views")
            losses = marginal_entropy(logits.view(self.views, len(images), -1).transpose(0, 1))
            added = add_terms(logits.new_zeros(len(logits)), self.terms, net, outputs)
            net.step(losses + added.view(self.views, -1).mean(0))
        with torch.no_grad():
            return net(images, batches=batches).logits

    def protocol(self) -> dict[str, Any]:
        """Return what a result must say about this method to be comparable."""
        settings = {"views": self.views, "joint": self.joint, "prior": self.prior, "crop": self.crop}
        return super().protocol() | settings | self._space.protocol()
