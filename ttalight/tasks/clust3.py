"""ClusT3: test-time training by clustering the positions of feature maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ttalight.adapters import Adapter, TestTimeTraining
from ttalight.errors import InputError
from ttalight.losses import clustering_loss
from ttalight.models.maps import select_stages
from ttalight.tasks.map_task import MapTask

__all__ = ["ClusT3"]


class ClusT3(MapTask):
    """A classifier whose maps are clustered; at test time the encoder keeps the clusters informative.

    Behind each chosen stage several projectors (1x1 convolutions) assign every position to one of K clusters. Source
    training minimises cross-entropy plus ``clustering_loss`` of all projectors; test time minimises the latter alone,
    on the images as they are, with projectors and classifier frozen.

    Source: G. A. V. Hakim et al., *ClusT3: Information Invariant Test-Time Training*, ICCV 2023, arXiv 2310.12345.
    Layers 1 and 2 with 15 projectors of 10 clusters each are the authors' best setting for CIFAR-10. Their source
    training is SGD (``optimizer``) at 0.1 with momentum 0.9 and weight decay 1e-4, batches of 128, 350 epochs, a tenth
    of the rate after 150 and 250 (``scheduler``), from random weights; without these arguments the schedule is
    ``BaseTask``'s. The authors' code differs: see ``clustering_loss``, and the second stage's projector has a hidden
    layer there when it is the only one of its stage.

    Args:
        layers: Numbers of the encoder's stages with projectors, from 1 on.
        clusters: Clusters K of a projector, 2 or more.
        projectors: Projectors of each stage.
        variant: ``paper`` maximises mutual information; ``code`` is the loss of the authors' code.
        weights: Checkpoint of this task.
        kwargs: See ``SupervisedTask`` and ``BaseTask``; crops are ``padded`` here.

    Raises:
        ValueError: If an argument is out of range, or the file does not fit.
        FileNotFoundError: If the file does not exist.
    """

    def __init__(
        self,
        layers: Sequence[int] = (1, 2),
        clusters: int = 10,
        projectors: int = 15,
        variant: Literal["paper", "code"] = "paper",
        weights: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(weights=weights, **kwargs)
        if clusters < 2 or projectors < 1:
            raise InputError(f"needs 2 clusters and 1 projector at least, got {clusters} and {projectors}")
        if variant not in ("paper", "code"):
            raise InputError(f"variant must be 'paper' or 'code', got {variant!r}")
        self.stages = select_stages(self.encoder, layers)
        self.groups = projectors
        self.variant = variant
        # All projectors of a stage are one convolution: the channels of the first, then those of the second, ...
        self.projectors = nn.ModuleDict(
            {str(stage.number): nn.Conv2d(stage.channels, projectors * clusters, 1) for stage in self.stages}
        )
        self.load_trained(weights, "clusters", "projectors")

    def training_losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return cross-entropy and clustering loss of one pass."""
        features, maps = self.encode_with_maps(images)
        return {"supervised": cross_entropy(self.classifier(features), labels), "auxiliary": self._cluster(maps)}

    def _cluster(self, maps: dict[int, Tensor]) -> Tensor:
        losses = [
            clustering_loss(self.projectors[str(number)](values), self.groups, self.variant)
            for number, values in maps.items()
        ]
        return torch.stack(losses).sum()

    def auxiliary_loss(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the sum of all projectors' losses, a scalar; nothing is drawn.

        Args:
            images: (B, 3, H, W) in [0, 1].
            generator: Not used.
        """
        return self._cluster(self.encode_with_maps(images)[1])

    def default_adapter(self) -> Adapter:
        """Return the published test-time training: Adam at 1e-5, here with 20 of the published numbers of steps."""
        return TestTimeTraining(steps=20, lr=1e-5)
