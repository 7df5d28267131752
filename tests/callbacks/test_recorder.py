"""The recorder on our modules and on any other, and the results of Trainer.adapt."""

from __future__ import annotations

import json
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import Logger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ttalight
from ttalight.adapters import Source, Tent
from ttalight.callbacks import Recorder
from ttalight.cli import main
from ttalight.data import (
    Continual,
    DigitsDataModule,
    Mixed,
    PerDomain,
    Probed,
    SingleSample,
    Stream,
    StreamOrder,
    Visit,
)
from ttalight.reporting import domain_table, read_predictions, read_results


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


class Nowhere(Logger):
    """A logger without a folder."""

    name, version = "nowhere", 0

    def log_metrics(self, metrics, step=None):
        pass

    def log_hyperparams(self, params, *args, **kwargs):
        pass


class Stop(lightning.Callback):
    """Fails before a batch."""

    def __init__(self, index: int) -> None:
        self.index = index

    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == self.index:
            raise KeyError("stop")


COLUMNS = ("position", "visit", "domain", "sample", "label", "prediction", "logits", "domains")


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
    """All that the module predicts, with the visit of each image, by a plain loop over the stream."""
    data.setup("test")
    module.eval()
    logits, labels, visits = [], [], []
    for index, batch in enumerate(data.test_dataloader()):
        images, target = data.on_after_batch_transfer(batch, 0)
        scored = data.stream.scored(index)
        with torch.no_grad():
            logits.append(module(images)[scored])
        labels.append(target[scored])
        visits.append(torch.from_numpy(data.stream.visit[data.stream.batch(index)].astype(np.int64))[scored])
    return torch.cat(logits), torch.cat(labels), torch.cat(visits)


def measures(logits, labels):
    """The measures of some images, one after the other in double precision."""
    probabilities = logits.double().softmax(1)
    n, classes = logits.shape
    bins, values = {}, dict.fromkeys(("accuracy", "top5", "nll", "brier", "entropy"), 0.0)
    for row, label in zip(probabilities.tolist(), labels.tolist(), strict=True):
        order = sorted(range(classes), key=lambda index: -row[index])
        values["accuracy"] += (order[0] == label) / n
        values["top5"] += (label in order[:5]) / n
        values["nll"] -= np.log(row[label]) / n
        values["brier"] += sum((p - (index == label)) ** 2 for index, p in enumerate(row)) / n
        values["entropy"] -= sum(p * np.log(p) for p in row) / n
        members = bins.setdefault(int(np.ceil(row[order[0]] * 15)), [])
        members.append(row[order[0]] - (order[0] == label))
    shares = np.bincount(probabilities.argmax(1), minlength=classes) / n
    return values | {
        "samples": n,
        "error": 1 - values["accuracy"],
        "ece": sum(abs(sum(members)) for members in bins.values()) / n,
        "diversity": -sum(share * np.log(share) for share in shares if share) / np.log(classes),
    }


def written(trainer) -> dict:
    return json.loads(Path(trainer.log_dir, "results.json").read_text())


