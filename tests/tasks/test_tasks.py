"""The four tasks: what is trained, what stays, what travels in the files, and resuming."""

from __future__ import annotations

import hashlib
import shutil

import pytest
import torch
from lightning import Callback
from torch.nn.functional import cross_entropy

from ttalight.adapters import EMABN, PTBN, Source, TestTimeTraining
from ttalight.losses import alignment_loss, barlow_twins_loss, consistency_loss, contrastive_loss
from ttalight.tasks import (
    AlignmentTask,
    ClusT3,
    ContrastiveTask,
    CrossTaskTTT,
    JointTask,
    ProbeTask,
    RotationTTT,
    SupervisedTask,
)

SMALL = {"encoder": "cifar_resnet8", "lr": 1e-3}


def tensors(path):
    return torch.load(path, weights_only=True)["state_dict"]


@pytest.fixture
def batch(make_data):
    data = make_data()
    data.setup("test")
    return data.on_after_batch_transfer(next(iter(data.test_dataloader())), 0)


class TestStages:
    def test_teacher_and_classifier_stay_as_they_were(self, stages):
        source, aligned = tensors(stages["source"]), tensors(stages["align"])
        for name, value in source.items():
            kept = name if name.startswith("classifier.") else f"teacher.{name}"
            assert torch.equal(aligned[kept], value), name

    def test_encoder_and_projector_have_moved(self, stages):
        before, after = tensors(stages["simclr"]), tensors(stages["align"])
        assert not torch.equal(before["encoder.conv1.weight"], after["encoder.conv1.weight"])
        assert not torch.equal(before["projector.weight"], after["projector.weight"])

    def test_a_file_holds_all_that_the_next_stage_needs(self, stages, batch, tmp_path):
        moved = shutil.copy(stages["align"], tmp_path / "only.ckpt")
        task = CrossTaskTTT(aligned=str(moved), encoder="cifar_resnet8").eval()
        aligned = AlignmentTask.load_from_checkpoint(moved, supervised=None, self_supervised=None).eval()
        with torch.no_grad():
            expected = aligned.classifier(aligned.projector(aligned.encoder(aligned.normalize(batch[0]))))
            assert torch.equal(task(batch[0]), expected)
            assert torch.equal(aligned(batch[0]), expected)
        assert task.source["file"] == str(moved)

    def test_normalisation_comes_from_the_data_and_travels(self, stages, make_data):
        for path in stages.values():
            assert tensors(path)["normalize.mean"].tolist() == pytest.approx(make_data().mean)

    def test_files_are_plain(self, stages):
        for path in stages.values():
            parameters = torch.load(path, weights_only=True)["hyper_parameters"]
            assert {"optimizer", "scheduler"}.isdisjoint(parameters)
            assert parameters["encoder"] == "cifar_resnet8"

    def test_rescaling_keeps_predictions(self, stages, batch):
        plain = CrossTaskTTT(aligned=stages["align"], encoder="cifar_resnet8").eval()
        rescaled = CrossTaskTTT(aligned=stages["align"], encoder="cifar_resnet8", rescale_features=True).eval()
        ratio = rescaled.feature_norms[0] / rescaled.feature_norms[1]
        with torch.no_grad():
            expected = plain.classifier(plain.project(batch[0]) * ratio)
            torch.testing.assert_close(rescaled(batch[0]), expected)


