"""The label of images that have none."""

from __future__ import annotations

__all__ = ["UNLABELLED"]

#: Label of an image whose class is not known: the value that ``torch.nn.functional.cross_entropy`` leaves out.
UNLABELLED = -100
