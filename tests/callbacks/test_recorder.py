"""The recorder on our modules and on strangers', and what Trainer.adapt returns."""

from __future__ import annotations

import json
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ttalight
from ttalight.adapters import Source, Tent
from ttalight.callbacks import Recorder
from ttalight.data import DigitsDataModule, Stream, StreamOrder, Visit


class Module(lightning.LightningModule):
    """A fixed linear classifier of 32 x 32 images that sees their mean colours in a grid."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.AdaptiveAvgPool2d(8), nn.Flatten(), nn.BatchNorm1d(192), nn.Linear(192, 10))

    def forward(self, images):
        return self.net(images)

    def test_step(self, batch, batch_idx, dataloader_idx=0):
        self(batch[0])

    def validation_step(self, batch, batch_idx):
        self(batch[0])


class Interleaved(StreamOrder):
    """Two domains mixed, with a second visit of the first one at the end; nothing announced."""

    announced = False

    def build(self, domains, labels, batch_size, seed):
        size = len(labels[0])
        visit = np.concatenate([np.random.default_rng(seed).permutation(np.repeat([0, 1], size)), np.full(10, 2)])
        sample = np.concatenate([np.zeros(2 * size, dtype=int), np.arange(10)])
        for index in (0, 1):
            sample[visit == index] = np.arange(size)
        offsets = np.append(np.arange(0, len(visit), batch_size), len(visit))
        return Stream(domains, [Visit(0), Visit(1), Visit(0, 1)], visit, sample, offsets, self.announced)


@pytest.fixture
def run(tmp_path):
    def make(*callbacks, **kwargs) -> ttalight.Trainer:
        return ttalight.Trainer(
            default_root_dir=str(tmp_path), accelerator="cpu", enable_progress_bar=False, callbacks=list(callbacks),
            **kwargs,
        )  # fmt: skip

    return make


@pytest.fixture
def data() -> DigitsDataModule:
    return DigitsDataModule(batch_size=32, domains=["clean", "contrast"], limit=80)


def by_hand(module, data):
    """Accuracy and NLL per visit by a plain loop over the stream."""
    data.setup("test")
    module.eval()
    logits, labels, visits = [], [], []
    for index, batch in enumerate(data.test_dataloader()):
        images, target = data.on_after_batch_transfer(batch, 0)
        with torch.no_grad():
            logits.append(module(images))
        labels.append(target)
        visits.append(torch.from_numpy(data.stream.visit[data.stream.batch(index)].astype(np.int64)))
    logits, labels, visits = torch.cat(logits), torch.cat(labels), torch.cat(visits)
    rows = []
    for visit in range(len(data.stream.visits)):
        where = visits == visit
        right = (logits[where].argmax(1) == labels[where]).double().mean().item()
        rows.append((right, nn.functional.cross_entropy(logits[where], labels[where]).item()))
    return rows


@pytest.mark.parametrize("order", [None, Interleaved()])
def test_rows_equal_a_hand_loop(run, data, order):
    if order is not None:
        data.order = order
    module = Module()
    trainer = run()
    trainer.test(module, datamodule=data)
    results = json.loads(Path(trainer.log_dir, "results.json").read_text())
    rows = results["domains"]
    expected = by_hand(module, data)
    assert [row["accuracy"] for row in rows] == pytest.approx([accuracy for accuracy, _ in expected])
    assert [row["nll"] for row in rows] == pytest.approx([nll for _, nll in expected], rel=1e-5)
    names = ["clean", "contrast"] if order is None else ["clean", "contrast", "clean"]
    assert [row["name"] for row in rows] == names
    assert [row["visit"] for row in rows] == [0, 0, 1][: len(rows)]
    assert results["protocol"]["stream_hash"] == data.stream.hash
    assert results["protocol"]["stream"] == ("PerDomain" if order is None else "Interleaved")
    assert results["mean"]["accuracy"] == pytest.approx(np.mean([row["accuracy"] for row in rows]))


def test_a_strangers_loaders_are_rows(tmp_path):
    module = Module()
    loader = DataLoader(TensorDataset(torch.rand(12, 3, 32, 32), torch.arange(12) % 10), batch_size=5)
    recorder = Recorder(folder=str(tmp_path))
    trainer = lightning.Trainer(accelerator="cpu", logger=False, callbacks=recorder, enable_progress_bar=False)
    trainer.test(module, [loader, loader])
    assert [(row["name"], row["samples"]) for row in recorder.results["domains"]] == [
        ("loader_0", 12),
        ("loader_1", 12),
    ]
    assert recorder.results["source"] == {"file": None, "sha256": None}
    assert (tmp_path / "domains.csv").is_file()


def test_adapt_returns_what_it_writes_and_leaves_the_trainer_as_it_was(run, data):
    trainer = run()
    callbacks = list(trainer.callbacks)
    module = Module()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    results = trainer.adapt(module, datamodule=data, adapter=Tent(lr=0.01))
    assert results == json.loads(Path(trainer.log_dir, "results.json").read_text())
    assert trainer.callbacks == callbacks
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert results["method"] == "Tent"
    assert results["cost"]["forwards_per_batch"] == 1
    assert results["cost"]["backwards_per_batch"] == 1
    assert results["cost"]["adapted_parameters"] == 2 * 192


def test_announced_boundaries_reset_and_others_do_not(run, data):
    module = Module()
    single = run().adapt(module, DigitsDataModule(batch_size=32, domains=["contrast"], limit=80), Tent(lr=0.1))
    data.order.shuffle = False
    alone = DigitsDataModule(batch_size=32, domains=["contrast"], limit=80)
    alone.order.shuffle = False
    single = run().adapt(module, alone, Tent(lr=0.1))
    both = run().adapt(module, data, Tent(lr=0.1))
    never = run().adapt(module, data, Tent(lr=0.1, reset="never"))
    assert both["domains"][1]["nll"] == single["domains"][0]["nll"]
    assert never["domains"][1]["nll"] != single["domains"][0]["nll"]
    assert never["domains"][0]["nll"] == both["domains"][0]["nll"]


def test_a_stopped_run_keeps_finished_domains(run, data, tmp_path):
    class Stop(lightning.Callback):
        def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            if batch_idx == 4:  # in the second domain
                raise KeyError("stop")

    with pytest.raises(KeyError):
        run(Stop()).adapt(Module(), datamodule=data, adapter=Source())
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["complete"] is False
    assert [(row["name"], row["samples"]) for row in results["domains"]] == [("clean", 80)]


class TestErrors:
    def test_no_adapter(self, run, data):
        with pytest.raises(ValueError, match="Module has no adapter of its own: give one, for example --adapter Tent"):
            run().adapt(Module(), datamodule=data)

    def test_nothing_to_adapt_to(self, run):
        with pytest.raises(ValueError, match="needs a model and a datamodule"):
            run().adapt(Module(), adapter=Tent())

    def test_a_step_that_bypasses_forward(self, run, data):
        class Bypass(Module):
            def test_step(self, batch, batch_idx):
                self.net(batch[0])

        with pytest.raises(
            RuntimeError, match=r"step of Bypass does not call self\(images\), so its predictions cannot"
        ):
            run().test(Bypass(), datamodule=data)

    def test_batches_without_labels(self, run):
        loader = DataLoader(torch.rand(4, 3, 32, 32), batch_size=2)

        class Unlabelled(Module):
            def test_step(self, batch, batch_idx):
                self(batch)

        with pytest.raises(TypeError, match=r"the recorder reads batches \(image, label\), got Tensor"):
            run().test(Unlabelled(), loader)
