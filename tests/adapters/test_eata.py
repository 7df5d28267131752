"""ETA, EATA and RDumb: filters, the Fisher information and where it comes from, resets."""

from __future__ import annotations

import copy
import json
import math
import pickle
import warnings

import lightning
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from ttalight import Trainer
from ttalight.adapters import EATA, ETA, PTBN, RDumb
from ttalight.adapters.components.regularization import ewc_penalty_and_gradient
from ttalight.cli import main
from ttalight.data import DigitsDataModule
from ttalight.losses import entropy
from ttalight.tasks import SupervisedTask

OPEN = {"margin": 1.0, "redundancy": 1.0, "lr": 0.02}  # every sample counts


@pytest.fixture
def batches(images):
    return [images, images.flip(0) * 0.5, images[:3] - 1, images[:1]]


def tensors(adapted):
    return adapted.engine.capture()["tensors"]


class TestETA:
    def test_nothing_kept_changes_nothing(self, make_net, batches):
        adapted, still = ETA(margin=1e-3, lr=0.1).wrap(make_net()), PTBN().wrap(make_net())
        for batch in batches:
            assert torch.equal(adapted(batch), still(batch))
        assert (adapted.engine.updates, adapted.engine.skipped) == (0, 4)
        assert not adapted.engine.net.optimizer.state
        assert tensors(adapted)["method.mean_prediction"].isnan().all()

    def test_repetitions_are_redundant(self, make_net, images):
        adapted = ETA(margin=1.0, redundancy=0.4).wrap(make_net())
        adapted(images)
        mean = tensors(adapted)["method.mean_prediction"]
        assert adapted.engine.last["selected"] == 1  # nothing is redundant before there is a mean
        adapted(images)
        assert adapted.engine.last["selected"] == 0
        assert torch.equal(tensors(adapted)["method.mean_prediction"], mean)

    def test_nan_sample_does_not_spoil_the_mean(self, make_net, images, breaks):
        group = lambda channels: torch.nn.GroupNorm(2, channels)  # noqa: E731
        spoilt = images.clone()
        spoilt[0] = 1e6
        adapted, clean = ETA(**OPEN).wrap(breaks(make_net(group))), ETA(**OPEN).wrap(make_net(group))
        adapted(spoilt)
        clean(images[1:])
        assert adapted.engine.skipped == 1
        torch.testing.assert_close(*(tensors(each)["method.mean_prediction"] for each in (adapted, clean)))

    def test_dense_predictions_count_by_image(self, images):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.BatchNorm2d(6), torch.nn.Conv2d(6, 4, 1)).double()
        adapted = ETA(margin=1.0, redundancy=1.0).wrap(net)
        logits = adapted(images)
        weights = (math.log(4) - entropy(logits).mean((1, 2))).exp()
        expected = (weights * entropy(logits).mean((1, 2))).mean().item()
        assert adapted.engine.last["loss"] == pytest.approx(expected)
        mean = logits.softmax(1).mean((0, 2, 3))
        torch.testing.assert_close(tensors(adapted)["method.mean_prediction"], mean)


class TestRDumb:
    def test_starts_again_after_so_many_updates(self, make_net, images):
        adapted = RDumb(reset=3, **OPEN).wrap(make_net())
        seen = [adapted(images) for _ in range(8)]
        for index, logits in enumerate(seen):
            assert torch.equal(logits, seen[index % 3])
            assert index % 3 == 0 or not torch.equal(logits, seen[0])
        assert adapted.engine.updates == 8

    def test_counts_from_a_reset_of_somebody_else(self, make_net, images):
        adapted = RDumb(reset=3, **OPEN).wrap(make_net())
        expected = [adapted(images) for _ in range(3)]
        assert torch.equal(adapted(images), expected[0])
        adapted(images)
        adapted.reset()  # after two of three
        for index in range(7):
            assert torch.equal(adapted(images), expected[index % 3])

    def test_batches_without_an_update_do_not_count(self, make_net, images):
        adapted = RDumb(reset=2, margin=1e-3).wrap(make_net())
        for _ in range(5):
            adapted(images)
        assert adapted.engine.net.counters.updates_at_reset == 0

    def test_is_eta_until_the_thousandth_update(self, make_net, batches):
        adapted, plain = RDumb(**OPEN).wrap(make_net()), ETA(**OPEN).wrap(make_net())
        for batch in batches:
            assert torch.equal(adapted(batch), plain(batch))
        assert RDumb().protocol()["reset"] == 1000


class Unlabelled(lightning.LightningDataModule):
    """A data module of the user's, which turns bytes into floats on the device."""

    def __init__(self, images, clean=None):
        super().__init__()
        self.images, self.clean = images, clean
        self.stages = []

    def setup(self, stage):
        self.stages.append(stage)

    def test_dataloader(self):
        return DataLoader(TensorDataset(self.images, torch.zeros(len(self.images), dtype=torch.long)), batch_size=4)

    def on_after_batch_transfer(self, batch, dataloader_idx):
        return batch[0].double() / 255, batch[1]


