"""The base of the methods that contrast images with source prototypes and follow a reference model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from ttalight.adapters.components.image_predictions import check_image_predictions
from ttalight.adapters.components.pixel_space import PixelSpace, check_normalization, pixel_space
from ttalight.adapters.components.projector import Projector
from ttalight.adapters.components.source_images import SourceBatch
from ttalight.adapters.components.source_prototypes import nearest_prototypes, source_prototypes
from ttalight.adapters.self_training import SelfTrainingAdapter
from ttalight.adapters.source_data import SourceDataAdapter
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError
from ttalight.losses import multi_view_contrastive_loss
from ttalight.models.network import Network, Outputs
from ttalight.seeding import derive_seed
from ttalight.transforms import RandomJitterAffineFlip

__all__ = ["PrototypeContrastAdapter"]

#: Dimension of the vectors that are contrasted, as in the public code of RMT and SANTA.
_PROJECTION = 128


class PrototypeContrastAdapter(SourceDataAdapter, SelfTrainingAdapter):
    """Steps on the agreement with a reference model, and on a contrast with source prototypes.

    The loss is the mean ``disagreement`` of the predictions for an image and for an augmented copy of it with the
    reference's prediction for the image, and a weighted contrastive loss among three views of the image: its feature,
    the copy's feature, and the source prototype that is nearest to the former by cosine. A projector, trained with the
    network, maps views to the vectors that are compared.

    Prototypes are class means of the features of source images, with the statistics of their batches: those of
    ``source``, or in a Lightning run images of the data module's validation set, drawn at random. They are of the class
    of their label, or, in batches without labels, of the class that the source model predicts. Without source images
    the rows of the classifier stand in for class means, with a warning.

    Args:
        source: This and the other arguments: see ``SANTA``, which has the same.
    """

    #: Factor of the contrastive loss, and its temperature, as in the public code of RMT and SANTA.
    contrast_weight: ClassVar[float] = 1.0
    temperature: ClassVar[float] = 0.1
    #: What a method does without source images, for the warning.
    without_source: ClassVar[str] = "the rows of the classifier stand in for the mean features of its classes"

    def __init__(
        self,
        source: Iterable[Any] | None = None,
        source_samples: int = 100_000,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(source=source, **kwargs)
        if source_samples < 1:
            raise InputError(f"source_samples must be at least 1, got {source_samples}")
        check_normalization(mean, std)
        self.source_samples, self.mean, self.std = source_samples, mean, std
        self._augmentation = RandomJitterAffineFlip.with_blur_and_noise()
        self._space = PixelSpace()
        #: Source prototypes, (C, D), 0 for classes without one; and the rows of the classifier in their place.
        self._prototypes = self._rows = torch.empty(0)

    # -- hooks for subclasses

    @abstractmethod
    def reference(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Return the logits of the reference model for a batch, (B, C), without gradient."""

    @abstractmethod
    def disagreement(self, logits: Tensor, reference: Tensor) -> Tensor:
        """Return the loss of predictions with respect to the reference's, (B,).

        Args:
            logits: Of the network, (B, C), for images or for their augmented copies.
            reference: Logits of the reference, (B, C).
        """

    # -- the batch

    def check(self, net: Network) -> None:
        """Check that there are parameters to adapt, and a classifier."""
        super().check(net)
        net.classifier.check()

    def configure(self, net: AdaptiveNetwork) -> None:
        """Set the trainable parameters, a projector's among them, and measure the prototypes."""
        super().configure(net)
        self._space = pixel_space(net, self.mean, self.std)
        self._rows = net.head.weight.detach() * net.possible_classes[:, None]
        self._prototypes = self._rows.clone()
        generator = torch.Generator().manual_seed(derive_seed(net.seed, "projector"))
        self._projector = Projector(self._rows.shape[1], _PROJECTION, generator, like=self._rows)
        net.set_trainable(net.parameters, own=self._projector.parameters)
        if net.images is not None and not net.is_bad:  # else they are part of the state that follows
            batches = self.read_source(net)
            if batches is not None:
                means = source_prototypes(net, batches, type(self).__name__)
                self._prototypes.copy_(means * net.possible_classes[:, None])

    def read_source(self, net: AdaptiveNetwork) -> Iterable[SourceBatch] | None:
        """Return batches of the source. Without any, warn and return None."""
        return self.source_batches(net, self.source_samples, self.without_source)

    def method_state(self) -> dict[str, Tensor]:
        """Return the prototypes."""
        return {"prototypes": self._prototypes}

    def update(self, net: AdaptiveNetwork, images: Tensor, step: int) -> Tensor:
        """Make one step; see ``SelfTrainingAdapter``."""
        net.draws(step)  # the augmentation in ``losses``
        return super().update(net, images, step)

    def losses(self, net: AdaptiveNetwork, images: Tensor, outputs: Outputs) -> Tensor:
        """Return the disagreement with the reference and the weighted contrast of each image."""
        check_image_predictions(outputs.logits, type(self).__name__, "compares predictions of altered images")
        with torch.no_grad():
            reference = self.reference(net, images)
            copies = self._augmentation(self._space.to_pixels(images), net.generator)
        augmented = net(self._space.from_pixels(copies))
        both = self.disagreement(outputs.logits, reference) + self.disagreement(augmented.logits, reference)
        return both / 2 + self.contrast_weight * self._contrast(outputs, augmented)

    def _contrast(self, outputs: Outputs, augmented: Outputs) -> Tensor:
        clean, copies = (each.vectors.to(self._prototypes.dtype) for each in (outputs, augmented))
        views = torch.stack([nearest_prototypes(clean, self._prototypes), clean, copies], dim=1)
        return multi_view_contrastive_loss(self._projector(views), self.temperature)

    def protocol(self) -> dict[str, Any]:
        """Return the settings that are saved with a result; ``prototypes`` says what they were made from."""
        own = {name: getattr(self, name) for name in ("source_samples", "contrast_weight", "temperature")}
        is_stand_in = self._rows.numel() > 0 and torch.equal(self._prototypes, self._rows)
        own["prototypes"] = "classifier" if is_stand_in else "source"
        return super().protocol() | own | self._space.protocol()
