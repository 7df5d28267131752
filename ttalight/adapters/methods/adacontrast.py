"""AdaContrast: labels refined by neighbours, contrast with a queue of keys, diverse predictions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ttalight.adapters.components.image_predictions import check_image_predictions
from ttalight.adapters.components.moco_view import moco_view
from ttalight.adapters.components.neighbors import FeatureBank
from ttalight.adapters.components.pixel_space import PixelSpace, check_normalization, pixel_space
from ttalight.adapters.components.teacher import Teacher
from ttalight.adapters.self_training import SelfTrainingAdapter
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError
from ttalight.losses import marginal_entropy, queue_contrastive_loss
from ttalight.models.network import Network, Outputs, Selection
from ttalight.seeding import derive_seed
from ttalight.transforms import random_horizontal_flip

__all__ = ["AdaContrast"]


class AdaContrast(SelfTrainingAdapter):
    """Trains all weights on labels that neighbours refine, and on a contrast of two strong views.

    Each image has a weak view (mirrored or not) and two strong ones, queries and keys. Its label is the class of the
    largest mean probability among the neighbours of the weak view's feature in a bank of earlier images; until
    ``refine_after`` images were seen it is the network's own. The loss is the cross-entropy of the query's prediction
    to the label, the contrast of the query's feature with that of its key and with a queue of earlier keys, those of
    images with the same label left out, minus the entropy of the mean prediction of the queries. Keys, and the entries
    of the bank, come from a second set of weights, the running mean of the first. BatchNorm layers normalise the views
    with statistics of the batch, which move the running ones; predictions have these, after the step.

    A batch costs three forwards of the network, through one of which the backward goes, and two of the second set of
    weights. There are copies of all weights, and the features of ``queue`` images twice, with their probabilities.

    Source: D. Chen, D. Wang, T. Darrell, S. Ebrahimi, *Contrastive Test-Time Adaptation*, CVPR 2022, arXiv 2204.10377,
    in the online form of the public benchmark of R. Marsden, M. Döbler, B. Yang (arXiv 2306.00650), whose settings are
    the defaults. Its continual streams never reset: ``reset="never"``. Differences to it: strong views are never
    cropped (there they are for photographs without corruptions); the labels of the queue are those of the keys that it
    holds (there the places that a batch is about to take have its labels already); the bank drops its oldest entries
    (there it begins at other places); and views are not rounded to 8 bits.

    Args:
        lr: Learning rate of SGD with Nesterov momentum 0.9 and weight decay 1e-4; 2e-4 by default.
        neighbors: Neighbours of a feature, at least 1.
        queue: Images in the bank, and keys in the queue, at least 1.
        refine_after: Number of images from which on labels are refined, at least 1.
        temperature: Of the contrastive loss, above 0.
        key_momentum: Share of the second set of weights that stays in each step, in [0, 1].
        prediction: See ``SelfTrainingAdapter``.
        mean: Channel means of a normalisation outside the network; see ``pixel_space``.
        std: Channel standard deviations of it.
        kwargs: See ``SelfTrainingAdapter``.

    Raises:
        ValueError: If an argument is out of range; at the first batch, if the network predicts pixel by pixel or its
            classifier cannot be found.
    """

    norm = "ema"
    prediction_norm = "source"
    published_parameters: Selection = "all"
    published: ClassVar[dict[str, dict[str, Any]]] = {
        name: {"optimizer": "SGD", "momentum": 0.9, "nesterov": True, "weight_decay": 1e-4, "lr": 2e-4}
        for name in ("cifar", "imagenet")
    }

    def __init__(
        self,
        lr: float | None = None,
        neighbors: int = 10,
        queue: int = 16384,
        refine_after: int = 1024,
        temperature: float = 0.07,
        key_momentum: float = 0.999,
        prediction: Literal["before", "after"] = "after",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(lr=lr, prediction=prediction, **kwargs)
        for name, value in (("neighbors", neighbors), ("queue", queue), ("refine_after", refine_after)):
            if value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if temperature <= 0:
            raise InputError(f"temperature must be above 0, got {temperature}")
        if not 0 <= key_momentum <= 1:
            raise InputError(f"key_momentum must lie in [0, 1], got {key_momentum}")
        check_normalization(mean, std)
        self.neighbors, self.queue, self.refine_after = neighbors, queue, refine_after
        self.temperature, self.key_momentum = temperature, key_momentum
        self.mean, self.std = mean, std
        self._space = PixelSpace()
        #: Of the present batch: features and labels of the keys, and the weak views.
        self._seen: tuple[Tensor, Tensor, Tensor] | None = None

    def check(self, net: Network) -> None:
        """Check that there are parameters to adapt, and a classifier."""
        super().check(net)
        net.classifier.check()

    def configure(self, net: AdaptiveNetwork) -> None:
        """Set the trainable parameters, let statistics move, and fill the queue with random keys of random labels."""
        super().configure(net)
        self._space = pixel_space(net, self.mean, self.std)
        self._second = Teacher(net, name="key")
        net.set_norm_mode("ema")
        weight, possible = net.head.weight, net.possible_classes.nonzero()[:, 0]
        generator = torch.Generator().manual_seed(derive_seed(net.seed, "queue"))
        keys = torch.randn(self.queue, weight.shape[1], generator=generator).to(weight)
        labels = possible[torch.randint(len(possible), (self.queue,), generator=generator).to(possible.device)]
        self._keys = FeatureBank(keys, labels)
        self._bank = FeatureBank(torch.zeros_like(keys), weight.new_zeros(self.queue, len(weight)))

    def method_state(self) -> dict[str, Tensor]:
        """Return the second set of weights, the queue and the bank."""
        stores = {"queue": self._keys, "bank": self._bank}
        return self._second.state() | {
            f"{name}.{part}": v for name, store in stores.items() for part, v in store.state.items()
        }

    def adapt(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Step on the batch."""
        before = self.predict(net, images) if self.prediction == "before" else None
        logits = super().adapt(net, images)
        return logits if before is None else before

    def update(self, net: AdaptiveNetwork, images: Tensor, step: int) -> Tensor:
        """Make one step, and return the logits of the queries; see ``SelfTrainingAdapter``."""
        draws, pixels = net.draws(step), self._space.to_pixels(images)
        with torch.no_grad():
            views = (random_horizontal_flip(pixels, 0.5, draws), moco_view(pixels, draws), moco_view(pixels, draws))
            weak, queries, keys = map(self._space.from_pixels, views)
            outputs = net(weak)
            check_image_predictions(outputs.logits, type(self).__name__, "compares predictions of altered images")
            self._second.follow(net, self.key_momentum)
            self._seen = self._pass_keys(net, keys).vectors, self._refined(outputs), weak
        try:
            return super().update(net, queries, step)
        finally:
            self._seen = None

    def losses(self, net: AdaptiveNetwork, images: Tensor, outputs: Outputs) -> Tensor:
        """Return losses of the queries whose mean is that of AdaContrast; the diversity of the batch is in each."""
        assert self._seen is not None, "update has seen the other views"
        keys, labels, _ = self._seen
        excluded = labels[:, None] == self._keys.values
        contrast = queue_contrastive_loss(outputs.vectors, keys, self._keys.features, self.temperature, excluded)
        classification = F.cross_entropy(outputs.logits, labels, reduction="none")
        return classification + contrast - marginal_entropy(outputs.logits)

    def after_step(self, net: AdaptiveNetwork) -> None:
        """Add the keys to the queue, and the weak views to the bank."""
        assert self._seen is not None, "update has seen the other views"
        keys, labels, weak = self._seen
        self._keys.add(keys, labels)
        outputs = self._pass_keys(net, weak)
        self._bank.add(outputs.vectors, outputs.logits.softmax(1))

    @torch.no_grad()
    def _pass_keys(self, net: AdaptiveNetwork, images: Tensor) -> Outputs:
        with self._second.active(net):
            return net(images, norm="batch")

    def _refined(self, outputs: Outputs) -> Tensor:
        """Return the labels of weak views, (B,)."""
        near = self._bank.average_of_nearest(outputs.vectors, self.neighbors).argmax(1)
        return torch.where(self._bank.seen >= self.refine_after, near, outputs.logits.argmax(1))

    def check_defaults(self, classes: int) -> None:
        """Warn of nothing: the settings for CIFAR and ImageNet are the same."""

    def protocol(self) -> dict[str, Any]:
        """Return the settings that are saved with a result, so that results can be compared."""
        names = ("neighbors", "queue", "refine_after", "temperature", "key_momentum")
        return super().protocol() | {name: getattr(self, name) for name in names} | self._space.protocol()
