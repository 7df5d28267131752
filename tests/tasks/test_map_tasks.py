"""Properties of each method that adapts by a loss on its classifier's maps: ClusT3, NC-TTT, ReC-TTT, TTTFlow."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import pytest
import torch
from lightning import Callback

from ttalight.adapters import EMABN, Source, TestTimeTraining
from ttalight.cli import main
from ttalight.seeding import derive_seed
from ttalight.tasks import NCTTT, ClusT3, ReCTTT, SupervisedTask, TTTFlow

OWN = {
    ClusT3: {"projectors": 3, "clusters": 4},
    NCTTT: {"channels": 4},
    ReCTTT: {"decoder_blocks": [1, 1, 1]},
    TTTFlow: {"flow_steps": 1, "hidden": 4},
}
ENCODER = {"encoder": "cifar_resnet8"}
FIT = [
    "--model.lr", "1e-3", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2",
    "--trainer.limit_val_batches", "2", "--trainer.enable_progress_bar", "false",
    "--trainer.enable_model_summary", "false", "--trainer.accelerator", "cpu",
]  # fmt: skip
DIGITS = ["--data", "DigitsDataModule", "--data.batch_size", "20"]

pytestmark = pytest.mark.filterwarnings("ignore:the frozen encoder of ReC-TTT has random weights")


def words(kind) -> list[str]:
    given = ENCODER | OWN[kind]
    return [
        "--model", kind.__name__, *(word for name, value in given.items() for word in (f"--model.{name}", str(value)))
    ]  # fmt: skip


@pytest.fixture(scope="module")
def start(stages) -> dict[type, dict[str, str]]:
    """Arguments that training needs besides, by class."""
    return {kind: {} for kind in OWN} | {TTTFlow: {"supervised": stages["source"]}}


@pytest.fixture(scope="module")
def files(tmp_path_factory, start) -> dict[type, str]:
    """Checkpoints that the real command wrote, by class."""
    folder = tmp_path_factory.mktemp("rivals")
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patch.setenv("PL_GLOBAL_SEED", "0")
        patch.chdir(folder)
        for kind in OWN:
            own = [word for name, value in start[kind].items() for word in (f"--model.{name}", value)]
            main(["fit", *words(kind), *own, *FIT, *DIGITS, "--name", kind.__name__, "--seed_everything", "0"])
    return {kind: str(folder / "runs" / kind.__name__ / "checkpoints" / "last.ckpt") for kind in OWN}


@pytest.fixture(params=list(OWN), ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


@pytest.fixture
def task(kind, files):
    return kind(weights=files[kind], **ENCODER, **OWN[kind])


@pytest.fixture
def adapt(make_trainer, make_data, tmp_path):
    """Adapt and return results and logits."""

    def run(task, adapter, **data):
        logits = []
        handle = task.register_forward_hook(lambda module, args, output: logits.append(output))
        results = make_trainer(tmp_path).adapt(
            task,
            make_data(**({"domains": ["contrast"], "limit": 16, "batch_size": 10} | data)),
            adapter,
            overwrite=True,
        )
        handle.remove()
        return results, torch.cat(logits)

    return run


@pytest.fixture
def images(make_data):
    data = make_data(batch_size=12)
    data.setup("test")
    return data.on_after_batch_transfer(next(iter(data.test_dataloader())), 0)[0]


class TestFiles:
    def test_a_file_holds_all_that_test_time_needs(self, kind, files, task, images):
        saved = torch.load(files[kind], weights_only=True)
        assert all(torch.equal(value, saved["state_dict"][name]) for name, value in task.state_dict().items())
        assert saved["hyper_parameters"]["encoder"] == "cifar_resnet8"
        assert task.source["file"] == files[kind]
        again = kind.load_from_checkpoint(files[kind])
        with torch.no_grad():
            assert torch.equal(again.eval()(images), task.eval()(images))

    def test_of_another_class_or_architecture_is_refused(self, kind, files):
        other = next(key for key in OWN if key is not kind)
        with pytest.raises(
            ValueError, match=f"weights: .* was written by {other.__name__}, expected .* {kind.__name__}"
        ):
            kind(weights=files[other], **ENCODER, **OWN[kind])
        with pytest.raises(ValueError, match=r"of another architecture \(encoder: file 'cifar_resnet8', here"):
            kind(weights=files[kind], encoder="cifar_resnet14", **OWN[kind])

    def test_resumed_weights_equal_uninterrupted(self, kind, start, make_trainer, make_data, tmp_path):
        class Killed(Exception):
            pass

        class Kill(Callback):
            def on_train_epoch_start(self, trainer, pl_module):
                if trainer.current_epoch == 1:
                    raise Killed

        def fit(folder, callbacks=(), **resume):
            torch.manual_seed(0)
            task = kind(**ENCODER, **OWN[kind], **start[kind])
            trainer = make_trainer(
                folder, max_epochs=2, limit_train_batches=2, limit_val_batches=0, callbacks=list(callbacks)
            )
            trainer.fit(task, datamodule=make_data(batch_size=10), **resume)
            return task.state_dict()

        whole = fit(tmp_path / "whole")
        with pytest.raises(Killed):
            fit(tmp_path / "part", [Kill()])
        resumed = fit(tmp_path / "part", ckpt_path=str(tmp_path / "part" / "checkpoints" / "last.ckpt"))
        assert all(torch.equal(resumed[name], value) for name, value in whole.items())

    def test_copies_have_no_hooks(self, task, images):
        task.auxiliary_loss(images, torch.Generator())
        assert not any(module._forward_hooks for module in task.modules())
        twin = copy.deepcopy(task)
        generator = torch.Generator()
        assert torch.equal(twin.auxiliary_loss(images, generator), task.auxiliary_loss(images, generator))


class TestAdaptation:
    def test_zero_steps_are_the_source_model(self, task, adapt):
        _, source = adapt(task, Source())
        assert torch.equal(adapt(task, TestTimeTraining(steps=0))[1], source)

    def test_zero_rate_is_the_control(self, task, adapt):
        _, control = adapt(task, EMABN(steps=2, reset="batch"))
        assert torch.equal(adapt(task, TestTimeTraining(steps=2, lr=0.0))[1], control)
        assert not torch.equal(adapt(task, Source())[1], control)

    def test_updates_up_to_the_deepest_map_and_releases(self, task, adapt):
        before = {name: value.clone() for name, value in task.state_dict().items()}
        flags = [(module.training, len(module._buffers)) for module in task.modules()]
        adapter = TestTimeTraining(steps=2, lr=1e-3, reset="never")
        adapt(task, adapter)
        free = {id(parameter) for parameter in task.adaptable_parameters()}
        chosen = {name for name, parameter in task.named_parameters() if id(parameter) in free}
        state = adapter.state_dict()["tensors"]
        assert {name for name in state if "statistics" not in name} == chosen
        assert not any(torch.equal(state[name], before[name]) for name in chosen)
        assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())
        assert [(module.training, len(module._buffers)) for module in task.modules()] == flags

    def test_single_images(self, task, adapt):
        _, logits = adapt(task, TestTimeTraining(steps=2, lr=1e-3), batch_size=15)  # batches of 15 and 1
        assert logits.shape == (16, 10)
        assert logits.isfinite().all()

    def test_lowers_its_loss(self, task, images):
        adapted = TestTimeTraining(steps=5, lr=1e-3).wrap(task)
        losses = []
        step = adapted.engine.net.step
        adapted.engine.net.step = lambda values, *rest: losses.append(values.detach().mean()) or step(values, *rest)
        adapted(images)
        assert len(losses) == 5
        assert losses[-1] < losses[0]

    def test_readings_equal_shorter_runs(self, task, adapt):
        results, _ = adapt(task, TestTimeTraining(steps=2, lr=1e-3, read_at=[1]))
        shorter, _ = adapt(task, TestTimeTraining(steps=1, lr=1e-3))
        assert results["readings"][0]["mean"] == shorter["mean"]

    def test_auxiliary_loss_draws_nothing(self, task, images):
        task.eval()
        losses = [
            task.auxiliary_loss(images, torch.Generator().manual_seed(derive_seed(0, "adapt", 0, 0, step)))
            for step in range(2)
        ]
        assert torch.equal(*losses)

    def test_compiled_encoders_give_maps_too(self, task, images):
        task.eval()
        expected = task.auxiliary_loss(images, torch.Generator())
        task.encoder.compile(backend="eager")
        with torch.no_grad():
            task(images)  # now there is compiled code
        assert torch.equal(task.auxiliary_loss(images, torch.Generator()), expected)

    def test_runs_by_the_real_command_with_its_own_adapter(self, kind, files, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        main([
            "adapt", *words(kind), "--model.weights", files[kind], *DIGITS, "--data.limit", "8",
            "--data.domains", "[contrast]", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
            "--name", "run",
        ])  # fmt: skip
        results = json.loads(Path("runs/run/results.json").read_text())
        own = kind(**ENCODER, **OWN[kind]).default_adapter().protocol()
        assert results["complete"]
        assert results["source"]["file"] == files[kind]
        assert {name: results["protocol"][name] for name in own} == own
        assert results["cost"]["forwards_per_batch"] == own["steps"] * kind.auxiliary_views + 1


@pytest.mark.parametrize("kind", [ClusT3, NCTTT])
def test_training_adds_both_losses_of_one_pass(kind, make_trainer, make_data, tmp_path):
    seen, passes = {}, []
    task = kind(crop="none", **ENCODER, **OWN[kind])
    task.log = lambda name, value, **kwargs: seen.__setitem__(name, value)
    task.log_dict = seen.update
    task.encoder.register_forward_hook(lambda module, args, output: passes.append(len(output)))
    make_trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(task, datamodule=make_data(batch_size=10))
    assert passes == [10]
    assert seen["train/loss"] == seen["train/supervised_loss"] + seen["train/auxiliary_loss"]


def test_is_a_supervised_task_with_padded_crops():
    """The published source training of all three; CTA's own is resized crops."""
    assert ClusT3(**ENCODER).hparams["crop"] == "padded"
    assert issubclass(ReCTTT, SupervisedTask)
