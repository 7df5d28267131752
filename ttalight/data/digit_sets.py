"""MNIST, USPS and SVHN: the same ten digits in three sets, trained on in one and adapted to in another."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.functional import interpolate

from ttalight.data.arrays import ImageArrays
from ttalight.data.digit_files import read_idx, read_libsvm, read_mat
from ttalight.data.download import DATA_VARIABLE, data_root
from ttalight.data.module import ImageDataModule, Split
from ttalight.data.splits import held_out
from ttalight.data.streams import Domain
from ttalight.errors import InputError, MissingFileError

__all__ = ["DigitSetsDataModule"]

_SIZE = 32
_SOURCES = {
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "usps": "https://www.csie.ntu.edu.tw/~cjlin/libsvmtools/datasets/multiclass/",
    "svhn": "http://ufldl.stanford.edu/housenumbers/",
}
_FOLDERS = {"mnist": ("MNIST/raw", "mnist", "."), "usps": ("USPS", "usps", "."), "svhn": ("SVHN", "svhn", ".")}
#: Means and standard deviations of the training pixels: MNIST's at 32 x 32, the others' as usually published.
_MEAN_STD = {
    "mnist": ((0.1307, 0.1307, 0.1307), (0.289, 0.289, 0.289)),
    "usps": ((0.2469, 0.2469, 0.2469), (0.2989, 0.2989, 0.2989)),
    "svhn": ((0.4377, 0.4438, 0.4728), (0.198, 0.201, 0.197)),
}


class DigitSetsDataModule(ImageDataModule):
    """Digits of one set for training, and streams over the test images of any of the three.

    A domain is ``mnist``, ``usps`` or ``svhn`` (that set's test images), ``clean`` (the training set's own test
    images), or a corruption of the latter. Images become RGB of 32 x 32 pixels: grey levels are repeated, smaller
    images are interpolated bilinearly.

    Files are looked for in ROOT, as they are published and as torchvision keeps them:

    - mnist: MNIST/raw/train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-..., unpacked or .gz;
    - usps: USPS/usps.bz2 and usps.t.bz2 (LIBSVM's format);
    - svhn: SVHN/train_32x32.mat and test_32x32.mat (cropped digits; the label 10 is the digit 0).

    Validation images are taken from the training images: the last ``validation`` of a fixed order that spreads the
    classes evenly.

    Sources: Y. LeCun et al., Proceedings of the IEEE 86(11), 1998 (MNIST); J. Hull, IEEE TPAMI 16(5), 1994 (USPS);
    Y. Netzer et al., NIPS Workshop on Deep Learning and Unsupervised Feature Learning, 2011 (SVHN).

    Args:
        dataset: The set that is trained on.
        root: Folder with the sets; by default what the environment variable TTALIGHT_DATA names, else ``data``.
        domains: Names of the stream's domains.
        validation: Number of training images kept for validation. With 0 all of them are trained on and nothing is
            validated.
        kwargs: See ``ImageDataModule``.

    Raises:
        ValueError: If an argument is out of range or, once data are read, a file is damaged or of another kind.
        FileNotFoundError: Once data are read, if files are missing.
    """

    num_classes = 10

    def __init__(
        self,
        dataset: Literal["mnist", "usps", "svhn"] = "svhn",
        root: str | None = None,
        domains: Sequence[str] = ("mnist", "usps"),
        validation: int = 1000,
        **kwargs: Any,
    ) -> None:
        super().__init__(domains=domains, **kwargs)
        if dataset not in _SOURCES:
            raise InputError(f"dataset must be mnist, usps or svhn, got {dataset!r}")
        if validation < 0:
            raise InputError(f"validation must be at least 0, got {validation}")
        self.dataset = dataset
        self.mean, self.std = _MEAN_STD[dataset]
        self.root = data_root(root)
        self.validation = validation
        self.has_validation = validation > 0

    def load(self, split: Split) -> ImageArrays:
        """Return the clean images of a split."""
        if split == "test":
            return self._read(self.dataset, train=False)
        whole = self._read(self.dataset, train=True)
        chosen = torch.from_numpy(held_out(whole.labels.numpy(), self.validation, split))
        return ImageArrays(whole.images[chosen], whole.labels[chosen])

    def stream_domains(self) -> list[tuple[str, int]]:
        """Return name and severity (0 for all but corruptions) of each domain that the stream is made of."""
        wanted = [(name, 0) if name in _SOURCES else (name, severity) for name, severity in super().stream_domains()]
        return [key for place, key in enumerate(wanted) if key[0] not in _SOURCES or key not in wanted[:place]]

    def load_domains(self) -> list[tuple[Domain, ImageArrays]]:
        """Return the domains of ``stream_domains``, in that order, with their images."""
        wanted = self.stream_domains()
        if self.stream_split != "test" and any(name in _SOURCES for name, _ in wanted):
            raise InputError(
                "stream_split: validation is for clean and corrupted images of the training set; the other sets are "
                "tested on"
            )
        own = any(name not in _SOURCES for name, _ in wanted)
        clean = self.load(self.stream_split) if own else None
        return [self._domain(clean, *key) for key in wanted]

    def _domain(self, clean: ImageArrays | None, name: str, severity: int) -> tuple[Domain, ImageArrays]:
        if name in _SOURCES:
            test = self._read(name, train=False)
            return Domain(name), ImageArrays(test.images[: self.limit], test.labels[: self.limit])
        assert clean is not None
        images = self.corrupted(clean.images, name, severity)
        return self.domain(name, severity), ImageArrays(images, clean.labels[: self.limit])

    def _read(self, name: str, train: bool) -> ImageArrays:
        pixels, labels = {"mnist": self._mnist, "usps": self._usps, "svhn": self._svhn}[name](train)
        if len(pixels) != len(labels) or labels.min() < 0 or labels.max() > 9:
            raise InputError(
                f"{name}: {len(pixels)} images and {len(labels)} labels from {labels.min()} to {labels.max()}, "
                "expected as many labels as images, from 0 to 9: get the files again"
            )
        images = torch.from_numpy(np.ascontiguousarray(pixels))
        if images.shape[2] != _SIZE:
            images = torch.cat([_scaled(images[start : start + 1000]) for start in range(0, len(images), 1000)])
        rgb = images.expand(-1, 3, -1, -1).contiguous()
        return ImageArrays(rgb, torch.from_numpy(labels.astype(np.int64)))

    def _mnist(self, train: bool) -> tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]:
        part = "train" if train else "t10k"
        images = read_idx(self._file("mnist", f"{part}-images-idx3-ubyte", f"{part}-images-idx3-ubyte.gz"))
        labels = read_idx(self._file("mnist", f"{part}-labels-idx1-ubyte", f"{part}-labels-idx1-ubyte.gz"))
        return images[:, None], labels

    def _usps(self, train: bool) -> tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]:
        values, labels = read_libsvm(self._file("usps", "usps.bz2" if train else "usps.t.bz2"), 256)
        grey = ((values + 1) / 2 * 255).clip(0, 255).astype(np.uint8)
        return grey.reshape(-1, 1, 16, 16), labels - 1

    def _svhn(self, train: bool) -> tuple[npt.NDArray[np.uint8], npt.NDArray[Any]]:
        path = self._file("svhn", "train_32x32.mat" if train else "test_32x32.mat")
        arrays = read_mat(path)
        if not {"X", "y"} <= arrays.keys() or arrays["X"].shape[:3] != (_SIZE, _SIZE, 3):
            shapes = {name: array.shape for name, array in arrays.items()}
            raise InputError(f"{path} must hold X of shape (32, 32, 3, N) and y, it has {shapes}: get it again")
        return arrays["X"].transpose(3, 2, 0, 1).astype(np.uint8), arrays["y"].reshape(-1) % 10

    def _file(self, name: str, *files: str) -> Path:
        for folder in _FOLDERS[name]:
            for file in files:
                if (self.root / folder / file).is_file():
                    return self.root / folder / file
        raise MissingFileError(
            f"no {files[0]} in {self.root / _FOLDERS[name][0]} ({DATA_VARIABLE} is "
            f"{os.environ.get(DATA_VARIABLE) or 'not set'}): get it from {_SOURCES[name]}. If it is elsewhere, name "
            f"the folder that has {_FOLDERS[name][0]} in it by root (--data.root) or by the environment variable "
            f"{DATA_VARIABLE}"
        )


def _scaled(images: torch.Tensor) -> torch.Tensor:
    return interpolate(images.float(), size=(_SIZE, _SIZE), mode="bilinear").round().to(torch.uint8)
