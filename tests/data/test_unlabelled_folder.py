"""A folder of images without labels: how it is read, and what a run on it records."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from lightning import Callback
from PIL import Image

from ttalight import Trainer
from ttalight.adapters import PTBN, Source, Tent
from ttalight.callbacks import AdaptationCheckpoint
from ttalight.cli import main
from ttalight.data import Correlated, Potpourri, UnlabelledFolderDataModule
from ttalight.labels import UNLABELLED
from ttalight.metrics import StreamingClassification
from ttalight.reporting import domain_table, read_predictions, read_results
from ttalight.tasks import SupervisedTask


@pytest.fixture
def folder(tmp_path):
    draws = np.random.default_rng(0)
    for name in ("a/1.png", "a/2.png", "b/deep/1.png", "b/2.jpg", "3.png", "notes.txt", ".hidden.png"):
        path = tmp_path / "camera" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("no image") if path.suffix == ".txt" else _paint(path, draws)
    return tmp_path / "camera"


def _paint(path, draws):
    Image.fromarray(draws.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)


def make(folder, **arguments):
    return UnlabelledFolderDataModule(root=str(folder), resize=16, num_workers=0, batch_size=2, **arguments)


def task():
    torch.manual_seed(0)
    return SupervisedTask(encoder="cifar_resnet8", num_classes=10, mean=(0.5,) * 3, std=(0.25,) * 3)


def adapt(folder, run, adapter, **arguments):
    trainer = Trainer(default_root_dir=str(run), accelerator="cpu", enable_progress_bar=False)
    return trainer.adapt(task(), make(folder, **arguments), adapter)


def test_all_images_of_the_folder_are_one_domain_in_order_of_names(folder):
    data = make(folder)
    data.setup("test")
    files = data._stream_set.domains[0].files
    names = [files.path(int(index)).relative_to(folder).as_posix() for index in data.stream.sample]
    assert names == ["3.png", "a/1.png", "a/2.png", "b/2.jpg", "b/deep/1.png"]
    assert [domain.name for domain in data.stream.domains] == ["camera"]
    assert torch.cat([labels for _, labels in data.test_dataloader()]).tolist() == [UNLABELLED] * 5


def test_folders_are_domains_by_name(folder):
    data = make(folder, domains=["b", "a"], limit=1)
    data.setup("test")
    assert [domain.name for domain in data.stream.domains] == ["b", "a"]
    assert data.stream.counts().tolist() == [1, 1]


def test_results_without_labels_have_agreement_and_no_accuracy(folder, tmp_path):
    results = adapt(folder, tmp_path / "run", Tent(lr=0.1), domains=["a", "b"])
    assert results == read_results(tmp_path / "run")
    for row in results["domains"]:
        assert row["accuracy"] is row["error"] is row["nll"] is row["ece"] is row["brier"] is None
        assert row["samples"] == 2
        assert row["entropy"] > 0
        assert 0 <= row["diversity"] <= 1
        assert row["agreement"] in (0.0, 0.5, 1.0)
    assert results["mean"]["accuracy"] is None
    assert results["mean"]["entropy"] > 0
    assert results["overall"]["samples"] == 4
    assert results["curve"]["running"] == [None] * len(results["curve"]["images"])
    assert "worst" not in results
    assert "agreement %" in domain_table(results)
    assert "accuracy" not in domain_table(results)


def test_agreement_is_that_of_two_runs(folder, tmp_path):
    """Each prediction against the one of a run that adapts nothing."""
    results, saved = {}, {}
    for adapter in (Source(), PTBN()):
        run = tmp_path / type(adapter).__name__
        words = [
            "adapt", "--model=SupervisedTask", "--model.encoder=cifar_resnet8", "--data=UnlabelledFolderDataModule",
            f"--data.root={folder}", "--data.resize=16", "--data.batch_size=5", "--data.num_workers=0",
            f"--adapter={run.name}", "--predictions=true", f"--trainer.default_root_dir={run}",
            "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
        ]  # fmt: skip
        main(words)
        results[run.name] = json.loads((run / "results.json").read_text())
        saved[run.name] = read_predictions(run / "predictions.npz")
    same = (saved["PTBN"]["prediction"] == saved["Source"]["prediction"]).mean()
    assert results["PTBN"]["mean"]["agreement"] == pytest.approx(same)
    assert results["Source"]["mean"]["agreement"] == 1.0
    assert saved["PTBN"]["label"].tolist() == [UNLABELLED] * 5


def test_the_source_pass_of_the_agreement_changes_nothing(folder, tmp_path, monkeypatch):
    before = adapt(folder, tmp_path / "with", Tent(lr=0.1))
    monkeypatch.setattr("ttalight.callbacks.recorder.source_agreement", lambda engine, images, logits: logits[:, 0])
    after = adapt(folder, tmp_path / "without", Tent(lr=0.1))
    assert before["domains"][0]["entropy"] == after["domains"][0]["entropy"]
    assert before["cost"]["forwards_per_batch"] == after["cost"]["forwards_per_batch"]


class Stop(Callback):
    """Fails when the second batch ends."""

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        if batch_idx == 1:
            raise RuntimeError("stopped")


def test_a_stopped_run_resumes_with_its_agreement(folder, tmp_path):
    whole = adapt(folder, tmp_path / "whole", Tent(lr=0.1))
    arguments = {"default_root_dir": str(tmp_path / "run"), "accelerator": "cpu", "enable_progress_bar": False}
    every = AdaptationCheckpoint(every=1)
    with pytest.raises(RuntimeError, match="stopped"):
        Trainer(**arguments, callbacks=[every, Stop()]).adapt(task(), make(folder), Tent(lr=0.1))
    resumed = Trainer(**arguments).adapt(task(), make(folder), Tent(lr=0.1), resume=str(tmp_path / "run"))
    for name in ("agreement", "entropy", "diversity", "samples"):
        assert resumed["domains"][0][name] == whole["domains"][0][name]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"domains": ["c"]}, "no folder c in .*; there are a, b"),
        ({"stream": Correlated()}, "orders images by their labels, and these have none"),
        ({"stream": Potpourri(clean=True)}, "has no such set"),
    ],
)
def test_what_needs_labels_or_is_missing_is_an_error(folder, arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make(folder, **arguments).setup("test")


def test_an_empty_or_missing_folder_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no images in .*expected files that end in \.jpg"):
        make(tmp_path).setup("test")
    with pytest.raises(FileNotFoundError, match="there is no folder"):
        make(tmp_path / "none").setup("test")


def test_nothing_is_trained_without_labels(folder):
    with pytest.raises(ValueError, match="have no labels, so nothing can be trained"):
        make(folder).setup("fit")


def test_labels_for_some_images_only_are_an_error():
    metric = StreamingClassification(num_classes=3)
    metric.update(torch.eye(3), torch.tensor([0, UNLABELLED, 2]))
    with pytest.raises(ValueError, match="1 of 3 samples have the label -100"):
        metric.compute()
