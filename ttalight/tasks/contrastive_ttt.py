"""The base of the tasks that classify, and adapt by contrasting two views."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor, nn

from ttalight.adapters import Adapter, TestTimeTraining
from ttalight.tasks.classifier_steps import ClassifierSteps
from ttalight.tasks.two_view import TwoViewTask

__all__ = ["ContrastiveTTT"]


class ContrastiveTTT(ClassifierSteps, TwoViewTask):
    """Base of the classifiers that adapt encoder and projector by a self-supervised loss on two fresh views.

    What it classifies with is the subclass's ``forward``; the classifier stays frozen at test time.

    Args:
        kwargs: See ``TwoViewTask`` and ``BaseTask``.
    """

    auxiliary_views = 2

    def auxiliary_loss(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the self-supervised loss of two fresh views in one forward, a scalar.

        A single image has nothing to be told from: its loss is zero, which a warning says once, and only
        normalisation statistics can change.

        Args:
            images: (B, 3, H, W) in [0, 1].
            generator: Source of the views' random draws.
        """
        views = self.views(images, generator)
        if len(images) > 1:
            return self.contrast(views)
        warnings.warn(
            "a batch of one image has nothing to be compared with: its self-supervised loss is zero, and only "
            "normalisation statistics adapt. Test-time training on two views wants larger batches (data.batch_size, "
            "128 in CTA's paper)",
            stacklevel=2,
        )
        return self.project(views).sum() * 0

    def adaptable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of encoder and projector."""
        return [*self.encoder.parameters(), *self.projector.parameters()]

    def auxiliary_encoders(self) -> list[nn.Module]:
        """Return the modules that ``auxiliary_loss`` sends its images through, each on its own but for BatchNorm.

        Where processes share a batch, each passes its slice through these.
        """
        return [self.encoder]

    def default_adapter(self) -> Adapter:
        """Return CTA's test-time training: 20 steps of Adam at 1e-6 for each batch, from the source every time."""
        return TestTimeTraining()
