"""ROID: certain and diverse predictions, kept near the source by averaging weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ttalight.adapters.components.filters import redundancy
from ttalight.adapters.components.image_predictions import check_image_predictions
from ttalight.adapters.components.pixel_space import PixelSpace, check_normalization, pixel_space
from ttalight.adapters.components.regularization import ema_update_
from ttalight.adapters.self_training import SelfTrainingAdapter
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError
from ttalight.losses import soft_likelihood_ratio, symmetric_cross_entropy
from ttalight.models.network import Outputs
from ttalight.models.outputs import Select, logits_of, possible_classes, with_logits
from ttalight.transforms import RandomJitterAffineFlip

__all__ = ["ROID", "PriorCorrection", "certainty_diversity_weights", "smoothed_prior"]


class ROID(SelfTrainingAdapter):
    """Minimises a soft likelihood ratio and a symmetric cross-entropy to augmented images, both weighted.

    A sample weighs exp(diversity * certainty / temperature). Its diversity is one minus the cosine of its prediction to
    the running mean of predictions, its certainty the negative entropy, both rescaled to [0, 1] within the batch (to 0
    in a batch of equals). Samples of less than mean diversity are dropped, so at least one is always kept. After each
    step the weights move one hundredth of the way back to the source. Logits are corrected by the batch's class prior.

    A batch costs two forwards, the second of the kept images only, and one backward through both. Batch statistics of
    the second are those of the kept images. The prediction is that of the first (``before``).

    Source: R. Marsden, M. Döbler, B. Yang, *Universal Test-time Adaptation through Weight Ensembling, Diversity
    Weighting, and Prior Correction*, WACV 2024, arXiv 2306.00650. The optimizers are the authors': Adam for CIFAR, SGD
    with Nesterov momentum for ImageNet (``published``). Their tables of continual streams never reset:
    ``reset="never"``. Differences to the authors' code: augmentations are drawn for each image, not once for a batch;
    losses are divided by the number of images in the batch, not by the nominal batch size, which matters for a last,
    smaller batch; the logarithm of the likelihood ratio has no offset of 1e-5; and the prior correction, see there.

    Args:
        temperature: Of the weights, above 0.
        source_share: Share of the way back to the source weights after each step, in [0, 1].
        prior_correction: ``log`` adds the logarithm of the smoothed class prior to the logits, which is Bayes' rule
            for a source with equally frequent classes. ``published`` multiplies the logits by the prior, as the
            authors' code does: a likely class with a negative logit then loses, and the outputs are no logits.
            ``none`` leaves them.
        mean: Channel means of a normalisation outside the network; see ``pixel_space``.
        std: Channel standard deviations of it.
        kwargs: See ``SelfTrainingAdapter``.

    Raises:
        ValueError: If an argument is out of range; at the first batch, if the network has nothing to adapt or
            predicts pixel by pixel.
    """

    published: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar": {"optimizer": "Adam", "lr": 1e-3, "batch_size": 200},
        "imagenet": {"optimizer": "SGD", "momentum": 0.9, "nesterov": True, "lr": 2.5e-4, "batch_size": 64},
    }

    def __init__(
        self,
        temperature: float = 1 / 3,
        source_share: float = 0.01,
        prior_correction: Literal["log", "published", "none"] = "log",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if temperature <= 0:
            raise InputError(f"temperature must be above 0, got {temperature}")
        if not 0 <= source_share <= 1:
            raise InputError(f"source_share must lie in [0, 1], got {source_share}")
        if prior_correction not in ("log", "published", "none"):
            raise InputError(f"prior_correction must be 'log', 'published' or 'none', got {prior_correction!r}")
        check_normalization(mean, std)
        self.temperature = temperature
        self.source_share = source_share
        self.prior_correction = prior_correction
        self.mean, self.std = mean, std
        self._augmentation = RandomJitterAffineFlip()
        self._space = PixelSpace()
        self._mean_prediction = torch.empty(0)

    def configure(self, net: AdaptiveNetwork) -> None:
        """Set the trainable parameters and the batch's statistics, and begin with a uniform mean prediction."""
        super().configure(net)
        precision = torch.promote_types(net.parameters[0].dtype, torch.float32)
        possible = net.possible_classes
        self._mean_prediction = possible.to(precision) / possible.sum()
        self._space = pixel_space(net, self.mean, self.std)

    def method_state(self) -> dict[str, Tensor]:
        """Return the running mean of predictions."""
        return {"mean_prediction": self._mean_prediction}

    def adapt(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Step on the batch and correct the prediction by the batch's class prior."""
        logits = super().adapt(net, images)
        return self._corrected(logits) if self.prediction == "before" else logits

    def predict(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Predict the batch and correct the prediction by its class prior."""
        return self._corrected(super().predict(net, images))

    def _corrected(self, logits: Tensor) -> Tensor:
        return PriorCorrection(self.prior_correction).corrected(logits)

    def export(self, net: AdaptiveNetwork, module: nn.Module) -> None:
        """Let a copy of the network normalise, and correct what it returns in a forward hook; see ``Method.export``."""
        super().export(net, module)
        if self.prior_correction != "none":
            module.register_forward_hook(PriorCorrection(self.prior_correction, net.output))

    def update(self, net: AdaptiveNetwork, images: Tensor, step: int) -> Tensor:
        """Make one step, with the augmented images of the kept ones; see ``SelfTrainingAdapter``."""
        outputs = net(images)
        logits = outputs.logits
        check_image_predictions(logits, type(self).__name__, "compares predictions of altered images")
        weights = self.weigh(net, images, outputs)
        losses = self.losses(net, images, outputs) + self._inconsistency(net, images, logits, weights, step)
        self.backward(net, losses, weights, outputs)
        self.optimizer_step(net)
        return logits.detach()

    def weigh(self, net: AdaptiveNetwork, images: Tensor, outputs: Outputs) -> Tensor:
        """Return the weights of the samples and update the mean prediction.

        They contain the fraction kept: the authors divide the sum of the kept losses by the size of the whole batch.
        """
        logits = outputs.logits.detach()
        predictions = logits.softmax(1)
        weights = certainty_diversity_weights(predictions, self._mean_prediction, self.temperature)
        seen = predictions.mean(0)
        # A batch with a value that is not finite must not stay in the mean.
        self._mean_prediction.lerp_(torch.where(seen.isfinite().all(), seen, self._mean_prediction), 0.1)
        return weights * (weights != 0).to(weights.dtype).mean()

    def losses(self, net: AdaptiveNetwork, images: Tensor, outputs: Outputs) -> Tensor:
        """Return the soft likelihood ratio of each prediction."""
        return soft_likelihood_ratio(outputs.logits)

    def _inconsistency(
        self, net: AdaptiveNetwork, images: Tensor, logits: Tensor, weights: Tensor, step: int
    ) -> Tensor:
        """Return the symmetric cross-entropy of kept samples to their augmented images, (B,); 0 for the others."""
        with torch.no_grad():
            views = self._augmentation(self._space.to_pixels(images), net.draws(step))
        views = self._space.from_pixels(views)
        keep = weights.nonzero()[:, 0]
        losses = symmetric_cross_entropy(net(views, keep=keep).logits, logits.index_select(0, keep))
        return losses.new_zeros(len(images)).index_copy(0, keep, losses)

    def after_step(self, net: AdaptiveNetwork) -> None:
        """Move the weights back towards the source."""
        ema_update_(net.parameters, net.source, self.source_share)

    def protocol(self) -> dict[str, Any]:
        """Return what a result must say about this method to be comparable."""
        settings = {
            "temperature": self.temperature,
            "source_share": self.source_share,
            "prior_correction": self.prior_correction,
        }
        return super().protocol() | settings | self._space.protocol()


class PriorCorrection:
    """Corrects the logits of a batch by its class prior, as a forward hook on what the network returns.

    Args:
        kind: See ``ROID``.
        output: Where the logits are in it; see ``logits_of``.
    """

    def __init__(self, kind: str, output: Select = None) -> None:
        self.kind, self.output = kind, output

    def __call__(self, module: nn.Module, inputs: object, output: Any) -> Any:
        """Return the output with corrected logits."""
        return with_logits(output, self.corrected(logits_of(output, self.output)), self.output)

    def corrected(self, logits: Tensor) -> Tensor:
        """Return logits, (B, C), that are corrected."""
        if self.kind == "none":
            return logits
        prior = smoothed_prior(logits)
        return logits + prior.log() if self.kind == "log" else logits * prior


def certainty_diversity_weights(probabilities: Tensor, mean: Tensor, temperature: float) -> Tensor:
    """Return the weight of each sample, (B,), 0 for those of less than mean diversity.

    Args:
        probabilities: (B, C).
        mean: Running mean of predictions, (C,).
        temperature: Of the weights.
    """
    diversity = _rescaled(1 - redundancy(probabilities, mean))
    certainty = _rescaled(-torch.special.entr(probabilities).sum(1))
    weights = (diversity * certainty / temperature).exp()
    return torch.where(diversity < diversity.mean(), 0.0, weights)


def _rescaled(values: Tensor) -> Tensor:
    """Scale values to [0, 1]; all are 0 where they are equal but for the rounding of numbers around 1."""
    low, high = values.aminmax()
    spread, limits = high - low, torch.finfo(values.dtype)
    equal = spread <= 8 * limits.eps * torch.maximum(low.abs(), high.abs()).clamp_min(1)
    return ((values - low) / spread.clamp_min(limits.tiny)).masked_fill(equal, 0)


def smoothed_prior(logits: Tensor) -> Tensor:
    """Return the class frequencies that a batch's predictions speak of, pulled towards uniform, (C,).

    Args:
        logits: (B, C); small batches, and few classes, are pulled more. A class that all rows mask does not count.
    """
    prior = logits.detach().softmax(1).mean(0)
    classes = possible_classes(logits).sum(dtype=torch.float64)
    smooth = (1 / classes).clamp_min(1 / len(logits)).to(prior.dtype) * prior.amax().reciprocal()
    return (prior + smooth) / (1 + smooth * classes.to(prior.dtype))
