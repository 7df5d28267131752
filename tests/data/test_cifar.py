"""CIFAR from its published files: twins of them, what is refused, and the real set."""

from __future__ import annotations

import hashlib
import io
import pickle
import shutil
import tarfile

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, CIFAR100

from ttalight import Trainer
from ttalight.data import CIFARDataModule
from ttalight.data.splits import spread_order
from ttalight.tasks import SupervisedTask


class Bomb:
    """A pickle that runs code when it is opened."""

    def __reduce__(self):
        return (pytest.fail, ("the file was unpickled",))


def batch(seed, count, classes, key):
    random = np.random.default_rng(seed)
    return {
        "data": random.integers(0, 256, (count, 3072), dtype=np.uint8),
        key: random.permutation(np.arange(count) % classes).tolist(),
    }


@pytest.fixture
def twin(tmp_path, monkeypatch):
    """A folder with small files of both sets, whose checksums take the place of the published ones."""

    def write(published, classes, key, counts):
        folder = tmp_path / published.base_folder
        folder.mkdir()
        lists = {"train_list": [], "test_list": []}
        for index, (kind, name, count) in enumerate(counts):
            content = pickle.dumps(batch(index, count, classes, key))
            (folder / name).write_bytes(content)
            lists[kind].append([name, hashlib.md5(content).hexdigest()])
        for kind, entries in lists.items():
            monkeypatch.setattr(published, kind, entries)

    train = [("train_list", f"data_batch_{index}", 100) for index in (1, 2)]
    write(CIFAR10, 10, "labels", [*train, ("test_list", "test_batch", 60)])
    write(CIFAR100, 100, "fine_labels", [("train_list", "train", 300), ("test_list", "test", 100)])
    return tmp_path


class TestFiles:
    def test_images_and_labels_are_those_of_the_files(self, twin):
        test = CIFARDataModule(root=str(twin)).load("test")
        written = batch(2, 60, 10, "labels")
        assert test.images.shape == (60, 3, 32, 32)
        for index in (0, 59):  # planes R, G, B, row by row
            assert test.images[index].flatten().tolist() == written["data"][index].tolist()
        assert test.labels.tolist() == written["labels"]

    def test_cifar100_has_the_fine_labels(self, twin):
        data = CIFARDataModule("cifar100", str(twin), validation=100)
        assert data.num_classes == 100
        assert sorted(data.load("test").labels.tolist()) == list(range(100))
        assert len(data.load("train")) == 200

    def test_mean_and_std_are_the_set_s(self):
        assert CIFARDataModule().mean == (0.4914, 0.4822, 0.4465)
        assert CIFARDataModule("cifar100").std == (0.2675, 0.2565, 0.2761)

    def test_test_files_are_enough_for_evaluation(self, twin):
        for path in (twin / "cifar-10-batches-py").glob("data_batch_*"):
            path.unlink()
        data = CIFARDataModule(root=str(twin), batch_size=30)
        data.setup("test")
        assert len(data.stream) == 60
        with pytest.raises(FileNotFoundError, match="no data_batch_1, data_batch_2 in"):
            data.setup("fit")

    def test_a_loader_reads_a_batch_by_one_index(self, twin, monkeypatch):
        data = CIFARDataModule(root=str(twin), batch_size=16, validation=20)
        data.setup("fit")
        reads = []
        read = type(data.train_set).__getitems__
        monkeypatch.setattr(type(data.train_set), "__getitems__", lambda self, i: reads.append(len(i)) or read(self, i))
        batches = list(data.train_dataloader())
        assert reads == [16] * 11
        assert all(images.dtype == torch.uint8 for images, _ in batches)


class TestRefusals:
    def test_missing_files(self, tmp_path, monkeypatch):
        monkeypatch.delenv("TTALIGHT_DATA", raising=False)
        with pytest.raises(FileNotFoundError) as error:
            CIFARDataModule(root=str(tmp_path)).load("test")
        message = str(error.value)
        assert f"no test_batch in {tmp_path}/cifar-10-batches-py (TTALIGHT_DATA is not set)" in message
        for word in ("download: true", "https://www.cs.toronto.edu/", "--data.root", "variable TTALIGHT_DATA"):
            assert word in message

    def test_the_variable_names_the_folder(self, twin, monkeypatch):
        monkeypatch.setenv("TTALIGHT_DATA", str(twin))
        assert len(CIFARDataModule().load("test")) == 60
        monkeypatch.setenv("TTALIGHT_DATA", str(twin / "elsewhere"))
        with pytest.raises(FileNotFoundError, match=r"TTALIGHT_DATA is .*elsewhere\)"):
            CIFARDataModule().load("test")
        assert len(CIFARDataModule(root=str(twin)).load("test")) == 60

    def test_a_tampered_file_is_not_opened(self, twin):
        path = twin / "cifar-10-batches-py" / "test_batch"
        path.write_bytes(pickle.dumps(Bomb()))
        found, expected = hashlib.md5(path.read_bytes()).hexdigest(), CIFAR10.test_list[0][1]
        with pytest.raises(ValueError, match=f"test_batch is not the published file.*is {found}, expected {expected}"):
            CIFARDataModule(root=str(twin)).load("test")


