"""What holds for every method: exact states, gifts returned, small batches, any number of classes, no waiting."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import timm
import torch

from ttalight import adapters
from ttalight.adapters import Adapter, GradientAdapter, SelfTrainingAdapter, Tent, TestTimeTraining

BASES = {Adapter, GradientAdapter, SelfTrainingAdapter, TestTimeTraining}
CLASSES = [
    value
    for name in adapters.__all__
    if isinstance(value := getattr(adapters, name), type) and issubclass(value, Adapter) and value not in BASES
]
#: Methods that move nothing, methods of BatchNorm networks only, and those that need a data-dependent subset.
METHODS = {cls.__name__: cls for cls in CLASSES} | {
    "Tent with STAG": lambda **kwargs: Tent(terms=[adapters.STAG()], **kwargs),
}
BATCH_NORM_ONLY = ("PTBN", "AlphaBN", "EMABN", "FIND")

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


def test_a_state_continues_bit_for_bit(method, make_net, batches):
    whole = method(reset="never").wrap(make_net())
    expected = [whole(batch) for batch in batches]
    first, second = method(reset="never").wrap(make_net()), method(reset="never").wrap(make_net())
    for batch, logits in zip(batches[:2], expected, strict=False):
        assert torch.equal(first(batch), logits)
    state = copy.deepcopy(first.engine.state_dict())
    second(batches[3])
    second.engine.load_state_dict(state)
    for batch, logits in zip(batches[2:], expected[2:], strict=True):
        assert torch.equal(second(batch), logits)


def test_a_reset_starts_again_bit_for_bit(method, make_net, batches):
    adapted = method(reset="never").wrap(make_net())
    first = [adapted(batch) for batch in batches[:2]]
    adapted.reset()
    adapted.engine.visit, adapted.engine.batch = 0, 0  # the draws of the first time
    assert all(torch.equal(adapted(batch), logits) for batch, logits in zip(batches[:2], first, strict=True))


def test_a_release_gives_the_network_back(method, make_net, batches, state_of, same_state):
    net = make_net()
    before = state_of(net)
    adapted = method(reset="never").wrap(net)
    for batch in batches[:2]:
        adapted(batch)
    adapted.release()
    same_state(net, before)


@pytest.mark.parametrize("classes", [2, 10, 1000])
def test_any_batch_and_any_number_of_classes(method, make_net, batches, classes):
    adapted = method().wrap(make_net(classes=classes))
    for batch in batches:
        logits = adapted(batch)
        assert logits.shape == (len(batch), classes)
        assert torch.isfinite(logits).all()
        assert not logits.requires_grad
    assert all(torch.isfinite(value).all() for value in adapted.engine.net.parameters)


@pytest.mark.parametrize("network", ["test_vit", "test_convnext"])
def test_networks_without_batch_norm(name, method, network, batches):
    net = timm.create_model(network, num_classes=4, **({"img_size": 32} if "vit" in network else {})).double()
    adapted = method().wrap(net)
    if name in BATCH_NORM_ONLY:
        with pytest.raises(ValueError, match="BatchNorm"):
            adapted(batches[0])
    else:
        assert torch.isfinite(adapted(batches[0])).all()


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_mixed_precision_changes_little(method, make_net, batches, precision):
    net = make_net().float()
    batch = batches[0].float()
    expected = method().wrap(copy.deepcopy(net))(batch)
    with torch.autocast("cpu", dtype=precision):
        logits = method().wrap(net)(batch)
    assert torch.isfinite(logits).all()
    assert (logits - expected).abs().max() < 0.1 * expected.abs().max()
    assert {value.dtype for value in net.state_dict().values()} <= {torch.float32, torch.int64}


def test_waits_for_the_device_once_a_step(name, method, make_net, batches, monkeypatch):
    """Counts what would make a GPU wait: values read by the host, and shapes that depend on data."""
    adapted = method().wrap(make_net())
    adapted(batches[0])  # configured
    waits = []

    def counting(name):
        real = getattr(torch.Tensor, name)

        def read(*args, **kwargs):
            if "optim" not in Path(sys._getframe(1).f_code.co_filename).parts:  # optimizers count steps on the host
                waits.append(name)
            return real(*args, **kwargs)

        return read

    monkeypatch.setattr("ttalight.transforms.color._values_at_hand", lambda tensor: False)  # as on a device
    for name_of_read in ("item", "tolist", "__bool__", "__float__", "__int__", "numpy", "cpu", "nonzero"):
        monkeypatch.setattr(torch.Tensor, name_of_read, counting(name_of_read))
    monkeypatch.setattr(copy, "deepcopy", lambda *args: pytest.fail("a deep copy in a step"))
    masks = []
    index = torch.Tensor.__getitem__

    def getitem(tensor, key):
        if isinstance(key, torch.Tensor) and key.dtype == torch.bool:
            masks.append(key)
        return index(tensor, key)

    monkeypatch.setattr(torch.Tensor, "__getitem__", getitem)
    steps = adapted.engine.updates + adapted.engine.skipped
    adapted(batches[1])
    steps = adapted.engine.updates + adapted.engine.skipped - steps
    assert len(waits) <= 1 + steps, waits  # one look at the batch, and one for each step
    assert len(masks) <= 2 * (name in ("DeYO", "ROID", "CMF", "SAR"))  # second passes of the kept samples only
