"""Limits of every task: it does not read labels or test data, depend on earlier batches, touch what is not its own."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from ttalight.adapters import Tent, TestTimeTraining
from ttalight.data import DigitsDataModule
from ttalight.tasks import (
    NCTTT,
    AlignmentTask,
    ClusT3,
    ContrastiveTask,
    CrossTaskTTT,
    JointTask,
    ProbeTask,
    ReCTTT,
    RotationTTT,
    SupervisedTask,
    TTTFlow,
    TTTPlusPlus,
)

SMALL = {"encoder": "cifar_resnet8", "lr": 1e-3}
ADAPTING = {
    CrossTaskTTT: {},
    JointTask: {},
    ProbeTask: {},
    RotationTTT: {},
    TTTPlusPlus: {"calibration_images": 100, "queue": 24},
    ClusT3: {"projectors": 3, "clusters": 4},
    NCTTT: {"channels": 4},
    ReCTTT: {"decoder_blocks": [1, 1, 1]},
    TTTFlow: {"flow_steps": 1, "hidden": 4},
}
#: Tasks that are trained, and the stages that they start from.
TRAINED = {kind: {} for kind in (SupervisedTask, ContrastiveTask, *ADAPTING) if kind is not CrossTaskTTT} | {
    ProbeTask: {"self_supervised": "simclr"},
    TTTFlow: {"supervised": "source"},
    AlignmentTask: {"supervised": "source", "self_supervised": "simclr"},
}

pytestmark = pytest.mark.filterwarnings("ignore:the frozen encoder of ReC-TTT has random weights")


@pytest.fixture(scope="module", params=list(ADAPTING), ids=lambda kind: kind.__name__)
def task(request, make_data):
    """A task with random weights; adaptation gives it back as it was."""
    torch.manual_seed(0)
    task = request.param(**SMALL, **ADAPTING[request.param])
    if isinstance(task, TTTPlusPlus):
        data = make_data()
        data.setup("fit")
        task.summarize(data)
    return task


def batches(count, size=4):
    return torch.rand(count * size, 3, 32, 32, generator=torch.Generator().manual_seed(1)).split(size)


def test_labels_of_the_stream_change_no_prediction(task, make_trainer, tmp_path):
    class Permuted(DigitsDataModule):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            images, labels = super().on_after_batch_transfer(batch, dataloader_idx)
            return images, labels.roll(1)

    def run(kind):
        logits = []
        handle = task.register_forward_hook(lambda module, inputs, output: logits.append(output))
        data = kind(batch_size=5, limit=10, domains=["contrast"])
        adapter = TestTimeTraining(steps=2, lr=1e-3, reset="domain")
        results = make_trainer(tmp_path).adapt(task, data, adapter, overwrite=True)
        handle.remove()
        return results["mean"]["nll"], torch.cat(logits)

    (nll, logits), (permuted_nll, permuted) = run(DigitsDataModule), run(Permuted)
    assert torch.equal(logits, permuted)
    assert nll != permuted_nll


def test_episode_ignores_earlier_batches(task):
    """Draws belong to a batch's place, so the place is kept, and what came before it is other."""
    first, second, third = batches(3)

    def last(order, reset):
        adapted = TestTimeTraining(steps=2, lr=1e-2, reset=reset).wrap(task)
        logits = [adapted(images) for images in order]
        adapted.release()
        return logits[-1]

    orders = (first, second, third), (third, first, third)
    assert torch.equal(*(last(order, "batch") for order in orders))
    assert not torch.equal(*(last(order, "never") for order in orders))


def test_an_episode_leaves_the_global_random_state(task):
    assert_keeps_random_state(TestTimeTraining(steps=2, lr=1e-3).wrap(task))


def test_update_keeps_global_random_state():
    assert_keeps_random_state(Tent(lr=1e-3).wrap(SupervisedTask(**SMALL)))


def assert_keeps_random_state(adapted):
    torch_state, numpy_state, state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    for images in batches(2):
        adapted(images)
    adapted.release()
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert str(np.random.get_state()) == str(numpy_state)  # noqa: NPY002
    assert random.getstate() == state


@pytest.mark.parametrize("kind", list(TRAINED), ids=lambda kind: kind.__name__)
def test_training_never_reads_test_data(kind, stages, make_trainer, tmp_path):
    class Sealed(DigitsDataModule):
        def load(self, split):
            if split == "test":
                raise AssertionError("test images were read")
            return super().load(split)

    options = {name: stages[stage] for name, stage in TRAINED[kind].items()} | ADAPTING.get(kind, {})
    trainer, data = make_trainer(tmp_path, limit_train_batches=1), Sealed(batch_size=20)
    trainer.fit(kind(**SMALL, **options), datamodule=data)
    assert trainer.global_step == 1
    with pytest.raises(AssertionError, match="test images were read"):
        data.setup("test")


def test_readings_write_no_file(make_trainer, make_data, tmp_path, monkeypatch):
    def files(name, **arguments):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        trainer = make_trainer(tmp_path / name, logger=False)
        results = trainer.adapt(CrossTaskTTT(**SMALL), make_data(limit=20), TestTimeTraining(steps=2, **arguments))
        return results, {str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*")}

    (results, read), (_, plain) = files("read", read_at=[0, 1]), files("plain")
    assert [reading["steps"] for reading in results["readings"]] == [0, 1]
    assert read == plain


def test_last_epoch_is_kept_by_default(make_trainer, make_data, tmp_path):
    def fit(folder, **arguments):
        task = SupervisedTask(**SMALL)
        task.validation_step = lambda batch, batch_idx: task.log("val/accuracy", 0.9 - 0.3 * task.current_epoch)
        make_trainer(folder, max_epochs=3, **arguments).fit(task, datamodule=make_data())
        return task, {
            path.name: torch.load(path, weights_only=True)
            for path in (folder / "checkpoints").iterdir()
            if path.name != "previous.ckpt"
        }

    task, saved = fit(tmp_path / "default")
    assert saved.keys() == {"last.ckpt"}
    assert (saved["last.ckpt"]["epoch"], saved["last.ckpt"]["global_step"]) == (2, 9)
    assert all(torch.equal(saved["last.ckpt"]["state_dict"][name], value) for name, value in task.state_dict().items())
    best = ModelCheckpoint(filename="best", monitor="val/accuracy", mode="max")
    _, saved = fit(tmp_path / "asked", callbacks=best)
    assert saved["best.ckpt"]["epoch"] == 0
