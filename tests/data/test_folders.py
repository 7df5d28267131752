"""Entries of folders of images: hidden entries, links, pictures of any depth, in every data module."""

from __future__ import annotations

import os

import numpy as np
import pytest
from PIL import Image

from ttalight.data import (
    CorruptedDataModule,
    DomainFoldersDataModule,
    ImageFolderDataModule,
    ImageNetDataModule,
    TinyImageNetDataModule,
)
from ttalight.data.corruptions.frost import FROST_FILES, frost
from ttalight.data.folders import find_files, subfolders
from ttalight.data.image_files import read_image

ENDINGS = (".png",)
WNIDS = ("n01440764", "n01443537")


def paint(path, value=128):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (value,) * 3).save(path)


def clutter(folder, name):
    """Leave in a folder with class folders what systems and mistakes leave there."""
    for hidden in (".ipynb_checkpoints", ".git", "__MACOSX", "@eaDir"):
        paint(folder / hidden / "0.png")
        paint(folder / name / hidden / "0.png")
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "Thumbs.db").write_bytes(b"x")
    (folder / name / "._0.png").write_bytes(b"a resource fork")
    os.symlink(".", folder / "itself")
    os.symlink("..", folder / "above")
    os.symlink("round", folder / "round")
    os.symlink("nowhere", folder / "broken")
    os.symlink("..", folder / name / "up")
    os.symlink(folder.parent, folder / name / "further_up")
    os.symlink(".", folder / name / "here")
    os.symlink("turn", folder / name / "turn")
    os.mkfifo(folder / name / "pipe.png")


def names(files):
    return sorted(str(files.path(index).relative_to(files.folder)) for index in range(len(files)))


class TestClutter:
    """The same files are found with and without it, and the same classes."""

    def test_image_folder(self, tmp_path):
        for split in ("train", "test"):
            for name in ("cat", "dog"):
                paint(tmp_path / split / name / "0.png")
                paint(tmp_path / split / name / "deep" / "1.png")
            clutter(tmp_path / split, "cat")
        os.symlink(".", tmp_path / "validation_of_old")
        data = ImageFolderDataModule(root=str(tmp_path), resize=16, num_workers=0)
        data.setup("test")
        assert data.num_classes == 2
        for split in ("train", "test"):
            assert names(data.open(split)) == ["cat/0.png", "cat/deep/1.png", "dog/0.png", "dog/deep/1.png"]

    def test_domain_folders(self, tmp_path):
        for domain in ("photo", "sketch"):
            for name in ("cat", "dog"):
                paint(tmp_path / domain / name / "0.png")
            clutter(tmp_path / domain, "cat")
        clutter(tmp_path, "photo")
        data = DomainFoldersDataModule(root=str(tmp_path), sources=["photo"], resize=16, num_workers=0, batch_size=2)
        data.setup("test")
        assert (data.domains, data.classes) == (("sketch",), ["cat", "dog"])
        assert len(data.stream) == 2

    def test_imagenet(self, tmp_path):
        for wnid in WNIDS:
            paint(tmp_path / "val" / wnid / "0.JPEG")
            paint(tmp_path / "ImageNet-C" / "fog" / "5" / wnid / "0.JPEG")
            paint(tmp_path / "imagenet-r" / wnid / "0.JPEG")
        clutter(tmp_path / "imagenet-r", WNIDS[0])
        clutter(tmp_path / "val", WNIDS[0])
        clutter(tmp_path / "ImageNet-C" / "fog" / "5", WNIDS[0])
        clutter(tmp_path / "ImageNet-C", "fog")
        data = ImageNetDataModule(
            root=str(tmp_path),
            domains=["clean", "fog", "imagenet_r"],
            label_space="restricted",
            resize=16,
            num_workers=0,
        )
        data.setup("test")
        assert (data.num_classes, len(data.stream)) == (2, 6)
        with pytest.raises(FileNotFoundError, match=r"no folder snow in .*; there are fog$"):
            ImageNetDataModule(root=str(tmp_path), domains=["snow"], resize=16).setup("test")

    def test_tiny_imagenet(self, tmp_path):
        root = tmp_path / "tiny-imagenet-200"
        for wnid in WNIDS:
            for index in range(2):
                paint(root / "train" / wnid / "images" / f"{index}.JPEG")
                paint(tmp_path / "Tiny-ImageNet-C" / "fog" / "5" / wnid / f"{index}.JPEG")
            paint(root / "val" / wnid / "0.JPEG")
        clutter(root / "train", WNIDS[0])
        clutter(root / "val", WNIDS[0])
        clutter(tmp_path / "Tiny-ImageNet-C" / "fog" / "5", WNIDS[0])
        data = TinyImageNetDataModule(
            root=str(tmp_path), domains=["clean", "fog"], validation=2, resize=16, num_workers=0
        )
        data.setup("test")
        assert (data.num_classes, len(data.stream)) == (2, 6)
        assert len(data.open("train")) == 2

    def test_corrupted_layout(self, tmp_path):
        folder = tmp_path / "CIFAR-10-C"
        folder.mkdir()
        (folder / "._labels.npy").write_bytes(b"x")
        with pytest.raises(FileNotFoundError, match="no CIFAR-10-C in"):
            CorruptedDataModule(root=str(tmp_path), domains=["fog"]).setup("test")
        np.save(folder / "labels.npy", np.zeros(5, dtype=np.int64))
        os.symlink("fog.npy", folder / "fog.npy")
        (folder / "._fog.npy").write_bytes(b"x")
        with pytest.raises(FileNotFoundError, match=r"no fog\.npy in .*; there are "):
            CorruptedDataModule(root=str(tmp_path), domains=["fog"]).setup("test")
        os.unlink(folder / "fog.npy")
        os.mkfifo(folder / "fog.npy")
        with pytest.raises(FileNotFoundError, match=r"no fog\.npy in"):
            CorruptedDataModule(root=str(tmp_path), domains=["fog"]).setup("test")


