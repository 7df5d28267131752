"""CTA-C: a linear classifier on a frozen model. What every such task must do is in test_auxiliary_tasks.py."""

from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cross_entropy

from ttalight.tasks import ProbeTask

SMALL = {"encoder": "cifar_resnet8", "lr": 1e-2}


@pytest.fixture(scope="module")
def fitted(stages, make_trainer, make_data, tmp_path_factory):
    task = ProbeTask(self_supervised=stages["simclr"], crop="none", **SMALL)
    start = {name: value.clone() for name, value in task.state_dict().items()}
    folder = tmp_path_factory.mktemp("probe")
    make_trainer(folder).fit(task, datamodule=make_data(batch_size=50))
    return task, start, str(folder / "checkpoints" / "last.ckpt")


def test_only_the_classifier_is_trained(fitted, stages):
    task, start, path = fitted
    source = torch.load(stages["simclr"], weights_only=True)["state_dict"]
    after = torch.load(path, weights_only=True)["state_dict"]
    for name, value in source.items():  # statistics of BatchNorm included
        assert torch.equal(after[name], value), name
    assert not torch.equal(after["classifier.weight"], start["classifier.weight"])
    trained = [parameter for group in task.optimizers().param_groups for parameter in group["params"]]
    assert {id(parameter) for parameter in trained} == {id(parameter) for parameter in task.classifier.parameters()}


def test_the_classifier_learns_what_the_features_say(fitted, make_data):
    task, start, _ = fitted
    data = make_data(batch_size=50)
    data.setup("fit")
    images, labels = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)[:2]
    task.eval()
    with torch.no_grad():
        features = task.project(images)
        before = cross_entropy(features @ start["classifier.weight"].T + start["classifier.bias"], labels)
        assert cross_entropy(task(images), labels) < before


def test_a_file_holds_all_that_adaptation_needs(fitted):
    task, _, path = fitted
    loaded = ProbeTask(weights=path, encoder="cifar_resnet8").eval()
    images = torch.rand(3, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(images), task.eval()(images))
        assert torch.equal(loaded(images), loaded.classifier(loaded.projector(loaded.encode(images))))
    assert loaded.source["file"] == path


def test_encoder_and_projector_stay_in_eval_mode(stages):
    task = ProbeTask(self_supervised=stages["simclr"], **SMALL).train()
    assert task.classifier.training
    assert not any(part.training for part in [*task.encoder.modules(), task.projector])


def test_test_time_is_that_of_cta(fitted):
    task = fitted[0]
    assert task.default_adapter().protocol()["lr"] == 1e-6
    assert (task.temperature, task.auxiliary_views) == (0.01, 2)
    names = {id(parameter): name for name, parameter in task.named_parameters()}
    assert {names[id(parameter)].partition(".")[0] for parameter in task.adaptable_parameters()} == {
        "encoder", "projector",
    }  # fmt: skip


def test_what_is_wrong_is_said(fitted, stages, make_trainer, make_data, tmp_path):
    with pytest.raises(ValueError, match=r"give self_supervised .* or weights .*, not both"):
        ProbeTask(self_supervised=stages["simclr"], weights=fitted[2], **SMALL)
    with pytest.raises(ValueError, match="trained on a self-supervised model: give self_supervised="):
        make_trainer(tmp_path).fit(ProbeTask(**SMALL), datamodule=make_data())
    with pytest.raises(ValueError, match=r"self_supervised: .* was written by SupervisedTask, expected .* Contrastive"):
        ProbeTask(self_supervised=stages["source"], **SMALL)
