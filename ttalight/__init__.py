"""Test-time training and test-time adaptation with PyTorch Lightning."""

from ttalight import compat as _compat

_compat.import_torchvision()

from ttalight.trainer import Trainer  # noqa: E402  (what follows imports torchvision)
from ttalight.version import __version__  # noqa: E402

__all__ = ["Trainer", "__version__"]
