"""Networks as people build and change them: each adapts like the plain one, or is refused by name at once."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint
from torchvision.ops import FrozenBatchNorm2d

from ttalight import adapters
from ttalight.adapters import EATA, EMABN, FIND, LAME, NCTTA, PTBN, SHOT, T3A, TIPI, AlphaBN, MoETTA, Source, Tent

pytestmark = pytest.mark.filterwarnings("ignore:.*statistics of", "ignore:.*source", "ignore:None of the inputs")
METHODS = {"PTBN": PTBN, "AlphaBN": AlphaBN, "EMABN": EMABN, "Tent": functools.partial(Tent, lr=0.1), "TIPI": TIPI}


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


@pytest.fixture
def batches(images):
    return [images, images.flip(0) * 0.5]


class Around(nn.Module):
    """Calls the parts of a network in its own way."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def features(self, x):
        return self.net[:9](x)

    def forward(self, x):
        return self.net[9](self.features(x))


def norms_of(net):
    return [module for module in net.modules() if isinstance(module, nn.BatchNorm2d)]


def with_partial(net):
    for norm in norms_of(net):
        norm.forward = functools.partial(type(norm).forward, norm)
    return net


def with_method_of_another(net):
    class Profiler:
        def __init__(self, module):
            self.own = module.forward

        def run(self, *args, **kwargs):
            return self.own(*args, **kwargs)

    for norm in norms_of(net):
        norm.forward = Profiler(norm).run
    return net


def old_forward(module, *args, **kwargs):
    return module._old_forward(*args, **kwargs)


def with_offloading_hooks(net):
    for module in net.modules():
        module._old_forward = module.forward
        module.forward = functools.update_wrapper(functools.partial(old_forward, module), module._old_forward)
    return net


def with_direct_calls(net):
    class Direct(Around):
        def forward(self, x):
            for layer in self.net:
                x = layer.forward(x)
            return x

    return Direct(net)


def with_keywords(net):
    class Keywords(Around):
        def forward(self, x):
            for layer in self.net:
                x = layer(input=x)
            return x

    return Keywords(net)


def with_hooks(net):
    for norm in norms_of(net):
        norm.register_forward_pre_hook(lambda module, args, kwargs: (args, kwargs), with_kwargs=True)
        norm.register_full_backward_hook(lambda *args: None)
    net[2], net[5] = nn.ReLU(), nn.ReLU()
    return net


def with_reentrant_checkpoint(net):
    class Reentrant(Around):
        def forward(self, x):
            return self.net[3:](checkpoint(self.net[:3], x.requires_grad_(), use_reentrant=True))

    return Reentrant(net)


def with_switches(net):
    class Switches(Around):
        def forward(self, x):
            self.net[:6].train()
            self.requires_grad_(True)
            return super().forward(x)

    return Switches(net)


def with_input_in_place(net):
    class InPlace(Around):
        def forward(self, x):
            return super().forward(x.mul_(2)) / 1

    net[0].weight.data /= 2
    return InPlace(net)


def with_data_in_place(net):
    class InPlace(Around):
        def forward(self, x):
            x.data.mul_(2)
            return super().forward(x)

    net[0].weight.data /= 2
    return InPlace(net)


SAME = [
    with_partial, with_method_of_another, with_offloading_hooks, with_direct_calls, with_keywords, with_hooks,
    with_reentrant_checkpoint, with_switches, with_input_in_place, with_data_in_place, torch.fx.symbolic_trace,
    nn.SyncBatchNorm.convert_sync_batchnorm, lambda net: with_direct_calls(with_partial(net)),
]  # fmt: skip


@pytest.mark.parametrize("change", SAME, ids=[*(change.__name__ for change in SAME[:-1]), "direct_calls_of_partial"])
def test_it_adapts_like_the_plain_network(change, method, make_net, batches):
    plain, changed = method(seed=0).wrap(make_net(dropout=0)), method(seed=0).wrap(net := change(make_net(dropout=0)))
    for batch in batches:
        torch.testing.assert_close(changed(batch), plain(batch), rtol=1e-9, atol=1e-9)
    changed.release()
    torch.testing.assert_close(net(batches[0].clone()), change(make_net(dropout=0))(batches[0].clone()))


def test_reparametrised_affines_adapt(net, images):
    parametrizations.weight_norm(net[1], dim=None)
    adapted = Tent(lr=0.1).wrap(net)
    before = net[1].weight.detach().clone()
    adapted(images)
    assert not torch.equal(net[1].weight, before)
    assert len(adapted.engine.net.parameters) == 5


def test_hooks_of_the_network_itself_take_part(net, images):
    net.register_forward_pre_hook(lambda module, args: ((args[0] - 0.5) / 0.25,))
    net.register_forward_hook(lambda module, args, output: output / 0.1)
    assert torch.equal(net(images), Source().wrap(net)(images))


