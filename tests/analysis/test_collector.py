"""Features of a run: they are those behind its predictions, and the run does not notice."""

from __future__ import annotations

import json

import pytest
import torch
from lightning import Callback

from ttalight.adapters import EMABN, PTBN, Source, Tent, TestTimeTraining
from ttalight.analysis import FeatureCollector, class_medians, davies_bouldin, read_features, read_geometry
from ttalight.tasks import SupervisedTask
from ttalight.tasks.two_view import TwoViewTask

METHODS = {
    "ttt": lambda: TestTimeTraining(steps=3, lr=1e-2, read_at=[0, 1]),
    "ttt, batch statistics": lambda: TestTimeTraining(steps=2, lr=1e-2, norm="batch", read_at=[0]),
    "ttt, online": lambda: TestTimeTraining(steps=2, lr=1e-2, reset="domain"),
    "control": lambda: EMABN(steps=3, reset="batch", read_at=[0]),
    "tent": lambda: Tent(lr=1e-2),
    "ptbn": PTBN,
    "source": Source,
}


class Predictions(Callback):
    """Keeps what the recorder sees: logits after all steps, and the readings."""

    def __init__(self) -> None:
        self.after: list[torch.Tensor] = []
        self.before: list[torch.Tensor] = []

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
        engine = next(callback for callback in trainer.callbacks if hasattr(callback, "engine")).engine
        if 0 in engine.net.readings:
            self.before.append(engine.net.readings[0])
        self.after.append(trainer.callbacks[1]._logits.detach())


def measured(results):
    text = json.loads(json.dumps(results))
    for row in text["domains"]:
        row["seconds"] = row["images_per_second"] = None
    text["cost"]["images_per_second"] = None
    return text


@pytest.mark.parametrize("method", METHODS)
def test_the_run_goes_on_as_without(method, make_task, make_data, make_trainer):
    few = {"batch_size": 10, "limit": 20}
    first = METHODS[method]()
    plain = make_trainer(name="plain").adapt(make_task(), make_data(**few), first)
    collector = FeatureCollector(source_images=30, keep=["contrast"])
    adapter, task = METHODS[method](), make_task()
    watched = make_trainer(collector, name="watched").adapt(task, make_data(**few), adapter)
    assert measured(watched) == measured(plain)
    own, other = adapter.state_dict()["tensors"], first.state_dict()["tensors"]
    assert own.keys() == other.keys()
    assert all(torch.equal(own[name], other[name]) for name in own)
    assert all(torch.equal(a, b) for a, b in zip(task.parameters(), make_task().parameters(), strict=True))


@pytest.mark.parametrize("method", ["ttt", "ttt, batch statistics", "control"])
@pytest.mark.parametrize("kind", ["cta", "joint"])
def test_features_are_those_behind_the_predictions(method, kind, make_task, make_data, make_trainer):
    collector, predictions = FeatureCollector(keep=["clean", "contrast"]), Predictions()
    adapter, task = METHODS[method](), make_task(kind)
    make_trainer(collector, predictions).adapt(task, make_data(batch_size=10, limit=20), adapter)
    place = "projector" if kind == "cta" else "encoder"
    for steps, logits in ((0, predictions.before), (adapter.steps, predictions.after)):
        values = torch.cat([collector.features[name].values[place, steps] for name in ("clean", "contrast")])
        assert torch.allclose(task.classifier(values), torch.cat(logits), atol=1e-5)
    moved = collector.features["contrast"].values
    assert not torch.allclose(moved["projector", 0], moved["projector", adapter.steps])


def test_source_features_have_no_steps(make_task, make_data, make_trainer):
    collector = FeatureCollector(keep=["contrast"])
    make_trainer(collector).adapt(make_task(), make_data(), Source())
    assert {row["steps"] for row in collector.rows} == {0}


def test_features_before_steps_are_source_features(make_task, make_data, make_trainer):
    kept = []
    for method in ("ttt, online", "source"):
        collector = FeatureCollector(keep=["contrast"])
        make_trainer(collector, name=method).adapt(make_task(), make_data(), METHODS[method]())
        kept.append(collector.features["contrast"].values["projector", 0])
    assert torch.equal(*kept)


def test_files_have_the_rows_and_what_is_kept(make_task, make_data, make_trainer, tmp_path):
    collector = FeatureCollector(images=25, source_images=50, keep=["contrast"], keep_images=20)
    make_trainer(collector).adapt(make_task(), make_data(), TestTimeTraining(steps=2))
    assert read_geometry(tmp_path / "run") == collector.rows
    found = read_features(tmp_path / "run")
    assert list(found) == ["contrast"]
    values = found["contrast"].values["encoder", 2]
    assert values.shape == (20, 64)
    row = next(
        row for row in collector.rows if (row["domain"], row["place"], row["steps"]) == ("contrast", "encoder", 2)
    )
    assert row["samples"] == 25
    assert row["davies_bouldin"] != davies_bouldin(values, found["contrast"].labels)


