"""The rows of a task's classifier for the classes that a data module has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ttalight.models.label_space import select_classes

__all__ = ["LabelSpace"]


class LabelSpace:
    """Replaces a task's ``classifier`` by one of some classes, and restores it."""

    def __init__(self) -> None:
        self._whole: nn.Linear | None = None
        #: Numbers of the classes that are left, None for all.
        self.classes: list[int] | None = None

    def restrict(self, task: nn.Module, classes: Sequence[int] | None) -> None:
        """Keep the classifier's rows of the given classes, in their order.

        Args:
            task: Has a ``classifier``; nothing changes where that is no linear layer, or has no other classes.
            classes: Numbers of the classes; None restores all of them.
        """
        if self._whole is not None:
            _set_classifier(task, self._whole.to(task.device))  # type: ignore[arg-type]
            self._whole = self.classes = None
        classifier: Any = getattr(task, "classifier", None)
        if classes is not None and isinstance(classifier, nn.Linear) and classifier.out_features > len(classes):
            self.classes = list(classes)
            self._whole = classifier  # here no state_dict of the task looks into it
            _set_classifier(task, select_classes(classifier, classes))


def _set_classifier(task: Any, classifier: nn.Linear) -> None:
    task.classifier, task.num_classes = classifier, classifier.out_features
