"""EfficientNet-Lite0 on real photographs at 224 pixels, and the examples of docs/data.md and docs/cta.md."""

from __future__ import annotations

import csv
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from ttalight import Trainer
from ttalight.adapters import Source
from ttalight.cli import main
from ttalight.data import ImageNetDataModule
from ttalight.reporting import read_results
from ttalight.tasks import SupervisedTask

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "data.md"


def examples(page: Path) -> dict[str, str]:
    """The blocks of a page that need data, by language."""
    return dict(re.findall(r"^```(\w+) needs-data\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S))


EXAMPLES = examples(PAGE)


@pytest.fixture(scope="module")
def place(shared_data, tmp_path_factory):
    """A folder as the page wants it: imagenet/val/<wnid>/ and the weights."""
    place = tmp_path_factory.mktemp("photographs")
    shutil.unpack_archive(shared_data / "imagenet-samples-even-256px.tar", place)
    samples = place / "imagenet-samples-256px"
    with (samples / "labels.csv").open() as table:
        for row in csv.DictReader(table):
            folder = place / "imagenet" / "val" / row["wnid"]
            folder.mkdir(parents=True)
            (samples / row["file"]).rename(folder / row["file"])
    (place / "efficientnet_lite0.pth").symlink_to(shared_data / "efficientnet_lite0_imagenet_timm.pth")
    return place


@pytest.fixture
def task(place):
    return SupervisedTask(
        encoder="tf_efficientnet_lite0",
        stem="imagenet",
        num_classes=1000,
        weights=str(place / "efficientnet_lite0.pth"),
    )


@pytest.mark.data
def test_labels_and_preprocessing_are_right(place, task):
    """437 of all 500 photographs are classified right; wrong labels or preprocessing would show in a few."""
    data = ImageNetDataModule(root=str(place / "imagenet"), batch_size=20, limit=40, num_workers=0)
    options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    results = Trainer(**options).adapt(task, data, Source())
    assert (data.resize, data.interpolation, task.crop.size) == (256, "bicubic", 224)
    assert task.normalize.mean.tolist() == [0.5] * 3
    assert results["domains"][0]["samples"] == 40
    assert results["domains"][0]["accuracy"] >= 0.8


@pytest.mark.data
def test_the_command_of_the_page(place, monkeypatch, capsys):
    monkeypatch.chdir(place)
    _, *words = shlex.split(EXAMPLES["bash"].replace("\\\n", " "))
    main([*words, "--data.limit", "12", "--data.batch_size", "12", "--data.num_workers", "0",
          "--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"])  # fmt: skip
    results = read_results(place / "runs" / "photographs" / "ptbn")
    assert [(row["name"], row["severity"], row["samples"]) for row in results["domains"]] == [
        ("clean", 0, 12),
        ("gaussian_noise", 3, 12),
    ]
    assert "gaussian_noise" in capsys.readouterr().out


@pytest.mark.data
def test_the_code_of_the_page(place, monkeypatch):
    monkeypatch.chdir(place)
    text = EXAMPLES["python"].replace("limit=100", "limit=8, num_workers=0").replace("batch_size=50", "batch_size=8")
    namespace: dict[str, object] = {}
    torch.manual_seed(0)
    exec(compile(text, str(PAGE), "exec", dont_inherit=True), namespace)
    rows = namespace["results"]["domains"]
    assert [(row["name"], row["samples"]) for row in rows] == [("clean", 8), ("gaussian_noise", 8)]
    assert all(row["nll"] < 7 for row in rows)


@pytest.mark.data
def test_alignment_of_a_copy_and_its_test_time(place, monkeypatch):
    """The commands of docs/cta.md: two steps of alignment on eight photographs, then CTA on noisy ones."""
    monkeypatch.chdir(place)
    for folder in sorted((place / "imagenet" / "val").iterdir())[:8]:
        target = place / "imagenet" / "train" / folder.name
        target.mkdir(parents=True)
        for file in folder.iterdir():
            (target / file.name).symlink_to(file)
    fit, adapt = (shlex.split(line)[1:] for line in examples(DOCS / "cta.md")["bash"].replace("\\\n", " ").splitlines())
    small = ["--data.batch_size", "4", "--data.num_workers", "0", "--trainer.enable_progress_bar", "false",
             "--trainer.accelerator", "cpu"]  # fmt: skip
    main([*fit, *small, "--trainer.max_epochs", "1", "--trainer.limit_val_batches", "0"])
    last = place / "runs" / "photographs" / "align" / "checkpoints" / "last.ckpt"
    state = torch.load(last, weights_only=True)["state_dict"]
    public = torch.load(place / "efficientnet_lite0.pth", weights_only=True)
    assert torch.equal(state["teacher.encoder.conv_stem.weight"], public["conv_stem.weight"])
    assert not torch.equal(state["encoder.conv_stem.weight"], public["conv_stem.weight"])
    main([*adapt, *small, "--data.limit", "8", "--adapter", "TestTimeTraining", "--adapter.steps", "1"])
    results = read_results(place / "runs" / "photographs" / "cta")
    assert [(row["name"], row["samples"]) for row in results["domains"]] == [("clean", 8), ("gaussian_noise", 8)]
    assert all(row["nll"] < 100 for row in results["domains"])
    assert results["source"]["file"].endswith("align/checkpoints/last.ckpt")


def test_the_pages_have_their_examples():
    assert EXAMPLES.keys() == {"bash", "python"}
    assert examples(DOCS / "cta.md").keys() == {"bash"}