class TestLosses:
    @pytest.fixture
    def trained(self, make_trainer, make_data, tmp_path, monkeypatch):
        """Run one training step of a task and return its loss and what it was computed from."""

        def run(task, **seen):
            monkeypatch.setattr(type(task), "log", lambda self, name, value, **kwargs: seen.__setitem__(name, value))
            monkeypatch.setattr(
                type(task),
                "on_train_batch_end",
                lambda self, outputs, batch, batch_idx: seen.__setitem__("batch", batch),
            )
            data = make_data()
            make_trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(task, datamodule=data)
            return seen

        return run

    def test_supervised(self, trained):
        task = SupervisedTask(crop="none", **SMALL)
        inputs = []
        task.classifier.register_forward_hook(lambda module, args, output: inputs.append(output.detach()))
        seen = trained(task)
        assert seen["train/loss"].item() == pytest.approx(cross_entropy(inputs[0], seen["batch"][1]).item())

    @pytest.mark.parametrize(("temperature", "symmetric"), [(0.01, True), (0.5, True), (0.01, False)])
    def test_contrastive(self, trained, temperature, symmetric):
        task = ContrastiveTask(temperature=temperature, symmetric=symmetric, **SMALL)
        outputs = []
        task.projector.register_forward_hook(lambda module, args, output: outputs.append(output.detach()))
        loss = trained(task)["train/loss"]
        assert outputs[0].shape[0] == 40  # two views of twenty images in one forward
        assert loss.item() == pytest.approx(
            contrastive_loss(*outputs[0].chunk(2), temperature, symmetric=symmetric).item()
        )

    @pytest.mark.parametrize("teacher_view", ["clean", "weak"])
    def test_alignment(self, trained, stages, teacher_view):
        task = AlignmentTask(
            supervised=stages["source"], self_supervised=stages["simclr"], teacher_view=teacher_view,
            sibling="exclude", **SMALL,
        )  # fmt: skip
        outputs, taught = [], []
        task.projector.register_forward_hook(lambda module, args, output: outputs.append(output.detach()))
        task.teacher["encoder"].register_forward_hook(lambda module, args, output: taught.append(output))
        seen = trained(task)
        if teacher_view == "clean":  # computed once, for all 1,000 training images, before the first step
            assert sum(map(len, taught)) == 1000
            target = task.teach(seen["batch"][0])
        else:
            target = taught[0]
        expected = alignment_loss(*outputs[0].chunk(2), target, 0.5, sibling="exclude")
        assert seen["train/loss"].item() == pytest.approx(expected.item(), rel=1e-5)
        assert seen["train/teacher_norm"].item() == pytest.approx(target.norm(dim=1).mean().item(), rel=1e-5)
        assert not task.teacher.training
        assert task.encoder.training

    def test_bf16_accumulation_and_channels_last(self, make_trainer, make_data, tmp_path):
        task = ContrastiveTask(channels_last=True, **SMALL)
        before = task.encoder.conv1.weight.detach().clone()
        trainer = make_trainer(tmp_path, precision="bf16-mixed", accumulate_grad_batches=2, limit_train_batches=4)
        trainer.fit(task, datamodule=make_data())
        assert trainer.global_step == 2
        assert task.encoder.layer2[0].conv1.weight.is_contiguous(memory_format=torch.channels_last)
        assert task.encoder.conv1.weight.isfinite().all()
        assert not torch.equal(task.encoder.conv1.weight, before)