class TestValidation:
    def test_parts_are_disjoint_complete_and_stratified(self, twin):
        data = CIFARDataModule(root=str(twin), validation=50)
        train, validation = data.load("train"), data.load("validation")
        assert np.bincount(validation.labels).tolist() == [5] * 10
        whole = np.concatenate([batch(index, 100, 10, "labels")["data"] for index in (0, 1)])
        parts = torch.cat([train.images, validation.images]).flatten(1).numpy()
        assert sorted(row.tobytes() for row in parts) == sorted(row.tobytes() for row in whole)

    def test_is_the_same_for_every_seed(self, twin):
        first, other = (CIFARDataModule(root=str(twin), validation=50, seed=seed).load("validation") for seed in (0, 1))
        assert torch.equal(first.images, other.images)

    def test_a_larger_part_contains_a_smaller(self, twin):
        small, large = (CIFARDataModule(root=str(twin), validation=n).load("validation") for n in (20, 50))
        rows = {image.numpy().tobytes() for image in large.images}
        assert all(image.numpy().tobytes() in rows for image in small.images)

    def test_no_validation_trains_on_everything(self, twin, tmp_path):
        data = CIFARDataModule(root=str(twin), validation=0, batch_size=100)
        assert len(data.load("train")) == 200
        with pytest.raises(ValueError, match="there are no validation images: validation is 0"):
            data.load("validation")
        task = SupervisedTask(encoder="cifar_resnet8", crop="none")
        trainer = Trainer(
            default_root_dir=str(tmp_path / "run"), max_epochs=1, accelerator="cpu", logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(task, datamodule=data)
        assert trainer.global_step == 2
        with pytest.raises(ValueError, match="validation is 0"):
            trainer.validate(task, datamodule=data)

    def test_more_than_there_are(self, twin):
        with pytest.raises(ValueError, match="validation must be less than the 200 training images, got 200"):
            CIFARDataModule(root=str(twin), validation=200).load("train")


class TestSpreadOrder:
    def test_every_stretch_from_either_end_is_balanced(self):
        labels = np.random.default_rng(0).permutation(np.repeat([0, 1, 2], [100, 40, 7]))
        order = spread_order(labels)
        assert sorted(order) == list(range(147))
        for ordered in (labels[order], labels[order[::-1]]):
            for count in range(1, 147):
                for label, total in enumerate((100, 40, 7)):
                    assert abs((ordered[:count] == label).sum() - count * total / 147) < 2

    def test_is_pinned(self):
        """Weights trained on one split must not be validated on another one later."""
        labels = np.arange(50_000) % 10
        assert spread_order(labels)[-5:].tolist() == [14673, 19427, 42308, 8615, 3826]
        assert not np.array_equal(labels[spread_order(labels)][:10], np.arange(10))


class TestDownload:
    @pytest.fixture
    def published(self, twin, monkeypatch):
        """The twin's CIFAR-10 as an archive at a file address, and an empty folder to download into."""
        archive = twin / "published.tar.gz"
        with tarfile.open(archive, "w:gz") as tar:
            tar.add(twin / "cifar-10-batches-py", "cifar-10-batches-py")
            readme = tarfile.TarInfo("cifar-10-batches-py/readme.html")
            tar.addfile(readme, io.BytesIO())
        monkeypatch.setattr(CIFAR10, "url", archive.as_uri())
        monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
        return twin / "new"

    def test_missing_files_are_fetched_on_request(self, published):
        data = CIFARDataModule(root=str(published))
        data.prepare_data()
        assert not published.exists()
        data = CIFARDataModule(root=str(published), download=True)
        data.prepare_data()
        assert len(data.load("test")) == 60
        names = {path.name for path in (published / "cifar-10-batches-py").iterdir()}
        assert names == {"data_batch_1", "data_batch_2", "test_batch"}

    def test_files_that_are_there_are_not_fetched(self, twin, monkeypatch):
        monkeypatch.setattr(CIFAR10, "url", "file:///nowhere")
        CIFARDataModule(root=str(twin), download=True).prepare_data()

    def test_archive_of_wrong_checksum_is_refused(self, published, monkeypatch):
        monkeypatch.setattr(CIFAR10, "tgz_md5", "0" * 32)
        with pytest.raises(ValueError, match=f"expected {'0' * 32}; removed what came from file:"):
            CIFARDataModule(root=str(published), download=True).prepare_data()
        assert list(published.iterdir()) == []


@pytest.fixture(scope="module")
def root(shared_data, tmp_path_factory):
    """The real CIFAR-10, unpacked."""
    root = tmp_path_factory.mktemp("cifar")
    for part in ("test", "train"):
        shutil.unpack_archive(shared_data / f"cifar-10-{part}.tar.xz", root)
    return root


@pytest.mark.data
class TestRealSet:
    def test_splits(self, root):
        data = CIFARDataModule(root=str(root))
        train, validation, test = (data.load(split) for split in ("train", "validation", "test"))
        assert [len(part) for part in (train, validation, test)] == [45_000, 5_000, 10_000]
        assert np.bincount(validation.labels).tolist() == [500] * 10
        assert np.bincount(test.labels).tolist() == [1000] * 10

    def test_mean_and_std_are_those_of_all_training_pixels(self, root):
        pixels = CIFARDataModule(root=str(root), validation=0).load("train").images
        for channel in range(3):
            values = pixels[:, channel].double() / 255
            assert values.mean().item() == pytest.approx(CIFARDataModule().mean[channel], abs=1e-4)
            assert values.std().item() == pytest.approx(CIFARDataModule().std[channel], abs=6e-4)

    def test_agrees_with_torchvision(self, root):
        ours, theirs = CIFARDataModule(root=str(root)).load("test"), CIFAR10(root, train=False)
        assert np.array_equal(ours.images.permute(0, 2, 3, 1).numpy(), theirs.data)
        assert ours.labels.tolist() == theirs.targets
