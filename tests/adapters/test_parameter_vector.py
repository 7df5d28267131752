"""One vector in the place of many parameters moves them as torch's optimizers do."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, AdamW, RMSprop

from ttalight.adapters import ETA, Tent
from ttalight.adapters.parameter_vector import ParameterVector, divide, flatten

OPTIMIZERS = {
    "sgd": partial(SGD, lr=0.1, weight_decay=0.1),
    "momentum": partial(SGD, lr=0.1, momentum=0.9, dampening=0.3),
    "uphill": partial(SGD, lr=0.1, maximize=True),
    "nesterov": partial(SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adam": partial(Adam, lr=0.1, foreach=True),
    "amsgrad": partial(Adam, lr=0.1, amsgrad=True, weight_decay=0.1),
    "fused": partial(Adam, lr=0.1, fused=True),
    "decay": partial(Adam, lr=0.1, betas=(0.5, 0.9), weight_decay=0.1),
    "adamw": partial(AdamW, lr=0.1, betas=(0.5, 0.9)),
}


def make_parameters() -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    shapes = [(4,), (2, 3), (), (5,)]
    return [nn.Parameter(torch.randn(shape, generator=draw, dtype=torch.float64)) for shape in shapes]


def follow(vector, optimizer, parameters, mover, steps=4):
    """Step both on the same gradients, and move both by hand in between."""
    draw = torch.Generator().manual_seed(1)
    for _ in range(steps):
        gradients = [torch.randn(p.shape, generator=draw, dtype=p.dtype) for p in parameters]
        vector.step(mover, flatten(gradients))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        with torch.no_grad():
            for parameter in (parameters[1], vector.parameters[1]):
                parameter.mul_(0.9)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair)), lambda pair: pair])
def test_moves_as_the_parameters_would_move_alone(make, copied):
    parameters, vector = make_parameters(), ParameterVector(make_parameters())
    vector, mover = copied((vector, make([vector.values])))
    follow(vector, make(parameters), parameters, mover)
    for own, moved in zip(parameters, vector.parameters, strict=True):
        torch.testing.assert_close(moved, own)


def test_parts_are_what_was_flattened():
    parameters = make_parameters()
    for part, parameter in zip(divide(flatten(parameters), parameters), parameters, strict=True):
        assert torch.equal(part, parameter)


class TestFits:
    def test_optimizers_that_treat_numbers_alike(self):
        parameters = make_parameters()
        assert all(ParameterVector.fits(make(parameters), parameters) for make in OPTIMIZERS.values())

    @pytest.mark.parametrize(
        "make",
        [
            lambda parameters: RMSprop(parameters),
            lambda parameters: SGD([{"params": parameters[:2]}, {"params": parameters[2:], "lr": 1.0}], lr=0.1),
            lambda parameters: type("Own", (SGD,), {})(parameters, lr=0.1),
        ],
    )
    def test_others_do_not(self, make):
        parameters = make_parameters()
        assert not ParameterVector.fits(make(parameters), parameters)

    def test_neither_do_large_mixed_or_single_parameters(self):
        small = make_parameters()
        for parameters in (
            [*small, nn.Parameter(torch.zeros(1 << 18))],
            [*small, nn.Parameter(torch.zeros(1))],
            small[:1],
        ):
            assert not ParameterVector.fits(SGD(parameters, lr=0.1), parameters)


class WithUnused(nn.Module):
    """A network with a layer that no pass reaches, as auxiliary classifiers are in evaluation."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.unused = net, nn.BatchNorm2d(3).double()

    def forward(self, images):
        return self.net(images)


class TestInTheEngine:
    def test_small_parameters_become_one(self, make_net, images):
        adapted = Tent().wrap(make_net())
        adapted(images)
        (group,) = adapted.engine.optimizer.param_groups
        assert [parameter.shape for parameter in group["params"]] == [
            (sum(p.numel() for p in adapted.engine.net.parameters),)
        ]

    @pytest.mark.parametrize("clip_norm", [None, 1e-3])
    def test_the_same_numbers_as_with_an_optimizer_that_keeps_them_apart(self, make_net, images, clip_norm):
        apart = type("Own", (SGD,), {})
        logits = []
        for optimizer in (SGD, apart):
            adapted = ETA(
                optimizer=partial(optimizer, lr=0.1, momentum=0.9), margin=1.0, redundancy=1.0, clip_norm=clip_norm
            ).wrap(make_net())
            logits.append(torch.cat([adapted(images) for _ in range(4)]))
            assert adapted.engine.updates == 4
            assert (len(adapted.engine.optimizer.param_groups[0]["params"]) == 1) == (optimizer is SGD)
        torch.testing.assert_close(*logits)

    def test_settings_that_were_changed_stay(self, make_net, images):
        adapted = Tent().wrap(make_net())
        engine = adapted.engine
        engine.prepare(images)
        engine.optimizer.param_groups[0]["lr"] = 7.0
        adapted(images)
        assert engine.optimizer.param_groups[0]["lr"] == 7.0
        engine.reset()
        assert engine.optimizer.param_groups[0]["lr"] == Tent.published["cifar"]["lr"]

    def test_a_pass_that_misses_a_layer_from_the_start_keeps_them_apart(self, make_net, images):
        adapted = Tent().wrap(WithUnused(make_net()))
        adapted(images)
        parameters = adapted.engine.net.parameters
        assert len(adapted.engine.optimizer.param_groups[0]["params"]) == len(parameters) == 6

    def test_a_state_from_before_the_first_step_goes_into_an_engine_after_it(self, make_net, images):
        adapted = Tent().wrap(make_net())
        adapted.engine.prepare(images)
        before = adapted.state_dict()
        first = adapted(images)
        second = adapted(images)
        after = adapted.state_dict()
        adapted.load_state_dict(before)
        assert torch.equal(adapted(images), first)
        adapted.load_state_dict(before)
        adapted.load_state_dict(after)
        third = adapted(images)
        other = Tent().wrap(make_net())
        other.load_state_dict(after)
        assert torch.equal(other(images), third)
        assert not torch.equal(second, third)
