"""Labels of images and of pixels that have no class."""

from __future__ import annotations

__all__ = ["UNLABELLED", "VOID"]

#: Label of an image whose class is not known: the value that ``torch.nn.functional.cross_entropy`` leaves out.
UNLABELLED = -100

#: Label of pixels that do not count, in label maps of this package's data modules.
VOID = 255
