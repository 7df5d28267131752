"""The base of the methods whose own predictions are their supervision."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal

import torch
from torch import Tensor

from ttalight.adapters.adapter import GradientAdapter
from ttalight.adapters.term import add_terms
from ttalight.models.network import Network, Outputs, Selection

__all__ = ["SelfTrainingAdapter", "per_image"]


class SelfTrainingAdapter(GradientAdapter):
    """Steps on a loss of the batch's own predictions, on the batch's statistics.

    A method says which samples count, and how much (``weigh``), and what each of them loses (``losses``); where it
    needs more, a ``penalty`` on the weights, a ``pull`` on their gradients, and what follows a step (``after_step``).

    Args:
        lr: See ``GradientAdapter``.
        prediction: Whether logits come from ``before`` the update, the forward that the loss was made from (with
            several ``steps`` that of the last one), or from one more forward ``after`` it.
        parameters: What may adapt: ``norm`` for the weights and biases of all normalisation layers,
            ``norm_before_last_block`` for those in front of the last block, ``features`` for everything but the
            classifier, ``all``, or a function of name and parameter; the method's published choice by default.
        repeat_kept: On networks without BatchNorm, forward without gradients first and repeat only the kept samples
            with gradients, while fewer than 60 % of a batch are kept. The same numbers, up to rounding, for less time.
        kwargs: See ``GradientAdapter`` and ``Adapter``.

    Raises:
        ValueError: If an argument is out of range; at the first batch, if the network has nothing to adapt.
    """

    norm = "batch"
    #: What the authors adapt.
    published_parameters: Selection = "norm"

    def __init__(
        self,
        lr: float | None = None,
        prediction: Literal["before", "after"] = "before",
        parameters: Selection | None = None,
        repeat_kept: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(lr=lr, **kwargs)
        if self.steps < 1:
            raise ValueError(f"steps must be at least 1, got {self.steps}")
        if prediction not in ("before", "after"):
            raise ValueError(f"prediction must be 'before' or 'after', got {prediction!r}")
        self.prediction = prediction
        self.parameters: Selection = self.published_parameters if parameters is None else parameters
        self.repeat_kept = repeat_kept
        if self.episode == "image" and repeat_kept:
            raise ValueError("episode='image' takes no repeat_kept: leave it away, or episode='batch'")

    # -- what a method says

    def weigh(self, net: Network, images: Tensor, outputs: Outputs) -> Tensor | None:
        """Return the weight of each sample without gradient, (B,); zero drops it. None keeps all alike."""
        return None

    @abstractmethod
    def losses(self, net: Network, images: Tensor, outputs: Outputs) -> Tensor:
        """Return the loss of each sample, (B,), with gradients to the free parameters."""

    def penalty(self, net: Network) -> Tensor | None:
        """Return a scalar on the weights that is added to the mean loss."""
        return None

    def pull(self, net: Network) -> tuple[Tensor, Tensor] | None:
        """Return a gradient that needs no pass backwards, one vector for all parameters, and its part of the loss."""
        return None

    def after_step(self, net: Network) -> None:
        """Do what follows each step."""

    # -- the batch

    def configure(self, net: Network) -> None:
        """Free the parameters and normalise with the batch's statistics."""
        net.free(net.select(self.parameters))
        net.set_norm_mode("batch")

    def adapt(self, net: Network, images: Tensor) -> Tensor:
        """Step on the batch."""
        for _ in range(self.steps):
            logits = self._step(net, images)
        if self.prediction == "before":
            return logits
        with torch.no_grad():
            return net(images).logits

    def _step(self, net: Network, images: Tensor) -> Tensor:
        outputs, losses, weights = self._pass(net, images)
        net.backward(losses, weights, self.penalty(net))
        net.descend(self.pull(net))
        self.after_step(net)
        return outputs.logits

    def _pass(self, net: Network, images: Tensor) -> tuple[Outputs, Tensor, Tensor | None]:
        """Return a pass with the losses and weights of its samples, (B,) each."""
        repeat = self.repeat_kept and net.kept < 0.6 and not any(norm.is_batch_norm for norm in net.norms)
        with torch.set_grad_enabled(not repeat):
            outputs = net(images)
        weights = self.weigh(net, images, outputs)
        if repeat and weights is not None:
            losses = self._losses_of_kept(net, images, weights)
        else:
            selected = None if weights is None else weights != 0
            losses = add_terms(self.losses(net, images, outputs), self.terms, net, outputs, selected, weights)
        return outputs, losses, weights

    def _losses_of_kept(self, net: Network, images: Tensor, weights: Tensor) -> Tensor:
        """Return the losses of all samples, (B,), from a pass of the kept ones."""
        keep = weights.nonzero()[:, 0]
        if len(keep) == 0:
            return (0 * net.parameters[0].sum()).expand(len(images))  # the engine skips the step
        outputs, weights = net(images, keep=keep), weights.index_select(0, keep)
        losses = self.losses(net, images.index_select(0, keep), outputs)
        losses = add_terms(losses, self.terms, net, outputs, weights=weights)
        return losses.new_zeros(len(images)).index_copy(0, keep, losses)


def per_image(values: Tensor) -> Tensor:
    """Average per-pixel values, (B, ...), to one for each image, (B,)."""
    return values.flatten(1).mean(1) if values.ndim > 1 else values
