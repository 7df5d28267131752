"""The embedded digits and what every data module does."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from ttalight.data import DigitsDataModule, ImageArrays


@pytest.fixture(scope="module")
def splits():
    data = DigitsDataModule()
    return {split: data.load(split) for split in ("train", "validation", "test")}


class TestDigits:
    def test_sizes(self, splits):
        assert {split: len(images) for split, images in splits.items()} == {
            "train": 1000,
            "validation": 297,
            "test": 500,
        }
        assert splits["test"].images.shape == (500, 3, 32, 32)

    def test_splits_are_stratified(self, splits):
        for images in splits.values():
            shares = np.bincount(images.labels.numpy(), minlength=10) / len(images)
            assert shares.min() > 0.09
            assert shares.max() < 0.11

    def test_is_the_public_set(self, splits):
        datasets = pytest.importorskip("sklearn.datasets")
        public = datasets.load_digits()
        ours = torch.cat([images.images[:, 0, 3::4, 3::4].float() for images in splits.values()])
        assert len(ours) == len(public.images)
        counts = sum(np.bincount(images.labels.numpy()) for images in splits.values())
        assert counts.tolist() == np.bincount(public.target).tolist()

    def test_upsampling_keeps_the_brightness(self, splits):
        mean = torch.cat([images.images.float().mean((1, 2, 3)) for images in splits.values()]).mean() / 255
        assert mean == pytest.approx(0.305, abs=2e-3)  # the data module's own mean
        assert splits["train"].images.max() == 255

    def test_normalisation_suits_the_training_images(self, splits):
        pixels = splits["train"].images.double() / 255
        assert pixels.mean().item() == pytest.approx(DigitsDataModule.mean[0], abs=2e-3)
        assert pixels.std().item() == pytest.approx(DigitsDataModule.std[0], abs=2e-3)


class TestStreamOfDomains:
    @pytest.fixture
    def data(self):
        data = DigitsDataModule(batch_size=64, domains=["clean", "contrast"], severity=3, limit=100)
        data.setup("test")
        return data

    def test_loader_yields_image_and_label(self, data, splits):
        batches = list(data.test_dataloader())
        assert [len(labels) for _, labels in batches] == [64, 36, 64, 36]
        images, labels = batches[0]
        samples = data.stream.sample[data.stream.batch(0)].astype(np.int64)
        assert torch.equal(images, splits["test"].images[samples])
        assert torch.equal(labels, splits["test"].labels[samples])
        assert not torch.equal(batches[2][0], splits["test"].images[data.stream.sample[100:164].astype(np.int64)])

    def test_domains_say_what_they_are(self, data):
        assert [(domain.name, domain.severity) for domain in data.stream.domains] == [("clean", 0), ("contrast", 3)]

    def test_images_are_cast_on_the_device(self, data):
        images, labels = data.on_after_batch_transfer(next(iter(data.test_dataloader())), 0)
        assert images.dtype == torch.float32
        assert 0 <= images.min()
        assert images.max() == 1
        assert labels.dtype == torch.int64

    def test_validation_images_on_request(self):
        data = DigitsDataModule(stream_split="validation")
        data.setup("test")
        assert len(data.stream) == 297


class TestTraining:
    def batches(self, epoch, seed="5", monkeypatch=None):
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        data = DigitsDataModule(batch_size=64)
        data.with_index = True
        data.setup("fit")
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        return torch.stack([index for _, _, index in loader])

    def test_order_is_keyed_by_seed_and_epoch(self, monkeypatch):
        first = self.batches(0, monkeypatch=monkeypatch)
        torch.rand(100)
        assert torch.equal(first, self.batches(0, monkeypatch=monkeypatch))
        assert not torch.equal(first, self.batches(1, monkeypatch=monkeypatch))
        assert not torch.equal(first, self.batches(0, seed="6", monkeypatch=monkeypatch))

    def test_batches_are_full_and_samples_come_once(self, monkeypatch):
        index = self.batches(0, monkeypatch=monkeypatch)
        assert index.shape == (15, 64)
        assert len(index.unique()) == 15 * 64


class TestTrainingOnAGPU:
    BYTES = 1000 * 3 * 32 * 32

    def data(self, device):
        data = DigitsDataModule()
        data.trainer = SimpleNamespace(
            world_size=1, global_rank=0, strategy=SimpleNamespace(root_device=torch.device(device))
        )
        return data

    def trained(self, monkeypatch, device, free, workers=0):
        """Devices of the images, from the start of a training to its end."""
        places = []
        monkeypatch.setattr(ImageArrays, "to", lambda images, place: places.append(str(place)))
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**12))
        data = self.data(device)
        data.num_workers = workers
        data.setup("fit")
        data.train_dataloader()
        data.teardown("fit")
        return places

    def test_images_are_held_there_while_it_trains(self, monkeypatch):
        assert self.trained(monkeypatch, "cuda:1", 4 * self.BYTES) == ["cuda:1", "cpu"]

    @pytest.mark.parametrize(
        ("device", "free", "workers"), [("cuda", 4 * BYTES - 1, 0), ("cuda", 8 * BYTES, 1), ("cpu", 8 * BYTES, 0)]
    )
    def test_images_stay_on_host_without_room(self, monkeypatch, device, free, workers):
        assert self.trained(monkeypatch, device, free, workers) == ["cpu"]

    @pytest.mark.parametrize("device", ["cuda", "cpu"])
    def test_batches_wait_in_pinned_memory(self, device):
        data = self.data(device)
        data.setup("test")
        data.setup("validate")
        assert [loader.pin_memory for loader in (data.test_dataloader(), data.val_dataloader())] == [
            device == "cuda"
        ] * 2

    def test_images_that_are_there_are_not_pinned(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * self.BYTES, 10**12))
        monkeypatch.setattr(
            ImageArrays, "to", lambda images, place: setattr(images, "images", images.images.to("meta"))
        )
        data = self.data("cuda")
        data.setup("fit")
        assert not data.train_dataloader().pin_memory
        assert data.val_dataloader().pin_memory

    @pytest.mark.gpu
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_batches_are_the_same(self, splits):
        data = splits["train"]
        here = data.__getitems__([5, 3])
        data.to("cuda")
        there = data.__getitems__([5, 3])
        data.to("cpu")
        for own, other in zip(here, there, strict=True):
            assert other.is_cuda
            assert torch.equal(own, other.cpu())


class TestImageArrays:
    def test_batches_are_on_the_images_device(self):
        data = ImageArrays(torch.zeros(4, 3, 2, 2, dtype=torch.uint8), torch.arange(4), with_index=True)
        data.to("meta")
        images, labels, index = data.__getitems__([1, 3])
        assert (images.device.type, labels.device.type, tuple(images.shape)) == ("meta", "meta", (2, 3, 2, 2))
        assert index.tolist() == [1, 3]

    def test_a_batch_is_one_read(self):
        images = torch.arange(5 * 3 * 4).reshape(5, 3, 2, 2).to(torch.uint8)
        data = ImageArrays(images, torch.arange(5), with_index=True)
        loader = DataLoader(data, 2, collate_fn=lambda batch: batch)
        batch = next(iter(loader))
        assert torch.equal(batch[0], images[:2])
        assert batch[2].tolist() == [0, 1]
        assert torch.equal(data[3][0], images[3])

    @pytest.mark.parametrize(
        ("images", "labels", "message"),
        [
            (torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), "images must be uint8 RGB.*got torch.float32"),
            (
                torch.zeros(2, 4, 4, dtype=torch.uint8),
                torch.zeros(2, dtype=torch.int64),
                r"got torch.uint8 of shape \(2, 4, 4\)",
            ),
            (
                torch.zeros(2, 3, 4, 4, dtype=torch.uint8),
                torch.zeros(3, dtype=torch.int64),
                r"labels must be int64 of shape \(2,\)",
            ),
        ],
    )
    def test_says_what_is_wrong(self, images, labels, message):
        with pytest.raises(ValueError, match=message):
            ImageArrays(images, labels)
