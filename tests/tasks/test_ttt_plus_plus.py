"""TTT++: contrast, moments of the source, queue. What every such task must do is in test_auxiliary_tasks.py."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from ttalight.adapters import TestTimeTraining
from ttalight.losses import barlow_twins_loss, contrastive_loss, covariance_distance, feature_moments, mean_distance
from ttalight.tasks import TTTPlusPlus

SMALL = {"encoder": "cifar_resnet8", "lr": 1e-3, "projection": 16}


@pytest.fixture(scope="module")
def path(make_trainer, make_data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ttt")
    task = TTTPlusPlus(crop="none", calibration_images=100, **SMALL)
    make_trainer(folder).fit(task, datamodule=make_data())
    return str(folder / "checkpoints" / "last.ckpt")


@pytest.fixture
def load(path):
    def load(**kwargs):
        return TTTPlusPlus(weights=path, encoder="cifar_resnet8", projection=16, **kwargs)

    return load


def batch(count=12, seed=4):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("objective", ["contrastive", "barlow_twins"])
def test_training_loss(objective, make_trainer, make_data, tmp_path):
    task = TTTPlusPlus(contrastive_weight=0.3, temperature=0.2, objective=objective, **SMALL)
    seen, logits, projected = {}, [], []
    task.log = lambda name, value, **kwargs: seen.setdefault(name, value)
    task.classifier.register_forward_hook(lambda module, args, output: logits.append(output.detach()))
    task.projector.register_forward_hook(lambda module, args, output: projected.append(output.detach()))
    task.on_train_batch_end = lambda outputs, batch, batch_idx: seen.setdefault("labels", batch[1])
    task.on_train_epoch_end = lambda: None
    make_trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(task, datamodule=make_data())
    first, second = logits[0].chunk(2)  # both losses are of the same two views
    supervised = cross_entropy(first, seen["labels"]) + cross_entropy(second, seen["labels"])
    views = projected[0].chunk(2)
    compared = 0.2 / 0.07 * contrastive_loss(*views, 0.2) if objective == "contrastive" else barlow_twins_loss(*views)
    expected = 0.7 * supervised + 0.3 * compared
    assert seen["train/loss"].item() == pytest.approx(expected.item(), rel=1e-5)


def test_file_has_moments_of_training_images(load, make_data):
    task = load().eval()
    data = make_data()
    data.setup("fit")
    images = data.train_set.images.float() / 255
    with torch.no_grad():
        features = task.encode(images)
        for alignment, vectors in (
            (task.encoder_alignment, features),
            (task.head_alignment, task.projector(features)),
        ):
            mean, covariance = feature_moments(vectors)
            torch.testing.assert_close(alignment.mean, mean, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(alignment.covariance, covariance, rtol=1e-3, atol=1e-6)
            assert (alignment.spread > 0).all()


def test_source_batches_cost_about_the_weights(load, make_data):
    task = load(encoder_weight=3.0, head_weight=0.0).eval()
    data = make_data()
    data.setup("fit")
    with torch.no_grad():
        losses = [
            task.encoder_alignment(task.encode(part.float() / 255)).item()
            for part in data.train_set.images[torch.randperm(1000)].split(100)
        ]
    assert 0.4 < sum(losses) / len(losses) / 3.0 < 2.0


def test_moments_are_taken_once_at_the_end(make_trainer, make_data, tmp_path, monkeypatch):
    calls = []
    original = TTTPlusPlus.summarize
    monkeypatch.setattr(
        TTTPlusPlus, "summarize", lambda self, data: (calls.append(self.current_epoch), original(self, data))
    )
    task = TTTPlusPlus(calibration_images=100, **SMALL)
    make_trainer(tmp_path, max_epochs=2, limit_train_batches=1).fit(task, datamodule=make_data())
    assert calls == [1]
    assert task.training


def test_unfinished_weights_are_refused():
    task = TTTPlusPlus(encoder="cifar_resnet8")
    adapted = TestTimeTraining(steps=1, lr=1e-3).wrap(task)
    with pytest.raises(ValueError, match="no moments of the source, which training takes at its end"):
        adapted(batch())
    adapted.release()


def test_auxiliary_loss_has_three_parts(load):
    task = load(encoder_weight=0.7, head_weight=0.2).eval()
    images = batch()
    with torch.no_grad():
        loss = task.auxiliary_loss(images, torch.Generator().manual_seed(1))
        views = task.views(images, torch.Generator().manual_seed(1))
        expected = 0.5 / 0.07 * contrastive_loss(*task.project(views).chunk(2), 0.5)
        features = task.encode(images)
        for weight, alignment, vectors in (
            (0.7, task.encoder_alignment, features),
            (0.2, task.head_alignment, task.projector(features)),
        ):
            mean, covariance = feature_moments(vectors)
            apart = covariance_distance(alignment.covariance, covariance) / alignment.spread[0]
            expected += weight * (apart + mean_distance(alignment.mean, mean) / alignment.spread[1] / 2)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_contrast_does_not_see_the_length_of_features(load):
    task = load(encoder_weight=0.0, head_weight=0.0).eval()
    with torch.no_grad():
        before = task.auxiliary_loss(batch(), torch.Generator().manual_seed(1))
        task.projector[2].weight.mul_(10)
        task.projector[2].bias.mul_(10)
        after = task.auxiliary_loss(batch(), torch.Generator().manual_seed(1))
    torch.testing.assert_close(before, after)


def test_crops_and_colours_are_drawn_for_each_image(load):
    task = load()
    boxes, _, jitter, grey = task.views.draw(64, 32, 32, torch.Generator().manual_seed(0))[:4]
    assert len(boxes.unique(dim=0)) > 50
    assert len(jitter.brightness.unique()) > 50
    assert 0 < grey.sum() < 64


def test_projector_and_classifier_stay(load):
    task = load()
    adapter = TestTimeTraining(steps=2, lr=1e-3, reset="never")
    adapted = adapter.wrap(task)
    adapted(batch())
    names = {name for name in adapted.engine.capture()["tensors"] if name.startswith(("projector", "classifier"))}
    assert not names
    adapted.release()


class TestQueue:
    def test_begins_empty_for_every_episode(self, load):
        task = load(queue=24)
        adapted = TestTimeTraining(steps=1, lr=1e-3, reset="batch").wrap(task)
        for seed in range(4):
            adapted(batch(seed=seed))
            assert int(task.encoder_alignment.queued) == 12
        adapted.release()
        assert int(task.encoder_alignment.queued) == 0
        assert task.head_alignment.queue.abs().sum() == 0

    def test_holds_earlier_batches_of_a_domain(self, load):
        task = load(queue=24)
        adapted = TestTimeTraining(steps=1, lr=0.0, reset="never").wrap(task)
        for seed in range(3):
            adapted(batch(seed=seed))
        assert int(task.head_alignment.queued) == 24
        assert task.head_alignment.queue.abs().sum(1).min() > 0
        state = adapted.state_dict()["tensors"]
        assert torch.equal(state["method.head_queue"], task.head_alignment.queue)
        adapted.release()


def test_starts_from_a_supervised_model(stages):
    task = TTTPlusPlus(supervised=stages["source"], **SMALL)
    source = torch.load(stages["source"], weights_only=True)["state_dict"]
    assert all(torch.equal(task.state_dict()[name], value) for name, value in source.items())


def test_default_adapter_has_the_published_optimizer():
    adapter = TTTPlusPlus(encoder="cifar_resnet8").default_adapter()
    group = adapter.make_optimizer([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
    assert (group["lr"], group["momentum"]) == (0.01, 0.9)
    assert (adapter.steps, adapter.reset) == (20, "batch")
