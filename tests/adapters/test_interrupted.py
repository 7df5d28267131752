"""A batch that an exception ends leaves no trace: whatever raised it, wherever in the batch, in whatever method."""

from __future__ import annotations

import warnings
from functools import partial

import pytest
import torch
from support.methods import CLASSES, EVERY_CLASS, SETTINGS
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ttalight.adapters import PTBN, GradientAdapter, Tent

#: As for every method, and a few with less to do.
OPEN = {
    **SETTINGS,
    "EATA": {**SETTINGS["EATA"], "fisher_samples": 20},
    **{name: {"memory": 3} for name in ("RoTTA", "NOTE")},  # an update in every batch, also after a reset
    "MEMO": {"views": 2, "reset": "domain"},
    "TestTimeTraining": {"reset": "domain"},
}
NAMES = [*CLASSES, "TestTimeTraining"]
#: Whatever is raised, a batch ends alike.
CASES = [
    *((name, KeyboardInterrupt) for name in NAMES),
    *(
        (name, error)
        for name in ("EMABN", "Tent", "RoTTA", "TestTimeTraining")
        for error in (torch.OutOfMemoryError, RuntimeError)
    ),
]
PLACES = ("forward", "backward", "optimizer")

pytestmark = pytest.mark.filterwarnings("ignore:.*runs with its settings for CIFAR", "ignore:.*source")


class Fault:
    """Raises an exception at the k-th time that a batch comes to a place."""

    def arm(self, place=None, k=0, kind=RuntimeError):
        self.place, self.k, self.kind, self.seen = place, k, kind, dict.fromkeys(PLACES, 0)

    def __call__(self, place):
        self.seen[place] += 1
        if (place, self.k) == (self.place, self.seen[place]):
            raise self.kind("broken off")


class Passing(torch.autograd.Function):
    """Changes nothing, and comes to a fault on the way back."""

    @staticmethod
    def forward(ctx, x, fault):
        ctx.fault = fault
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        ctx.fault("backward")
        return gradient, None


