"""SAR: the perturbation, both filters, terms in both passes, and recovery from collapse."""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from torch import nn

from ttalight.adapters import PTBN, SAR, DeYO, Term
from ttalight.adapters.methods.sar import sam_perturbation
from ttalight.losses import entropy


@pytest.fixture
def sharp_net(make_net):
    """A network whose entropies are low for large inputs and high for small ones (no BatchNorm to even that out)."""

    def make():
        net = make_net(lambda channels: nn.GroupNorm(2, channels, eps=1.0))
        with torch.no_grad():
            net[9].weight *= 20
        return net

    return make


@pytest.fixture
def sure(images):
    return images * 4


@pytest.fixture
def unsure(images):
    return images * 0.05


def mean_of(adapted):
    return adapted.engine.capture()["tensors"]["method.mean_entropy"].item()


def test_a_network_that_is_its_last_block_is_named(images):
    blocks = [nn.Sequential(*(nn.BatchNorm2d(3, affine=number == 3) for _ in range(2))) for number in range(4)]
    net = nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 4))
    with pytest.raises(ValueError, match=r"all normalisation layers of Sequential .* last block.*parameters='norm'"):
        SAR().wrap(net.double())(images)


class TestClimb:
    def test_goes_so_far_along_the_gradient(self):
        parameters = [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in (3, (2, 2), 1)]
        for parameter in parameters[:2]:
            parameter.grad = torch.randn_like(parameter)
        moves = [new - old.data for new, old in zip(sam_perturbation(parameters, 0.05), parameters, strict=True)]
        assert sum(move.square().sum() for move in moves).sqrt().item() == pytest.approx(0.05)
        ratio = moves[0] / parameters[0].grad
        torch.testing.assert_close(moves[1], ratio[0] * parameters[1].grad)
        assert ratio[0] > 0
        assert moves[2] == 0  # it has no gradient

    def test_stays_where_there_is_no_slope(self):
        parameter = nn.Parameter(torch.ones(3))
        parameter.grad = torch.zeros(3)
        assert torch.equal(sam_perturbation([parameter], 0.05)[0], torch.ones(3))


class TestFilters:
    def test_no_perturbation_and_no_rate_is_ptbn(self, make_net, images):
        adapted, still = SAR(rho=0.0, lr=0.0, margin=1.0).wrap(make_net()), PTBN().wrap(make_net())
        for batch in (images, images[:1]):
            assert torch.equal(adapted(batch), still(batch))

    def test_second_filter_is_within_the_first(self, make_net, images):
        net = make_net()
        entropies = entropy(PTBN().wrap(copy.deepcopy(net))(images)) / math.log(4)
        margin = entropies.sort().values[3:5].mean().item()  # four samples below
        kept = []
        for rho in (0.0, 0.5, 1.0, 2.0, 4.0):
            adapted = SAR(margin=margin, rho=rho, parameters="norm").wrap(copy.deepcopy(net))
            adapted(images)
            kept.append(round(adapted.engine.last["selected"] * 6))
        assert kept[0] == 4
        assert max(kept) == 4  # never one that the first filter had dropped
        assert min(kept) < 4

    @pytest.mark.parametrize("spoilt", [False, True])
    def test_nothing_kept_changes_nothing(self, make_net, images, spoilt, breaks):
        net = breaks(make_net())
        adapted = SAR(margin=1.0 if spoilt else 1e-3, lr=0.1).wrap(net)
        before = [parameter.detach().clone() for parameter in net.parameters()]
        adapted(images + 1e6 if spoilt else images)
        assert (adapted.engine.updates, adapted.engine.skipped, adapted.engine.recoveries) == (0, 1, 0)
        assert all(map(torch.equal, before, net.parameters()))
        assert math.isnan(mean_of(adapted))

    def test_terms_count_in_both_passes(self, sharp_net, sure, unsure):
        seen = []

        class Largest(Term):
            def __call__(self, outputs, head, selected):
                seen.append((outputs.logits.detach(), selected))
                return outputs.logits.amax(1)

        images = torch.cat([sure, unsure])
        adapted = SAR(terms=[Largest(0.1)], rho=0.02, margin=0.5, parameters="norm").wrap(sharp_net())
        logits = adapted(images)
        (first, kept), (second, kept_again) = seen
        assert torch.equal(first, logits)
        assert not torch.equal(first, second)
        assert 0 < kept_again.sum() <= kept.sum() < len(images)
        expected = (entropy(second) + 0.1 * second.amax(1))[kept_again].mean().item()
        assert adapted.engine.last["loss"] == pytest.approx(expected)
        assert mean_of(adapted) == pytest.approx(entropy(second)[kept_again].mean().item())  # of the entropy alone


