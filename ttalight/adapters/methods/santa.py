"""SANTA: predictions anchored in the source model, features aligned with source prototypes."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from ttalight.adapters.prototype_contrast import PrototypeContrastAdapter
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.losses import symmetric_cross_entropy

__all__ = ["SANTA"]


class SANTA(PrototypeContrastAdapter):
    """Keeps predictions near those of the source model, and contrasts images with source prototypes.

    The source model is the anchor: it predicts each batch with the statistics of the batch. The disagreement of a
    prediction p with the anchor's q is -sum p log q, averaged over an image and an augmented copy of it, which pulls p
    to the class that the anchor is surest of. The contrastive loss has three views of an image: its feature, that of
    the copy, and the source prototype that is nearest to the first by cosine. A projector, trained with the weights of
    the normalisation layers, maps them to the vectors that are compared.

    Prototypes are class means of the features of source images, with the statistics of their batches: those of
    ``source``, or in a Lightning run images of the data module's validation set, drawn at random. The class of an image
    is its label or, in batches without labels, the one that the source model predicts. Without source images the rows
    of the classifier stand in for the means, with a warning.

    A batch costs two forwards with one backward through both, and one forward of the anchor; before the first batch
    there is a forward for each batch of source images. The prediction is that of the first forward.

    Source: G. Chakrabarty, M. Sreenivas, S. Biswas, *SANTA: Source Anchoring Network and Target Alignment for Continual
    Test Time Adaptation*, TMLR 2023, after the public benchmark of R. Marsden, M. Döbler, B. Yang (arXiv 2306.00650),
    since the authors' repository holds no code. Its settings and optimizers are ``published``; its continual streams
    never reset: ``reset="never"``. Differences to it: augmentations are drawn for each image, not once for a batch;
    a class without a source image has no prototype (there it is NaN); and source images need no labels.

    Args:
        source: Batches of source images (B, 3, H, W), or tuples of images and labels, as the network's forward takes
            them; read once a run, so lists and data loaders serve any number of runs.
        source_samples: Number of images that prototypes are the mean of, at most.
        mean: Channel means of a normalisation outside the network; see ``pixel_space``.
        std: Channel standard deviations of it.
        kwargs: See ``SelfTrainingAdapter``.

    Raises:
        ValueError: If an argument is out of range; at the first batch, if the network predicts pixel by pixel, its
            classifier cannot be found, or ``source`` gives no images or labels that are not its classes.
        TypeError: At the first batch, if ``source`` gives something else than images.
    """

    published: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar": {"optimizer": "Adam", "lr": 1e-3, "batch_size": 200},
        "imagenet": {"optimizer": "SGD", "momentum": 0.9, "nesterov": True, "lr": 0.01, "batch_size": 64},
    }

    def reference(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Return the logits of the source model with the batch's statistics, (B, C)."""
        with net.with_weights(net.source):
            return net(images).logits

    def disagreement(self, logits: Tensor, reference: Tensor) -> Tensor:
        """Return the cross-entropy -sum p log q of predictions p to the anchor's q, (B,)."""
        return symmetric_cross_entropy(logits, reference, share=1.0)
