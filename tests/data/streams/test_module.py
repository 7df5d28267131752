"""Data modules with streams: severities, clean images, shared memory."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ttalight.data import (
    Continual,
    CorruptedDataModule,
    DigitsDataModule,
    Domain,
    Gradual,
    ImageFolderDataModule,
    InOut,
    Mixed,
    Potpourri,
    Probed,
    SingleSample,
)
from ttalight.data.corruptions import corrupt

COUNT = 10


def images_of(data):
    data.setup("test")
    return list(zip(data.stream.domains, data._stream_set.domains, strict=True))


def test_a_stream_gets_the_severities_that_it_asks_for():
    data = DigitsDataModule(domains=["clean", "contrast"], limit=5, stream=Gradual([1, 4, 1]))
    read = images_of(data)
    assert [domain for domain, _ in read] == [Domain("clean"), Domain("contrast", 1), Domain("contrast", 4)]
    clean = data.load("test").images[:5]
    for (domain, part), severity in zip(read[1:], (1, 4), strict=True):
        assert domain.severity == severity
        assert torch.equal(part.images, corrupt(clean, "contrast", severity))


@pytest.mark.parametrize("order", [Potpourri(clean=True), InOut(), Probed(), SingleSample(InOut())])
def test_clean_images_come_last_and_are_held_once(order):
    data = DigitsDataModule(domains=["clean", "contrast"], limit=5, stream=order)
    read = images_of(data)
    assert [domain.name for domain, _ in read] == ["clean", "contrast", "clean"]
    assert read[2][1] is read[0][1]
    assert len(read[2][1]) == 5


@pytest.mark.parametrize("order", [Mixed(), Potpourri(), Continual()])
def test_other_streams_get_the_domains_alone(order):
    data = DigitsDataModule(domains=["contrast", "fog"], limit=5, stream=order)
    assert [domain.name for domain, _ in images_of(data)] == ["contrast", "fog"]


class TestPublishedLayout:
    @pytest.fixture
    def layout(self, tmp_path):
        rng = np.random.default_rng(0)
        for name in ("fog", "snow"):
            np.save(tmp_path / f"{name}.npy", rng.integers(0, 256, (5 * COUNT, 32, 32, 3), dtype=np.uint8))
        np.save(tmp_path / "labels.npy", np.tile(np.arange(COUNT), 5))
        return tmp_path

    def test_severities_are_rows_of_the_files(self, layout):
        data = CorruptedDataModule(root=str(layout), domains=["snow", "fog"], stream=Gradual([2, 5, 2]))
        read = images_of(data)
        assert [(domain.name, domain.severity) for domain, _ in read] == [
            ("snow", 2), ("snow", 5), ("fog", 2), ("fog", 5),
        ]  # fmt: skip
        for domain, part in read:
            rows = slice((domain.severity - 1) * COUNT, domain.severity * COUNT)
            expected = np.load(layout / f"{domain.name}.npy")[rows]
            assert np.array_equal(part.images.permute(0, 2, 3, 1).numpy(), expected)
        assert data.stream.counts().tolist() == [COUNT] * 6

    def test_a_probe_says_that_the_clean_set_is_missing(self, layout, monkeypatch):
        monkeypatch.setenv("TTALIGHT_DATA", str(layout / "nowhere"))
        with pytest.raises(FileNotFoundError, match=r"no test_batch in .*cifar-10-batches-py"):
            images_of(CorruptedDataModule(root=str(layout), domains=["fog"], stream=Probed()))


class TestImageFolder:
    ONE = 6 * 3 * 16 * 16 / 1e9

    @pytest.fixture
    def make(self, tmp_path):
        for index in range(6):
            folder = tmp_path / "test" / ("ant" if index % 2 else "bee")
            folder.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(index).integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{index}.png")
        arguments = {
            "root": str(tmp_path),
            "resize": 16,
            "num_workers": 0,
            "batch_size": 4,
            "domains": ["fog", "contrast"],
        }
        return lambda **kwargs: ImageFolderDataModule(**(arguments | kwargs))

    def test_severities(self, make):
        data = make(stream=Gradual([3, 1]))
        images = torch.cat([images for images, _ in self.batches(data)])
        clean = data.load("test").images
        samples = data.stream.sample.astype(np.int64).reshape(4, 6)
        for index, (name, severity) in enumerate([("fog", 3), ("fog", 1), ("contrast", 3), ("contrast", 1)]):
            whole = corrupt(clean, name, severity, chunk_size=data.corruption_chunk)
            assert torch.equal(images[6 * index : 6 * index + 6], whole[samples[index]])

    def test_rounds_remake_domains_if_memory_is_short(self, make):
        data = make(stream=Continual(rounds=2, shuffle=False), memory_limit=2.5 * self.ONE)
        images = torch.cat([images for images, _ in self.batches(data)]).split(6)
        assert torch.equal(images[0], images[2])
        assert torch.equal(images[1], images[3])
        assert not torch.equal(images[0], images[1])

    @pytest.mark.parametrize("order", [Mixed(), SingleSample(Continual(), window=2)])
    def test_mixed_streams_need_all_domains(self, make, order):
        with pytest.raises(ValueError, match="all 2 have to be in memory"):
            make(stream=order, memory_limit=2.5 * self.ONE).setup("test")

    def test_probes_share_the_clean_images(self, make):
        data = make(stream=Probed(samples=3))
        batches = self.batches(data)
        clean = data.load("test").images
        for index, (images, _) in enumerate(batches):
            if data.stream.is_probe(index):
                assert torch.equal(images, clean[data.stream.sample[data.stream.batch(index)].astype(np.int64)])

    def batches(self, data):
        data.setup("test")
        return list(data.test_dataloader())
