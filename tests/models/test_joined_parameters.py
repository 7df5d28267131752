"""Parameters that share the memory of one vector while a published optimizer moves them."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from ttalight.adapters import EATA, Tent
from ttalight.models.vectors import JoinedParameters, can_join

SIZES = (3, 5, 2)


@pytest.fixture
def parameters():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(size, generator=generator, dtype=torch.float64)) for size in SIZES]


@pytest.fixture
def net():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 3), nn.BatchNorm2d(6)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4)).double().eval()


@pytest.fixture
def images():
    return torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def joined(adapted):
    return adapted.engine.net.joined


def test_what_moves_the_vector_moves_the_parameters(parameters):
    before, own = torch.cat(parameters).clone(), [parameter.data_ptr() for parameter in parameters]
    vector = JoinedParameters(parameters)
    vector.vector.data.add_(1.0)
    assert torch.equal(torch.cat(parameters), before + 1)
    vector.separate()
    assert torch.equal(torch.cat(parameters), before)
    assert [parameter.data_ptr() for parameter in parameters] == own


def test_replaced_memory_is_taken_over(parameters):
    vector = JoinedParameters(parameters)
    parameters[1].data = torch.full((5,), 7.0, dtype=torch.float64)
    vector.refresh()
    assert torch.equal(vector.vector[3:8], parameters[1])
    vector.vector.data.zero_()
    assert all(not parameter.any() for parameter in parameters)
    parameters[0].data = parameters[0].data.float()
    with pytest.raises(RuntimeError, match=r"moved or converted while it adapts: use to\(\)"):
        vector.refresh()


@pytest.mark.parametrize(
    "odd", [torch.ones(2, 2), torch.ones(2, dtype=torch.float32), torch.tensor([1.0, torch.nan], dtype=torch.float64)]
)
def test_others_are_not_joined(odd, parameters):
    assert can_join(parameters)
    assert not can_join([*parameters, nn.Parameter(odd.to(odd.dtype if odd.ndim == 1 else torch.float64))])
    assert not can_join([*parameters, parameters[0]])


@pytest.mark.parametrize(
    "make",
    [
        partial(torch.optim.Adam, lr=0.1),
        partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True),
        partial(torch.optim.SGD, lr=0.1),
    ],
)
def test_a_state_is_that_of_an_optimizer_of_the_parameters(make, parameters):
    other, own = [nn.Parameter(parameter.detach().clone()) for parameter in parameters], make(parameters)
    vector = JoinedParameters(other)
    whole = make([vector.vector])
    assert vector.divide_state(whole.state_dict()) == own.state_dict()
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = parameter.detach().cos()
        vector.vector.grad = torch.cat([parameter.grad for parameter in parameters])
        own.step(), whole.step()
    torch.testing.assert_close(vector.divide_state(whole.state_dict()), own.state_dict())
    again = make([nn.Parameter(vector.vector.detach().clone())])
    again.load_state_dict(vector.join_state(own.state_dict()))
    torch.testing.assert_close(again.state_dict(), whole.state_dict())


def test_a_parameter_that_has_not_moved_has_no_moments(parameters):
    own = torch.optim.Adam(parameters, lr=0.1)
    parameters[1].grad = torch.ones(5, dtype=torch.float64)
    own.step()
    (entries,) = JoinedParameters(parameters).join_state(own.state_dict())["state"].values()
    assert entries["step"] == 1
    assert entries["exp_avg"].count_nonzero() == 5


def test_a_published_optimizer_moves_one_vector(net, images):
    parameters = {name: parameter for name, parameter in net.named_parameters()}
    storages = {name: parameter.data_ptr() for name, parameter in parameters.items()}
    adapted = Tent(lr=0.1).wrap(net)
    adapted(images)
    assert adapted.engine.net.optimizer.param_groups[0]["params"] == [joined(adapted).vector]
    assert dict(net.named_parameters()) == parameters
    adapted.release()
    assert {name: parameter.data_ptr() for name, parameter in net.named_parameters()} == storages


def test_an_optimizer_of_the_user_gets_the_parameters(net, images):
    adapted = Tent(optimizer=partial(torch.optim.Adam, lr=0.1)).wrap(net)
    adapted(images)
    (group,) = adapted.engine.net.optimizer.param_groups
    assert joined(adapted) is None
    assert all(map(lambda a, b: a is b, group["params"], [net[1].weight, net[1].bias, net[3].weight, net[3].bias]))


def test_a_method_with_an_optimizer_of_its_own_gets_the_parameters(net, images):
    class Own(Tent):
        def make_optimizer(self, parameters):
            return torch.optim.SGD([{"params": [parameter]} for parameter in parameters], lr=0.1)

    adapted = Own(lr=0.1).wrap(net)
    adapted(images)
    assert len(adapted.engine.net.optimizer.param_groups) == 4


@pytest.mark.parametrize("method", [Tent, partial(EATA, fisher="stream", margin=1.0, redundancy=1.0)])
def test_steps_are_those_of_the_same_optimizer_of_the_parameters(method, net, images):
    twin = copy.deepcopy(net)
    first, second = method(lr=0.01).wrap(net), method(optimizer=partial(torch.optim.Adam, lr=0.01)).wrap(twin)
    for _ in range(3):
        torch.testing.assert_close(first(images), second(images), rtol=1e-10, atol=1e-10)
    saved = first.state_dict()
    second.load_state_dict(saved)  # both save the same
    torch.testing.assert_close(second.state_dict()["optimizer"]["state"], saved["optimizer"]["state"])
    third = method(lr=0.01).wrap(first.release())
    third.load_state_dict(second.state_dict())
    torch.testing.assert_close(third(images), second(images), rtol=1e-10, atol=1e-10)


def test_gradients_of_the_parameters_are_views_of_that_of_the_vector(net, images):
    adapted = Tent(lr=0.1).wrap(net)
    adapted(images)
    inside = adapted.engine.net
    penalty = torch.full((24,), 0.5, dtype=torch.float64), torch.tensor(1.0)
    inside.backward(inside(images).entropies, penalty_gradient=penalty)
    gradients = [parameter.grad for parameter in inside.parameters]
    assert torch.equal(torch.cat(gradients), inside.joined.vector.grad)
    gradients[0].zero_()  # a method may change them in place
    assert not inside.joined.vector.grad[:6].any()


def test_weights_that_the_user_replaces_still_adapt_and_reset(net, images):
    adapted = Tent(lr=0.1).wrap(net)
    source = net[1].weight.detach().clone()
    adapted(images)
    net[1].weight.data = torch.full((6,), 2.0, dtype=torch.float64)
    adapted(images)
    assert not torch.equal(net[1].weight, torch.full((6,), 2.0, dtype=torch.float64))
    net[1].weight.data = torch.full((6,), 3.0, dtype=torch.float64)
    adapted.reset()
    assert torch.equal(net[1].weight, source)


def test_copies_of_an_adapted_network_have_memory_of_their_own(net, images):
    adapted = Tent(lr=0.1).wrap(net)
    adapted(images)
    plain = copy.deepcopy(adapted.module)
    weight = plain[1].weight.detach().clone()
    assert torch.equal(weight, net[1].weight)
    adapted(images)
    assert torch.equal(plain[1].weight, weight)
