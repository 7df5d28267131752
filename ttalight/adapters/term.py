"""Plug-in terms for the losses of gradient-based methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from ttalight.arguments import CheckedArguments
from ttalight.models.network import Head, Network, Outputs

__all__ = ["Term", "add_terms"]


class Term(CheckedArguments, ABC):
    """A per-sample loss that any gradient-based adapter can add to its own.

    Settings are plain attributes; results name a run's terms by their ``repr``, which lists them.

    Args:
        weight: Factor of the term.
        reweight: Whether the method's own weight of a sample multiplies the term too; by default every sample that
            the method keeps has the same.
    """

    def __init__(self, weight: float = 1.0, reweight: bool = False) -> None:
        self.weight = weight
        self.reweight = reweight

    def __repr__(self) -> str:
        own = ", ".join(f"{name}={value}" for name, value in vars(self).items() if name != "given_arguments")
        return f"{type(self).__name__}({own})"

    @abstractmethod
    def __call__(self, outputs: Outputs, head: Head, selected: Tensor | None) -> Tensor:
        """Return the term for every sample, (B,).

        Args:
            outputs: Logits and features of the pass that the loss is made from.
            head: The classifier.
            selected: Mask of the samples that the method keeps, (B,); None where it keeps all.
        """


def add_terms(
    losses: Tensor,
    terms: Sequence[Term],
    net: Network,
    outputs: Outputs,
    selected: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Return per-sample losses with the plug-in terms added, (B,).

    Args:
        losses: The method's own losses, (B,).
        terms: The terms; a method that takes any asks for ``net.head`` in ``configure``, so that features are kept.
        net: The network.
        outputs: Logits and features of the pass that the losses are made from.
        selected: Mask of the samples that the method keeps, (B,); None where it keeps all.
        weights: What the losses will be multiplied by, (B,), so that terms without ``reweight`` can be divided by it.
    """
    for term in terms:
        values = term.weight * term(outputs, net.head, selected)
        if weights is not None and not term.reweight:
            values = values / torch.where(weights == 0, 1, weights)
        losses = losses + values
    return losses