class TestLinks:
    def test_a_linked_class_counts_like_any_other(self, tmp_path):
        paint(tmp_path / "pool" / "a" / "0.png")
        paint(tmp_path / "pool" / "a" / "more" / "1.png")
        (tmp_path / "train").mkdir()
        os.symlink(tmp_path / "pool" / "a", tmp_path / "train" / "cat")
        assert subfolders(tmp_path / "train") == ["cat"]
        assert find_files(tmp_path / "train", ["cat"], ENDINGS) == {"cat": ["cat/0.png", "cat/more/1.png"]}

    def test_two_links_to_one_folder_count_once(self, tmp_path):
        paint(tmp_path / "cat" / "b" / "0.png")
        os.symlink("b", tmp_path / "cat" / "a")
        assert find_files(tmp_path, ["cat"], ENDINGS) == {"cat": ["cat/a/0.png"]}

    def test_a_circle_outside_of_the_tree_ends(self, tmp_path):
        paint(tmp_path / "pool" / "a" / "0.png")
        os.symlink("../b", tmp_path / "pool" / "a" / "next")
        paint(tmp_path / "pool" / "b" / "1.png")
        os.symlink("../a", tmp_path / "pool" / "b" / "next")
        os.symlink("..", tmp_path / "pool" / "b" / "up")
        (tmp_path / "train").mkdir()
        os.symlink("../pool/a", tmp_path / "train" / "cat")
        assert find_files(tmp_path / "train", ["cat"], ENDINGS) == {"cat": ["cat/0.png", "cat/next/1.png"]}

    @pytest.mark.parametrize("both", [False, True])
    def test_class_folder_cycles_are_an_error(self, both, tmp_path):
        """No image may have two labels."""
        for name in ("cat", "dog"):
            paint(tmp_path / "train" / name / "0.png")
        os.symlink("../dog", tmp_path / "train" / "cat" / "others")
        if both:
            os.symlink("../cat", tmp_path / "train" / "dog" / "others")
        data = ImageFolderDataModule(root=str(tmp_path), resize=16)
        with pytest.raises(ValueError, match=r"is a folder of the class cat, and a link makes it one of the class dog"):
            data.open("train")

    def test_order_is_that_of_torchvision(self, tmp_path):
        """Splits and limits of earlier runs depend on it."""
        from torchvision.datasets.folder import make_dataset

        for path in (
            "b/0.png",
            "b/a/1.png",
            "b/a-b/2.png",
            "b/a/x/3.png",
            "b/B/4.png",
            "b/a.png",
            "A/9.png",
            "a b/é.png",
        ):
            paint(tmp_path / path)
        expected = [os.path.relpath(path, tmp_path) for path, _ in make_dataset(str(tmp_path), extensions=ENDINGS)]
        found = find_files(tmp_path, subfolders(tmp_path), ENDINGS)
        assert [path for own in found.values() for path in own] == expected

    def test_a_broken_link_is_named_when_it_is_read(self, tmp_path):
        paint(tmp_path / "train" / "cat" / "0.png")
        os.symlink("gone.png", tmp_path / "train" / "cat" / "1.png")
        files = ImageFolderDataModule(root=str(tmp_path), resize=16).open("train")
        with pytest.raises(ValueError, match=r"cannot read image .*cat/1\.png \(FileNotFoundError"):
            [files[index] for index in range(len(files))]


class TestAnnotations:
    @pytest.mark.parametrize(
        "content", [b"\xff\xfe\t", b"../../0.JPEG\tn01440764\n", b"/etc/0.png\tn01440764\n", b"a.png\n"]
    )
    def test_odd_ones_are_one_line(self, content, tmp_path):
        root = tmp_path / "tiny-imagenet-200"
        for wnid in WNIDS:
            paint(root / "train" / wnid / "0.JPEG")
        (root / "val").mkdir()
        (root / "val" / "val_annotations.txt").write_bytes(content)
        with pytest.raises(ValueError, match=r"val_annotations\.txt (must have lines|is not a table)"):
            TinyImageNetDataModule(root=str(tmp_path), resize=16).open("test")


