"""Copies, files and second owners of a network that is being adapted."""

from __future__ import annotations

import copy
import functools
import gc
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

from ttalight import adapters
from ttalight.adapters import PTBN, T3A, Tent

pytestmark = pytest.mark.filterwarnings("ignore:.*statistics of", "ignore:.*source")


@pytest.fixture
def batches(images):
    return [images, images.flip(0) * 0.5]


def with_partial(net):
    for norm in (net[1], net[4]):
        norm.forward = functools.partial(type(norm).forward, norm)
    return net


class OwnDeepcopy(nn.BatchNorm2d):
    def __deepcopy__(self, memo):
        made = self.__class__.__new__(self.__class__)
        memo[id(self)] = made
        made.__dict__ = copy.deepcopy(self.__dict__, memo)
        return made


class OwnState(nn.BatchNorm2d):
    def __getstate__(self):
        return {**self.__dict__, "secret": 1}

    def __setstate__(self, state):
        assert state.pop("secret") == 1
        super().__setstate__(state)


class OwnReduce(nn.BatchNorm2d):
    def __reduce__(self):
        return _make, (type(self), self.num_features, self.state_dict())


def _make(cls, channels, state):
    made = cls(channels).double().eval()
    made.load_state_dict(state)
    return made


def through_a_file(net):
    torch.save(net, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda net: pickle.loads(pickle.dumps(net)), "file": through_a_file}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("norm", [nn.BatchNorm2d, OwnDeepcopy, OwnState, OwnReduce, with_partial])
@pytest.mark.parametrize("method", [PTBN, T3A, functools.partial(Tent, lr=0.1)], ids=["PTBN", "T3A", "Tent"])
def test_copies_are_plain_networks(method, norm, copied, make_net, batches):
    net = with_partial(make_net()) if norm is with_partial else make_net(norm)
    adapted = method(reset="never").wrap(net)
    for batch in batches:
        adapted(batch)
    made = copied(net)
    plain = make_net()
    plain.load_state_dict(net.state_dict())
    assert torch.equal(made(batches[0]), plain(batches[0]))
    assert [type(module) for module in made.modules()] == [type(module) for module in make_net(type(made[1])).modules()]
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in made.modules())
    assert b"ttalight" not in pickle.dumps(made)
    assert torch.equal(method().wrap(made)(batches[0]), method().wrap(plain)(batches[0]))
    adapted.reset()
    assert torch.equal(adapted(batches[0]), method(reset="never").wrap(make_net())(batches[0]))


def test_a_file_is_read_where_this_package_is_not(net, images, tmp_path):
    adapted = T3A(norm="batch").wrap(net)
    adapted(images)
    torch.save(net, tmp_path / "net.pt")
    code = "import sys, torch; torch.load(sys.argv[1], weights_only=False); assert 'ttalight' not in sys.modules"
    subprocess.run([sys.executable, "-c", code, tmp_path / "net.pt"], check=True)


def test_parts_have_one_owner(make_net, images):
    first, second, third = make_net(), make_net(), make_net()
    second[1], third[1].weight = first[1], first[1].weight
    adapted = PTBN().wrap(first)
    with pytest.raises(RuntimeError, match=r"Sequential, its part 1, is being adapted already: .*adapters\.release"):
        PTBN().wrap(second)
    with pytest.raises(RuntimeError, match=r"1\.weight of Sequential belongs to another network as well"):
        PTBN().wrap(third)
    with pytest.raises(RuntimeError, match="Conv2d is being adapted already"):
        PTBN().wrap(first[0])
    adapters.release(second)
    successor = Tent(lr=0.1).wrap(second)
    successor(images)
    weights = [value.clone() for value in second.parameters()]
    del adapted  # of the network that was released, and is another method's now
    gc.collect()
    assert all(map(torch.equal, weights, second.parameters()))
    successor.release()
    assert torch.equal(PTBN().wrap(third)(images), PTBN().wrap(make_net())(images))


def test_gradients_of_before_take_no_part(make_net, batches):
    clean, used = make_net(dropout=0), make_net(dropout=0)
    used(batches[0]).square().sum().backward()
    kept = [parameter.grad.clone() for parameter in used.parameters()]
    adapted, other = Tent(lr=0.1).wrap(clean), Tent(lr=0.1).wrap(used)
    for batch in batches:
        assert torch.equal(adapted(batch), other(batch))
    assert all(map(torch.equal, clean.parameters(), used.parameters()))
    other.release()
    assert all(
        torch.equal(parameter.grad, gradient) for parameter, gradient in zip(used.parameters(), kept, strict=True)
    )
