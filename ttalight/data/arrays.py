"""Labelled images held in memory, and the read of a whole batch by one index."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ttalight.data.streams import Stream
from ttalight.errors import InputError

__all__ = ["ImageArrays", "StreamDataset"]


class ImageArrays(Dataset[tuple[Tensor, ...]]):
    """A labelled image set as one tensor of pixels and one of labels.

    Args:
        images: uint8 RGB, (N, 3, H, W).
        labels: int64, (N,).
        with_index: Whether a batch carries the samples' indices as a third field.

    Raises:
        ValueError: If shapes or types differ from the above; the message says what was seen.
    """

    def __init__(self, images: Tensor, labels: Tensor, with_index: bool = False) -> None:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise InputError(
                f"images must be uint8 RGB of shape (N, 3, H, W), got {images.dtype} of shape {tuple(images.shape)}"
            )
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise InputError(
                f"labels must be int64 of shape ({len(images)},), one per image, "
                f"got {labels.dtype} of shape {tuple(labels.shape)}"
            )
        self.images = images
        self.labels = labels
        self.with_index = with_index

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> None:
        """Hold images and labels on another device; batches come from there."""
        self.images, self.labels = self.images.to(device), self.labels.to(device)

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(field[0] for field in self.__getitems__([index]))

    def __getitems__(self, indices: Sequence[int] | npt.NDArray[Any]) -> tuple[Tensor, ...]:
        """Return the batch of the given samples: images (B, 3, H, W) and labels (B,), read by one index."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        batch = self.images[index], self.labels[index]
        return (*batch, index) if self.with_index else batch


class StreamDataset(Dataset[tuple[Tensor, Tensor]]):
    """The samples of a stream, read from the image sets of its domains.

    Args:
        stream: Which sample of which domain stands where.
        domains: The image set of each of the stream's domains.

    Raises:
        ValueError: If the stream has samples that the sets have not.
    """

    def __init__(self, stream: Stream, domains: Sequence[ImageArrays]) -> None:
        self.stream = stream
        self.domains = list(domains)
        if len(self.domains) < len(stream.domains):
            raise InputError(f"the stream has {len(stream.domains)} domains, got the images of {len(self.domains)}")
        sizes = np.array([len(images) for images in self.domains])
        beyond = stream.sample >= sizes[stream.domain_of(slice(None))]
        if beyond.any():
            position = int(beyond.argmax())
            domain = int(stream.domain_of(slice(position, position + 1))[0])
            raise InputError(
                f"the stream asks for sample {stream.sample[position]} of {stream.domains[domain].name}, which has "
                f"{sizes[domain]} samples: it was made for another image set, or for another limit"
            )

    def __len__(self) -> int:
        return len(self.stream)

    def __getitem__(self, positions: slice) -> tuple[Tensor, Tensor]:
        """Return images (B, 3, H, W) and labels (B,) of the samples at the given positions of the stream.

        Labels of pixels are (B, H, W).
        """
        domain = self.stream.domain_of(positions)
        sample = self.stream.sample[positions].astype(np.int64)
        if domain.min() == domain.max():
            images, labels = self.domains[int(domain[0])].__getitems__(sample)[:2]
            return images, labels
        return self._mixed(domain, sample)

    def _mixed(self, domain: npt.NDArray[np.int64], sample: npt.NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        batch: tuple[Tensor, Tensor] | None = None
        for index in np.unique(domain):
            where = torch.from_numpy(np.flatnonzero(domain == index))
            part = self.domains[index].__getitems__(sample[where.numpy()])[:2]
            if batch is None:  # labels are one number an image, or one a pixel
                images, labels = (field.new_empty((len(domain), *field.shape[1:])) for field in part)
                batch = images, labels
            batch[0][where], batch[1][where] = part
        assert batch is not None, "a batch has samples"
        return batch
