"""Test-time training on an aligned model: the last stage of CTA."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate

from ttalight.errors import InputError
from ttalight.files.difference import difference
from ttalight.losses import consistency_loss
from ttalight.models.norm import find_norms
from ttalight.tasks.contrastive_ttt import ContrastiveTTT

__all__ = ["CrossTaskTTT"]


class CrossTaskTTT(ContrastiveTTT):
    """Classifies by h(pi(g(x))) and adapts g and pi by the self-supervised objective that they were trained with.

    Last stage of S. Barbeau et al., *CTA: Cross-Task Alignment for Better Test Time Training*, arXiv 2507.05221: two
    fresh views of every image in one forward; all of g and pi adapt, h is frozen. Steps, learning rate and reset are
    the adapter's, by default ``TestTimeTraining()``. The objective is that of the ``ContrastiveTask`` from which the
    aligned file was made, unless ``objective`` says otherwise; its temperature is this task's own ``temperature``, by
    default the paper's 0.01, whatever that of training was.

    The contrastive objective never sees the classifier. ``consistency_weight``, which is ours and not the paper's, adds
    ``consistency_loss``: views and un-augmented images, in one forward, have to agree on a class, so that features stay
    aligned with the rows of h, the prototypes that alignment has given them. With ``contrast_weight=0`` it is alone.

    Args:
        aligned: Checkpoint of an ``AlignmentTask``; ``ttalight:mnist.ckpt`` is one that travels inside the package, of
            a ``cifar_resnet8`` on MNIST.
        num_classes: Number of classes C.
        rescale_features: Bring pi(g(x)) to the mean norm of f(x) before the classifier. The cosine losses leave that
            norm free, so confidences, and with them NLL and ECE, mean little without it; accuracy hardly changes.
        symmetric: Whether both views are anchors of the loss; see ``ContrastiveTask``.
        contrast_weight: Factor of the self-supervised objective, at least 0.
        consistency_weight: Factor of the consistency of predictions, at least 0.
        parameters: What adapts: ``all`` of g and pi, as in the paper, the ``encoder`` g, or the affines of its ``norm``
            layers.
        kwargs: See ``TwoViewTask`` and ``BaseTask``.

    Raises:
        ValueError: If an argument is out of range, or the file does not fit.
        FileNotFoundError: If the file does not exist.
    """

    def __init__(
        self,
        aligned: str | None = None,
        encoder: str = "resnet50",
        num_classes: int = 10,
        stem: Literal["cifar", "imagenet"] = "cifar",
        rescale_features: bool = False,
        symmetric: bool = True,
        contrast_weight: float = 1.0,
        consistency_weight: float = 0.0,
        parameters: Literal["all", "encoder", "norm"] = "all",
        **kwargs: Any,
    ) -> None:
        super().__init__(encoder=encoder, stem=stem, **kwargs)
        weights = (contrast_weight, consistency_weight)
        if not all(0 <= weight < math.inf for weight in weights) or sum(weights) == 0:
            raise InputError(
                "contrast_weight and consistency_weight must be finite and at least 0, and one of them above, got "
                f"{contrast_weight} and {consistency_weight}"
            )
        if parameters not in ("all", "encoder", "norm"):
            raise InputError(f"parameters must be 'all', 'encoder' or 'norm', got {parameters!r}")
        self.adapted = parameters
        self.contrast_weight = contrast_weight
        self.consistency_weight = consistency_weight
        self.auxiliary_views = 3 if consistency_weight else 2
        self.num_classes = num_classes
        self.rescale_features = rescale_features
        self.symmetric = symmetric
        self.classifier = nn.Linear(self.encoder.num_features, num_classes)  # type: ignore[arg-type]
        self.register_buffer("feature_norms", torch.ones(2))
        self.feature_norms: Tensor
        if aligned is not None:
            parts = {name: name for name in ("normalize.", "encoder.", "projector.", "classifier.")}
            architecture = {"encoder": encoder, "stem": stem, "num_classes": num_classes}
            checkpoint = self.load_stage(aligned, "aligned", "AlignmentTask", parts, architecture)
            if fault := difference({"feature_norms": self.feature_norms}, checkpoint["state_dict"]):
                raise InputError(f"aligned: {aligned} is not the checkpoint of an AlignmentTask: its {fault}")
            self.feature_norms.copy_(checkpoint["state_dict"]["feature_norms"])

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits h(pi(g(x))), (B, C), of images in [0, 1], (B, 3, H, W)."""
        return self._classify(self.project(images))

    def auxiliary_loss(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the loss that adaptation minimises, a scalar; see ``ContrastiveTTT``."""
        if not self.consistency_weight or len(images) == 1:
            return self.contrast_weight * super().auxiliary_loss(images, generator)
        clean, views = self.crop(images), self.views(images, generator)
        if clean.shape[2:] != views.shape[2:]:  # views are square
            clean = interpolate(clean, views.shape[2:], mode="bilinear", align_corners=False, antialias=True)
        features = self.project(torch.cat((clean, views)))
        logits = self._classify(features).view(3, len(images), -1)
        loss = self.consistency_weight * consistency_loss(logits)
        if self.contrast_weight:
            loss = loss + self.contrast_weight * self.compare(*features[len(images) :].chunk(2))
        return loss

    def adaptation_protocol(self) -> dict[str, Any]:
        """Return the settings of the loss that are saved with a result, where they are not the paper's."""
        own = {
            "contrast_weight": self.contrast_weight,
            "consistency_weight": self.consistency_weight,
            "adapted": self.adapted,
        }
        return {} if own == {"contrast_weight": 1.0, "consistency_weight": 0.0, "adapted": "all"} else own

    def adaptable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that adapt."""
        if self.adapted == "norm":
            return [parameter for norm in find_norms(self.encoder) for parameter in norm.affine]
        return list(self.encoder.parameters()) if self.adapted == "encoder" else super().adaptable_parameters()

    def _classify(self, features: Tensor) -> Tensor:
        if self.rescale_features:
            features = features * (self.feature_norms[0] / self.feature_norms[1])
        logits: Tensor = self.classifier(features)
        return logits
