"""Class maps of label images: which class each of their grey levels belongs to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ttalight.errors import InputError
from ttalight.labels import VOID

__all__ = ["CAMVID", "CITYSCAPES", "CITYSCAPES_CLASSES", "CAMVID_CLASSES", "class_table"]

CAMVID_CLASSES = (
    "sky", "building", "pole", "road", "pavement", "tree", "sign", "fence", "car", "pedestrian", "bicyclist",
)  # fmt: skip
#: The eleven classes of CamVid, in the order of V. Badrinarayanan, A. Kendall, R. Cipolla, *SegNet: A Deep
#: Convolutional Encoder-Decoder Architecture for Image Segmentation*, PAMI 2017, arXiv 1511.00561.
CAMVID: Mapping[int, int] = {number: number for number in range(11)}

CITYSCAPES_CLASSES = (
    "road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation", "terrain",
    "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle",
)  # fmt: skip
#: From the label ids of Cityscapes and ACDC to the nineteen classes that are evaluated: M. Cordts et al., *The
#: Cityscapes Dataset for Semantic Urban Scene Understanding*, CVPR 2016, arXiv 1604.01685.
CITYSCAPES: Mapping[int, int] = {
    label: number
    for number, label in enumerate((7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33))
}


def class_table(class_map: Mapping[int, int] | None) -> Tensor:
    """Return the class of each grey level, uint8 (256,); grey levels that the map does not have are ``VOID``.

    Args:
        class_map: Grey level to class. None keeps grey levels as classes.

    Raises:
        ValueError: If a grey level or a class is no integer from 0 to 255.
    """
    if class_map is None:
        return torch.arange(256, dtype=torch.uint8)
    table = torch.full((256,), VOID, dtype=torch.uint8)
    for level, number in class_map.items():
        if not (type(level) is int and type(number) is int and 0 <= level <= 255 and 0 <= number <= VOID):
            raise InputError(
                f"a class map goes from grey levels 0 to 255 to classes 0 to 255, got {level!r}: {number!r}"
            )
        table[level] = number
    return table
