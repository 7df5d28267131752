"""Normalisation layers: found by type, moded per layer, whatever stands around them."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
import torchvision
from timm.layers import BatchNormAct2d
from torch import nn

from ttalight.models import NormLayer, find_norms
from ttalight.models.batch_statistics import moments, normalize_by_batch
from ttalight.models.norm import exact_statistics


@pytest.mark.parametrize(
    ("make", "kind", "count"),
    [
        (lambda: torchvision.models.resnet50(), nn.BatchNorm2d, 53),  # those of the downsampling paths included
        (lambda: timm.create_model("resnet50"), nn.BatchNorm2d, 53),
        (lambda: timm.create_model("tf_efficientnet_lite0"), BatchNormAct2d, 49),
        (lambda: torchvision.models.vit_b_16(), nn.LayerNorm, 25),
        (lambda: timm.create_model("vit_base_patch16_224"), nn.LayerNorm, 25),
        (lambda: timm.create_model("resnet50_gn"), nn.GroupNorm, 53),
    ],
)
def test_every_layer_is_found(make, kind, count):
    with torch.device("meta"):
        norms = find_norms(make())
    assert len(norms) == count
    assert all(isinstance(norm.module, kind) for norm in norms)


@pytest.fixture
def x():
    return torch.randn(6, 4, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def layer(module: nn.Module) -> tuple[nn.Module, NormLayer]:
    module = module.double().eval()
    norm = NormLayer("norm", module)
    norm.attach()
    return module, norm


@pytest.mark.parametrize("make", [nn.BatchNorm2d, BatchNormAct2d, nn.SyncBatchNorm])
def test_modes_equal_the_layers_own(make, x):
    if make is nn.SyncBatchNorm and not torch.cuda.is_available():
        reference = nn.BatchNorm2d(4).double()  # the layer itself refuses input on the CPU in train mode
    else:
        reference = make(4).double()
    nn.init.normal_(reference.weight)
    nn.init.normal_(reference.bias)
    reference.running_mean.normal_()
    module = make(4).double()
    module.load_state_dict(reference.state_dict())
    module, norm = layer(module)
    source = copy.deepcopy(reference).eval()(x)
    batch = copy.deepcopy(reference).train()(x)
    assert torch.equal(module(x), source)
    norm.mode = "batch"
    before = module.running_mean.clone()
    torch.testing.assert_close(module(x), batch, rtol=1e-12, atol=1e-12)
    assert torch.equal(module.running_mean, before)
    norm.mode = "ema"
    torch.testing.assert_close(module(x), batch, rtol=1e-12, atol=1e-12)
    reference.train()(x)
    torch.testing.assert_close(module.running_mean, reference.running_mean)
    torch.testing.assert_close(module.running_var, reference.running_var)
    norm.detach()
    assert "forward" not in vars(module)


@pytest.mark.parametrize("shape", [(6, 4, 5, 5), (1, 4, 5, 5), (6, 4)])
@pytest.mark.parametrize(
    ("mode", "setting"), [("alpha", 0.0), ("alpha", 0.3), ("alpha", 1.0), ("prior", 0.0), ("prior", 5.0)]
)
def test_mixed_statistics(mode, setting, shape):
    draw = torch.Generator().manual_seed(0)
    module, norm = layer(nn.BatchNorm2d(4) if len(shape) == 4 else nn.BatchNorm1d(4))
    for value in (module.weight.data, module.bias.data, module.running_mean):
        value.copy_(torch.randn(4, generator=draw))
    module.running_var.copy_(torch.rand(4, generator=draw) + 0.5)
    before = [value.clone() for value in norm.statistics]
    x = torch.randn(shape, generator=draw, dtype=torch.float64).requires_grad_()
    share = setting if mode == "alpha" else len(x) / (len(x) + setting)
    norm.mode = mode
    setattr(norm, mode, setting)
    expected = torch.empty_like(x)
    slopes = torch.empty(4, dtype=torch.float64)
    for channel in range(4):
        values = x.detach()[:, channel].flatten().tolist()
        mean = sum(values) / len(values)
        var = sum((value - mean) ** 2 for value in values) / len(values)
        mean = (1 - share) * module.running_mean[channel] + share * mean
        var = (1 - share) * module.running_var[channel] + share * var
        slopes[channel] = module.weight[channel] / (var + module.eps).sqrt()
        expected[:, channel] = (x[:, channel] - mean) * slopes[channel] + module.bias[channel]
    out = module(x)
    torch.testing.assert_close(out, expected)
    assert all(map(torch.equal, before, norm.statistics))
    (gradient,) = torch.autograd.grad(out.sum(), x)  # the statistics are constants
    torch.testing.assert_close(gradient, slopes.view(-1, *[1] * (len(shape) - 2)).expand(shape))


@pytest.mark.parametrize("mode", ["alpha", "prior"])
def test_single_values_are_not_mixed_in(mode):
    module, norm = layer(nn.BatchNorm2d(4))
    x = torch.randn(1, 4, 1, 1, dtype=torch.float64)
    source = module(x)
    norm.mode, norm.alpha, norm.prior = mode, 1.0, 0.0
    assert torch.equal(module(x), source)


def test_a_fused_activation_is_kept(x):
    module, norm = layer(BatchNormAct2d(4))
    for mode in ("source", "batch", "ema"):
        norm.mode = mode
        assert module(x).min() == 0


def test_one_infinite_batch_leaves_batch_mode_unharmed(x):
    module, norm = layer(nn.BatchNorm2d(4))
    norm.mode = "batch"
    expected = module(x)
    module(x * float("inf"))
    assert torch.equal(module(x), expected)
    assert module.running_mean.isfinite().all()


def test_train_and_eval_change_nothing(x):
    module, norm = layer(nn.BatchNorm2d(4))
    for mode in ("source", "batch"):
        norm.mode = mode
        assert torch.equal(module.train()(x), module.eval()(x))


def test_layer_without_running_statistics_uses_batch(x):
    module, _ = layer(nn.BatchNorm2d(4, track_running_stats=False))
    torch.testing.assert_close(module(x).mean((0, 2, 3)), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="layer norm sees one value a channel and has no running statistics"):
        module(x[:1, :, :1, :1])


def test_a_forward_of_its_own_is_refused():
    class Odd(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + 1

    layer = NormLayer("stem", Odd(4))
    layer.mode = "source"  # which every method may ask for
    with pytest.raises(TypeError, match="layer stem is a Odd with a forward of its own, so its statistics cannot be"):
        layer.mode = "batch"


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: nn.LayerNorm(4), (6, 5, 4)),
        (lambda: timm.layers.LayerNorm(4), (6, 5, 4)),
        (lambda: nn.GroupNorm(2, 4), (6, 4, 5, 5)),
        (lambda: timm.layers.GroupNorm(4, 2), (6, 4, 5, 5)),
        (lambda: timm.layers.GroupNormAct(4, 2), (6, 4, 5, 5)),
        (lambda: nn.BatchNorm2d(4), (6, 4, 5, 5)),
        (lambda: BatchNormAct2d(4), (6, 4, 5, 5)),
    ],
)
@pytest.mark.parametrize("mode", ["source", "batch"])
def test_equal_replacement_changes_nothing(make, shape, mode):
    module, norm = layer(make())
    nn.init.normal_(module.weight)
    nn.init.normal_(module.bias)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    norm.mode = mode
    expected = module(x)
    channels = (-1, 1, 1) if len(shape) == 4 else (-1,)
    norm.replace(lambda x: norm.standardize(x) * module.weight.view(channels) + module.bias.view(channels))
    torch.testing.assert_close(module(x), expected)
    norm.replace(torch.zeros_like)
    assert not module(x).any()
    norm.detach()
    assert "forward" not in vars(module)


@pytest.mark.parametrize(
    "make",
    [
        lambda: timm.layers.LayerNorm2d(4),  # over dimension 1
        lambda: timm.layers.LayerNormAct2d(4),
        lambda: type("Scaled", (nn.LayerNorm,), {"forward": lambda self, x: 3 * nn.LayerNorm.forward(self, x)})(4),
        lambda: type("Conditional", (nn.LayerNorm,), {"forward": lambda self, x, condition: x})(4),
    ],
)
def test_layer_of_another_computation_is_refused(make):
    norm = NormLayer("blocks.3", make().eval())
    assert not norm.replaceable
    with pytest.raises(TypeError, match=r"layer blocks\.3 is a .* computes something else than torch\.nn's layer"):
        norm.replace(torch.zeros_like)


def test_layer_without_affine_can_be_replaced():
    assert NormLayer("norm", nn.LayerNorm((3, 4), elementwise_affine=False)).replaceable
    assert NormLayer("norm", nn.GroupNorm(2, 4, affine=False)).replaceable


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("offset", [0.0, 300.0])
def test_moments_are_exact_where_the_mean_is_large(layout, offset):
    """The difference of mean square and squared mean would have lost the variance there."""
    x = (
        torch.randn(64, 5, 12, 12, generator=torch.Generator().manual_seed(0))
        .add(offset)
        .contiguous(memory_format=layout)
    )
    for dimensions in ([0, 2, 3], [2, 3]):
        mean, var = moments(x, dimensions)
        exact_var, exact_mean = torch.var_mean(x.double(), dimensions, correction=0)
        assert mean.shape == var.shape == exact_mean.shape
        torch.testing.assert_close(mean.double(), exact_mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(var.double(), exact_var, rtol=1e-5, atol=0)


def test_moments_of_vectors():
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, var = moments(x, [0])
    torch.testing.assert_close((mean, var), (x.mean(0), x.var(0, correction=0)))


@pytest.mark.parametrize(
    ("affine", "wanted"), [(True, "all"), (True, "affine"), (True, "input"), (False, "all"), (False, "input")]
)
def test_normalize_by_batch_equals_batch_norm(affine, wanted):
    draws = torch.Generator().manual_seed(0)
    x, target = torch.randn(2, 6, 3, 5, 4, generator=draws, dtype=torch.float64) * 2 + 1
    weight, bias = torch.randn(2, 3, generator=draws, dtype=torch.float64)
    results = []
    for normalize in (
        lambda *a: normalize_by_batch(*a, 1e-3),
        lambda *a: torch.batch_norm(*a, None, None, True, 0.0, 1e-3, False),
    ):
        own = [value.clone() for value in (x, weight, bias)]
        for value in own[:1] if wanted == "input" else own[1:] if wanted == "affine" else own:
            value.requires_grad_(True)
        y = normalize(own[0], *(own[1:] if affine else (None, None)))
        (y * target).sum().backward()
        results.append([y.detach(), *(value.grad for value in own)])
    for ours, theirs in zip(*results, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


def test_exact_statistics_equal_in_channels_last():
    x = torch.randn(200, 8, 32, 32, generator=torch.Generator().manual_seed(0)) + 100
    layer = NormLayer("norm", nn.BatchNorm2d(8).eval())
    layer.attach()
    layer.mode = "batch"
    exact = nn.functional.batch_norm(x.double(), None, None, training=True)
    last = x.contiguous(memory_format=torch.channels_last)
    coarse = (layer.module(last) - exact).abs().max()
    with exact_statistics([layer]):
        fine = (layer.module(last) - exact).abs().max()
    assert fine < 1e-4
    assert fine < coarse / 2
    assert not layer.exact
