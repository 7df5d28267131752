"""Arguments of the wrong kind are refused in one line, before anything is computed from them."""

from __future__ import annotations

import inspect

import pytest
import torch
from lightning import LightningModule
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ttalight import Trainer, adapters
from ttalight.adapters import FIND, MEMO, STAG, T3A, Adapter, MoETTA, Tent, TestTimeTraining
from ttalight.data import Cross, Gradual
from ttalight.tasks import SupervisedTask

WRONG = ("1e-3", float("nan"), [1], True, {}, torch.zeros(2), 1 << 70)
CLASSES = [getattr(adapters, name) for name in adapters.__all__]
TASK, LOADER = LightningModule(), DataLoader(TensorDataset(torch.zeros(4, 3, 8, 8), torch.zeros(4).long()))


def adapt(*args, **kwargs):
    return Trainer(logger=False, enable_progress_bar=False).adapt(*args, **kwargs)


METHODS = [cls for cls in CLASSES if isinstance(cls, type) and issubclass(cls, Adapter) and not inspect.isabstract(cls)]


@pytest.mark.parametrize("method", METHODS)
def test_every_number_of_every_method(method):
    owners = [cls for cls in method.__mro__ if "__init__" in vars(cls)]
    parameters = {name: value for cls in owners for name, value in inspect.signature(cls).parameters.items()}
    numbers = [name for name, value in parameters.items() if value.annotation in ("float", "int", "float | None")]
    assert "lr" in numbers or method.__name__ not in ("Tent", "SAR")
    for name in numbers:
        for value in WRONG:
            with pytest.raises((TypeError, ValueError), match=rf"{name} must .*, got") as error:
                method(**{name: value})
            assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: T3A(supports=2.5), "T3A: supports must be a whole number, got 2.5, a float"),
        (lambda: T3A(supports=None), "T3A: supports must be a whole number, got None, a NoneType"),
        (lambda: MEMO(joint="no"), "MEMO: joint must be true or false, got 'no', a str"),
        (lambda: STAG(weight="a"), "STAG: weight must be a number, got 'a', a str"),
        (lambda: MoETTA(plain=3), "MoETTA: plain must be a list of whole numbers, got 3, a int"),
        (lambda: TestTimeTraining(read_at="12"), "TestTimeTraining: read_at must be a list of whole numbers, got '12'"),
        (lambda: Gradual(path=None), "Gradual: path must be a list of whole numbers, got None"),
        (lambda: Tent(learning_rate=1), "Tent has no argument learning_rate"),
        (lambda: Tent(clip=1), "Tent has no argument clip; nearest: clip_norm"),
        (lambda: Tent(optimizer="SGD"), r"optimizer must make an optimizer of parameters, .* got a str"),
        (lambda: Tent(terms=STAG()), r"terms must be a list of terms, for example \[STAG\(\)\], got STAG"),
        (lambda: Tent(terms=[STAG]), r"terms must be a list of terms, .* got \[<class"),
        (lambda: Tent(passes="fast"), r"passes must be a way to compute passes, for example FastPass\(\), got 'fast'"),
        (lambda: Tent.preset([1]), r"Tent has settings for .*, got \[1\]"),
        (
            lambda: adapt(nn.Linear(2, 2), LOADER),
            "model must be a LightningModule; .* got a Linear",
        ),
        (lambda: adapt(SupervisedTask, LOADER), "got the class SupervisedTask"),
        (lambda: adapt(TASK, LOADER, Tent), r"adapter must be .*Tent\(\), got the class Tent"),
        (lambda: adapt(TASK, LOADER, "Tent"), r"adapter must be .*Tent\(\), got a str"),
        (
            lambda: adapt(TASK, LOADER, Tent(), resume=3),
            "resume must be the folder of a run, got a int",
        ),
        (lambda: FIND(layers=3), "layers must be 'auto', 'all' or a list of positions, got 3"),
        (lambda: Cross(domains_per_batch=[1]), r"domains_per_batch must be a number, random or null, got \[1\]"),
    ],
)
def test_the_line(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
