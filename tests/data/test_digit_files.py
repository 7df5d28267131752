"""The formats of MNIST, USPS and SVHN, and the data module over them."""

from __future__ import annotations

import bz2
import gzip
import shutil
import struct

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from ttalight import Trainer
from ttalight.adapters import PTBN
from ttalight.data import DigitSetsDataModule, PerDomain
from ttalight.data.corruptions import corrupt
from ttalight.data.digit_files import read_idx, read_libsvm, read_mat
from ttalight.tasks import SupervisedTask

RNG = np.random.default_rng(0)


def idx(array, kind):
    return struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape) + array.tobytes()


class TestIdx:
    @pytest.mark.parametrize(
        ("kind", "dtype"), [(0x08, ">u1"), (0x09, ">i1"), (0x0B, ">i2"), (0x0C, ">i4"), (0x0D, ">f4"), (0x0E, ">f8")]
    )
    def test_every_type(self, tmp_path, kind, dtype):
        array = RNG.integers(-100 if "u" not in dtype else 0, 100, (3, 4, 5)).astype(dtype)
        (tmp_path / "a").write_bytes(idx(array, kind))
        (tmp_path / "a.gz").write_bytes(gzip.compress(idx(array, kind)))
        for name in ("a", "a.gz"):
            found = read_idx(tmp_path / name)
            assert np.array_equal(found, array)
            assert found.dtype.isnative

    @pytest.mark.parametrize("content", [b"", b"\x00\x00\x08", b"PK\x03\x04", b"\x00\x00\x07\x01\x00\x00\x00\x01a"])
    def test_other_files(self, tmp_path, content):
        (tmp_path / "a").write_bytes(content)
        with pytest.raises(ValueError, match=r"a is not a complete IDX file \("):
            read_idx(tmp_path / "a")

    def test_cut_short(self, tmp_path):
        content = idx(np.zeros((3, 4), np.uint8), 8)
        (tmp_path / "a").write_bytes(content[:-1])
        (tmp_path / "a.gz").write_bytes(gzip.compress(content)[:-9])
        for name in ("a", "a.gz"):
            with pytest.raises(ValueError, match=f"{name} is not a complete IDX file"):
                read_idx(tmp_path / name)


class TestLibsvm:
    def test_values_and_labels(self, tmp_path):
        text = "1 1:0.5 3:-1\n10 2:1e-1 4:.25\n"
        (tmp_path / "a").write_text(text)
        (tmp_path / "a.bz2").write_bytes(bz2.compress(text.encode()))
        for name in ("a", "a.bz2"):
            values, labels = read_libsvm(tmp_path / name, 4)
            assert values.tolist() == [[0.5, 0, -1, 0], [0, 0.1, 0, 0.25]]
            assert labels.tolist() == [1, 10]

    @pytest.mark.parametrize("text", ["1 0:1\n", "1 9:1\n", "1 a:1\n", "x 1:1\n", "1\n", "\n"])
    def test_other_files(self, tmp_path, text):
        (tmp_path / "a").write_text(text)
        with pytest.raises(ValueError, match="a is not a complete LIBSVM file of 4 values a line"):
            read_libsvm(tmp_path / "a", 4)
        (tmp_path / "a.bz2").write_bytes(bz2.compress(b"1 1:1\n")[:-4])
        with pytest.raises(ValueError, match=r"a\.bz2 is not a complete LIBSVM file"):
            read_libsvm(tmp_path / "a.bz2", 4)


def element(kind, data):
    return struct.pack("<II", kind, len(data)) + data + b"\x00" * (-len(data) % 8)


def small(kind, data):
    return struct.pack("<HH", kind, len(data)) + data.ljust(4, b"\x00")


def matrix(name, array, klass, kind):
    """An array as MATLAB writes it, by the format's description."""
    body = element(6, struct.pack("<II", klass, 0)) + element(5, struct.pack(f"<{array.ndim}i", *array.shape))
    body += small(1, name.encode()) if len(name) <= 4 else element(1, name.encode())
    data = array.tobytes(order="F")
    return element(14, body + (small(kind, data) if len(data) <= 4 else element(kind, data)))


def mat(*matrices, packed):
    import zlib

    parts = matrices if not packed else [struct.pack("<II", 15, len(z := zlib.compress(m))) + z for m in matrices]
    return b"MATLAB 5.0 MAT-file, by hand".ljust(124) + struct.pack("<H", 0x0100) + b"IM" + b"".join(parts)