class TestTrainedTeacher:
    """Alignment that trains the supervised encoder too."""

    @pytest.fixture
    def fitted(self, stages, make_trainer, make_data, tmp_path):
        """Align for three steps and return the task, the gradients of its last step and what it logged."""

        def run(**arguments):
            torch.manual_seed(0)
            files = {"supervised": stages["source"], "self_supervised": stages["simclr"]}
            task = AlignmentTask(**files, **arguments, **SMALL)
            gradients, logged = {}, {}

            def keep():
                gradients.update({name: p.grad.clone() for name, p in task.named_parameters() if p.grad is not None})

            task.on_before_optimizer_step = lambda optimizer: keep()
            task.log = lambda name, value, **kwargs: logged.__setitem__(name, value)
            make_trainer(tmp_path / str(arguments)).fit(task, datamodule=make_data())
            return task, gradients, logged

        return run

    def test_gradients_reach_teacher_not_classifier(self, fitted, stages):
        source = tensors(stages["source"])
        _, frozen, _ = fitted()
        task, gradients, _ = fitted(freeze_teacher=False)
        assert not any(name.startswith("teacher.") for name in frozen)
        trained = {name for name in gradients if name.startswith("teacher.")}
        assert trained == {f"teacher.{name}" for name, _ in task.teacher.named_parameters()}
        assert all(gradients[name].any() for name in trained)
        assert not any(name.startswith("classifier.") for name in [*frozen, *gradients])
        assert torch.equal(task.classifier.weight, source["classifier.weight"])
        # Its statistics are those of a network that is trained.
        assert not torch.equal(task.teacher["encoder"].bn1.running_mean, source["encoder.bn1.running_mean"])

    def test_both_losses_teach(self, fitted):
        task, _, logged = fitted(freeze_teacher=False)
        total = logged["train/alignment"] + logged["train/supervised"]
        torch.testing.assert_close(logged["train/loss"], total)
        images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        weight = task.teacher["encoder"].conv1.weight
        target = task.teach(images)
        views = task.project(images.repeat(2, 1, 1, 1)).detach().chunk(2)
        (aligning,) = torch.autograd.grad(alignment_loss(*views, target, 0.5), weight, retain_graph=True)
        labels = torch.tensor([1, 2, 3, 4])
        (classifying,) = torch.autograd.grad(cross_entropy(task.classifier(target), labels), weight)
        assert aligning.any()
        assert classifying.any()

    def test_features_are_computed_anew(self, fitted):
        task, _, _ = fitted(freeze_teacher=False)
        assert task._cache is None
        assert not task.trainer.datamodule.with_index

    def test_its_file_is_all_that_test_time_needs(self, fitted, batch, tmp_path):
        task, _, _ = fitted(freeze_teacher=False)
        path = next(tmp_path.rglob("last.ckpt"))
        loaded = CrossTaskTTT(aligned=str(path), encoder="cifar_resnet8").eval()
        with torch.no_grad():
            assert torch.equal(loaded(batch[0]), task.eval()(batch[0]))
        assert torch.equal(loaded.feature_norms, task.feature_norms)
        assert not torch.equal(loaded.feature_norms, torch.ones(2))


@pytest.fixture(scope="module")
def twins(stages, make_trainer, make_data, tmp_path_factory):
    """Checkpoints of the stages that begin with Barlow Twins."""
    root = tmp_path_factory.mktemp("objective")

    def fit(name, task):
        make_trainer(root / name).fit(task, datamodule=make_data())
        return str(root / name / "checkpoints" / "last.ckpt")

    start = fit("twins", ContrastiveTask(objective="barlow_twins", **SMALL))
    align = fit("align", AlignmentTask(supervised=stages["source"], self_supervised=start, **SMALL))
    return {"self_supervised": start, "align": align}


