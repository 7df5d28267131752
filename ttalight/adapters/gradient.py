"""The base of the methods that take gradient steps."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.cli import OptimizerCallable
from torch import nn
from torch.optim import Optimizer

from ttalight.adapters.adapter import Adapter
from ttalight.adapters.advice import warn_of_defaults
from ttalight.adapters.protocol import describe_optimizer
from ttalight.adapters.published import ChosenOptimizer, PublishedSettings
from ttalight.adapters.term import Term
from ttalight.errors import InputError, InputTypeError

__all__ = ["GradientAdapter"]


class GradientAdapter(PublishedSettings, Adapter):
    """Base of the methods that take gradient steps.

    Args:
        lr: Learning rate of the published optimizer.
        optimizer: Another optimizer, with its own learning rate; not together with ``lr``.
        steps: Gradient steps for each batch.
        clip_norm: Norm that the whole gradient of a step is clipped to. No limit by default.
        terms: Plug-in terms that are added to the loss of each sample.
        kwargs: See ``Adapter``.

    Raises:
        ValueError: If both ``lr`` and ``optimizer`` are given, or one is out of range.
    """

    def __init__(
        self,
        lr: float | None = None,
        optimizer: OptimizerCallable | None = None,
        steps: int = 1,
        clip_norm: float | None = None,
        terms: list[Term] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self._optimizer = ChosenOptimizer(type(self).__name__, self.published, lr, optimizer)
        if terms is not None and not (isinstance(terms, (list, tuple)) and all(isinstance(t, Term) for t in terms)):
            raise InputTypeError(f"terms must be a list of terms, for example [STAG()], got {terms!r:.60}")
        if steps < 0:
            raise InputError(f"steps must be at least 0, got {steps}")
        if clip_norm is not None and not clip_norm > 0:
            raise InputError(f"clip_norm must be positive, or None for no limit, got {clip_norm}")
        self.steps, self.clip_norm, self.terms = steps, clip_norm, terms or []
        is_own = type(self).make_optimizer is not GradientAdapter.make_optimizer
        self.is_elementwise = self._optimizer.is_published and not is_own

    def make_optimizer(self, parameters: list[nn.Parameter]) -> Optimizer:
        """Return the optimizer asked for, by default the published one."""
        return self._optimizer(parameters)

    def protocol(self) -> dict[str, Any]:
        """Return the settings that are saved with a result, so that results can be compared."""
        terms = {"terms": [repr(term) for term in self.terms]} if self.terms else {}
        return super().protocol() | describe_optimizer(self) | terms

    def check_defaults(self, classes: int) -> None:
        """Warn when settings published for CIFAR meet a classifier of ImageNet's kind."""
        if self._optimizer.is_default:
            warn_of_defaults(type(self).__name__, self.published, classes)
