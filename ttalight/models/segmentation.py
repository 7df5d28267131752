"""Networks that predict the class of each pixel."""

from __future__ import annotations

from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttalight.errors import InputError

__all__ = ["FeatureSegmenter", "create_segmenter"]


class FeatureSegmenter(nn.Module):
    """Classifies each place by the maps of a timm network's last stages, side by side at the largest resolution.

    B. Hariharan, P. Arbeláez, R. Girshick, J. Malik, *Hypercolumns for Object Segmentation and Fine-grained
    Localization*, CVPR 2015, arXiv 1411.5752, with a linear classifier as in J. Long, E. Shelhamer, T. Darrell, *Fully
    Convolutional Networks for Semantic Segmentation*, CVPR 2015, arXiv 1411.4038.

    Args:
        encoder: Name of a timm network that can return the maps of its stages.
        num_classes: Number of classes C.
        stages: Number of stages, the last ones, whose maps are read.
        pretrained: Whether timm's weights of the encoder are downloaded.

    Raises:
        ValueError: If there is no such network, or it has no maps.
    """

    def __init__(self, encoder: str, num_classes: int, stages: int = 3, pretrained: bool = False) -> None:
        super().__init__()
        try:
            stem: Any = timm.create_model(encoder, pretrained=pretrained, features_only=True)
        except (AttributeError, RuntimeError, TypeError) as error:
            raise InputError(f"{encoder!r} has no maps of its stages, or timm does not know it ({error})") from error
        self.encoder: nn.Module = stem
        channels: list[int] = stem.feature_info.channels()[-stages:]
        self.stages = len(channels)
        self.classifier = nn.Conv2d(sum(channels), num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, (B, C, h, w), at the resolution of the first map that is read."""
        maps = self.encoder(images)[-self.stages :]
        size = maps[0].shape[2:]
        joined = [maps[0], *(F.interpolate(part, size=size, mode="bilinear") for part in maps[1:])]
        logits: Tensor = self.classifier(torch.cat(joined, 1))
        return logits


def create_segmenter(name: str, num_classes: int) -> nn.Module:
    """Return a network of random weights that predicts pixels, by name.

    Args:
        name: ``fcn_resnet50``, ``deeplabv3_resnet50``, ``lraspp_mobilenet_v3_large`` and the like, which are those of
            ``torchvision.models.segmentation``, or else the name of a timm network, whose maps are classified
            (``FeatureSegmenter``).
        num_classes: Number of classes.

    Raises:
        ValueError: If there is no network of that name.
    """
    from torchvision.models import get_model, list_models, segmentation

    if name in list_models(module=segmentation):
        network: nn.Module = get_model(name, weights=None, weights_backbone=None, num_classes=num_classes)
        return network
    return FeatureSegmenter(name, num_classes)
