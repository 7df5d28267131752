"""The base of the methods whose own predictions are their supervision."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal

from torch import Tensor

from ttalight.adapters.gradient import GradientAdapter
from ttalight.adapters.term import add_terms
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError
from ttalight.models.network import Network, Outputs, Selection

__all__ = ["SelfTrainingAdapter", "per_image"]


class SelfTrainingAdapter(GradientAdapter):
    """Steps on a loss of the batch's own predictions, on the batch's statistics.

    A method defines which samples count, and how much (``weigh``), and the loss of each (``losses``). Where it needs
    more, a ``penalty`` on the weights, a ``penalty_gradient`` in closed form, and what follows a step
    (``after_step``).

    Args:
        lr: See ``GradientAdapter``.
        prediction: Whether logits come from ``before`` the update, the forward that the loss was made from (with
            several ``steps`` that of the last one), or from one more forward ``after`` it.
        parameters: What may adapt: ``norm`` for the weights and biases of all normalisation layers,
            ``norm_before_last_block`` for those in front of the last block, ``features`` for everything but the
            classifier, ``all``, or a function of name and parameter; the method's published choice by default.
        kwargs: See ``GradientAdapter`` and ``Adapter``.

    Raises:
        ValueError: If an argument is out of range; in ``wrap``, if the network has nothing to adapt.
    """

    norm = "batch"
    #: What the authors adapt.
    published_parameters: Selection = "norm"

    def __init__(
        self,
        lr: float | None = None,
        prediction: Literal["before", "after"] = "before",
        parameters: Selection | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(lr=lr, **kwargs)
        if self.steps < 1:
            raise InputError(f"steps must be at least 1, got {self.steps}")
        if prediction not in ("before", "after"):
            raise InputError(f"prediction must be 'before' or 'after', got {prediction!r}")
        self.prediction = prediction
        self.parameters: Selection = self.published_parameters if parameters is None else parameters

    # -- hooks for subclasses

    def weigh(self, net: AdaptiveNetwork, images: Tensor, outputs: Outputs) -> Tensor | None:
        """Return the weight of each sample without gradient, (B,); zero drops it. None keeps all alike."""
        return None

    @abstractmethod
    def losses(self, net: AdaptiveNetwork, images: Tensor, outputs: Outputs) -> Tensor:
        """Return the loss of each sample, (B,), with gradients to the trainable parameters."""

    def penalty(self, net: AdaptiveNetwork) -> Tensor | None:
        """Return a scalar on the weights that is added to the mean loss."""
        return None

    def penalty_gradient(self, net: AdaptiveNetwork) -> tuple[Tensor, Tensor] | None:
        """Return a gradient in closed form, one vector (N,) for all parameters, and the penalty that it is of."""
        return self.pull(net)

    def pull(self, net: AdaptiveNetwork) -> tuple[Tensor, Tensor] | None:
        """Return the same as ``penalty_gradient``, which had this name until version 0.2."""
        return None

    def after_step(self, net: AdaptiveNetwork) -> None:
        """Run after each step that has updated the parameters."""

    # -- the batch

    def check(self, net: Network) -> None:
        """Check that there are parameters to adapt, and layers whose statistics can be chosen."""
        check_selection(net, self.parameters)
        for layer in net.norms:
            layer.check()

    def configure(self, net: AdaptiveNetwork) -> None:
        """Set the parameters to adapt, and normalise with the batch's statistics."""
        net.set_trainable(net.select(self.parameters))
        net.set_norm_mode("batch")

    def adapt(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Step on the batch."""
        for step in range(self.steps):
            logits = self.update(net, images, step)
        return logits if self.prediction == "before" else self.predict(net, images)

    def update(self, net: AdaptiveNetwork, images: Tensor, step: int) -> Tensor:
        """Make one step, and return the logits that its loss was made from.

        Args:
            net: The network.
            images: (B, 3, H, W).
            step: Number of the step within the batch, from 0.
        """
        outputs = net(images)
        weights = self.weigh(net, images, outputs)
        self.backward(net, self.losses(net, images, outputs), weights, outputs)
        self.optimizer_step(net)
        return outputs.logits

    def backward(self, net: AdaptiveNetwork, losses: Tensor, weights: Tensor | None, outputs: Outputs) -> None:
        """Compute the gradients of the losses, with terms and penalties added.

        Args:
            net: The network.
            losses: (B,).
            weights: (B,), or None.
            outputs: The pass that the losses were made from.
        """
        selected = None if weights is None else weights != 0
        if self.terms:
            losses = add_terms(losses, self.terms, net, outputs, selected, weights)
        net.backward(losses, weights, self.penalty(net), self.penalty_gradient(net))

    def optimizer_step(self, net: AdaptiveNetwork) -> None:
        """Let the optimizer step, and do what follows a step that has updated the parameters."""
        if net.optimizer_step():
            self.after_step(net)


def check_selection(net: Network, selection: Selection) -> None:
    """Check that a selection names parameters that can be adapted, as far as that is known without images.

    Raises:
        ValueError: If it names none.
        TypeError: If they are held in 16 bits.
    """
    if selection == "features":
        net.classifier.check()
        possible = {id(parameter) for layer in net.classifier.candidates.values() for parameter in layer.parameters()}
        everything = list(net.module.parameters())
        net.check_trainable([value for value in everything if id(value) not in possible] or everything)
    else:
        net.check_trainable(net.select(selection))


def per_image(values: Tensor) -> Tensor:
    """Average per-pixel values, (B, ...), to one for each image, (B,)."""
    return values.flatten(1).mean(1) if values.ndim > 1 else values
