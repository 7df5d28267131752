"""ActMAD: activations whose means and variances match the source's, position by position."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import chain
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ttalight.adapters.components.activation_moments import (
    Moments,
    affine_moments,
    collect_moments,
    measure_moments,
    moment_distance,
)
from ttalight.adapters.components.moments_file import add_bytes, measure_and_write, read_moments, weights_sha256
from ttalight.adapters.self_training import SelfTrainingAdapter
from ttalight.adapters.source_data import SourceDataAdapter
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError
from ttalight.models.network import Network, Outputs, Selection
from ttalight.models.norm import NormLayer

__all__ = ["ActMAD"]


class ActMAD(SourceDataAdapter, SelfTrainingAdapter):
    """Aligns the means and variances of activations with the source's, at each position of each map.

    The activations are the outputs of the normalisation layers, which keep their running statistics. The loss is half
    the sum over layers of the mean absolute differences between the batch's and the source's means, and between their
    variances. All weights in front of the last of these layers adapt. One forward and one backward a batch, and one
    forward for the prediction after the step.

    The source's means and variances are measured once, when the first batch arrives, on the images of ``source``, or in
    a Lightning run on images of the data module's validation set. Without any the method warns, and takes the weights
    and biases of BatchNorm layers in their place: with its running statistics such a layer has on the source a mean
    equal to its bias and a standard deviation equal to its weight, over all positions.

    Source: M. J. Mirza, P. Jané Soneira, W. Lin, M. Kozinski, H. Possegger, H. Bischof, *ActMAD: Activation Matching to
    Align Distributions for Test-Time-Training*, CVPR 2023, arXiv 2211.12870. Differences to the authors' code: images
    of source and stream are taken as they are, where theirs are cropped and flipped at random. Variances of the source
    are over all images, where theirs are the mean of those of batches. Moments are those of the layers' outputs, where
    in their network a ReLU in place has changed these before they are read. A result is that of the predictions for the
    stream, where theirs is the lowest of the errors on the whole test set after each batch.

    Args:
        source: Batches of source images (B, 3, H, W), or tuples that begin with them, as the network's forward takes
            them; read once a run, with ``statistics`` up to two times.
        source_samples: Number of images that are measured.
        statistics: File of the source's means and variances. One of the same weights and images is read, otherwise it
            is written. Without source images it must be there, from an earlier run or from ``ActivationStatistics``.
        prediction: See ``SelfTrainingAdapter``.
        kwargs: See ``SelfTrainingAdapter``.

    Raises:
        ValueError: If an argument is out of range. At the first batch, if there are neither source images nor BatchNorm
            layers, if ``statistics`` is of other weights and there are no images to measure, or if source images have
            another size than the stream's.
    """

    norm = "source"
    published_parameters: Selection = "all"
    published: ClassVar[dict[str, dict[str, Any]]] = {
        name: {
            "optimizer": "SGD", "momentum": 0.9, "nesterov": True, "weight_decay": 5e-4, "lr": lr, "batch_size": 128,
        }
        for name, lr in (("cifar", 1e-2), ("cifar100", 1e-3), ("imagenet", 2.5e-4))
    }  # fmt: skip

    def __init__(
        self,
        source: Iterable[Any] | None = None,
        source_samples: int = 5000,
        statistics: str | None = None,
        prediction: Literal["before", "after"] = "after",
        **kwargs: Any,
    ) -> None:
        super().__init__(source=source, prediction=prediction, **kwargs)
        if source_samples < 1:
            raise InputError(f"source_samples must be at least 1, got {source_samples}")
        self.source_samples, self.statistics = source_samples, statistics
        #: Means and variances of the source in turns, and whether they are those of channels.
        self._source: list[Tensor] = []
        self._of_channels = False
        self._found: Moments = []

    def check(self, net: Network) -> None:
        """Check that there are parameters to adapt, and normalisation layers."""
        super().check(net)
        if not net.norms:
            raise InputError(
                f"{type(net.module).__name__} has no BatchNorm, GroupNorm or LayerNorm, whose outputs ActMAD aligns: "
                "use another network or another method"
            )
        is_given = self.statistics is not None or self._images.given is not None or self._images.trainer is not None
        if not is_given and not channel_layers(net):
            raise InputError(
                f"{type(net.module).__name__} has no BatchNorm layer with running statistics, which could stand in for "
                "the source's: give source= (an iterable of batches of images), or statistics= (a file)"
            )

    def configure(self, net: AdaptiveNetwork) -> None:
        """Set the parameters to adapt, keep running statistics, and measure the source."""
        net.set_trainable(net.select(self.parameters))
        net.set_norm_mode("source")
        if net.images is None:
            saved = [value for name, value in net.saved.items() if name.startswith("method.moments.")]
            self._source = [torch.empty_like(value, device=net.device) for value in saved]
            self._of_channels = all(value.ndim == 1 for value in saved)
        else:
            self._source = [value.to(net.device) for value in chain(*self._of_source(net))]
        self._layers = channel_layers(net) if self._of_channels else net.norms

    def method_state(self) -> dict[str, Tensor]:
        """Return the source's means and variances, in turns."""
        return {f"moments.{number}": value for number, value in enumerate(self._source)}

    def update(self, net: AdaptiveNetwork, images: Tensor, step: int) -> Tensor:
        """Make one step; see ``SelfTrainingAdapter``."""
        with collect_moments(net, self._layers, self._of_channels) as found:
            outputs = net(images)
            self._found = list(found)  # a pass that is recomputed for the gradient adds more
            self.backward(net, self.losses(net, images, outputs), self.weigh(net, images, outputs), outputs)
        self.optimizer_step(net)
        return outputs.logits

    def losses(self, net: AdaptiveNetwork, images: Tensor, outputs: Outputs) -> Tensor:
        """Return the distance of the batch's moments from the source's for each image; it is that of the batch."""
        found, self._found = self._found, []
        return moment_distance(found, list(zip(self._source[::2], self._source[1::2], strict=True))).expand(len(images))

    def protocol(self) -> dict[str, Any]:
        """Return the settings that are saved with a result; ``moments`` says what the source's are of."""
        moments = "channels" if self._of_channels else "positions"
        return super().protocol() | {"source_samples": self.source_samples, "moments": moments}

    # -- the source

    def _of_source(self, net: AdaptiveNetwork) -> Moments:
        """Return the source's moments: from the file, from images, or those of the layers' weights and biases."""
        self._of_channels = False
        if self.statistics is not None:
            return self._of_file(net, self.statistics)
        batches = self.source_batches(
            net,
            self.source_samples,
            "weights and biases of BatchNorm layers stand in for the source's statistics, a channel each",
            ", or statistics= (a file of them)",
        )
        if batches is not None:
            return measure_moments(net, net.norms, (batch.images for batch in batches))
        self._of_channels = True
        return affine_moments(channel_layers(net))

    def _of_file(self, net: AdaptiveNetwork, path: str) -> Moments:
        weights, images = weights_sha256(net.module), None
        if self._images.given is not None:
            digest = hashlib.sha256()
            for batch in self._images.batches(self.source_samples, net.seed) or ():
                add_bytes(digest, batch.images)
            images = digest.hexdigest()
        moments = read_moments(path, weights, images)
        if moments is None:
            batches = self._images.batches(self.source_samples, net.seed)
            if batches is None:
                raise InputError(
                    f"statistics={path!r} is missing or of other weights, and there are no source images to measure: "
                    "give source=, or the file that ActivationStatistics left with these weights"
                )
            moments = measure_and_write(net, (batch.images for batch in batches), path, weights)
        return moments


def channel_layers(net: Network) -> list[NormLayer]:
    """Return the BatchNorm layers of a network that have running statistics."""
    return [layer for layer in net.norms if layer.is_batch_norm and layer.statistics]