class TestObjective:
    """Another self-supervised loss than SimCLR's, from its stage to test time."""

    def loss(self, task, images):
        """Return the loss that adapts, and the two views' projections."""
        outputs = []
        handle = task.projector.register_forward_hook(lambda module, args, output: outputs.append(output.detach()))
        loss = task.auxiliary_loss(images, torch.Generator().manual_seed(0))
        handle.remove()
        return loss, outputs[0].chunk(2)

    def test_is_what_adapts(self, twins, batch):
        task = CrossTaskTTT(aligned=twins["align"], encoder="cifar_resnet8").eval()
        loss, projections = self.loss(task, batch[0])
        torch.testing.assert_close(loss, barlow_twins_loss(*projections))
        loss.backward()
        assert all(parameter.grad.isfinite().all() for parameter in task.adaptable_parameters())
        assert task.encoder.conv1.weight.grad.any()

    def test_an_argument_has_the_last_word(self, twins, stages, batch):
        task = CrossTaskTTT(aligned=twins["align"], encoder="cifar_resnet8", objective="contrastive").eval()
        loss, projections = self.loss(task, batch[0])
        torch.testing.assert_close(loss, contrastive_loss(*projections, 0.01))
        other = CrossTaskTTT(aligned=stages["align"], encoder="cifar_resnet8", objective="barlow_twins").eval()
        loss, projections = self.loss(other, batch[0])
        torch.testing.assert_close(loss, barlow_twins_loss(*projections))

    def test_travels_with_every_file(self, twins, stages):
        assert CrossTaskTTT(aligned=stages["align"], encoder="cifar_resnet8").objective == "contrastive"
        probe = ProbeTask(self_supervised=twins["self_supervised"], encoder="cifar_resnet8")
        loaded = AlignmentTask.load_from_checkpoint(twins["align"], supervised=None, self_supervised=None)
        assert probe.objective == loaded.objective == "barlow_twins"

    def test_the_temperature_is_each_stage_s_own(self, stages, batch, tmp_path):
        content = torch.load(stages["align"], weights_only=True)
        content["hyper_parameters"]["temperature"] = 0.1
        torch.save(content, tmp_path / "warm.ckpt")
        for given, expected in (({}, 0.01), ({"temperature": 0.05}, 0.05)):
            task = CrossTaskTTT(aligned=str(tmp_path / "warm.ckpt"), encoder="cifar_resnet8", **given).eval()
            loss, projections = self.loss(task, batch[0])
            torch.testing.assert_close(loss, contrastive_loss(*projections, expected))

    def test_files_from_before_are_contrastive(self, stages, tmp_path):
        content = torch.load(stages["align"], weights_only=True)
        del content["ttalight"]["objective"], content["hyper_parameters"]["objective"]
        torch.save(content, tmp_path / "old.ckpt")
        assert CrossTaskTTT(aligned=str(tmp_path / "old.ckpt"), encoder="cifar_resnet8").objective == "contrastive"

    def test_others_are_refused(self, twins, tmp_path):
        with pytest.raises(ValueError, match=r"^objective must be one of contrastive, barlow_twins, got 'byol'"):
            ContrastiveTask(objective="byol", **SMALL)
        content = torch.load(twins["align"], weights_only=True)
        content["ttalight"]["objective"] = ["byol"]
        torch.save(content, tmp_path / "odd.ckpt")
        with pytest.raises(ValueError, match=r"aligned: .*odd.ckpt: objective must be one of"):
            CrossTaskTTT(aligned=str(tmp_path / "odd.ckpt"), encoder="cifar_resnet8")

    def test_a_single_image_leaves_the_weights(self, twins, make_trainer, make_data, tmp_path):
        task = CrossTaskTTT(aligned=twins["align"], encoder="cifar_resnet8")
        logits = []
        task.register_forward_hook(lambda module, args, output: logits.append(output))
        data = make_data(domains=["contrast"], batch_size=23)  # batches of 23 and 1
        with pytest.warns(UserWarning, match="nothing to be compared with"):
            make_trainer(tmp_path).adapt(task, data, TestTimeTraining(steps=2, lr=1e-3))
        assert torch.cat(logits).shape == (24, 10)
        assert torch.cat(logits).isfinite().all()

    def test_learns_to_agree(self, make_trainer, make_data, tmp_path):
        torch.manual_seed(0)
        task = ContrastiveTask(objective="barlow_twins", warmup_epochs=0, crop_scale=[0.5, 1.0], flip=0.0, **SMALL)
        losses = []
        task.on_train_batch_end = lambda outputs, batch, index: losses.append(outputs["loss"].item())
        make_trainer(tmp_path, max_epochs=2, limit_train_batches=10, limit_val_batches=0).fit(
            task, make_data(batch_size=50)
        )
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5])


class TestSchedule:
    def test_table_3(self, make_trainer, make_data, tmp_path):
        task = SupervisedTask(encoder="cifar_resnet8")
        rates = []
        task.on_train_batch_end = lambda *args: rates.append(task.optimizers().param_groups[0]["lr"])
        make_trainer(tmp_path, max_epochs=10, limit_val_batches=0).fit(task, datamodule=make_data())
        assert len(rates) == 30
        assert max(rates) == pytest.approx(5e-4)
        assert rates[5] == pytest.approx(5e-4)  # two of ten epochs of warm-up, three steps each
        assert rates[:6] == sorted(rates[:6])
        assert rates[6:] == sorted(rates[6:], reverse=True)
        assert rates[-1] == pytest.approx(1e-6, rel=0.01)

    def test_another_optimizer_and_scheduler(self, make_trainer, make_data, tmp_path):
        task = SupervisedTask(
            encoder="cifar_resnet8",
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
            scheduler=lambda optimizer: torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.5, total_iters=9),
        )
        make_trainer(tmp_path).fit(task, datamodule=make_data())
        assert isinstance(task.optimizers().optimizer, torch.optim.SGD)