X = RNG.integers(0, 256, (32, 32, 3, 7), dtype=np.uint8)
Y = np.array([10, 1, 2, 3, 9, 10, 5], dtype=np.uint8)[:, None]


class TestMat:
    @pytest.mark.parametrize("packed", [True, False])
    def test_arrays(self, tmp_path, packed):
        content = mat(
            matrix("X", X, 9, 2), matrix("labels", Y.astype("<f8"), 6, 9), matrix("y", Y[:3], 9, 2), packed=packed
        )
        (tmp_path / "a.mat").write_bytes(content)
        arrays = read_mat(tmp_path / "a.mat")
        assert np.array_equal(arrays["X"], X)
        assert np.array_equal(arrays["labels"], Y.astype(float))
        assert np.array_equal(arrays["y"], Y[:3])

    @pytest.mark.parametrize("packed", [True, False])
    def test_is_what_scipy_writes(self, tmp_path, packed):
        io = pytest.importorskip("scipy.io")
        others = {"text": "digits", "cell": np.array([1, "a"], dtype=object), "complex": np.ones(2) * 1j}
        io.savemat(tmp_path / "a.mat", {"X": X, "y": Y, **others}, do_compression=packed)
        arrays = read_mat(tmp_path / "a.mat")
        assert set(arrays) == {"X", "y"}
        assert np.array_equal(arrays["X"], X)
        assert np.array_equal(arrays["y"], Y)

    @pytest.mark.parametrize("packed", [True, False])
    def test_cut_short(self, tmp_path, packed):
        content = mat(matrix("X", X, 9, 2), packed=packed)
        for cut in (1, 900, len(content) - 130):
            (tmp_path / "a.mat").write_bytes(content[:-cut])
            with pytest.raises(ValueError, match=r"a\.mat is not a complete MATLAB 5 file"):
                read_mat(tmp_path / "a.mat")

    @pytest.mark.parametrize("content", [b"", b"\x89HDF\r\n\x1a\n" + bytes(500), b"x" * 200])
    def test_other_files(self, tmp_path, content):
        (tmp_path / "a.mat").write_bytes(content)
        with pytest.raises(ValueError, match=r"a\.mat is not a complete MATLAB 5 file"):
            read_mat(tmp_path / "a.mat")


# -- the data module, on twins of the published files

MNIST = {part: RNG.integers(0, 256, (count, 28, 28), dtype=np.uint8) for part, count in (("train", 30), ("t10k", 12))}
USPS = RNG.integers(0, 255, (9, 256)) / 127.5 - 1


@pytest.fixture
def root(tmp_path):
    for folder in ("MNIST/raw", "USPS", "SVHN"):
        (tmp_path / folder).mkdir(parents=True)
    for part, images in MNIST.items():
        labels = (np.arange(len(images)) % 10).astype(np.uint8)
        (tmp_path / "MNIST" / "raw" / f"{part}-images-idx3-ubyte").write_bytes(idx(images, 8))
        (tmp_path / "MNIST" / "raw" / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels, 8)))
    lines = [
        f"{index % 10 + 1} " + " ".join(f"{place + 1}:{value:.6f}" for place, value in enumerate(row))
        for index, row in enumerate(USPS)
    ]
    for name in ("usps.bz2", "usps.t.bz2"):
        (tmp_path / "USPS" / name).write_bytes(bz2.compress("\n".join(lines).encode()))
    for name in ("train_32x32.mat", "test_32x32.mat"):
        (tmp_path / "SVHN" / name).write_bytes(mat(matrix("X", X, 9, 2), matrix("y", Y, 9, 2), packed=True))
    return tmp_path


@pytest.fixture
def make(root):
    def build(**arguments):
        return DigitSetsDataModule(**({"root": str(root), "batch_size": 5, "validation": 2} | arguments))

    return build