class Net(nn.Module):
    """Comes to a fault in the middle of its forward and of its backward; a task for test-time training as well."""

    def __init__(self, fault):
        super().__init__()
        torch.manual_seed(0)
        self.fault = [fault]
        self.first = nn.Sequential(nn.Conv2d(3, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU())
        self.second = nn.Sequential(nn.Conv2d(6, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU())
        self.classifier = nn.Linear(6, 4)
        nn.init.normal_(self.classifier.weight, std=3)
        self.double().train()
        self.classifier.bias.requires_grad_(False)
        for parameter in self.parameters():  # as a training leaves them
            parameter.grad = torch.ones_like(parameter)

    def forward(self, images):
        torch.rand(1)  # drawn from the global generator
        x = Passing.apply(self.first(images), self.fault[0])
        self.fault[0]("forward")
        return self.classifier(self.second(x).mean((2, 3)))

    def auxiliary_loss(self, images, generator):
        noise = torch.randn(images.shape, generator=generator, dtype=images.dtype)
        return (self(images + 0.1 * noise) - self(images)).square().mean(1)

    def adaptable_parameters(self):
        return [*self.first.parameters(), *self.second.parameters()]


@pytest.fixture
def fault():
    (fault := Fault()).arm()
    hook = register_optimizer_step_post_hook(lambda *args: fault("optimizer"))
    yield fault
    hook.remove()


@pytest.fixture
def batches():
    return list(torch.rand(5, 3, 3, 12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64))


@pytest.fixture
def method(name):
    """Makes the method, with several steps a batch where it takes steps."""
    cls = EVERY_CLASS[name]
    steps = {"steps": 2, "lr": 0.01} if issubclass(cls, GradientAdapter) else {}
    return partial(cls, seed=3, **steps, **OPEN.get(name, {}))


def leaves(value, path=""):
    """The parts of a structure by path, tensors as their bits."""
    if isinstance(value, torch.Tensor):
        return {path: (value.dtype, value.shape, value.detach().numpy().tobytes())}
    if isinstance(value, (dict, list, tuple)):
        named = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for name, part in named for key, leaf in leaves(part, f"{path}/{name}").items()}
    return {path: repr(value)}


def module_state(net):
    """Weights, buffers, gradients, flags and classes of layers."""
    parameters = {name: (value, value.grad, value.requires_grad) for name, value in net.named_parameters()}
    modes = {name: (module.training, type(module).__qualname__) for name, module in net.named_modules()}
    return leaves([parameters, dict(net.named_buffers()), modes])


def everything(adapted):
    """The same, and state of method and optimizer, counters, random draws."""
    engine = adapted.engine
    net = engine.net
    optimizer = None if net.optimizer is None else [list(net.optimizer.state.values()), net.optimizer.param_groups]
    plain = (torch.Tensor, bool, int, float, str, type(None))
    own = {name: value for name, value in vars(engine.method).items() if isinstance(value, plain)}
    norms = [norm.mode for norm in net.norms]
    counts = [net.forwards, net.backwards, net.last, norms, torch.get_rng_state()]
    return leaves([module_state(net.module), optimizer, own, counts, adapted.state_dict()])


def difference(ours, theirs):
    return [path for path in ours.keys() | theirs.keys() if ours.get(path) != theirs.get(path)]


def interrupt(adapted, batch, fault, kind, count, state, before):
    """Break a batch off each time that it comes to each place, and check the state afterwards."""
    for place in PLACES:
        for k in range(1, count[place] + 1):
            fault.arm(place, k, kind)
            with pytest.raises(kind, match="broken off"):
                adapted(batch)
            fault.arm()
            assert difference(state(), before) == [], f"{place} {k}"


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_later_batch(method, kind, fault, batches):
    whole, broken, twin = (method().wrap(Net(fault)) for _ in range(3))
    for batch in batches[:2]:
        assert torch.equal(whole(batch), broken(batch))
    twin.load_state_dict(whole.state_dict())
    fault.arm()
    twin(batches[2])
    count, state = fault.seen, partial(everything, broken)
    assert count["forward"]
    assert bool(twin.engine.net.parameters) == bool(count["backward"]) == bool(count["optimizer"])
    interrupt(broken, batches[2], fault, kind, count, state, state())
    whole.engine.announce(), broken.engine.announce()  # now a reset is due
    interrupt(broken, batches[2], fault, kind, count, state, state())
    for batch in batches[3:]:
        assert torch.equal(whole(batch), broken(batch))
    assert difference(everything(whole), everything(broken)) == []


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_the_first_batch(method, kind, fault, batches):
    net = Net(fault)
    before = module_state(net)
    whole, broken = method().wrap(Net(fault)), method().wrap(net)
    fault.arm()
    expected = whole(batches[1])
    interrupt(broken, batches[0], fault, kind, fault.seen, partial(module_state, net), before)
    assert torch.equal(broken(batches[1]), expected)
    assert torch.equal(broken(batches[2]), whole(batches[2]))
    assert difference(everything(broken), everything(whole)) == []


def test_network_taken_over_by_another_method(fault, batches):
    net = Net(fault)
    first = Tent().wrap(net)
    fault.arm("forward", 1)
    with pytest.raises(RuntimeError, match="broken off"):
        first(batches[0])
    second, expected = PTBN().wrap(net), PTBN().wrap(Net(fault))(batches[0])
    with pytest.raises(RuntimeError, match="is being adapted already"):
        first(batches[0])
    first.release()
    assert torch.equal(second(batches[0]), expected)


def test_a_warning_that_is_an_error(fault, batches):
    net = Net(fault)
    before, adapted = module_state(net), Tent(lr=0.1).wrap(net)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="statistics of 3 images"):
            adapted(batches[0])
    assert difference(module_state(net), before) == []
    assert adapted.engine.batches == 0
    assert torch.equal(adapted(batches[1]), Tent(lr=0.1).wrap(Net(fault))(batches[1]))
