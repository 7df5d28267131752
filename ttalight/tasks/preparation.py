"""Crop and normalisation of a task's images, and where their values come from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from ttalight.errors import InputError
from ttalight.models import CenterCrop, Normalize, Preprocessing, preprocessing_of

__all__ = ["InputPreparation"]

# Where values come from, as the line at the start of a run says it.
_BY_DATA, _BY_MODEL, _BY_FILE, _GIVEN = (
    "from the data module", "from the model's pretrained configuration", "from the checkpoint", "given"
)  # fmt: skip


class InputPreparation:
    """Crop and normalisation of a task's images.

    An argument comes first, then the file of an earlier stage, then pretrained weights, then the data module. The
    modules are the task's own submodules as well, whose state dict has the values.

    Args:
        image_size: Side in pixels of what the encoder sees; None if it is not given.
        mean: Channel means, RGB in [0, 1]; None if they are not given.
        std: Channel standard deviations; None together with ``mean``.

    Raises:
        ValueError: If a value is out of range, or one of mean and standard deviation is missing.
    """

    def __init__(self, image_size: int | None, mean: Sequence[float] | None, std: Sequence[float] | None) -> None:
        if (mean is None) != (std is None):
            raise InputError("give both mean and std, or neither")
        self.crop = CenterCrop(image_size)
        self.normalize = Normalize(mean, std)
        #: How pretrained weights expect their images, None without such weights.
        self.preprocessing: Preprocessing | None = None
        self._given = None if mean is None or std is None else (mean, std)
        self._normalized_by = _BY_DATA if self._given is None else _GIVEN
        self._sized_by = _BY_DATA if image_size is None else _GIVEN

    @property
    def is_given(self) -> bool:
        """Whether mean and standard deviation are arguments."""
        return self._given is not None

    def follow_model(self, network: nn.Module) -> None:
        """Take the values of a network's ``pretrained_cfg``, as far as no argument says otherwise."""
        self.preprocessing = preprocessing_of(network)
        if self.preprocessing is None:
            return
        if self._given is None:
            self.normalize.set(self.preprocessing.mean, self.preprocessing.std)
            self._normalized_by = _BY_MODEL
        if self._sized_by != _GIVEN and self.preprocessing.size is not None:
            self.crop.size, self._sized_by = self.preprocessing.size, _BY_MODEL

    def follow_file(self, image_size: int | None) -> None:
        """Keep the normalisation that was loaded with a file's weights, and take its size, unless arguments say them.

        Args:
            image_size: Side in pixels that the file names; None if it names none.
        """
        self._normalized_by = _BY_FILE
        if self._given is not None:
            self.normalize.set(*self._given)
            self._normalized_by = _GIVEN
        if self._sized_by == _BY_DATA and image_size is not None:
            self.crop.size, self._sized_by = image_size, _BY_FILE

    def follow_data(self, data: Any) -> None:
        """Take the normalisation of a data module that has one, where nothing else has said it."""
        if self._normalized_by == _BY_DATA and hasattr(data, "mean"):
            self.normalize.set(data.mean, data.std)

    def describe(self, data: Any) -> str:
        """Return one line: the values, where they come from, and how the data module scales images."""
        mean, std = (" ".join(f"{value:.4g}" for value in part.tolist()) for part in self.normalize.buffers())
        scaled = (getattr(data, "resize", None), getattr(data, "interpolation", None))
        size = "as delivered" if scaled[0] is None else f"{scaled[0]} {scaled[1]}"
        crop = "none" if self.crop.size is None else f"{self.crop.size} ({self._sized_by})"
        line = f"Preprocessing: mean {mean}, std {std} ({self._normalized_by}); size {size}, crop {crop}"
        wanted = self.preprocessing
        if wanted is None or None in (scaled[0], wanted.resize) or scaled == (wanted.resize, wanted.interpolation):
            return line
        return f"{line}; the model's pretrained configuration has size {wanted.resize} {wanted.interpolation}"
