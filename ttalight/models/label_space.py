"""A classifier of some of its classes."""

from __future__ import annotations

import copy
from collections.abc import Sequence

from torch import nn

from ttalight.errors import InputError

__all__ = ["select_classes"]


def select_classes(classifier: nn.Linear, classes: Sequence[int]) -> nn.Linear:
    """Return a classifier whose logits are those of the given classes alone, in the given order.

    Its weights are a copy of the classes' rows. Softmax, entropy and the gradients of methods then know of no other
    class, which is what "restricted to 200 classes" means for ImageNet-R and ImageNet-A.

    Args:
        classifier: The whole classifier.
        classes: Numbers of the classes that stay, each once.

    Raises:
        ValueError: If a number is not one of the classifier's classes, or comes twice.
    """
    if (
        not classes
        or len(set(classes)) < len(classes)
        or not 0 <= min(classes) <= max(classes) < classifier.out_features
    ):
        raise InputError(
            f"classes must be different numbers from 0 to {classifier.out_features - 1}, got {list(classes)[:10]}"
        )
    index, part = list(classes), copy.deepcopy(classifier)
    part.out_features = len(index)
    for name, parameter in classifier.named_parameters(recurse=False):
        setattr(part, name, nn.Parameter(parameter.data[index], parameter.requires_grad))
    return part
