"""Test-time training and test-time adaptation with PyTorch Lightning."""

from ttalight import compat as _compat

_compat.import_torchvision()

__version__ = "0.1.0"
