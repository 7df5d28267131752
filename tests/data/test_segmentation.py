"""Folders of images and label maps: the published layouts, what a batch is, corruptions, and errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from ttalight.data import (
    ACDCDataModule,
    CamVidDataModule,
    CityscapesDataModule,
    Continual,
    LabelShift,
    Mixed,
    SegmentationDataModule,
)
from ttalight.data.label_maps import class_table


def write(root, image, labels, size=(6, 8), seed=0, levels=11):
    """Write a random image and its label map."""
    draws = np.random.default_rng(seed)
    for path, pixels in (
        (image, draws.integers(0, 256, (*size, 3), dtype=np.uint8)),
        (labels, draws.integers(0, levels + 1, size, dtype=np.uint8)),
    ):
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(root / path)


@pytest.fixture
def camvid(tmp_path):
    for index in range(3):
        write(tmp_path, f"test/{index}.png", f"testannot/{index}.png", seed=index)
    return tmp_path


def batches(data):
    data.setup("test")
    return [data.on_after_batch_transfer(batch, 0) for batch in data.test_dataloader()]


def test_camvid(camvid):
    data = CamVidDataModule(root=str(camvid), batch_size=2, num_workers=0)
    first, second = batches(data)
    images, labels = first
    assert (images.shape, images.dtype) == ((2, 3, 6, 8), torch.float32)
    assert (labels.shape, labels.dtype) == ((2, 6, 8), torch.int64)
    assert set(torch.cat([first[1], second[1]]).unique().tolist()) <= {*range(11), 255}
    sample = int(data.stream.sample[0])
    written = np.array(Image.open(camvid / "testannot" / f"{sample}.png"))
    assert np.array_equal(labels[0], np.where(written == 11, 255, written))
    assert (data.num_classes, data.has_validation) == (11, False)


def test_cityscapes_and_acdc(tmp_path):
    stem = "leftImg8bit/val/town/town_0", "gtFine/val/town/town_0"
    write(tmp_path, f"{stem[0]}_leftImg8bit.png", f"{stem[1]}_gtFine_labelIds.png", levels=33)
    ((_, labels),) = batches(CityscapesDataModule(root=str(tmp_path), num_workers=0))
    written = np.array(Image.open(tmp_path / f"{stem[1]}_gtFine_labelIds.png"))
    road, bicycle = labels[0] == 0, labels[0] == 18
    assert np.array_equal(road, written == 7)
    assert np.array_equal(bicycle, written == 33)
    assert set(labels.unique().tolist()) <= {*range(19), 255}

    for weather in ("fog", "night"):
        stem = f"rgb_anon/{weather}/train/GP/0", f"gt/{weather}/train/GP/0"
        write(tmp_path, f"{stem[0]}_rgb_anon.png", f"{stem[1]}_gt_labelIds.png", size=(6, 8 if weather == "fog" else 9))
    data = ACDCDataModule(
        ("night", "fog"), "train", root=str(tmp_path), stream=Continual(rounds=2), batch_size=1, num_workers=0
    )
    found = batches(data)  # of two sizes
    assert [images.shape[-1] for images, _ in found] == [9, 8, 9, 8]
    assert [domain.name for domain in data.stream.domains] == ["night", "fog"]
    assert data.protocol()["class_names"][0] == "road"


def test_domains_mix_in_a_batch(camvid):
    data = CamVidDataModule(
        root=str(camvid), domains=("clean", "contrast"), stream=Mixed(), batch_size=6, num_workers=0
    )
    ((images, labels),) = batches(data)
    domain = data.stream.domain_of(slice(None))
    assert images[torch.from_numpy(domain == 1)].std() < 0.5 * images[torch.from_numpy(domain == 0)].std()
    assert labels.shape == (6, 6, 8)


@pytest.mark.parametrize("name", ["fog", "snow", "frost", "gaussian_noise", "motion_blur", "glass_blur", "spatter"])
def test_corruptions_of_images_that_are_no_squares(tmp_path, name):
    for index in range(2):
        write(tmp_path, f"test/{index}.png", f"testannot/{index}.png", size=(40, 56), seed=index)
    data = CamVidDataModule(root=str(tmp_path), domains=(name,), num_workers=0, severity=3)
    data.setup("test")
    images, _ = data._stream_set.domains[0].__getitems__([0, 1])
    again, _ = data._stream_set.domains[0].__getitems__([1])
    clean = data._files([""], "test").__getitems__([0, 1])[0]
    assert images.shape == clean.shape
    assert not torch.equal(images, clean)
    assert torch.equal(again[0], images[1])  # whatever else is in the batch


def test_size_scales_images_and_maps(camvid):
    ((images, labels),) = batches(CamVidDataModule(root=str(camvid), size=(3, 4), num_workers=0))
    assert images.shape == (3, 3, 3, 4)
    assert set(labels.unique().tolist()) <= {*range(11), 255}


class TestErrors:
    def test_a_map_is_missing(self, camvid):
        (camvid / "testannot/1.png").unlink()
        with pytest.raises(FileNotFoundError, match=r"1 of 3 images in .*test have no label map, such as .*1\.png"):
            CamVidDataModule(root=str(camvid)).setup("test")

    def test_no_folder(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"there is no folder .*val .*by root"):
            CityscapesDataModule(root=str(tmp_path)).setup("test")

    def test_several_sizes(self, camvid):
        write(camvid, "test/1.png", "testannot/1.png", size=(7, 8))
        with pytest.raises(ValueError, match=r"6 x 8 and 7 x 8 pixels: set size .*batch_size to 1"):
            batches(CamVidDataModule(root=str(camvid), num_workers=0))

    def test_a_map_of_colours_and_one_of_another_size(self, camvid):
        Image.open(camvid / "test/0.png").save(camvid / "testannot/0.png")
        data = CamVidDataModule(root=str(camvid), num_workers=0)
        with pytest.raises(ValueError, match="has mode RGB, expected one channel of 8 bits"):
            batches(data)
        Image.new("L", (2, 2)).save(camvid / "testannot/0.png")
        with pytest.raises(ValueError, match=r"0\.png has 2 x 2 pixels and its image .* 6 x 8"):
            batches(data)

    def test_arguments(self, camvid):
        with pytest.raises(ValueError, match="num_classes is missing"):
            SegmentationDataModule()
        with pytest.raises(ValueError, match="must be in images and maps or in neither"):
            SegmentationDataModule(2, images="{domain}/images")
        with pytest.raises(ValueError, match="grey levels 0 to 255 to classes"):
            class_table({256: 0})
        data = CamVidDataModule(root=str(camvid), stream=LabelShift())
        with pytest.raises(ValueError, match="orders images by their labels"):
            data.setup("test")
