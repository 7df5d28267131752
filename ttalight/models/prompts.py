"""Text features of class names, by prompt templates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttalight.errors import InputError

__all__ = ["encode_class_names", "ensemble_text_features"]


@torch.no_grad()
def encode_class_names(
    model: nn.Module,
    tokenize: Callable[[list[str]], Tensor],
    names: Sequence[str],
    templates: Sequence[str] = ("a photo of a {}.",),
) -> Tensor:
    """Return the text features of classes by their names, averaged over prompt templates.

    Args:
        model: A model with ``encode_text``, for example of open_clip.
        tokenize: Maps N texts to tokens, (N, length), for example a tokenizer of open_clip.
        names: Names of the C classes, such as "golden retriever".
        templates: Sentences with ``{}`` in the place of a name.

    Returns:
        Unit vectors, (C, D); see ``ensemble_text_features``.

    Raises:
        ValueError: If there is no name or no template, or a template has no place for a name.
    """
    if isinstance(names, str) or isinstance(templates, str) or not names or not templates:
        raise InputError("names and templates must be lists of one string or more")
    if without := [template for template in templates if "{}" not in template]:
        raise InputError(f"each template needs {{}} in the place of a name, got {without[0]!r}")
    device, encode = next(model.parameters()).device, cast(Any, model).encode_text
    texts = [[template.replace("{}", name) for name in names] for template in templates]
    return ensemble_text_features(torch.stack([encode(tokenize(each).to(device)) for each in texts]))


def ensemble_text_features(features: Tensor) -> Tensor:
    """Average the text features of several prompts for each class: the mean of unit vectors, of length one again.

    Args:
        features: (T, C, D) of T prompt templates, of any length.

    Returns:
        Unit vectors, (C, D).

    Raises:
        ValueError: If it has another shape.
    """
    if features.ndim != 3 or len(features) == 0:
        raise InputError(
            f"expected text features of shape (templates, classes, dimension), got {tuple(features.shape)}"
        )
    return F.normalize(F.normalize(features, dim=2).mean(0), dim=1)
