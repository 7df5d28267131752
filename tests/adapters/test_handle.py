"""Freezing, modes and parameters of adapted networks, and representations."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from support.networks import small_net

from ttalight import Trainer
from ttalight.adapters import EATA, SAR, STAG, Source, Tent
from ttalight.data import CIFARDataModule, DigitsDataModule
from ttalight.data.streams import Continual, SingleSample
from ttalight.reporting import read_results
from ttalight.tasks import SupervisedTask


@pytest.fixture
def images():
    return torch.rand(8, 3, 12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_frozen_calls_change_nothing(images):
    adapted = Tent(lr=0.1).wrap(small_net())
    adapted(images)
    assert adapted.freeze() is adapted
    assert adapted.is_frozen
    state, expected = adapted.state_dict(), adapted(images, adapt=False)
    assert torch.equal(adapted(images), expected)
    for other in (copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))):
        assert other.is_frozen
        assert torch.equal(other(images), expected)
    assert adapted.state_dict()["counters"] == state["counters"]
    assert not adapted.unfreeze().is_frozen
    assert torch.equal(adapted(images), expected)  # the prediction before the step
    assert not torch.equal(adapted(images), expected)


def test_modes_are_those_after_the_release(images):
    net = small_net().train()
    net[1].eval()
    adapted = Tent(lr=0.1).wrap(net)
    assert adapted.training
    assert adapted.eval() is adapted
    assert not adapted.training
    first = adapted(images)
    assert torch.equal(first, Tent(lr=0.1).wrap(small_net())(images))
    assert adapted.train().training
    assert not any(part.training for part in net.modules())
    adapted(images)
    adapted.release()
    assert all(part.training for part in net.modules())


def test_modes_of_parts_stay_without_a_call(images):
    net = small_net().train()
    net[1].eval()
    modes = [part.training for part in net.modules()]
    Tent().wrap(net).release()
    assert [part.training for part in net.modules()] == modes


def test_parameters_and_device_are_those_of_the_network(images):
    net = small_net()
    adapted = Tent().wrap(net)
    assert all(ours is theirs for ours, theirs in zip(adapted.parameters(), net.parameters(), strict=True))
    assert [name for name, _ in adapted.named_parameters()] == [name for name, _ in net.named_parameters()]
    assert adapted.device == torch.device("cpu")


def test_representations_of_networks(images):
    with Tent(lr=0.1).wrap(small_net(), window=4) as adapted:
        adapted(images)
        assert repr(adapted) == "AdaptedNetwork(Tent(lr=0.1), Sequential, 1 batches, 1 updates, window of 4)"
        assert repr(adapted.freeze()).endswith("window of 4, frozen)")
    assert repr(adapted) == "AdaptedNetwork(Tent(lr=0.1), released)"


@pytest.mark.parametrize(
    ("made", "text"),
    [
        (Source(), "Source()"),
        (Tent(), "Tent()"),
        (Tent(1e-2, reset="domain"), "Tent(lr=0.01)"),
        (SAR(margin=0.3, lr=None), "SAR(margin=0.3)"),
        (
            Tent(optimizer=torch.optim.SGD, terms=[STAG()]),
            "Tent(optimizer=SGD, terms=[STAG(weight=0.3, reweight=False)])",
        ),
        (EATA(source=[torch.zeros(2, 3, 40, 40)]), "EATA(source=list(...))"),
        (SingleSample(window=3), "SingleSample(window=3)"),
        (Continual(), "Continual()"),
        (DigitsDataModule(), "DigitsDataModule()"),
        (
            DigitsDataModule(batch_size=8, stream=SingleSample()),
            "DigitsDataModule(batch_size=8, stream=SingleSample())",
        ),
        (CIFARDataModule(domains=["fog"]), "domains=('fog',)"),
    ],
)
def test_representations_show_what_differs_from_the_defaults(made, text):
    assert repr(made) == text or (text.startswith("domains") and text in repr(made))
    assert str(made) == repr(made)
    assert repr(copy.deepcopy(made)) == repr(made)


def test_representations_of_presets():
    assert "lr=0.00025" in repr(Tent.preset("imagenet"))


def test_results_show_their_table(tmp_path):
    data = DigitsDataModule(batch_size=64, limit=64, domains=["clean", "contrast"])
    task = SupervisedTask(encoder="cifar_resnet8")
    trainer = Trainer(default_root_dir=str(tmp_path), accelerator="cpu", enable_progress_bar=False, logger=False)
    results = trainer.adapt(task, data, Source())
    for seen in (results, read_results(tmp_path)):
        assert isinstance(seen, dict)
        assert "Source" in repr(seen).splitlines()[0]
        assert "contrast" in repr(seen)
        assert "<td>contrast</td>" in seen._repr_html_()
        assert json.loads(json.dumps(seen)) == seen