class Labelled(Unlabelled):
    """The same with validation images."""

    def val_dataloader(self):
        labels = torch.full((len(self.clean),), 10**6)  # no class: whoever reads it fails
        return DataLoader(TensorDataset(self.clean, labels), batch_size=len(self.clean))


class Classifier(lightning.LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, images):
        return self.net(images)

    def test_step(self, batch, batch_idx):
        self(batch[0])


class Seen(lightning.Callback):
    """Keeps what the adapter knows at the end of a run."""

    def __init__(self, adapter):
        self.adapter = adapter

    def on_test_epoch_end(self, trainer, pl_module):
        self.state, self.protocol = self.adapter.state_dict(), self.adapter.protocol()


@pytest.fixture
def in_lightning(make_net, tmp_path):
    def run(adapter, data):
        seen = Seen(adapter)
        trainer = lightning.Trainer(
            accelerator="cpu", callbacks=[adapter, seen], logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.test(Classifier(make_net()), datamodule=data, verbose=False)
        return seen

    return run


@pytest.fixture
def pixels():
    return torch.randint(256, (12, 3, 16, 16), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


class TestEATA:
    @pytest.mark.parametrize("arguments", [{}, {"fisher_weight": 0.0, "source": "never read"}])
    def test_without_penalty_is_eta(self, make_net, batches, arguments):
        adapted, plain = EATA(**OPEN, **arguments).wrap(make_net()), ETA(**OPEN).wrap(make_net())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for batch in batches:
                assert torch.equal(adapted(batch), plain(batch))
        expected = [] if arguments else ["EATA found no source images, so it runs as ETA"]
        said = [str(warning.message).split(":")[0] for warning in caught]
        assert [message for message in said if "images a batch" not in message] == expected
        assert adapted.engine.method.protocol()["fisher"] is None

    @pytest.mark.parametrize("arguments", [{"source": "images"}, {"fisher": "stream"}])
    def test_the_penalty_keeps_weights_near_the_source(self, make_net, batches, arguments):
        if "source" in arguments:
            arguments = {"source": batches[:2]}
        distances = []
        for weight in (0.0, 1e3, 1e6):
            adapted = EATA(**OPEN, **arguments, fisher_weight=weight).wrap(make_net())
            for batch in batches * 3:
                adapted(batch)
            net = adapted.engine.net
            distances.append(sum((w - s).square().sum() for w, s in zip(net.parameters, net.source, strict=True)))
        assert distances[0] > 1.2 * distances[1] > 1.44 * distances[2]

    def test_generator_source_is_read_once(self, make_net, batches):
        def source():
            yield from batches[:2]

        adapted = EATA(**OPEN, fisher_weight=100.0, source=source()).wrap(make_net())
        listed = EATA(**OPEN, fisher_weight=100.0, source=batches[:2]).wrap(make_net())
        assert torch.equal(adapted(batches[0]), listed(batches[0]))
        copies = [copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted)), adapted.to("cpu")]
        expected = [listed(batch) for batch in batches]
        for each in copies:
            assert [torch.equal(each(batch), logits) for batch, logits in zip(batches, expected, strict=True)] == [
                True
            ] * 4

    def test_reads_no_more_source_than_it_needs(self, make_net, images):
        def source():
            yield images
            yield images
            pytest.fail("fisher_samples were there already")

        EATA(source=source(), fisher_samples=2 * len(images)).wrap(make_net())(images)

    def test_measures_anew_in_another_run(self, make_net, batches):
        method = EATA(**OPEN, source=batches[:1])
        first = method.wrap(make_net())
        first(batches[0])
        values = tensors(first)
        first.release()
        second = method.wrap(make_net(torch.nn.BatchNorm2d, 7))
        second(batches[0])
        assert not torch.equal(tensors(second)["method.fisher"], values["method.fisher"])

    def test_a_stream_is_measured_anew_after_a_reset(self, make_net, batches):
        adapted = EATA(**OPEN, fisher="stream", fisher_samples=8, reset="never").wrap(make_net())
        for batch in batches:
            adapted(batch)
        state = tensors(adapted)
        assert (state["method.fisher.samples"], state["method.fisher.batches"]) == (8, 2)
        adapted.reset()
        assert all(not value.any() for name, value in tensors(adapted).items() if "fisher" in name)
        adapted(batches[2])
        assert tensors(adapted)["method.fisher.samples"] == 3

    def test_memory_does_not_grow_with_the_stream(self, make_net, images):
        adapted = EATA(**OPEN, fisher="stream", reset="never").wrap(make_net())
        adapted(images)
        size = len(pickle.dumps(adapted))
        for _ in range(12):
            adapted(images)
        assert adapted.engine.updates == 13
        assert len(pickle.dumps(adapted)) == pytest.approx(size, abs=40)  # counters have more digits

    def test_takes_the_validation_images_of_a_data_module(self, in_lightning, make_net, pixels):
        data = Labelled(pixels, pixels.flip(0))
        seen = in_lightning(EATA(**OPEN, fisher_weight=50.0), data)
        assert data.stages == ["test", "validate"]
        assert seen.protocol["fisher"] == "source"
        adapted = EATA(**OPEN, fisher_weight=50.0, source=[pixels.flip(0).double() / 255]).wrap(make_net())
        for batch in pixels.split(4):
            adapted(batch.double() / 255)
        for name, value in tensors(adapted).items():
            found = seen.state["tensors"][name if name.startswith("method.") else f"net.{name}"]
            torch.testing.assert_close(found, value, rtol=1e-8, atol=1e-12)

    def test_draws_validation_images_at_random(self, in_lightning, pixels):
        """Of images that come class by class, the first ones are of one class."""
        sizes = []
        clean = torch.arange(240, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 3, 8, 8)

        class Watched(Labelled):
            def on_after_batch_transfer(self, batch, dataloader_idx):
                if len(batch[1]) and batch[1][0] == 10**6:
                    sizes.append(sorted(batch[0][:, 0, 0, 0].tolist()))
                return super().on_after_batch_transfer(batch, dataloader_idx)

        for _ in range(2):
            in_lightning(EATA(fisher_samples=20, seed=1), Watched(pixels, clean))
        assert sizes[0] == sizes[1]
        assert len(set(sizes[0])) == 20
        assert sizes[0][-1] > 150

    def test_missing_validation_images_are_named(self, in_lightning, pixels):
        with pytest.warns(UserWarning, match="found no source images.*a data module with validation images"):
            seen = in_lightning(EATA(), Unlabelled(pixels))
        assert seen.protocol["fisher"] is None

    def test_on_the_digits(self, tmp_path):
        task = SupervisedTask(encoder="cifar_resnet8")
        data = DigitsDataModule(batch_size=20, domains=["contrast"], limit=40)
        trainer = Trainer(default_root_dir=str(tmp_path), accelerator="cpu", enable_progress_bar=False)
        results = trainer.adapt(task, data, EATA(fisher_samples=50))
        assert results["cost"]["forwards_per_batch"] == results["cost"]["backwards_per_batch"] == (2 + 3) / 2

    def test_settings_on_the_command_line_reach_the_method(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        main([
            "adapt", "--model", "SupervisedTask", "--model.encoder", "cifar_resnet8", "--model.num_classes", "10",
            "--data", "DigitsDataModule", "--data.limit", "20", "--data.batch_size", "10", "--adapter", "EATA",
            "--adapter.fisher", "stream", "--adapter.fisher_samples", "15", "--adapter.fisher_weight", "7",
            "--adapter.redundancy", "0.1", "--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false",
        ])  # fmt: skip
        results = json.loads((tmp_path / "runs" / "default" / "results.json").read_text())
        expected = {"fisher": "stream", "fisher_samples": 15, "fisher_weight": 7.0, "redundancy": 0.1, "margin": 0.4}
        assert results["protocol"].items() >= expected.items()
        assert results["cost"]["forwards_per_batch"] == 2

    @pytest.mark.parametrize(
        ("source", "error", "message"),
        [
            ([], ValueError, "source gave no batch of images"),
            ([{"image": 1}], TypeError, "as the network takes them.*got dict"),
            ([(torch.zeros(2, 3, 8, 8, dtype=torch.uint8), 0)], TypeError, r"got torch\.uint8 of shape \(2, 3, 8, 8\)"),
            (torch.zeros(2, 3, 8, 8), TypeError, r"got torch\.float32 of shape \(3, 8, 8\)"),
        ],
    )
    def test_says_what_is_wrong_with_the_source(self, make_net, images, source, error, message):
        with pytest.raises(error, match=message):
            EATA(source=source).wrap(make_net())(images)


@pytest.mark.parametrize("with_importance", [True, False])
def test_drift_gradient_is_that_of_the_penalty(with_importance):
    draw = torch.Generator().manual_seed(3)
    shapes = [(4,), (2, 3), (5,)]
    weights = [torch.randn(shape, generator=draw, dtype=torch.float64, requires_grad=True) for shape in shapes]
    source, importance = ([torch.rand(shape, generator=draw, dtype=torch.float64) for shape in shapes] for _ in "si")
    scales = importance if with_importance else [1.0] * 3
    penalty = 0.7 * sum((s * (w - o) ** 2).sum() for w, o, s in zip(weights, source, scales, strict=True))
    expected = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(penalty, weights)])
    flat, origin = (torch.cat([value.flatten() for value in values]) for values in (importance, source))
    gradient, value = ewc_penalty_and_gradient(weights, origin, 0.7, flat if with_importance else None)
    assert value.item() == pytest.approx(penalty.item())
    torch.testing.assert_close(gradient, expected)
