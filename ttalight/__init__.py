"""Test-time training and test-time adaptation with PyTorch Lightning."""

from ttalight import compat as _compat

_compat.import_torchvision()

from ttalight.trainer import Trainer  # noqa: E402  (what follows imports torchvision)

__version__ = "0.1.0"
__all__ = ["Trainer", "__version__"]
