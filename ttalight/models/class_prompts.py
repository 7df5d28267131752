"""The texts of a classifier's classes, with the tower that encodes them."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ttalight.models.prompts import encode_class_names
from ttalight.models.text_tower import TextTower

__all__ = ["ClassPrompts"]


class ClassPrompts(NamedTuple):
    """Names of classes in prompt templates, and the text tower; a task offers them as ``class_prompts``.

    Attributes:
        tower: The text tower.
        names: Names of the C classes, in the order of the logits.
        templates: Sentences with ``{}`` in the place of a name.
    """

    tower: TextTower
    names: list[str]
    templates: list[str]

    def texts(self, template: str) -> list[str]:
        """Return the C sentences of a template."""
        return [template.replace("{}", name) for name in self.names]

    def features(self, templates: list[str] | None = None) -> Tensor:
        """Return unit vectors of the classes, (C, D), averaged over templates, by default all of its own."""
        return encode_class_names(self.tower, self.tower.tokenize, self.names, templates or self.templates)