@pytest.mark.parametrize(
    "order",
    [PerDomain(), Interleaved(), Mixed(), SingleSample(Continual(rounds=2), window=4)],
    ids=lambda order: type(order).__name__,
)
def test_everything_equals_a_hand_loop(run, data, order):
    data.order, data.limit = order, 30
    module, trainer = Module(), run()
    trainer.test(module, datamodule=data)
    results = written(trainer)
    logits, labels, visits = by_hand(module, data)
    rows = results["domains"]
    assert len(rows) == len(data.stream.visits)
    for index, row in enumerate(rows):
        where = data.stream.visits[index]
        assert (row["name"], row["visit"]) == (data.stream.domains[where.domain].name, where.number)
        expected = measures(logits[visits == index], labels[visits == index])
        assert {name: row[name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    expected = measures(logits, labels)
    assert {name: results["overall"][name] for name in expected} == pytest.approx(expected, rel=1e-5, abs=1e-6)
    for name in expected.keys() - {"samples"}:
        values, weights = [row[name] for row in rows], [row["samples"] for row in rows]
        assert results["mean"][name] == pytest.approx(np.mean(values))
        assert results["weighted_mean"][name] == pytest.approx(np.average(values, weights=weights))
    assert results["curve"]["images"][-1] == len(labels)
    assert results["curve"]["running"][-1] == pytest.approx(expected["accuracy"])
    protocol = results["protocol"]
    assert (protocol["stream"], protocol["stream_hash"]) == (type(order).__name__, data.stream.hash)
    assert protocol["stream_args"] == order.describe()
    assert protocol["data"] == "DigitsDataModule"
    assert results["classes"] == 10
    assert results["complete"] is True


def test_protocol_has_what_the_data_module_says(run):
    class Described(DigitsDataModule):
        dataset = "digits"

        def protocol(self):
            return {"label_space": "full"}

    trainer = run()
    trainer.test(Module(), datamodule=Described(batch_size=10, limit=10))
    protocol = written(trainer)["protocol"]
    assert (protocol["data"], protocol["label_space"]) == ("digits", "full")


def test_curve_follows_the_stream(run, data):
    module, trainer = Module(), run()
    trainer.test(module, datamodule=data)
    curve = written(trainer)["curve"]
    logits, labels, _ = by_hand(module, data)
    right = (logits.argmax(1) == labels).double().numpy()
    assert curve["images"] == [32, 64, 80, 112, 144, 160]
    starts = [0, *curve["images"][:-1]]
    expected = [right[a:b].mean() for a, b in zip(starts, curve["images"], strict=True)]
    assert curve["accuracy"] == pytest.approx(expected)
    assert curve["running"] == pytest.approx([right[:end].mean() for end in curve["images"]])


class TestProbes:
    @pytest.fixture
    def results(self, run, data):
        def adapt(order, name="Tent"):
            data.order = order
            fresh = DigitsDataModule(batch_size=32, domains=["contrast", "gaussian_noise"], limit=80, stream=order)
            trainer = run()
            trainer.adapt(Module(), fresh, Tent(lr=0.05, reset="never"), overwrite=True)
            return written(trainer)

        return adapt

    def test_have_rows_and_count_in_no_mean(self, results):
        plain, probed = results(Continual()), results(Probed(Continual(), every=60, samples=40))
        rows = [row for row in probed["domains"] if "probe" not in row]
        for with_probes, without in zip(rows, plain["domains"], strict=True):
            assert with_probes["accuracy"] == without["accuracy"]
            assert with_probes["nll"] == pytest.approx(without["nll"])
            assert with_probes["start"] == without["start"]
        for key in ("mean", "weighted_mean", "overall"):
            assert probed[key] == pytest.approx(plain[key])
        assert probed["curve"]["running"][-1] == pytest.approx(plain["curve"]["running"][-1])
        assert probed["worst"] == plain["worst"]

    def test_show_forgetting(self, results):
        probed = results(Probed(Continual(), every=60, samples=40))
        probes = [row["accuracy"] for row in probed["domains"] if row.get("probe")]
        assert len(probes) == 3
        (found,) = probed["forgetting"]
        assert found["forgotten"] == pytest.approx(probes[0] - probes[-1])
        assert found["lowest"] == min(probes)


def test_rounds(run, data):
    data.order = Continual(rounds=2)
    trainer = run()
    trainer.test(Module(), datamodule=data)
    results = written(trainer)
    first, second = results["rounds"]
    assert [entry["rows"] for entry in (first, second)] == [2, 2]
    for entry in (first, second):
        rows = [row["accuracy"] for row in results["domains"] if row["visit"] == entry["visit"]]
        assert entry["accuracy"] == pytest.approx(np.mean(rows))


def test_a_part_of_a_stream_is_not_complete(run, data):
    trainer = run(limit_test_batches=2)
    trainer.test(Module(), datamodule=data)
    results = written(trainer)
    assert results["complete"] is False
    assert [row["samples"] for row in results["domains"]] == [64]


class Segmentation(lightning.LightningModule):
    """One class a pixel, by its colour."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.net = nn.Conv2d(3, 4, 1)

    def forward(self, images):
        return {"out": self.net(images)}

    def test_step(self, batch, batch_idx):
        self(batch[0])


def test_dense_predictions(tmp_path):
    module = Segmentation()
    images, labels = torch.rand(6, 3, 5, 4), torch.randint(4, (6, 5, 4))
    labels[:, 0] = 255
    loader = DataLoader(TensorDataset(images, labels), batch_size=4)
    recorder = Recorder(folder=str(tmp_path), predictions=True, ignore_index=255)
    trainer = lightning.Trainer(accelerator="cpu", logger=False, callbacks=recorder, enable_progress_bar=False)
    trainer.test(module, loader, verbose=False)
    (row,) = recorder.results["domains"]
    with torch.no_grad():
        predicted = module.net(images).argmax(1)
    counts = labels != 255
    assert row["samples"] == 6  # images, as in the protocol
    assert row["accuracy"] == pytest.approx((predicted == labels)[counts].double().mean().item())
    parts = []
    for index in range(4):
        own, true = (predicted == index)[counts], (labels == index)[counts]
        parts.append((own & true).sum().item() / (own | true).sum().item())
    assert row["miou"] == pytest.approx(np.mean(parts))
    assert row["iou"] == pytest.approx(parts)
    assert read_results(tmp_path)["domains"][0]["iou"] == row["iou"]
    assert ",miou,start" in (tmp_path / "domains.csv").read_text()  # and no list
    assert "mIoU %" in str(recorder.results)
    assert recorder.results["mean"]["miou"] == row["miou"]
    assert recorder.results["curve"]["running"][-1] == pytest.approx(row["accuracy"])
    assert read_predictions(tmp_path, "logits")["logits"].shape == (6, 4, 5, 4)


class TestPredictions:
    def test_are_those_that_were_measured(self, run, data, tmp_path):
        data.order = Mixed()
        module = Module()
        trainer = run(Recorder(predictions=True))
        trainer.test(module, datamodule=data)
        found = read_predictions(tmp_path, *COLUMNS)
        logits, labels, visits = by_hand(module, data)
        assert found["position"].tolist() == list(range(160))
        assert np.array_equal(found["label"], labels)
        assert np.array_equal(found["visit"], visits)
        assert np.array_equal(found["sample"], data.stream.sample)
        assert found["domains"][found["domain"]].tolist() == [("clean", "contrast")[visit] for visit in visits.tolist()]
        assert np.array_equal(found["prediction"], logits.argmax(1))
        assert found["logits"].dtype == np.float16
        np.testing.assert_allclose(found["logits"], logits, rtol=1e-3, atol=1e-4)
        right = found["prediction"] == found["label"]
        rows = written(trainer)["domains"]
        assert [right[found["visit"] == index].mean() for index in (0, 1)] == [row["accuracy"] for row in rows]

    def test_a_window_s_older_images_come_once(self, run, data, tmp_path):
        data.order, data.limit = SingleSample(window=4), 10
        run(Recorder(predictions=True)).test(Module(), datamodule=data)
        assert read_predictions(tmp_path)["position"].tolist() == list(range(20))

    def test_of_a_stopped_run_are_kept(self, run, data, tmp_path):
        with pytest.raises(KeyError):
            run(Stop(4), Recorder(predictions=True)).test(Module(), datamodule=data)
        found = read_predictions(tmp_path)
        assert len(found["position"]) == 32 + 32 + 16 + 32
        assert not list(tmp_path.glob(".predictions*"))

    def test_are_not_written_unless_asked_for(self, run, data, tmp_path):
        run().test(Module(), datamodule=data)
        assert not list(tmp_path.glob("*predictions*"))

    def test_need_a_place(self, data):
        trainer = lightning.Trainer(accelerator="cpu", logger=Nowhere(), callbacks=Recorder(predictions=True))
        with pytest.raises(ValueError, match="predictions=True needs a place to write to"):
            trainer.test(Module(), datamodule=data)

    def test_command(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        words = "--model SupervisedTask --model.encoder cifar_resnet8 --data DigitsDataModule --data.limit 20".split()
        words += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--predictions", "true"]
        main(["adapt", *words, "--adapter", "Source", "--name", "a"])
        main(["test", *words, "--name", "b"])
        found = [read_predictions(f"runs/{name}", "position", "logits") for name in ("a", "b")]
        assert [len(part["position"]) for part in found] == [20, 20]
        assert np.array_equal(found[0]["logits"], found[1]["logits"])
        results = json.loads(Path("runs/a/results.json").read_text())
        assert results["network"] == "cifar_resnet8"
        with pytest.raises(SystemExit) as stop:
            main(["fit", *words, "--name", "c"])
        assert stop.value.code == 2
        assert "fit takes no --predictions: adapt, test and validate do" in capsys.readouterr().err


class TestManyVisits:
    """A stream of more visits than have their results written one after the other."""

    def test_rows_and_time(self, run, tmp_path, monkeypatch):
        writes = []
        monkeypatch.setattr("ttalight.callbacks.recorder.write_results", lambda *a: writes.append(len(a[1]["domains"])))
        data = DigitsDataModule(batch_size=1, domains=["clean", "contrast"], limit=1, stream=Continual(rounds=120))
        trainer = run()
        trainer.test(Module(), datamodule=data)
        assert len(writes) < 230
        assert writes[:3] == [1, 2, 3]
        assert writes[99:100] == [100]
        assert writes[-1] == 240
        recorder = next(callback for callback in trainer.callbacks if isinstance(callback, Recorder))
        assert recorder.results["overall"]["samples"] == 240
        assert len(recorder.results["rounds"]) == 120
        assert len(recorder.results["curve"]["images"]) == 120
        table = domain_table(recorder.results).splitlines()
        assert [line.split()[:2] for line in table[2:]] == [["clean", "120"], ["contrast", "120"], ["mean", "240"]]


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


def test_adapt_returns_results_and_restores_trainer(run, data):
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
    single = run().adapt(module, alone, Tent(lr=0.1), overwrite=True)
    both = run().adapt(module, data, Tent(lr=0.1), overwrite=True)
    never = run().adapt(module, data, Tent(lr=0.1, reset="never"), overwrite=True)
    assert both["domains"][1]["nll"] == single["domains"][0]["nll"]
    assert never["domains"][1]["nll"] != single["domains"][0]["nll"]
    assert never["domains"][0]["nll"] == both["domains"][0]["nll"]


def test_a_stopped_run_keeps_finished_domains(run, data, tmp_path):
    """It stops in the second one."""
    with pytest.raises(KeyError):
        run(Stop(4)).adapt(Module(), datamodule=data, adapter=Source())
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


@pytest.mark.parametrize("trainer_class", [ttalight.Trainer, lightning.Trainer])
def test_writes_nothing_to_the_current_folder_unasked(trainer_class, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recorder = Recorder()
    trainer = trainer_class(logger=False, callbacks=[recorder], accelerator="cpu", enable_progress_bar=False)
    trainer.test(Module(), datamodule=DigitsDataModule(batch_size=20, limit=20), verbose=False)
    assert recorder.results["complete"]
    assert not list(tmp_path.iterdir())