class TestResume:
    @pytest.mark.parametrize("stage", ["source", "align", "align, trained teacher"])
    def test_gives_the_weights_of_the_uninterrupted_run(self, stage, stages, make_trainer, make_data, tmp_path):
        def task():
            if stage == "source":
                return SupervisedTask(**SMALL)
            files = {"supervised": stages["source"], "self_supervised": stages["simclr"]}
            return AlignmentTask(**files, freeze_teacher=stage == "align", **SMALL)

        torch.manual_seed(0)
        whole = task()
        make_trainer(tmp_path / "whole", max_epochs=3).fit(whole, datamodule=make_data())

        class Killed(Exception):
            pass

        class Kill(Callback):
            def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
                if trainer.current_epoch == 2 and batch_idx == 1:
                    raise Killed

        torch.manual_seed(0)
        with pytest.raises(Killed):
            make_trainer(tmp_path / "part", max_epochs=3, callbacks=Kill()).fit(task(), datamodule=make_data())
        torch.manual_seed(99)
        resumed = task()
        last = tmp_path / "part" / "checkpoints" / "last.ckpt"
        make_trainer(tmp_path / "part", max_epochs=3).fit(resumed, datamodule=make_data(), ckpt_path=str(last))
        for name, value in whole.state_dict().items():
            assert torch.equal(resumed.state_dict()[name], value), name

    def test_from_another_class_is_refused(self, stages, make_trainer, make_data, tmp_path):
        with pytest.raises(ValueError, match="written by SupervisedTask, and ckpt_path resumes the same class only"):
            make_trainer(tmp_path).fit(ContrastiveTask(**SMALL), datamodule=make_data(), ckpt_path=stages["source"])