def test_source_features_are_of_the_training_set(make_task, make_data, make_trainer):
    collector = FeatureCollector(source_images=60)
    make_trainer(collector).adapt(make_task(), make_data(domains=["clean"]), TestTimeTraining(steps=1))
    task, data = make_task().eval(), make_data()
    images = data.load("train")
    task.normalize.set(data.mean, data.std)
    with torch.no_grad():
        features = task.project(images.images[:60].float() / 255)
    medians = class_medians(features, images.labels[:60], 10)
    test = data.load("test")
    stream = make_data(domains=["clean"])
    stream.setup("test")
    with torch.no_grad():
        own = task.project(test.images[:40].float() / 255)
    expected = (class_medians(own, test.labels[:40], 10) - medians).norm(dim=1)
    row = next(row for row in collector.rows if (row["place"], row["steps"]) == ("projector", 0))
    assert row["distances"]["source"]["total"] == pytest.approx(float(expected.nansum()), rel=1e-4)


def test_the_supervised_model_is_a_second_reference(make_task, make_data, make_trainer, tmp_path):
    task = SupervisedTask(encoder="cifar_resnet8", crop="none")
    fit = {"max_epochs": 1, "limit_train_batches": 1, "limit_val_batches": 0}
    make_trainer(name="source", **fit).fit(task, datamodule=make_data())
    path = tmp_path / "source" / "checkpoints" / "last.ckpt"
    collector = FeatureCollector(source_images=40, supervised=str(path))
    make_trainer(collector).adapt(make_task(), make_data(domains=["clean"]), TestTimeTraining(steps=1))
    for row in collector.rows:
        assert row["distances"].keys() == {"source", "supervised"}
        assert row["distances"]["source"]["mean"] != pytest.approx(row["distances"]["supervised"]["mean"])


class Stop(Exception):
    """Stops a run."""


class StopAt(Callback):
    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_test_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
        if batch_idx == self.batch:
            raise Stop


def test_a_resumed_run_keeps_what_was_finished(make_task, make_data, make_trainer, tmp_path):
    def run(*callbacks, **kwargs):
        collector = FeatureCollector(source_images=30, keep=["clean", "contrast"])
        trainer = make_trainer(collector, *callbacks)
        trainer.adapt(make_task(), make_data(), TestTimeTraining(steps=2, lr=1e-2), overwrite=True, **kwargs)
        return collector

    whole = run()
    with pytest.raises(Stop):
        run(StopAt(2))
    assert {row["domain"] for row in read_geometry(tmp_path / "run")} == {"clean"}
    resumed = run(resume=str(tmp_path / "run"))
    assert resumed.rows == whole.rows
    assert list(read_features(tmp_path / "run")) == ["clean", "contrast"]
    for name, features in whole.features.items():
        assert all(torch.equal(value, resumed.features[name].values[key]) for key, value in features.values.items())


def test_memory_is_bounded(make_task, make_data, make_trainer):
    sizes = []

    class Watch(Callback):
        def on_test_batch_end(self, trainer, pl_module, outputs, batch, batch_idx, dataloader_idx=0):
            sizes.append(sum(map(len, collector._held.values())))

    collector = FeatureCollector(images=15)
    make_trainer(collector, Watch()).adapt(make_task(), make_data(), TestTimeTraining(steps=1))
    assert sizes == [15, 0, 15, 0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"images": 0}, "images and keep_images must be at least 1 .* got 0, 2000 and 0"),
        ({"supervised": "x.ckpt"}, "say how many by source_images"),
    ],
)
def test_refuses_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        FeatureCollector(**arguments)


def test_refuses_when_the_run_starts(make_task, make_data, make_trainer):
    with pytest.raises(ValueError, match="keep names fogg, the stream has clean, contrast"):
        make_trainer(FeatureCollector(keep=["fogg"])).adapt(make_task(), make_data(), Source())
    with pytest.raises(TypeError, match=r"while Trainer\.adapt runs, got CrossTaskTTT and no adapter"):
        make_trainer(FeatureCollector(), name="other").test(make_task(), datamodule=make_data())


def test_there_are_tasks_without_a_projector(make_data, make_trainer):
    task = SupervisedTask(encoder="cifar_resnet8")
    assert not isinstance(task, TwoViewTask)
    collector = FeatureCollector()
    make_trainer(collector).adapt(task, make_data(), PTBN())
    assert {row["place"] for row in collector.rows} == {"encoder"}