RAMP = np.tile(np.linspace(0, 65535, 64).astype(np.uint16), (64, 1))


def tiff(bits, sample, content, photometric=1, big=False):
    """Return a grey TIFF file of 64 x 64 pixels whose values are of any kind."""
    entries = [
        (256, 4, 64), (257, 4, 64), (258, 3, bits), (259, 3, 1), (262, 3, photometric), (273, 4, 8), (277, 3, 1),
        (278, 4, 64), (279, 4, len(content)), (339, 3, sample),
    ]  # fmt: skip
    order = "big" if big else "little"
    parts = [b"MM\0*" if big else b"II*\0", (8 + len(content)).to_bytes(4, order), content]
    parts.append(len(entries).to_bytes(2, order))
    for tag, kind, value in entries:
        field = value.to_bytes(2, order) + bytes(2) if kind == 3 else value.to_bytes(4, order)
        parts.append(tag.to_bytes(2, order) + kind.to_bytes(2, order) + (1).to_bytes(4, order) + field)
    return b"".join([*parts, bytes(4)])


def twelve_bits(values):
    first, second = (values.reshape(-1, 2) >> 4).T
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()


SCALED = {
    "png": lambda path: Image.fromarray(RAMP).save(path, "PNG"),
    "tiff": lambda path: Image.fromarray(RAMP).save(path, "TIFF"),
    "tiff, big-endian": lambda path: path.write_bytes(tiff(16, 1, RAMP.astype(">u2").tobytes(), big=True)),
    "tiff, zero is white": lambda path: path.write_bytes(tiff(16, 1, (65535 - RAMP).tobytes(), photometric=0)),
    "tiff, 12 bits": lambda path: path.write_bytes(tiff(12, 1, twelve_bits(RAMP))),
    "tiff, float": lambda path: Image.fromarray((RAMP / 65535).astype(np.float32)).save(path, "TIFF"),
    "pgm": lambda path: path.write_bytes(b"P5 64 64 65535\n" + RAMP.astype(">u2").tobytes()),
    "pgm, 10 bits": lambda path: path.write_bytes(b"P5 64 64 1023\n" + (RAMP >> 6).astype(">u2").tobytes()),
    "ppm": lambda path: path.write_bytes(b"P6 64 64 65535\n" + RAMP[..., None].repeat(3, 2).astype(">u2").tobytes()),
    "pfm": lambda path: path.write_bytes(b"Pf 64 64 -1.0\n" + (RAMP / 65535).astype("<f4").tobytes()),
}

REFUSED = {
    "32-bit integers": tiff(32, 1, RAMP.astype("<u4").tobytes()),
    "signed": tiff(16, 2, (RAMP // 2).astype("<i2").tobytes()),
    "float above 1": tiff(32, 3, RAMP.astype("<f4").tobytes()),
    "float below 0": tiff(32, 3, (RAMP / -65535).astype("<f4").tobytes()),
    "not finite": tiff(32, 3, np.full((64, 64), np.nan, "<f4").tobytes()),
}


class TestDepth:
    """A ramp from black to white reads as one, whatever holds it, or is refused."""

    @pytest.mark.parametrize("kind", SCALED)
    def test_is_scaled(self, kind, tmp_path):
        SCALED[kind](tmp_path / "a.png")
        image = read_image(tmp_path / "a.png", 64)
        assert np.abs(image.numpy().astype(int) - RAMP[None] / 257).max() <= 1

    @pytest.mark.parametrize("kind", REFUSED)
    def test_is_refused_where_the_range_is_not_known(self, kind, tmp_path):
        (tmp_path / "a.tiff").write_bytes(REFUSED[kind])
        with pytest.raises(ValueError, match=r"cannot read image .*a\.tiff: it has .*; convert it to 8 bits$"):
            read_image(tmp_path / "a.tiff", 64)

    def test_frost(self, tmp_path):
        """Pictures of frost are read in the same way."""
        import torch

        for name in FROST_FILES:
            Image.fromarray(np.full((99, 99), 128 * 257, dtype=np.uint16)).save(tmp_path / name, "PNG")
        images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
        iced = frost(images, 1.0, 1.0, 1.0, generator=torch.Generator().manual_seed(0), frost_dir=str(tmp_path))
        assert (iced == 128).all()

    def test_a_line_of_pixels_takes_no_gigabytes(self, tmp_path):
        Image.new("L", (1, 30_000)).save(tmp_path / "a.png")
        with pytest.raises(ValueError, match="1 x 30000 pixels, it would have 256 x 7680000 when it is scaled"):
            read_image(tmp_path / "a.png", 256)
