"""ImageNet and the sets that stand in for it, as small twins of the published folders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageNetInfo

from ttalight import Trainer
from ttalight.adapters import Source, Tent
from ttalight.data import ImageNetDataModule, Mixed, PerDomain
from ttalight.data.corruptions import corrupt
from ttalight.data.image_files import read_image
from ttalight.tasks import SupervisedTask

WNIDS = sorted(ImageNetInfo().label_names())
#: Classes of the twins: those of -R, those of -A, and two of neither.
R, A, OTHERS = (1, 8, 300), (6, 300, 999), (0, 500)
ALL = sorted({*R, *A, *OTHERS})


def paint(path, seed, size=(280, 260)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC).save(path)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("imagenet")
    for number in ALL:
        for index in range(2):
            paint(root / "val" / WNIDS[number] / f"ILSVRC2012_val_{index}.JPEG", 10 * number + index)
        for severity in (1, 5):
            folder = root / "ImageNet-C" / "fog" / str(severity) / WNIDS[number]
            paint(folder / "a.JPEG", number + severity, (224, 224))
        paint(root / "sketch" / WNIDS[number] / "sketch_0.JPEG", number)
        paint(root / "imagenetv2-matched-frequency-format-val" / str(number) / "a.jpeg", number)
    for name, classes in (("imagenet-r", R), ("imagenet-a", A)):
        for number in classes:
            paint(root / name / WNIDS[number] / "0.jpg", number, (300, 240))
        (root / name / "README.txt").write_text("renditions")
    return root


@pytest.fixture
def make(root):
    def build(**arguments):
        return ImageNetDataModule(**({"root": str(root), "num_workers": 0, "batch_size": 4} | arguments))

    return build


def shown(data):
    """All images and labels of a stream."""
    data.setup("test")
    images, labels = zip(*data.test_dataloader(), strict=True)
    return torch.cat(images), torch.cat(labels)


class TestLabels:
    @pytest.mark.parametrize(
        ("domain", "classes"),
        [
            ("clean", [number for number in ALL for _ in range(2)]),
            ("fog", ALL),
            ("imagenet_v2", ALL),
            ("imagenet_sketch", ALL),
            ("imagenet_r", list(R)),
            ("imagenet_a", list(A)),
        ],
    )
    def test_are_the_places_among_the_sorted_wordnet_ids(self, make, domain, classes):
        data = make(domains=[domain])
        _, labels = shown(data)
        assert sorted(labels.tolist()) == classes
        assert data.num_classes == 1000
        assert data.protocol()["label_space"] == "full"

    def test_class_folders_of_v2_are_numbers_not_words(self, make, root):
        """Sorted as words, 8 comes after 500."""
        images, labels = shown(make(domains=["imagenet_v2"], stream=PerDomain(shuffle=False)))
        folder = root / "imagenetv2-matched-frequency-format-val"
        for image, label in zip(images, labels.tolist(), strict=True):
            assert torch.equal(image, read_image(folder / str(label) / "a.jpeg", 256))

    @pytest.mark.parametrize(("domain", "classes"), [("imagenet_r", R), ("imagenet_a", A)])
    def test_restricted_to_the_classes_of_a_set(self, make, domain, classes):
        data = make(domains=["clean", domain, "imagenet_sketch"], label_space="restricted")
        _, labels = shown(data)
        assert data.source_classes == classes
        assert data.num_classes == 3
        assert data.protocol() == {
            "resize": 256, "interpolation": "bilinear", "label_space": "restricted", "classes": 3
        }  # fmt: skip
        visits = [len(part.labels) for part in data._stream_set.domains]
        assert visits == [6, 3, 3]  # of the other sets, the images of these classes only
        assert sorted(labels.tolist()) == [0] * 4 + [1] * 4 + [2] * 4

    @pytest.mark.parametrize("domains", [["clean", "fog"], ["imagenet_r", "imagenet_a"]])
    def test_restricted_to_what(self, make, domains):
        with pytest.raises(ValueError, match="restricted is to the classes of one of imagenet_r and imagenet_a"):
            make(domains=domains, label_space="restricted")

    def test_unknown_label_space(self, make):
        with pytest.raises(ValueError, match="label_space must be full or restricted, got '200'"):
            make(label_space="200")


class TestDomains:
    def test_names_and_severities(self, make):
        data = make(domains=["clean", "fog", "imagenet_r"], severity=1)
        data.setup("test")
        assert [(domain.name, domain.severity) for domain in data.stream.domains] == [
            ("clean", 0),
            ("fog", 1),
            ("imagenet_r", 0),
        ]

    def test_published_images_are_shown_as_they_are(self, make, root):
        images, labels = shown(make(domains=["fog"], severity=5))
        assert images.shape == (len(ALL), 3, 224, 224)
        for image, label in zip(images, labels.tolist(), strict=True):
            with Image.open(root / "ImageNet-C" / "fog" / "5" / WNIDS[label] / "a.JPEG") as picture:
                assert np.array_equal(image.permute(1, 2, 0).numpy(), np.array(picture))

    def test_generated_images_beside_published_are_centres(self, make, root):
        data = make(domains=["fog", "imagenet_r"], stream=Mixed())
        images, labels = shown(data)
        assert images.shape == (len(ALL) + 3, 3, 224, 224)
        alone = make(domains=["imagenet_r"])
        whole, numbers = shown(alone)
        assert whole.shape[2:] == (256, 256)
        centre = whole[numbers.tolist().index(8)][:, 16:240, 16:240]
        assert any(torch.equal(image, centre) for image in images[labels == 8])

    def test_corruptions_can_be_made(self, make):
        data = make(domains=["fog", "imagenet_r", "clean"], generate=True, severity=2, stream=PerDomain(shuffle=False))
        images, labels = shown(data)
        clean = make().load("test")
        count = len(clean)
        assert torch.equal(images[:count], corrupt(clean.images, "fog", 2, table="imagenet", chunk_size=50))
        assert torch.equal(images[-count:], clean.images)
        assert torch.equal(labels[:count], clean.labels)

    def test_limit(self, make):
        data = make(domains=["clean", "imagenet_sketch"], limit=3)
        _, labels = shown(data)
        assert len(labels) == 6

    def test_workers_show_the_same(self, make):
        here, there = (shown(make(domains=["imagenet_r"], num_workers=workers)) for workers in (0, 1))
        assert all(torch.equal(a, b) for a, b in zip(here, there, strict=True))


class TestRefusals:
    @pytest.mark.parametrize(
        ("domain", "message"),
        [
            ("clean", r"no val folder in .*nothing.*from which clean is read.*image-net.org"),
            ("imagenet_r", r"no imagenet-r folder .*imagenet-r.tar.*TTALIGHT_DATA"),
            ("fog", r"no ImageNet-C folder .*zenodo.org/records/2235448.*generate: true"),
        ],
    )
    def test_missing_set(self, make, tmp_path, domain, message):
        (tmp_path / "nothing").mkdir()
        with pytest.raises(FileNotFoundError, match=message):
            make(root=str(tmp_path / "nothing"), domains=[domain]).setup("test")

    def test_missing_corruption_and_severity(self, make):
        with pytest.raises(FileNotFoundError, match=r"no folder fgo in .*ImageNet-C; there are fog; nearest: fog"):
            make(domains=["fgo"]).setup("test")
        with pytest.raises(FileNotFoundError, match=r"no folder 3 in .*fog; there are 1, 5"):
            make(domains=["fog"], severity=3).setup("test")

    def test_folders_that_are_no_wordnet_ids(self, make, tmp_path):
        paint(tmp_path / "val" / "goldfish" / "a.JPEG", 0)
        with pytest.raises(FileNotFoundError, match=r"no folders of the classes n01440764, .* in .*val"):
            make(root=str(tmp_path)).setup("test")

    def test_nothing_to_choose_hyper_parameters_on(self, make):
        with pytest.raises(ValueError, match="no validation images beside those that are tested on"):
            make(stream_split="validation")
        with pytest.raises(ValueError, match="no validation images"):
            make().setup("validate")


@pytest.fixture(scope="module")
def task():
    torch.manual_seed(0)
    return SupervisedTask(encoder="cifar_resnet8", num_classes=1000, image_size=224)


def trainer():
    return Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )


class TestRun:
    """A classifier of the 1,000 classes, adapted on 3 of them and given back whole."""

    @pytest.mark.parametrize("adapter", [Source, Tent])
    def test_restricted_logits_are_those_of_the_classes(self, make, task, adapter):
        whole = task.classifier
        before = {name: value.clone() for name, value in task.state_dict().items()}
        seen = []
        hook = task.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
        results = trainer().adapt(task, make(domains=["imagenet_r"], label_space="restricted"), adapter())
        hook.remove()
        assert seen[-1].shape[1] == 3
        assert results["domains"][0]["samples"] == 3
        assert task.classifier is whole
        assert task.num_classes == 1000
        after = task.state_dict()
        assert all(
            torch.equal(after[name], value) for name, value in before.items() if not name.startswith("normalize")
        )

    def test_full_and_restricted_in_turn(self, make, task):
        restricted = make(domains=["imagenet_r"], label_space="restricted")
        with torch.no_grad():
            restricted.setup("test")
            images = next(iter(restricted.test_dataloader()))[0] / 255
            task.eval()
            expected = task(images)[:, list(R)]
        task._label_space.restrict(task, restricted.source_classes)
        with torch.no_grad():
            torch.testing.assert_close(task.eval()(images), expected)
        results = trainer().adapt(task, make(domains=["imagenet_r"]), Source())
        assert results["domains"][0]["samples"] == 3
        assert task.classifier.out_features == 1000