class TestCrossTaskTTT:
    @pytest.fixture
    def task(self, stages):
        return CrossTaskTTT(aligned=stages["align"], encoder="cifar_resnet8")

    @pytest.fixture
    def adapt(self, make_trainer, make_data, tmp_path):
        """Adapt and return results and logits."""

        def run(task, adapter, datamodule=None, **data):
            logits = []
            handle = task.register_forward_hook(lambda module, args, output: logits.append(output))
            results = make_trainer(tmp_path).adapt(
                task, datamodule or make_data(domains=["contrast"], **data), adapter, overwrite=True
            )
            handle.remove()
            return results, torch.cat(logits)

        return run

    @pytest.mark.parametrize("contrast", [0.0, 0.5])
    def test_consistency_joins_views_and_images(self, stages, contrast):
        weights = {"contrast_weight": contrast, "consistency_weight": 2.0}
        task = CrossTaskTTT(aligned=stages["align"], encoder="cifar_resnet8", **weights).eval()
        images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        views = task.views(images, torch.Generator().manual_seed(3))
        expected = 2 * consistency_loss(torch.stack([task(images), *task(views).chunk(2)]))
        expected = expected + contrast * task.contrast(views)
        torch.testing.assert_close(task.auxiliary_loss(images, torch.Generator().manual_seed(3)), expected)
        assert task.auxiliary_views == 3

    def test_results_say_which_loss_was_minimised(self, stages, adapt):
        weights = {"contrast_weight": 0.0, "consistency_weight": 1.0}
        task = CrossTaskTTT(aligned=stages["align"], encoder="cifar_resnet8", **weights)
        results, _ = adapt(task, TestTimeTraining(steps=1))
        assert {name: results["protocol"][name] for name in weights} == weights
        assert "consistency_weight" not in adapt(task, PTBN())[0]["protocol"]
        assert CrossTaskTTT(encoder="cifar_resnet8").adaptation_protocol() == {}

    def test_consistency_of_images_that_are_not_square(self):
        task = CrossTaskTTT(encoder="cifar_resnet8", consistency_weight=1.0)
        assert torch.isfinite(task.auxiliary_loss(torch.rand(4, 3, 24, 40), torch.Generator().manual_seed(0)))

    def test_consistency_of_one_image(self):
        task = CrossTaskTTT(encoder="cifar_resnet8", contrast_weight=0.0, consistency_weight=1.0)
        with pytest.warns(UserWarning, match="a batch of one image has nothing to be compared with"):
            assert task.auxiliary_loss(torch.rand(1, 3, 32, 32), torch.Generator().manual_seed(0)) == 0

    def test_what_adapts(self):
        names = {
            chosen: _adapted_names(CrossTaskTTT(encoder="cifar_resnet8", parameters=chosen))
            for chosen in ("all", "encoder", "norm")
        }
        assert {name.split(".")[0] for name in names["all"]} == {"encoder", "projector"}
        assert names["encoder"] == {name for name in names["all"] if name.startswith("encoder.")}
        assert names["norm"] == {name for name in names["encoder"] if "bn" in name or name.endswith("downsample.1")}
        with pytest.raises(ValueError, match="parameters must be 'all', 'encoder' or 'norm', got 'some'"):
            CrossTaskTTT(encoder="cifar_resnet8", parameters="some")

    def test_one_of_the_losses_must_count(self):
        with pytest.raises(ValueError, match=r"one of them above, got 0\.0 and 0\.0"):
            CrossTaskTTT(encoder="cifar_resnet8", contrast_weight=0.0)

    @pytest.mark.parametrize("reset", ["batch", "domain"])
    def test_zero_rate_is_the_control_on_the_same_views(self, task, adapt, reset):
        _, trained = adapt(task, TestTimeTraining(steps=3, lr=0.0, reset=reset))
        _, control = adapt(task, EMABN(steps=3, reset=reset))
        assert torch.equal(trained, control)
        _, source = adapt(task, Source())
        assert not torch.equal(trained, source)

    def test_zero_steps_are_the_source_model(self, task, adapt):
        _, source = adapt(task, Source())
        assert torch.equal(adapt(task, TestTimeTraining(steps=0))[1], source)

    def test_results_have_the_accuracy_of_shorter_runs(self, task, adapt):
        results, _ = adapt(task, TestTimeTraining(steps=3, lr=1e-3, read_at=[0, 1]))
        assert [reading["steps"] for reading in results["readings"]] == [0, 1]
        for reading in results["readings"]:
            shorter, _ = adapt(task, TestTimeTraining(steps=reading["steps"], lr=1e-3))
            row, expected = reading["domains"][0], shorter["domains"][0]
            assert all(row[key] == expected[key] for key in ("name", "samples", "accuracy", "nll", "ece"))
            assert reading["mean"] == shorter["mean"]
        assert "readings" not in shorter

    def test_moves_encoder_and_projector_and_nothing_else(self, task, adapt):
        before = {name: value.clone() for name, value in task.state_dict().items()}
        adapter = TestTimeTraining(steps=2, lr=1e-3, reset="never")
        adapt(task, adapter)
        moved = {name for name in adapter.state_dict()["tensors"] if "statistics" not in name}
        assert moved == {name for name, _ in task.named_parameters() if not name.startswith("classifier.")}
        assert all(
            not torch.equal(adapter.state_dict()["tensors"][name], before[name])
            for name in ("encoder.conv1.weight", "projector.bias", "encoder.layer1.0.bn1.weight")
        )
        assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items())

    def test_against_a_plain_loop(self, task, adapt, make_data):
        """Two steps on every batch in train mode, prediction in eval mode, everything restored for the next one."""
        from ttalight.seeding import derive_seed

        # In float32 Adam's first steps would enlarge the rounding of gradients that are nearly zero.
        task, data = task.double(), make_data(domains=["contrast"])
        after = data.on_after_batch_transfer
        data.on_after_batch_transfer = lambda batch, loader: (after(batch, loader)[0].double(), batch[1])
        results, logits = adapt(task, TestTimeTraining(steps=2, lr=1e-3), data)
        source = {name: value.clone() for name, value in task.state_dict().items()}
        data.setup("test")
        expected = []
        for index, batch in enumerate(data.test_dataloader()):
            images = data.on_after_batch_transfer(batch, 0)[0]
            task.load_state_dict(source)
            optimizer = torch.optim.Adam(
                [*task.encoder.parameters(), *task.projector.parameters()], lr=1e-3, foreach=True
            )
            for step in range(2):
                task.train()
                generator = torch.Generator().manual_seed(derive_seed(0, "adapt", 0, index, step))
                views = task.views(images, generator)
                loss = contrastive_loss(*task.projector(task.encoder(task.normalize(views))).chunk(2), 0.01)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with torch.no_grad():
                expected.append(task.eval()(images))
        task.load_state_dict(source)
        torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-7, atol=1e-7)
        assert results["cost"]["forwards_per_batch"] == 5  # two views twice, and the prediction
        assert results["cost"]["backwards_per_batch"] == 4

    @pytest.mark.parametrize("norm", ["batch", "source"])
    def test_normalisation_at_prediction(self, task, adapt, norm):
        _, ema = adapt(task, TestTimeTraining(steps=1, lr=0.0))
        _, other = adapt(task, TestTimeTraining(steps=1, lr=0.0, norm=norm))
        _, source = adapt(task, Source())
        assert torch.equal(other, source) == (norm == "source")
        assert not torch.equal(other, ema)

    def test_predictions_do_not_depend_on_batch_order(self, stages, batch):
        task = SupervisedTask(weights=stages["source"], encoder="cifar_resnet8")
        batches = batch[0].chunk(5)
        adapted = EMABN(steps=2, reset="batch").wrap(task)
        forwards = [adapted(images) for images in batches]
        backwards = [adapted(images) for images in reversed(batches)]
        assert all(map(torch.equal, forwards, reversed(backwards)))

    def test_ragged_and_single_batches(self, task, adapt):
        _, logits = adapt(task, TestTimeTraining(steps=2, lr=1e-3), batch_size=23)  # batches of 23 and 1
        assert logits.shape == (24, 10)
        assert logits.isfinite().all()

    def test_is_its_own_default(self, task):
        adapter = task.default_adapter()
        assert isinstance(adapter, TestTimeTraining)
        protocol = adapter.protocol()
        assert (protocol["steps"], protocol["lr"], protocol["optimizer"]) == (20, 1e-6, "Adam")
        assert (protocol["reset"], protocol["prediction"], protocol["norm"]) == ("batch", "after", "ema")
        assert task.temperature == 0.01

    def test_other_models_are_refused(self, stages, adapt):
        task = SupervisedTask(weights=stages["source"], encoder="cifar_resnet8")
        with pytest.raises(TypeError, match="SupervisedTask has no auxiliary_loss and no adaptable_parameters"):
            adapt(task, TestTimeTraining())