class TestDigitSets:
    def test_mnist(self, make):
        images = make(dataset="mnist").load("test")
        assert images.images.shape == (12, 3, 32, 32)
        assert images.labels.tolist() == [index % 10 for index in range(12)]
        grey = interpolate(torch.from_numpy(MNIST["t10k"])[:, None].float(), size=(32, 32), mode="bilinear")
        assert torch.equal(images.images, grey.round().to(torch.uint8).expand(-1, 3, -1, -1))

    def test_usps(self, make):
        images = make(dataset="usps").load("test")
        assert images.labels.tolist() == list(range(9))
        expected = np.floor((USPS + 1) * 127.5 + 1e-3).reshape(9, 16, 16)
        grey = interpolate(torch.from_numpy(expected)[:, None].float(), size=(32, 32), mode="bilinear")
        assert (images.images[:, :1].float() - grey).abs().max() <= 1.5

    def test_svhn(self, make):
        images = make(dataset="svhn").load("test")
        assert np.array_equal(images.images.numpy(), X.transpose(3, 2, 0, 1))
        assert images.labels.tolist() == [0, 1, 2, 3, 9, 0, 5]

    def test_splits(self, make):
        data = make(dataset="mnist", validation=10)
        data.setup("fit")
        assert np.bincount(data.train_set.labels.numpy()).tolist() == [2] * 10
        assert np.bincount(data.validation_set.labels.numpy()).tolist() == [1] * 10

    def test_stream_over_sets_and_corruptions(self, make):
        data = make(
            dataset="svhn", domains=["mnist", "usps", "clean", "fog"], severity=2, limit=6,
            stream=PerDomain(shuffle=False),
        )  # fmt: skip
        data.setup("test")
        rows = [(domain.name, domain.severity) for domain in data.stream.domains]
        assert rows == [("mnist", 0), ("usps", 0), ("clean", 0), ("fog", 2)]
        clean = make(dataset="svhn").load("test").images[:6]
        parts = data._stream_set.domains
        assert torch.equal(parts[2].images, clean)
        assert torch.equal(parts[3].images, corrupt(make(dataset="svhn").load("test").images, "fog", 2)[:6])
        assert torch.equal(parts[0].images, make(dataset="mnist").load("test").images[:6])
        assert len(data.stream) == 24

    def test_other_sets_choose_no_hyper_parameters(self, make):
        with pytest.raises(ValueError, match="the other sets are tested on"):
            make(domains=["clean", "usps"], stream_split="validation").setup("test")
        data = make(domains=["clean"], stream_split="validation")
        data.setup("test")
        assert len(data.stream) == 2

    def test_missing_files(self, make, tmp_path):
        for dataset, file, source in (
            ("mnist", "t10k-images-idx3-ubyte", "ossci-datasets"),
            ("usps", r"usps\.t\.bz2", "libsvmtools"),
            ("svhn", r"test_32x32\.mat", "housenumbers"),
        ):
            with pytest.raises(FileNotFoundError, match=f"no {file} in .*{source}.*TTALIGHT_DATA"):
                make(dataset=dataset, root=str(tmp_path / "nothing")).load("test")

    def test_files_that_do_not_belong_together(self, make, root):
        raw = root / "MNIST" / "raw"
        (raw / "t10k-labels-idx1-ubyte").write_bytes(idx(np.array([1, 11], np.uint8), 8))
        with pytest.raises(ValueError, match="mnist: 12 images and 2 labels from 1 to 11, expected as many"):
            make(dataset="mnist").load("test")
        (root / "SVHN" / "test_32x32.mat").write_bytes(mat(matrix("y", Y, 9, 2), packed=False))
        with pytest.raises(ValueError, match=r"test_32x32\.mat must hold X of shape \(32, 32, 3, N\) and y, it has"):
            make(dataset="svhn").load("test")

    def test_train_and_adapt(self, make):
        options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        task = SupervisedTask(encoder="cifar_resnet8")
        Trainer(max_epochs=1, enable_checkpointing=False, **options).fit(task, datamodule=make(dataset="svhn"))
        results = Trainer(**options).adapt(task, make(), PTBN())
        assert [(row["name"], row["samples"]) for row in results["domains"]] == [("mnist", 12), ("usps", 9)]


@pytest.mark.data
def test_real_mnist(shared_data, tmp_path):
    shutil.unpack_archive(shared_data / "mnist-raw.tar.xz", tmp_path)
    data = DigitSetsDataModule(dataset="mnist", root=str(tmp_path))
    train, test = data.load("train"), data.load("test")
    assert (len(train), len(test)) == (59_000, 10_000)
    assert np.bincount(test.labels.numpy()).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    pixels = train.images[::7, 0].double() / 255
    assert pixels.mean().item() == pytest.approx(data.mean[0], abs=2e-3)
    assert pixels.std().item() == pytest.approx(data.std[0], abs=2e-3)
