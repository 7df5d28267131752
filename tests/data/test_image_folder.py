"""Folders of images at any size: decoding, the tree, domains made while they are read, memory."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import CenterCrop as TorchvisionCrop
from torchvision.transforms import Compose, PILToTensor, Resize

from ttalight import Trainer
from ttalight.adapters import Tent
from ttalight.cli import main
from ttalight.data import CorruptedFolder, ImageFolderDataModule, PerDomain, Stream, StreamOrder, Visit
from ttalight.data.corruptions import corrupt
from ttalight.data.image_files import read_image
from ttalight.tasks import AlignmentTask, ContrastiveTask, SupervisedTask

CLASSES = ("ant", "bee", "cat")
SIZES = ((40, 50), (70, 33), (32, 32), (37, 91))


def paint(path, size, seed):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1] // 4 + 1, size[0] // 4 + 1, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def tree(tmp_path):
    """Three classes, 12 training, 4 validation and 8 test images each, of several sizes and formats."""
    seed = 0
    for split, count in (("train", 12), ("val", 4), ("test", 8)):
        for name in CLASSES:
            for index in range(count):
                seed += 1
                folder = tmp_path / split / name / ("more" if index % 2 else ".")
                paint(folder / f"{index}.{('png', 'jpg', 'bmp')[index % 3]}", SIZES[seed % 4], seed)
    return tmp_path


@pytest.fixture
def make(tree):
    def build(**arguments):
        return ImageFolderDataModule(
            **({"root": str(tree), "resize": 32, "num_workers": 0, "batch_size": 6} | arguments)
        )

    return build


class TestDecoding:
    @pytest.mark.parametrize("size", [(300, 200), (199, 333), (256, 256), (257, 700), (64, 90)])
    @pytest.mark.parametrize("side", [256, 31])
    def test_is_torchvision_s_resize_and_center_crop(self, tmp_path, size, side):
        paint(tmp_path / "a.png", size, 1)
        with Image.open(tmp_path / "a.png") as image:
            expected = Compose([Resize(side), TorchvisionCrop(side), PILToTensor()])(image)
        assert torch.equal(read_image(tmp_path / "a.png", side), expected)

    @pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
    def test_every_mode_becomes_rgb(self, tmp_path, mode):
        path = tmp_path / ("a.tiff" if mode == "CMYK" else "a.png")
        Image.new("RGB", (20, 30), (255, 255, 255)).convert(mode).save(path)
        image = read_image(path, 16)
        assert image.shape == (3, 16, 16)
        assert (image == 255).all()

    @pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\nbroken"])
    def test_unreadable_file_is_named(self, tmp_path, content):
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot read image .*a\.png \(UnidentifiedImageError"):
            read_image(tmp_path / "a.png", 16)

    def test_truncated_file_is_named(self, tmp_path):
        paint(tmp_path / "a.jpg", (100, 100), 0)
        (tmp_path / "a.jpg").write_bytes((tmp_path / "a.jpg").read_bytes()[:-900])
        with pytest.raises(ValueError, match=r"cannot read image .*a\.jpg \(OSError: .*truncated"):
            read_image(tmp_path / "a.jpg", 16)

    def test_unreadable_file_is_named_by_a_worker(self, make, tree):
        (tree / "train" / "bee" / "0.png").write_bytes(b"no image")
        data = make(num_workers=1)
        data.setup("fit")
        with pytest.raises(ValueError, match=r"cannot read image .*train/bee/0\.png"):
            list(data.train_dataloader())


class TestTree:
    def test_files_are_labelled_by_their_folder(self, make, tree):
        files = make().open("test")
        assert len(files) == 24
        assert sorted(files.path(index) for index in range(24)) == sorted(
            path for path in (tree / "test").rglob("*.*") if path.is_file()
        )
        for index in range(24):
            image, label = files[index]
            assert files.path(index).relative_to(tree / "test").parts[0] == CLASSES[label]
            assert torch.equal(image, read_image(files.path(index), 32))

    def test_first_samples_are_balanced(self, make):
        labels = make().open("test").labels
        assert np.bincount(labels[:6]).tolist() == [2, 2, 2]

    def test_order_is_always_the_same(self, make):
        first, again = make(seed=1).open("train"), make(seed=2).open("train")
        assert first.files.tolist() == again.files.tolist()

    def test_number_of_classes_is_known_after_setup(self, make):
        data = make()
        data.setup("test")
        assert data.num_classes == 3

    def test_labels_are_those_of_the_training_classes(self, make, tree):
        """A test set without the first class must not shift the labels of the others."""
        for path in sorted((tree / "test" / "ant").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (tree / "test" / "ant").rmdir()
        data = make()
        assert sorted(set(data.open("test").labels.tolist())) == [1, 2]
        assert data.num_classes == 3

    def test_a_test_folder_alone_is_enough(self, make, tree):
        (tree / "train").rename(tree / "elsewhere")
        data = make()
        data.setup("test")
        assert (data.num_classes, len(data.stream)) == (3, 24)

    def test_validation_folder_may_be_missing(self, make, tree):
        (tree / "val").rename(tree / "elsewhere")
        data = make()
        data.setup("fit")
        assert data.val_dataloader() == []

    @pytest.mark.parametrize("name", ["validation", "valid"])
    def test_validation_folder_has_several_names(self, make, tree, name):
        (tree / "val").rename(tree / name)
        assert len(make().open("validation")) == 12

    def test_no_folder(self, make, tree, monkeypatch):
        with pytest.raises(FileNotFoundError, match=r"no test folder in /nowhere, which does not exist.*TTALIGHT_DATA"):
            make(root="/nowhere").setup("test")
        (tree / "test").rename(tree / "other")
        with pytest.raises(FileNotFoundError) as error:
            make().setup("test")
        assert f"no test folder in {tree}, which has other, train, val" in str(error.value)
        assert "stream_split: validation takes the validation images" in str(error.value)
        monkeypatch.setenv("TTALIGHT_DATA", str(tree))
        assert len(make(root=None, stream_split="validation").open("validation")) == 12

    def test_no_classes(self, make, tree):
        (tree / "test").rename(tree / "other")
        (tree / "test").mkdir()
        paint(tree / "test" / "1.png", (40, 40), 0)
        with pytest.raises(FileNotFoundError, match=r"no class folders in .*test: images belong into one subfolder"):
            make().setup("test")

    def test_class_without_images(self, make, tree):
        (tree / "test" / "bee" / "more").rename(tree / "gone")
        for path in (tree / "test" / "bee").iterdir():
            path.rename(path.with_suffix(".txt"))
        with pytest.raises(FileNotFoundError, match=r"no images in .*test/bee: every class folder needs .*\.png"):
            make().setup("test")

    def test_class_that_training_has_not(self, make, tree):
        (tree / "test" / "bee").rename(tree / "test" / "bug")
        with pytest.raises(ValueError, match=r"test has classes that .*train has not: bug"):
            make().setup("test")


class TestDomains:
    @pytest.mark.parametrize(("resize", "table"), [(256, "imagenet"), (64, "tiny_imagenet"), (32, "cifar")])
    def test_table_follows_the_size(self, make, resize, table):
        assert make(resize=resize).corruption_table == table

    def test_images_are_those_of_corrupt(self, make, monkeypatch):
        monkeypatch.setattr(ImageFolderDataModule, "corruption_chunk", 10)
        data = make(domains=["fog", "clean", "snow"], severity=3, seed=4, stream=PerDomain(shuffle=False))
        data.setup("test")
        clean = make().load("test")
        batches = list(data.test_dataloader())
        images = torch.cat([images for images, _ in batches]).split(24)
        assert [(domain.name, domain.severity) for domain in data.stream.domains] == [
            ("fog", 3),
            ("clean", 0),
            ("snow", 3),
        ]
        assert torch.equal(images[0], corrupt(clean.images, "fog", 3, seed=4, chunk_size=10))
        assert torch.equal(images[1], clean.images)
        assert torch.equal(images[2], corrupt(clean.images, "snow", 3, seed=4, chunk_size=10))
        assert torch.equal(torch.cat([labels for _, labels in batches]), clean.labels.repeat(3))

    def test_command_writes_the_same_images(self, make, tree, tmp_path):
        data = make(domains=["snow"], severity=2, limit=9, stream=PerDomain(shuffle=False))
        data.setup("test")
        main([
            "corrupt", "--data", "ImageFolderDataModule", "--data.root", str(tree), "--data.resize", "32",
            "--data.num_workers", "0", "--data.limit", "9", "--output", str(tmp_path / "set"), "--corruptions", "snow",
        ])  # fmt: skip
        written = CorruptedFolder(tmp_path / "set").read("snow", 2, num_classes=3)
        batches = list(data.test_dataloader())
        assert torch.equal(written.images, torch.cat([images for images, _ in batches]))
        assert torch.equal(written.labels, torch.cat([labels for _, labels in batches]))

    def test_shuffled_stream_and_limit_see_the_same_images(self, make, monkeypatch):
        monkeypatch.setattr(ImageFolderDataModule, "corruption_chunk", 4)
        data = make(domains=["gaussian_noise"], limit=7)
        data.setup("test")
        whole = corrupt(make().load("test").images, "gaussian_noise", 5, chunk_size=4)
        assert len(data.stream) == 7
        for index, (images, _) in enumerate(data.test_dataloader()):
            samples = data.stream.sample[data.stream.batch(index)].astype(np.int64)
            assert torch.equal(images, whole[samples])

    def test_no_more_domains_in_memory_than_allowed(self, make, monkeypatch):
        one = 24 * 3 * 32 * 32 / 1e9
        made = []
        monkeypatch.setattr(
            ImageFolderDataModule, "corrupted", lambda self, clean, name, severity: made.append(name) or clean.clone()
        )
        data = make(domains=["fog", "snow", "contrast"], memory_limit=2.5 * one)
        data.setup("test")
        assert made == []
        list(data.test_dataloader())
        assert made == ["fog", "snow", "contrast"]
        cache = data._stream_set.domains[0].cache
        assert list(cache._images) == [("contrast", 5)]
        roomy = make(domains=["fog", "snow", "contrast"], memory_limit=4.5 * one)
        roomy.setup("test")
        for _ in range(2):
            list(roomy.test_dataloader())
        assert made == ["fog", "snow", "contrast"] * 2

    def test_too_little_memory(self, make):
        one = 24 * 3 * 32 * 32 / 1e9
        message = r"24 images of .*test take 7\.37e-05 GB each for the clean .* 32 x 32 .*set limit to fewer images"
        with pytest.raises(ValueError, match=message):
            make(domains=["fog"], memory_limit=1.5 * one).setup("test")
        make(domains=["clean"], memory_limit=1.5 * one).setup("test")
        with pytest.raises(ValueError, match=r"more than memory_limit \(1e-06 GB\) allows"):
            make(memory_limit=1e-6).load("train")

    def test_stream_that_comes_back_needs_all_domains(self, make):
        one = 24 * 3 * 32 * 32 / 1e9
        with pytest.raises(ValueError, match="this stream comes back to its domains, so all 2 have to be in memory"):
            make(domains=["fog", "snow"], memory_limit=2.5 * one, stream=BackAndForth()).setup("test")
        data = make(domains=["fog", "snow"], memory_limit=3.5 * one, stream=BackAndForth())
        data.setup("test")
        whole = [corrupt(make().load("test").images, name, 5, chunk_size=50) for name in ("fog", "snow")]
        images, _ = next(iter(data.test_dataloader()))
        assert torch.equal(images, torch.stack([whole[index % 2][index] for index in range(6)]))


class BackAndForth(StreamOrder):
    """Sample i of domain i modulo 2, in one visit of each."""

    announced = False

    def build(self, domains, labels, batch_size, seed):
        size = len(labels[0])
        return Stream(
            domains=domains,
            visits=[Visit(0), Visit(1)],
            visit=np.arange(size) % 2,
            sample=np.arange(size),
            offsets=np.array([*range(0, size, batch_size), size]),
            announced=False,
        )


class TestStages:
    """The images go through training, alignment and adaptation, with and without workers."""

    @pytest.fixture
    def trainer(self, tmp_path):
        return lambda: Trainer(
            default_root_dir=str(tmp_path / "run"), max_epochs=1, accelerator="cpu", logger=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip

    def test_workers_deliver_what_this_process_does(self, make):
        batches = []
        for workers in (0, 2):
            data = make(num_workers=workers)
            data.with_index = True
            data.setup("fit")
            batches.append(list(data.train_dataloader()))
        assert len(batches[0]) == 6
        for here, there in zip(*batches, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))
            assert len(here) == 3

    def test_align_and_adapt(self, make, trainer, tmp_path):
        last = tmp_path / "run" / "checkpoints" / "last.ckpt"
        shared = {"encoder": "cifar_resnet8"}
        files = {}
        for name, task in (
            ("supervised", SupervisedTask(num_classes=3, **shared)),
            ("self_supervised", ContrastiveTask(**shared)),
        ):
            trainer().fit(task, datamodule=make())
            files[name] = str(last.rename(tmp_path / f"{name}.ckpt"))
        align = AlignmentTask(num_classes=3, **files, **shared)
        trainer().fit(align, datamodule=make())
        assert align._cache.shape == (36, 64)
        results = trainer().adapt(align, make(domains=["clean", "fog"]), Tent())
        assert [(row["name"], row["samples"]) for row in results["domains"]] == [("clean", 24), ("fog", 24)]

    def test_wrong_number_of_classes(self, make, trainer):
        with pytest.raises(ValueError, match="has 3 classes, SupervisedTask was made for 10"):
            trainer().fit(SupervisedTask(encoder="cifar_resnet8"), datamodule=make())


@pytest.mark.data
def test_photographs(shared_data, tmp_path):
    """Real ImageNet photographs, one class each: decoded as torchvision does, corrupted at 224 pixels."""
    shutil.unpack_archive(shared_data / "imagenet-samples-even-256px.tar", tmp_path)
    pictures = sorted((tmp_path / "imagenet-samples-256px").glob("*.[jJ]*"))[:6]
    for index, picture in enumerate(pictures):
        target = tmp_path / "test" / f"{index:03}" / picture.name
        target.parent.mkdir(parents=True)
        picture.rename(target)
    data = ImageFolderDataModule(
        root=str(tmp_path), resize=224, num_workers=2, domains=["clean", "defocus_blur"], severity=3, batch_size=6
    )
    data.setup("test")
    (clean, labels), (blurred, _) = list(data.test_dataloader())
    assert (data.num_classes, data.corruption_table) == (6, "imagenet")
    assert clean.shape == (6, 3, 224, 224)
    assert sorted(labels.tolist()) == list(range(6))

    def roughness(images):
        return images.float().diff(dim=-1).abs().mean()

    assert roughness(blurred) < 0.5 * roughness(clean)