def test_images_and_more_by_keyword(net, images):
    class Model(Around):
        def forward(self, pixel_values=None, mask=None, scale=1.0):
            return super().forward(pixel_values * mask) * scale

    mask = torch.ones(6, 1, 1, 1, dtype=torch.float64)
    expected = 2 * PTBN().wrap(copy.deepcopy(net))(images)
    adapted = PTBN().wrap(Model(net))
    assert torch.equal(adapted(pixel_values=images, mask=mask, scale=2.0), expected)
    with pytest.raises(TypeError, match=r"images must be a tensor of shape .* got NoneType"):
        adapted(scale=2.0)


# -- what is refused, when it is wrapped


class Ghost(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x)


class Bare(nn.Module):
    """Has no layer that could be a classifier."""

    def __init__(self):
        super().__init__()
        self.norm, self.weight = nn.BatchNorm2d(3), nn.Parameter(torch.ones(3, 4))

    def forward(self, x):
        return self.norm(x).mean((2, 3)) @ self.weight


def scripted_part(make_net):
    net = make_net()
    net[1] = torch.jit.script(net[1])
    return net


def on_meta(make_net):
    net = make_net()
    net[4].to("meta")
    return net


def lazy(make_net):
    return make_net(lambda channels: nn.LazyBatchNorm2d(dtype=torch.float64))


def frozen(make_net):
    return make_net(FrozenBatchNorm2d)


def no_statistics(make_net):
    return nn.Sequential(nn.BatchNorm2d(3, track_running_stats=False), nn.Flatten(), nn.Linear(3 * 32 * 32, 4))


REFUSED = [
    (PTBN(), scripted_part, TypeError, "layer 1 is a RecursiveScriptModule of TorchScript, which cannot be reached"),
    (Tent(), lambda make: torch.jit.script(make()), TypeError, "layer 1 is a .* of TorchScript"),
    (T3A(), lambda make: torch.jit.script(make()), ValueError, "no Linear layer and no 1x1 convolution outside Torch"),
    (FIND(), lambda make: with_partial(make()), TypeError, "layer 1 .* carries a forward of its own"),
    (MoETTA(), lambda make: with_partial(make()), TypeError, "layer 1 .* carries a forward of its own"),
    (Tent(), lambda make: make(Ghost), TypeError, "layer 1 is a Ghost with a forward of its own"),
    (T3A(norm="batch"), lambda make: make(Ghost), TypeError, "layer 1 is a Ghost with a forward of its own"),
    (Source(), on_meta, ValueError, "4.weight of Sequential is on the meta device"),
    (Source(), lazy, ValueError, "1.weight of Sequential has no shape yet: pass a batch through the network"),
    (Tent(), frozen, ValueError, "Sequential has no BatchNorm, GroupNorm or LayerNorm with weight and bias"),
    (MoETTA(), frozen, ValueError, "Sequential has no normalisation layer of torch.nn"),
    (FIND(), no_statistics, ValueError, "layer 0 has no running statistics"),
    (FIND(layers=[5]), lambda make: make(), ValueError, "positions .5., and the network has BatchNorm layers 0 to 1"),
    (NCTTA(), lambda make: Bare(), ValueError, "Bare has no Linear layer"),
    (Tent(terms=[adapters.STAG()]), lambda make: Bare(), ValueError, "Bare has no Linear layer"),
    (Tent(), lambda make: make().bfloat16(), TypeError, "are torch.bfloat16, .* network.float"),
    (SHOT(), lambda make: make().half(), TypeError, "are torch.float16, .* network.float"),
    (MoETTA(), lambda make: make().half(), TypeError, "are torch.float16, .* network.float"),
]


@pytest.mark.parametrize(("adapter", "make", "error", "message"), REFUSED)
def test_what_cannot_be_adapted_is_refused_by_name(adapter, make, error, message, make_net):
    with pytest.raises(error, match=message) as caught:
        copy.deepcopy(adapter).wrap(make(make_net))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", [Source, T3A, LAME])
def test_methods_without_statistics_take_any_layer(method, make_net, images):
    assert torch.equal(method().wrap(make_net(Ghost))(images), method().wrap(make_net())(images))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", [PTBN, AlphaBN, EMABN, FIND, T3A, Source])
def test_methods_without_steps_take_16_bits(method, dtype, make_net, images):
    expected = method().wrap(make_net().float())(images.float())
    logits = method().wrap(make_net().to(dtype))(images.to(dtype))
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("method", [Tent, TIPI, EATA])
def test_a_forward_without_gradients_is_named(method, net, images):
    class Frozen(Around):
        def forward(self, x):
            self.requires_grad_(False)
            return super().forward(x.detach())

    with pytest.raises(RuntimeError, match="does the model's forward run under no_grad, freeze its parameters"):
        method().wrap(Frozen(net))(images)


@pytest.mark.parametrize("select", [lambda z: z[:, :1], lambda z: z[:, 0]], ids=["(B, 1)", "(B,)"])
def test_one_logit_is_refused(select, net, images):
    class One(Around):
        def forward(self, x):
            return select(super().forward(x))

    with pytest.raises(ValueError, match=r"one logit for each image, shape .*: let the model return torch\.cat"):
        Tent().wrap(One(net))(images)


def test_one_image_without_a_batch(net, images):
    with pytest.raises(ValueError, match=r"expected images \(B, C, H, W\), got one of shape .*: add a dimension"):
        Tent().wrap(net)(images[0])
