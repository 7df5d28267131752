"""Instance-aware batch normalisation: against a loop over its formulas, and as adapters see it."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import timm
import torch
from support.networks import small_net
from torch import nn

from ttalight.adapters import EMABN, FIND, LAME, NOTE, PTBN, T3A, RoTTA, Source, Tent
from ttalight.distributed.batch_norm_sync import BatchNormSync
from ttalight.models.instance_aware import InstanceAwareBatchNorm, with_instance_aware_norm

pytestmark = pytest.mark.filterwarnings("ignore:.*statistics of")
K, SHARE = 1.5, 0.1


def shrunk(value, limit):
    return torch.sign(value) * torch.relu(value.abs() - limit)


def by_loop(layer, x, means, variances):
    """Normalise by given statistics, corrected by those of each image, one channel at a time."""
    pixels, rows = x[0, 0].numel(), []
    for image in x:
        channels = []
        for channel, mean, var, weight, bias in zip(image, means, variances, layer.weight, layer.bias, strict=True):
            error, spread = ((var + layer.eps) / pixels).sqrt(), (var + layer.eps) * math.sqrt(2 / (pixels - 1))
            own = mean + shrunk(channel.mean() - mean, K * error)
            around = var + shrunk(channel.var(unbiased=True) - var, K * spread)
            channels.append((channel - own) / (torch.relu(around) + layer.eps).sqrt() * weight + bias)
        rows.append(torch.stack(channels))
    return torch.stack(rows)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    made = InstanceAwareBatchNorm(3, k=K).double()
    nn.init.uniform_(made.weight, 0.5, 1.5)
    nn.init.normal_(made.bias)
    made.running_mean.normal_()
    made.running_var.uniform_(0.5, 2)
    return made


@pytest.fixture
def x():
    generator = torch.Generator().manual_seed(1)
    scales = torch.tensor([0.2, 1.0, 3.0, 1.0], dtype=torch.float64).view(4, 1, 1, 1)
    return scales * torch.randn(4, 3, 5, 6, generator=generator, dtype=torch.float64) + scales


def test_training_against_a_loop(layer, x):
    plain, images, others = nn.BatchNorm2d(3).double(), x.requires_grad_(), x.detach().clone().requires_grad_()
    plain.load_state_dict(layer.state_dict())
    factor = torch.randn(x.shape, dtype=torch.float64)
    made = layer(images)
    expected = by_loop(layer, others, others.mean((0, 2, 3)), others.var((0, 2, 3), unbiased=True))
    torch.testing.assert_close(made, expected)
    gradients = [torch.autograd.grad((out * factor).sum(), [leaf, *layer.parameters()])
                 for out, leaf in ((made, images), (expected, others))]  # fmt: skip
    for own, other in zip(*gradients, strict=True):
        torch.testing.assert_close(own, other)
    plain(x)
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(layer.state_dict()[name], value)


def test_evaluation_against_a_loop(layer, x):
    before = copy.deepcopy(layer.state_dict())
    made = layer.eval()(x)
    torch.testing.assert_close(made, by_loop(layer, x, layer.running_mean, layer.running_var))
    torch.testing.assert_close(layer(x[:1]), made[:1])
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_ends_at_statistics_of_all_and_of_each_image(layer, x):
    plain = nn.BatchNorm2d(3).double().eval()
    plain.load_state_dict(layer.state_dict())
    layer.eval().k = 1e9
    torch.testing.assert_close(layer(x), plain(x))
    layer.k = 0.0
    var, mean = torch.var_mean(x, (2, 3), keepdim=True, correction=1)
    shape = (3, 1, 1)
    expected = (x - mean) / (var + layer.eps).sqrt() * layer.weight.view(shape) + layer.bias.view(shape)
    torch.testing.assert_close(layer(x), expected)


def test_vectors_are_normalised_as_by_batch_norm(layer, x):
    plain = nn.BatchNorm1d(3).double()
    plain.load_state_dict(layer.state_dict())
    vectors = x.mean((2, 3))
    with pytest.raises(ValueError, match="more than one value a channel"):
        layer(vectors[:1])
    var = vectors.var(0, unbiased=True)
    scale = ((var * 3 / 4 + plain.eps) / (var + plain.eps)).sqrt()  # the unbiased variance in the place of the biased
    torch.testing.assert_close(layer(vectors) - layer.bias, (plain(vectors) - plain.bias) * scale)
    torch.testing.assert_close(layer.eval()(vectors[:1]), plain.eval()(vectors[:1]))


def test_momentum_none_averages(x):
    layer = InstanceAwareBatchNorm(3, momentum=None).double()
    plain = nn.BatchNorm2d(3, momentum=None).double()
    for batch in (x, 2 * x, x + 1):
        layer(batch), plain(batch)
    torch.testing.assert_close(layer.running_var, plain.running_var)


def test_half_precision_is_computed_in_full(layer, x):
    layer = layer.float().eval()
    with torch.autocast("cpu", torch.bfloat16):
        made = layer(x.bfloat16())
    assert made.dtype == torch.bfloat16
    assert torch.equal(made, layer(x.bfloat16().float()).bfloat16())


def test_layers_of_a_network_become_instance_aware():
    net = small_net()
    plain = copy.deepcopy(net)
    assert with_instance_aware_norm(net) is net
    assert list(net.state_dict()) == list(plain.state_dict())
    net.load_state_dict(plain.state_dict())
    plain.load_state_dict(net.state_dict())
    kinds = [type(module).__name__ for module in pickle.loads(pickle.dumps(net)) if "Norm" in type(module).__name__]
    assert kinds == ["InstanceAwareBatchNorm"] * 2
    assert "k=4" in repr(net)


def test_activations_of_fused_layers_stay():
    net = timm.create_model("tf_efficientnet_lite0", num_classes=4).eval()
    plain = copy.deepcopy(net)
    with_instance_aware_norm(net)
    for module in net.modules():
        if isinstance(module, InstanceAwareBatchNorm):
            module.k = 1e9
    images = torch.rand(2, 3, 32, 32)
    torch.testing.assert_close(net(images), plain(images), rtol=1e-4, atol=1e-4)


def test_networks_that_cannot_be():
    class Own(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    with pytest.raises(ValueError, match=r"has no BatchNorm layer .* norm: batch"):
        with_instance_aware_norm(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="layer 0 is a Own with a forward of its own"):
        with_instance_aware_norm(nn.Sequential(Own(2)))
    with pytest.raises(ValueError, match="k must be at least 0, got -1"):
        InstanceAwareBatchNorm(3, k=-1.0)


class TestAdapters:
    @pytest.fixture
    def net(self):
        return with_instance_aware_norm(small_net())

    @pytest.fixture
    def images(self):
        return torch.rand(8, 3, 12, 12, generator=torch.Generator().manual_seed(2), dtype=torch.float64) * 3

    def test_note_corrects_statistics_once(self, net, images):
        expected = NOTE(memory=4).wrap(small_net())
        with torch.no_grad():
            own = net(images)
        adapted = NOTE(memory=4).wrap(net)
        torch.testing.assert_close(adapted(images, adapt=False), own)
        for batch in (images, images.flip(0) * 0.5, images + 0.3):
            assert torch.equal(adapted(batch), expected(batch))
        torch.testing.assert_close(adapted.export()(images), adapted(images, adapt=False))
        for name, value in adapted.module.state_dict().items():
            assert torch.equal(value, expected.module.state_dict()[name])
        assert type(adapted.release()[1]) is InstanceAwareBatchNorm
        with torch.no_grad():
            assert torch.equal(net(images), own)

    def test_note_predicts_bad_batches_by_the_source(self, net, images):
        adapted = NOTE(memory=4, k=0.0, on_bad_batch="source").wrap(net)
        adapted(images)
        broken, repaired = images.clone(), images.clone()
        broken[0, 0, 0, 0], repaired[0, 0, 0, 0] = torch.nan, 0.0
        with torch.no_grad():
            expected = with_instance_aware_norm(small_net())(repaired)
        with pytest.warns(UserWarning, match="predicted with the source model"):
            torch.testing.assert_close(adapted(broken), expected)

    @pytest.mark.parametrize("adapter", [Source(), LAME(), T3A(supports=3)])
    def test_methods_that_leave_statistics_alone_work(self, net, images, adapter):
        before = copy.deepcopy(net.state_dict())
        with torch.no_grad():
            own = net(images)
        adapted = adapter.wrap(net)
        made = adapted(images)
        if isinstance(adapter, Source):
            assert torch.equal(made, own)
            assert torch.equal(adapted.export()(images), own)
        adapted.release()
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())

    @pytest.mark.parametrize("adapter", [PTBN(), EMABN(), Tent(), FIND(), RoTTA()])
    def test_methods_that_choose_statistics_are_errors(self, net, images, adapter):
        with pytest.raises(TypeError, match=r"layer 1 is a InstanceAwareBatchNorm (with|that)"):
            adapter.wrap(net)(images)

    def test_note_needs_the_layers_own_forward(self, net):
        net[1].forward = lambda x: x
        with pytest.raises(TypeError, match="carries a forward of its own"):
            NOTE().wrap(net)

    def test_processes_do_not_share_statistics(self, net):
        BatchNormSync().apply(net)
        assert "forward" not in vars(net[1])
