"""TTTFlow: a flow on a frozen classifier, initialised once, and an encoder that adapts up to the flow's maps."""

from __future__ import annotations

import pytest
import torch

from ttalight.adapters import TestTimeTraining
from ttalight.losses import flow_likelihood_loss
from ttalight.tasks import TTTFlow

SMALL = {"encoder": "cifar_resnet8", "flow_steps": 1, "hidden": 4}


@pytest.fixture
def images():
    return torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def fit(make_trainer, make_data, tmp_path):
    def run(task, **trainer):
        make_trainer(tmp_path, limit_val_batches=0, **trainer).fit(task, datamodule=make_data(batch_size=10))
        return task

    return run


def test_training_changes_the_flow_alone(stages, fit):
    task = TTTFlow(supervised=stages["source"], **SMALL)
    source = torch.load(stages["source"], weights_only=True)["state_dict"]
    assert task.source["file"] == stages["source"]
    before = {name: value.clone() for name, value in task.flow.state_dict().items()}
    fit(task, max_epochs=2)
    assert not task.train().encoder.training
    for name, value in task.state_dict().items():  # running statistics too
        part, _, rest = name.partition(".")
        if part == "flow":
            assert rest.endswith(("permutation", "sign")) == torch.equal(value, before[rest]), name
        else:
            assert torch.equal(value, source[name]), name


def test_flow_is_initialised_on_the_first_batch_and_never_again(stages, fit, monkeypatch):
    task, seen = TTTFlow(supervised=stages["source"], lr=1e-3, **SMALL), []
    initialize = task.flow.initialize
    monkeypatch.setattr(task.flow, "initialize", lambda maps: seen.append(maps) or initialize(maps))
    fit(task, max_epochs=2)
    assert [maps.shape for maps in seen] == [(10, 32, 16, 16)]
    fit(task)  # what is trained is trained further
    assert len(seen) == 1


def test_training_without_a_classifier_is_an_error(stages, fit):
    with pytest.raises(ValueError, match=r"maps of a classifier: give supervised= \(checkpoint of a SupervisedTask\)"):
        fit(TTTFlow(**SMALL))
    with pytest.raises(ValueError, match=r"give supervised .* or weights .*, not both"):
        TTTFlow(supervised=stages["source"], weights=stages["source"], **SMALL)


@pytest.mark.parametrize(("layer", "shape"), [(1, (16, 32, 32)), (3, (64, 8, 8))])
def test_loss_is_the_likelihood_of_the_stages_maps(images, layer, shape):
    task = TTTFlow(layer=layer, **SMALL)
    _, maps = task.encode_with_maps(images)
    assert maps[layer].shape[1:] == shape
    expected = flow_likelihood_loss(*task.flow(maps[layer]))
    torch.testing.assert_close(task.auxiliary_loss(images, torch.Generator()), expected)
    assert expected.shape == (6,)


def test_stages_behind_the_flow_neither_adapt_nor_move(images):
    task = TTTFlow(**SMALL)
    adapted = TestTimeTraining(steps=1, lr=1e-3, reset="never").wrap(task)
    adapted(images)
    tensors = adapted.state_dict()["tensors"]
    moved = {name.split(".")[1] for name in tensors}
    assert moved == {"conv1", "bn1", "layer1", "layer2"}
    assert {name.split(".")[1] for name in tensors if "statistics" in name} == {"bn1", "layer1", "layer2"}


def test_images_of_any_size(images):
    task = TTTFlow(**SMALL)
    assert TestTimeTraining(steps=1, lr=1e-3).wrap(task)(images[:1, :, :27, :30]).isfinite().all()


def test_published_settings():
    adapter = TTTFlow(encoder="cifar_resnet8").default_adapter()
    protocol = adapter.protocol()
    assert (protocol["optimizer"], protocol["lr"], protocol["steps"]) == ("SGD", 1e-3, 10)
    assert (protocol["reset"], protocol["norm"]) == ("batch", "ema")
    group = adapter.make_optimizer([torch.nn.Parameter(torch.zeros(1))]).param_groups[0]
    assert (group["momentum"], group["weight_decay"]) == (0.9, 5e-4)