class TestRecovery:
    def test_one_collapse_is_one_reset(self, sharp_net, sure, unsure):
        net = sharp_net()
        source = [parameter.detach().clone() for parameter in net.parameters()]
        adapted = SAR(margin=1.0, recovery=0.3, lr=0.05, reset="never").wrap(net)
        adapted(unsure)
        high = mean_of(adapted)
        assert high > 0.3
        while adapted.engine.recoveries == 0:
            assert adapted.engine.net.optimizer.state
            adapted(sure)
        assert all(map(torch.equal, source, net.parameters()))
        assert not adapted.engine.net.optimizer.state  # the momentum is gone
        assert math.isnan(mean_of(adapted))
        for _ in range(3):
            adapted(unsure)
        assert adapted.engine.recoveries == 1
        assert mean_of(adapted) > 0.3

    @pytest.mark.parametrize(("recovery", "expected"), [(0.0, 0), (10.0, 3)])
    def test_threshold_is_the_argument(self, sharp_net, sure, recovery, expected):
        adapted = SAR(margin=1.0, recovery=recovery).wrap(sharp_net())
        for _ in range(3):
            adapted(sure)
        assert adapted.engine.recoveries == expected
        assert adapted.engine.last["recovered"] == (expected > 0)

    def test_continues_from_a_state_in_the_middle(self, sharp_net, sure, unsure):
        make = lambda: SAR(margin=1.0, recovery=0.8, lr=0.05, parameters="norm", reset="never")  # noqa: E731
        batches = [sure, sure * 0.9, unsure, sure, sure, unsure]
        whole = make().wrap(sharp_net())
        expected = [whole(batch) for batch in batches]
        assert 0 < whole.engine.recoveries < len(batches)
        for stop in range(1, len(batches)):
            first, second = make().wrap(sharp_net()), make().wrap(sharp_net())
            for batch in batches[:stop]:
                first(batch)
            second.load_state_dict(first.state_dict())
            for batch, logits in zip(batches[stop:], expected[stop:], strict=True):
                assert torch.equal(second(batch), logits)
            assert second.engine.recoveries == whole.engine.recoveries

    def test_a_method_may_recover_at_once(self, make_net, images):
        adapted = SAR(margin=1.0, recovery=0.0, lr=0.05).wrap(make_net())
        source = [parameter.detach().clone() for parameter in adapted.module.parameters()]
        adapted(images)
        assert not all(map(torch.equal, source, adapted.module.parameters()))
        adapted.engine.net.reset()
        assert all(map(torch.equal, source, adapted.module.parameters()))
        assert adapted.engine.capture()["counters"]["recoveries"] == 1

    def test_a_reset_forgets_momentum_and_mean(self, sharp_net, unsure):
        adapted = SAR(margin=1.0, recovery=0.0, lr=0.05).wrap(sharp_net())
        first = [adapted(unsure) for _ in range(3)]
        adapted.reset()
        assert all(torch.equal(adapted(unsure), logits) for logits in first)

    def test_steps_after_a_recovery_are_reset_too(self, sharp_net, sure, unsure):
        """A step that follows a recovery within the batch moves weights, which a reset must find."""

        class Once(SAR):
            def _watch(self, net, entropies, kept):
                super()._watch(net, entropies, kept)
                net.reset_if(torch.tensor(self.calls == 0))
                self.calls += 1

        method = Once(margin=1.0, recovery=0.0, lr=0.05, steps=2, reset="batch")
        method.calls = 0
        adapted = method.wrap(sharp_net())
        source = [parameter.detach().clone() for parameter in adapted.module.parameters()]
        adapted(unsure)
        assert adapted.engine.recoveries == 1
        assert not all(map(torch.equal, source, adapted.module.parameters()))
        adapted.reset()
        assert all(map(torch.equal, source, adapted.module.parameters()))


class TestDefaults:
    @pytest.mark.parametrize(
        ("name", "last"), [("resnet10t", ("layer4.",)), ("test_vit", ("blocks.5.", ".norm.weight", ".norm.bias"))]
    )
    @pytest.mark.parametrize(
        "make", [lambda: SAR(margin=1.0, lr=0.1), lambda: DeYO(margin=1.0, threshold=-1.0, lr=0.1)], ids=["SAR", "DeYO"]
    )
    def test_last_block_stays(self, make, name, last):
        size = {"img_size": 32} if "vit" in name else {}
        net = timm.create_model(name, num_classes=4, **size)
        names = [f".{name}" for name, _ in net.named_parameters()]
        adapted = make().wrap(net)
        adapted(torch.rand(2, 3, 32, 32))
        assert adapted.engine.updates == 1
        free = [f".{name}" for name, parameter in net.named_parameters() if parameter.requires_grad]
        assert free
        for part in last:
            assert any(part in name for name in names)
            assert not any(part in name for name in free)

    def test_optimizer_is_the_published_one(self, make_net, images):
        adapted = SAR().wrap(make_net())
        adapted(images)
        (group,) = adapted.engine.net.optimizer.param_groups
        assert isinstance(adapted.engine.net.optimizer, torch.optim.SGD)
        assert (group["lr"], group["momentum"], group["nesterov"]) == (2.5e-4, 0.9, False)
        assert SAR().protocol().items() >= {"optimizer": "SGD", "margin": 0.4, "rho": 0.05, "recovery": 0.2}.items()

    @pytest.mark.filterwarnings("error")
    def test_is_silent_on_many_classes(self, make_net, images):
        images = images.repeat(2, 1, 1, 1)
        logits = SAR(margin=1.0).wrap(make_net(classes=200))(images)  # ImageNet's settings are the defaults
        assert logits.shape == (len(images), 200)
