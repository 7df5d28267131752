"""EATA: ETA with a penalty that keeps the weights that matter on source images near the source."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ttalight.adapters.components.regularization import ewc_penalty_and_gradient
from ttalight.adapters.methods.eta import ETA
from ttalight.adapters.source_data import SourceDataAdapter
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError
from ttalight.models.vectors import flatten, gradient_vector

__all__ = ["EATA"]


class EATA(SourceDataAdapter, ETA):
    """ETA with ``fisher_weight`` times the distance to the source weights, each weight by its Fisher information.

    The Fisher information is the mean over batches of the squared gradient of a batch's cross-entropy to the network's
    own labels, at the source weights and with the statistics that the method adapts with. It takes one forward and
    one backward for each of these batches, then ETA's one forward and one backward a batch.

    ``fisher="source"`` reads source images once, when the first batch arrives: the batches of ``source``, or in a
    Lightning run images of the data module's validation set, drawn at random. Labels are not used. Without any the
    method warns and runs as ETA. ``fisher="stream"`` needs none: until ``fisher_samples`` images of the stream have
    been seen, each batch is first passed forward and backward through the source weights. A reset starts this again.

    Source: S. Niu, J. Wu, Y. Zhang, Y. Chen, S. Zheng, P. Zhao, M. Tan, *Efficient Test-Time Model Adaptation without
    Forgetting*, ICML 2022, arXiv 2204.02610. The settings for CIFAR are those of the benchmark of R. Marsden, M.
    Döbler, B. Yang, arXiv 2306.00650. The authors take the images of their test set without corruptions; ``stream``
    is ours. See ``ETA`` for other differences.

    Args:
        source: Batches of source images (B, 3, H, W), or tuples that begin with them, as the network's forward takes
            them; read once a run, so lists and data loaders serve any number of runs.
        fisher: Where the Fisher information comes from.
        fisher_samples: Number of images that it is measured on.
        fisher_weight: Weight of the penalty; 0 is ETA.
        kwargs: See ``ETA``.

    Raises:
        ValueError: If an argument is out of range; at the first batch, if ``source`` gives no images.
        TypeError: At the first batch, if ``source`` gives something else than images.
    """

    shards_batches = True

    published: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar": {**ETA.published["cifar"], "fisher_weight": 1.0},
        "cifar100": {**ETA.published["cifar100"], "fisher_weight": 1.0},
        "imagenet": {**ETA.published["imagenet"], "fisher_weight": 2000.0},
    }

    def __init__(
        self,
        source: Iterable[Any] | None = None,
        fisher: Literal["source", "stream"] = "source",
        fisher_samples: int = 2000,
        fisher_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(source=source, **kwargs)
        if fisher not in ("source", "stream"):
            raise InputError(f"fisher must be 'source' or 'stream', got {fisher!r}")
        if fisher_samples < 1:
            raise InputError(f"fisher_samples must be at least 1, got {fisher_samples}")
        if fisher_weight < 0:
            raise InputError(f"fisher_weight must be at least 0, got {fisher_weight}")
        self.fisher = fisher
        self.fisher_samples = fisher_samples
        self.fisher_weight = fisher_weight
        #: Fisher information of all trainable parameters, (N,), NaN where it could not be measured. None before a run.
        self._importance: Tensor | None = None
        self._is_measured: bool | None = None

    def configure(self, net: AdaptiveNetwork) -> None:
        """Set the affines to adapt, and measure which of them matter."""
        super().configure(net)
        # In host memory: reading these counts does not wait for the device.
        self._seen = {"batches": torch.zeros((), dtype=torch.int64), "samples": torch.zeros((), dtype=torch.int64)}
        self._importance = torch.zeros_like(flatten(net.parameters))
        self._is_measured = None
        if self.fisher_weight > 0 and self.fisher == "source":
            # Without images it is part of the state that follows. A prediction needs none.
            measures = net.images is not None and not net.is_bad
            self._importance.copy_(self._of_source(net)) if measures else self._importance.fill_(torch.nan)

    def method_state(self) -> dict[str, Tensor]:
        """Return ETA's state and the Fisher information, with the counts that it is the mean of."""
        importance = {"fisher": self._importance} if self._importance is not None and self.fisher_weight else {}
        counts = {f"fisher.{name}": value for name, value in self._seen.items()}
        return super().method_state() | importance | (counts if self.fisher == "stream" else {})

    def adapt(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Step on the batch, after measuring the Fisher information on it where that comes from the stream."""
        if self.fisher == "stream" and self._penalized():
            self._add_batch(net, images)
        return super().adapt(net, images)

    def penalty_gradient(self, net: AdaptiveNetwork) -> tuple[Tensor, Tensor] | None:
        """Return the gradient of the penalty on the distance to the source weights, and the penalty."""
        if not self._penalized():
            return None
        return ewc_penalty_and_gradient(net.parameters, net.source_vector, self.fisher_weight, self._importance)

    def protocol(self) -> dict[str, Any]:
        """Return what a result must say about this method to be comparable; ``fisher`` is None where it ran as ETA."""
        return super().protocol() | {
            "fisher": None if self._importance is not None and not self._penalized() else self.fisher,
            "fisher_samples": self.fisher_samples,
            "fisher_weight": self.fisher_weight,
        }

    # -- the Fisher information

    def _penalized(self) -> bool:
        if self._is_measured is None and self._importance is not None:
            self._is_measured = self.fisher_weight > 0 and not bool(self._importance.isnan().any())
        return bool(self._is_measured)

    def _add_batch(self, net: AdaptiveNetwork, images: Tensor) -> None:
        batches, samples = self._seen["batches"], self._seen["samples"]
        images = images[: max(0, self.fisher_samples - int(samples))]
        if len(images) == 0:
            return
        with net.with_weights(net.source):
            squares = squared_gradient(net, images)
        batches += 1
        samples += len(images)
        assert self._importance is not None
        self._importance.lerp_(squares, 1 / int(batches))

    def _of_source(self, net: AdaptiveNetwork) -> Tensor:
        without = "it runs as ETA: nothing keeps the weights near the source"
        batches = self.source_batches(net, self.fisher_samples, without, ", or set fisher='stream'")
        if batches is None:
            return torch.full_like(flatten(net.parameters), torch.nan)
        squares = [squared_gradient(net, batch.images.to(net.device)) for batch in batches]
        return sum(squares, start=torch.zeros_like(squares[0])) / len(squares)


def squared_gradient(net: AdaptiveNetwork, images: Tensor) -> Tensor:
    """Return the squared gradient of a batch's mean cross-entropy to its own labels, one vector for all parameters.

    Args:
        net: The network.
        images: (B, 3, H, W).
    """
    logits = net(images).logits
    net.backward(F.cross_entropy(logits, logits.detach().argmax(1)))
    gradient = gradient_vector(net.parameters)
    net.zero_grad()
    return gradient.square()
