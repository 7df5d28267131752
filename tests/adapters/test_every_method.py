"""Properties of every method: exact states, gifts returned, small batches, any number of classes, no waiting."""

from __future__ import annotations

import copy
import io

import pytest
import timm
import torch
from support.methods import BATCH_NORM_ONLY, methods
from torch import nn

from ttalight.adapters import Tent

METHODS = methods()
#: Methods with a second pass of samples that a mask picks, which are as many as the data say: one more wait.
MASKED = ("DeYO", "ROID", "CMF")

pytestmark = pytest.mark.filterwarnings("ignore:.*runs with its settings for CIFAR", "ignore:.*source")


@pytest.fixture(params=METHODS)
def name(request):
    return request.param


@pytest.fixture
def method(name):
    return METHODS[name]


@pytest.fixture
def batches(images):
    images = (images - 0.5) / 2  # in [0, 1], for methods that make views
    return [images, images.flip(0) * 0.5, images[:3], images[:1]]


def moves(adapted):
    """Whether a method that takes steps has moved its weights; others have none to move."""
    net = adapted.engine.net
    if not net.parameters:
        return True
    return any(not torch.equal(weight, source) for weight, source in zip(net.parameters, net.source, strict=True))


def from_file(state):
    """Return a state as a file without pickled code holds it."""
    torch.save(state, file := io.BytesIO())
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("reset", ["never", "batch"])
def test_a_state_continues_bit_for_bit(method, reset, make_net, batches):
    whole = method(reset=reset).wrap(make_net())
    expected = [whole(batch) for batch in batches]
    assert reset == "batch" or moves(whole)
    first, second, fresh = (method(reset=reset).wrap(make_net()) for _ in range(3))
    for batch, logits in zip(batches[:2], expected, strict=False):
        assert torch.equal(first(batch), logits)
    state = from_file(first.engine.capture())
    second(batches[3])
    for continued in (second, fresh):
        continued.load_state_dict(state)
        for batch, logits in zip(batches[2:], expected[2:], strict=True):
            assert torch.equal(continued(batch), logits)
        states = (adapted.state_dict()["tensors"] for adapted in (continued, whole))
        torch.testing.assert_close(*states, rtol=0, atol=0, equal_nan=True)


def test_a_reset_starts_again_bit_for_bit(method, make_net, batches):
    adapted = method(reset="never").wrap(make_net())
    first = [adapted(batch) for batch in batches[:2]]
    assert moves(adapted)
    adapted.reset()
    adapted.engine.net.counters.visit, adapted.engine.net.counters.batch = 0, 0  # the draws of the first time
    assert all(torch.equal(adapted(batch), logits) for batch, logits in zip(batches[:2], first, strict=True))


def test_a_release_gives_the_network_back(method, make_net, batches, state_of, same_state):
    net = make_net()
    before = state_of(net)
    adapted = method(reset="never").wrap(net)
    for batch in batches[:2]:
        adapted(batch)
    assert moves(adapted)
    adapted.release()
    same_state(net, before)


@pytest.mark.parametrize("classes", [2, 1000])
def test_any_batch_and_any_number_of_classes(method, make_net, batches, classes):
    adapted = method().wrap(make_net(classes=classes))
    for batch in batches:
        logits = adapted(batch)
        assert logits.shape == (len(batch), classes)
        assert torch.isfinite(logits).all()
        assert not logits.requires_grad
    assert all(torch.isfinite(value).all() for value in adapted.engine.net.parameters)
    assert moves(adapted)


@pytest.mark.parametrize("network", ["test_vit", "test_convnext"])
def test_networks_without_batch_norm(name, method, network, batches):
    net = timm.create_model(network, num_classes=4, **({"img_size": 32} if "vit" in network else {})).double()
    if name.split()[0] in BATCH_NORM_ONLY:
        with pytest.raises(ValueError, match="BatchNorm"):
            method().wrap(net)
    else:
        adapted = method().wrap(net)
        assert torch.isfinite(adapted(batches[0])).all()
        assert moves(adapted)


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_mixed_precision_changes_little(method, make_net, batches, precision):
    net = make_net().float()
    batch = batches[0].float()
    expected = method().wrap(copy.deepcopy(net))(batch)
    with torch.autocast("cpu", dtype=precision):
        adapted = method().wrap(net)
        logits = adapted(batch)
    assert torch.isfinite(logits).all()
    assert moves(adapted)
    assert (logits - expected).abs().max() < 0.1 * expected.abs().max()
    assert {value.dtype for value in net.state_dict().values()} <= {torch.float32, torch.int64}


def test_waits_for_the_device_once_a_step(name, method, make_net, batches, waits, monkeypatch):
    # EATA would count the images of the stream, and RMT its steps after a warm-up, both on the host.
    settings = {"EATA": {"fisher": "source", "source": batches[2:3]}, "RMT": {"warm_up": 0}}
    adapted = method(**settings.get(name, {})).wrap(make_net())
    adapted(batches[0])  # configured
    engine = adapted.engine
    steps, passes = engine.updates, engine.net.forwards
    with waits, monkeypatch.context() as within:
        within.setattr(copy, "deepcopy", lambda *args: pytest.fail("a deep copy in a step"))
        adapted(batches[1])
    steps = engine.updates - steps
    assert (steps > 0) == bool(engine.net.parameters)
    # The look at pixels and weights is part of the first. CoTTA reads whether the source is sure, methods with a memory
    # how many images it is short of an update and, until it is full, how many it has.
    more = {"CoTTA": 1, "RoTTA": 1 + steps, "NOTE": 1}
    assert len(waits.read) == max(1, steps) + more.get(name, 0), waits.read
    assert len(waits.masked) == (name in MASKED), waits.masked
    if name in MASKED:
        assert engine.net.forwards - passes > 1  # the pass of the samples that a mask picks was made


def test_group_norm_in_channels_last():
    images = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    logits = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        layers = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
        net = nn.Sequential(*layers)
        adapted = Tent(lr=0.1).wrap(net.to(memory_format=layout))
        adapted(images)
        logits.append(adapted(images))
    torch.testing.assert_close(*logits)