class TestFiles:
    def test_missing(self):
        with pytest.raises(FileNotFoundError, match=r"weights: there is no file nowhere.ckpt.*--model.weights"):
            SupervisedTask(weights="nowhere.ckpt", **SMALL)

    def test_of_another_class(self, stages):
        with pytest.raises(ValueError, match=r"aligned: .* was written by SupervisedTask, expected .* AlignmentTask"):
            CrossTaskTTT(aligned=stages["source"], encoder="cifar_resnet8")

    def test_of_another_architecture(self, stages):
        with pytest.raises(
            ValueError, match=r"of another architecture \(encoder: file 'cifar_resnet8', here 'cifar_resnet14'"
        ):
            SupervisedTask(weights=stages["source"], encoder="cifar_resnet14")

    def test_truncated(self, stages, tmp_path):
        content = open(stages["source"], "rb").read()
        (tmp_path / "cut.ckpt").write_bytes(content[: len(content) // 2])
        with pytest.raises(ValueError, match="is not a readable checkpoint"):
            SupervisedTask(weights=str(tmp_path / "cut.ckpt"), **SMALL)

    def test_with_code_inside(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return (open, (str(tmp_path / "owned"), "w"))

        torch.save({"state_dict": Evil()}, tmp_path / "evil.ckpt")
        with pytest.raises(ValueError, match="was refused: it holds something other than tensors"):
            SupervisedTask(weights=str(tmp_path / "evil.ckpt"), **SMALL)
        assert not (tmp_path / "owned").exists()

    def test_foreign_weights_by_the_backbone_s_names(self, tmp_path, batch):
        import timm

        net = timm.create_model("resnet10t", num_classes=10).eval()
        torch.save({"state_dict": {f"module.{k}": v for k, v in net.state_dict().items()}}, tmp_path / "net.pth")
        task = SupervisedTask(weights=str(tmp_path / "net.pth"), encoder="resnet10t", stem="imagenet").eval()
        with torch.no_grad():
            torch.testing.assert_close(task(batch[0]), net(task.normalize(batch[0])))
        del net.fc
        torch.save(net.state_dict(), tmp_path / "headless.pth")
        with pytest.raises(
            ValueError, match=r"does not fit this ModuleDict: 2 missing: classifier.bias, classifier.weight"
        ):
            SupervisedTask(weights=str(tmp_path / "headless.pth"), encoder="resnet10t", stem="imagenet")

    @pytest.mark.parametrize("kind", [SupervisedTask, ContrastiveTask, RotationTTT, ClusT3, JointTask])
    def test_initial_weights_are_named(self, kind, tmp_path):
        import timm

        path = tmp_path / "net.pth"
        torch.save(timm.create_model("cifar_resnet8").state_dict(), path)
        task = kind(pretrained=str(path), **SMALL)
        assert task.source == {"file": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        assert kind(**SMALL).source == {"file": None, "sha256": None}

    def test_initial_weights_are_named_in_results(self, make_trainer, make_data, tmp_path):
        import timm

        torch.save(timm.create_model("cifar_resnet8").state_dict(), tmp_path / "net.pth")
        task = SupervisedTask(pretrained=str(tmp_path / "net.pth"), **SMALL)
        trainer = make_trainer(tmp_path)
        trainer.fit(task, datamodule=make_data())
        saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
        assert saved["ttalight"]["source"] == task.source
        assert trainer.adapt(task, make_data(), Source())["source"] == task.source

    @pytest.mark.data
    def test_public_resnet20(self, shared_data):
        task = SupervisedTask(weights=str(shared_data / "resnet20-12fca82f.th"), encoder="cifar_resnet20")
        assert task.source["sha256"].startswith("12fca82f")


def test_encoder_sees_centre_views_see_all():
    task = CrossTaskTTT(encoder="cifar_resnet8", image_size=24).eval()
    images = torch.rand(2, 3, 32, 32)
    sizes = []
    task.encoder.register_forward_pre_hook(lambda module, inputs: sizes.append(inputs[0].shape[-2:]))
    with torch.no_grad():
        logits = task(images)
        assert torch.equal(logits, task(images[..., 4:28, 4:28]))
    assert task.views(images, torch.Generator().manual_seed(0)).shape == (4, 3, 24, 24)
    assert set(sizes) == {(24, 24)}


def test_classes_must_agree_with_the_data(make_trainer, make_data, tmp_path):
    with pytest.raises(ValueError, match="DigitsDataModule has 10 classes, SupervisedTask was made for 7"):
        make_trainer(tmp_path).fit(SupervisedTask(num_classes=7, **SMALL), datamodule=make_data())


def test_alignment_without_its_stages(make_trainer, make_data, tmp_path):
    with pytest.raises(ValueError, match="alignment starts from a trained model"):
        make_trainer(tmp_path).fit(AlignmentTask(**SMALL), datamodule=make_data())


@pytest.mark.parametrize(("precision", "dtype"), [("64-true", torch.float64), ("bf16-true", torch.bfloat16)])
def test_images_have_the_precision_of_the_trainer(precision, dtype, make_trainer, make_data, tmp_path):
    task = SupervisedTask(encoder="cifar_resnet8")
    trainer = make_trainer(tmp_path, precision=precision)
    trainer.fit(task, datamodule=make_data())
    seen = set()
    task.encoder.register_forward_pre_hook(lambda module, args: seen.add(args[0].dtype))
    results = trainer.adapt(task, make_data(domains=["contrast"]), PTBN())
    assert results["complete"]
    assert seen == {dtype}


def _adapted_names(task):
    chosen = {id(parameter) for parameter in task.adaptable_parameters()}
    return {name for name, parameter in task.named_parameters() if id(parameter) in chosen}
