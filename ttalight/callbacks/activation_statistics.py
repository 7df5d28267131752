"""Leaves the means and variances of the source's activations with a trained network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from ttalight.adapters.components.moments_file import measure_and_write, weights_sha256
from ttalight.adapters.components.source_images import SourceImages
from ttalight.errors import InputError
from ttalight.models.network import Network
from ttalight.models.parts import all_modules
from ttalight.seeding import global_seed

__all__ = ["ActivationStatistics"]


class ActivationStatistics(Callback):
    """Measures the outputs of normalisation layers at the end of ``fit``, for ``ActMAD(statistics=FILE)``.

    They are those of the last epoch's weights, which ``last.ckpt`` has, on clean images of the data module's validation
    set. So a deployed model can be adapted by ActMAD without images of its source.

    Args:
        path: The file, relative to the run's folder (``default_root_dir``).
        samples: Number of images that are measured.

    Raises:
        ValueError: If there is less than one image, or at the end of ``fit``, if there are no validation images.
    """

    def __init__(self, path: str = "activation_statistics.pt", samples: int = 5000) -> None:
        super().__init__()
        if samples < 1:
            raise InputError(f"samples must be at least 1, got {samples}")
        self.path, self.samples = path, samples

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and write."""
        source = SourceImages(None)
        source.trainer = trainer
        batches = source.batches(self.samples, global_seed())
        if batches is None:
            raise InputError(
                "ActivationStatistics measures validation images, and there are none: use a data module that has them, "
                "or give ActMAD images as source="
            )
        if not trainer.is_global_zero:
            return
        images: Iterator[Tensor] = (batch.images for batch in batches)
        with evaluated(pl_module):
            path = Path(trainer.default_root_dir) / self.path
            measure_and_write(Network(pl_module), images, path, weights_sha256(pl_module))


@contextmanager
def evaluated(module: nn.Module) -> Iterator[None]:
    """Set a module to evaluation mode temporarily."""
    modes = {part: part.training for part in all_modules(module)}
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode
