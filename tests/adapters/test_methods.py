"""The methods of the first set against closed forms, each other and a slow reference."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from torch import nn

from ttalight.adapters import EMABN, ETA, NCTTA, PTBN, RPL, SAR, SHOT, DeYO, MoETTA, Source, Tent, Term
from ttalight.losses import entropy


def train_mode_logits(net, images):
    """Logits under batch statistics, by PyTorch's own train mode with drop-out off."""
    net = copy.deepcopy(net).train()
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    return net(images)


@pytest.mark.parametrize(
    "method", [PTBN, lambda: Tent(lr=0.0), lambda: ETA(lr=0.0, margin=1.0), lambda: SAR(lr=0.0, margin=1.0)]
)
def test_batch_statistics_after_a_call_of_eval(net, images, method):
    expected = train_mode_logits(net, images)
    adapted = method().wrap(net.train())
    for called in (adapted.module.eval, adapted.module.train, adapted.module.eval):
        called()
        torch.testing.assert_close(adapted(images), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("classes", [4, 10, 200])
@pytest.mark.parametrize(
    "method",
    [
        lambda margin: ETA(margin=margin, lr=0.0),
        lambda margin: SAR(margin=margin, rho=0.0, lr=0.0),
        lambda margin: DeYO(margin=margin, threshold=-1.0, lr=0.0),
    ],
    ids=["ETA", "SAR", "DeYO"],
)
def test_the_margin_follows_the_number_of_classes(make_net, images, method, classes):
    images = images * torch.linspace(0.1, 3, 6, dtype=images.dtype).view(-1, 1, 1, 1)
    net = make_net(classes=classes)
    values = (entropy(train_mode_logits(net, images)) / math.log(classes)).sort().values
    adapted = method(values[2:4].mean().item()).wrap(net)
    adapted(images)
    assert adapted.engine.last["selected"] == pytest.approx(3 / 6)


@pytest.mark.parametrize(
    "method",
    [
        RPL,
        partial(ETA, margin=1.0, redundancy=1.0),
        partial(SAR, margin=1.0),
        partial(NCTTA, margin=1.0),
        MoETTA,
        SHOT,
    ],
)
def test_steps_equal_repeated_batches(make_net, images, method):
    single, before, after = (
        method(lr=0.02, reset="never", **arguments).wrap(make_net())
        for arguments in ({}, {"steps": 3}, {"steps": 3, "prediction": "after"})
    )
    expected = [single(images) for _ in range(3)]
    assert torch.equal(before(images), expected[-1])  # the forward that the last step was made from
    tensors = [adapted.state_dict()["tensors"] for adapted in (single, before)]
    assert all(torch.equal(value, tensors[1][name]) for name, value in tensors[0].items())
    assert torch.equal(after(images), single(images))
    assert not torch.equal(expected[0], expected[-1])
    assert (before.engine.updates, after.engine.net.forwards - before.engine.net.forwards) == (3, 1)


class TestSource:
    def test_is_the_source_model_bit_for_bit(self, network, images, logits_in):
        expected = logits_in(network(images))
        assert torch.equal(logits_in(Source().wrap(network)(images)), expected)


class TestPTBN:
    def test_equals_train_mode(self, batch_norm_network, images, logits_in):
        expected = logits_in(train_mode_logits(batch_norm_network, images))
        adapted = PTBN().wrap(batch_norm_network)
        for _ in range(2):  # nothing carries over
            torch.testing.assert_close(logits_in(adapted(images)), expected, rtol=1e-10, atol=1e-10)

    def test_refuses_a_network_without_batch_norm(self, images):
        net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)).double()
        with pytest.raises(ValueError, match="Sequential has no BatchNorm layer"):
            PTBN().wrap(net)(images)


class TestEMABN:
    @pytest.mark.parametrize("steps", [1, 3])
    def test_moves_statistics_as_training_does(self, net, images, steps):
        expected = copy.deepcopy(net)
        for _ in range(steps):
            for module in expected.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.train()
            expected(images)
        adapted = EMABN(steps=steps).wrap(net)
        torch.testing.assert_close(adapted(images), expected.eval()(images), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(net[1].running_var, expected[1].running_var)

    def test_no_steps_is_the_source_model_bit_for_bit(self, batch_norm_network, images, logits_in):
        expected = logits_in(batch_norm_network(images))
        assert torch.equal(logits_in(EMABN(steps=0).wrap(batch_norm_network)(images)), expected)

    def test_many_steps_reach_the_batch_statistics(self, net, images):
        adapted = EMABN(steps=400).wrap(net)
        adapted(images)
        features = net[0](images)
        torch.testing.assert_close(net[1].running_mean, features.mean((0, 2, 3)), rtol=1e-6, atol=1e-8)

    def test_counts_its_forwards(self, net, images):
        adapted = EMABN(steps=4).wrap(net)
        adapted(images)
        assert (adapted.engine.net.forwards, adapted.engine.backwards) == (5, 0)


class TestTent:
    def test_zero_rate_is_ptbn_or_source(self, network, images, logits_in):
        has_batch_norm = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules())
        expected = logits_in(train_mode_logits(network, images) if has_batch_norm else network(images))
        adapted = Tent(lr=0.0).wrap(network)
        for _ in range(2):
            torch.testing.assert_close(logits_in(adapted(images)), expected, rtol=1e-9, atol=1e-9)

    def test_refuses_a_network_without_norm(self, images):
        net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 4)).double()
        with pytest.raises(ValueError, match="has no BatchNorm, GroupNorm or LayerNorm with weight and bias"):
            Tent().wrap(net)(images)

    def test_takes_a_term(self, net, images):
        class Confidence(Term):
            def __call__(self, outputs, head, selected):
                torch.testing.assert_close(
                    outputs.logits, outputs.features @ head.weight.T + head.bias, rtol=1e-12, atol=1e-12
                )
                return outputs.logits.amax(1)

        plain, termed = Tent().wrap(copy.deepcopy(net)), Tent(terms=[Confidence(0.5)]).wrap(net)
        logits = plain(images)
        assert torch.equal(termed(images), logits)
        expected = plain.engine.last["loss"] + 0.5 * logits.amax(1).mean().item()
        assert termed.engine.last["loss"] == pytest.approx(expected)

    def test_warns_on_many_classes_with_cifar_settings(self, make_net, images):
        with pytest.warns(UserWarning, match=r"Tent runs with its settings for CIFAR on 200 classes.*2\.5e-4|0\.00025"):
            Tent().wrap(make_net(classes=200))(images)

    def test_warns_where_none_are_published_for_so_many(self, make_net, images):
        with pytest.warns(
            UserWarning, match="SHOT runs with its settings for CIFAR on 200 classes. For ImageNet none are"
        ):
            SHOT().wrap(make_net(classes=200))(images)

    @pytest.mark.filterwarnings("error")
    def test_does_not_warn_when_told_a_rate(self, make_net, images):
        assert Tent(lr=1e-4).wrap(make_net(classes=200))(images.repeat(2, 1, 1, 1)).shape == (12, 200)
