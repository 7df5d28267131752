"""Ensembles: merged predictions against plain means, and members that are what they would be alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from ttalight.adapters import (
    EATA,
    LAME,
    PTBN,
    T3A,
    AdaptedEnsemble,
    RoTTA,
    Tent,
)
from ttalight.adapters.ensemble import merge_logits

pytestmark = pytest.mark.filterwarnings("ignore:.*statistics of")

MAKERS = {
    "Tent": lambda: Tent(lr=0.05, seed=1),
    "EATA": lambda: EATA(fisher="stream", fisher_samples=6, margin=1.0, redundancy=0.99995, lr=0.02, seed=2),
    "RoTTA": lambda: RoTTA(memory=4, seed=3),
}


class Fails(nn.Module):
    """Fails at images that are brighter than a limit, after the layers that come before it."""

    def forward(self, features):
        if features.abs().max() > 1e3:
            raise ArithmeticError("too bright")
        return features


@pytest.fixture
def batches(images):
    return [images, images.flip(0) * 0.5, images[:4] + 0.3, images * 0.8]


@pytest.fixture
def members(make_net):
    return lambda: [make().wrap(make_net()) for make in MAKERS.values()]


@pytest.mark.parametrize("merge", ["probabilities", "logits"])
def test_members_are_what_they_would_be_alone(members, batches, merge):
    alone, ensemble = members(), AdaptedEnsemble(members(), merge)
    for batch in batches:
        for adapt in (False, True):
            logits = torch.stack([member(batch, adapt=adapt) for member in alone])
            expected = logits.softmax(2).mean(0).log() if merge == "probabilities" else logits.mean(0)
            torch.testing.assert_close(ensemble(batch, adapt=adapt), expected)
    for own, member in zip(alone, ensemble.members, strict=True):
        pairs = zip(own.module.state_dict().values(), member.module.state_dict().values(), strict=True)
        assert all(torch.equal(*pair) for pair in pairs)
        assert torch.equal(own(batches[0], adapt=False), member(batches[0], adapt=False))
    assert ensemble.forwards == sum(member.engine.net.forwards for member in alone)
    assert ensemble.backwards == sum(member.engine.backwards for member in alone) > 0
    assert len(list(ensemble.parameters())) == sum(len(list(member.parameters())) for member in alone)


def test_one_member_is_the_network_alone(net, make_net, images):
    expected = Tent().wrap(make_net())(images)
    assert torch.equal(AdaptedEnsemble([Tent().wrap(net)], "logits")(images), expected)


def test_merging_keeps_masked_classes():
    first = torch.tensor([[2.0, 1.0, -torch.inf], [800.0, -800.0, -torch.inf]])
    second = torch.tensor([[0.0, 3.0, -torch.inf], [-800.0, 800.0, -torch.inf]])
    merged = merge_logits([first, second])
    assert torch.equal(merged[:, 2], torch.full((2,), -torch.inf))
    torch.testing.assert_close(merged.exp().sum(1), torch.ones(2))
    torch.testing.assert_close(merged[1, :2].exp(), torch.full((2,), 0.5))
    assert torch.equal(merge_logits([first, second], "logits")[:, 2], torch.full((2,), -torch.inf))
    assert merge_logits([first.half(), second.half()]).dtype == torch.float32


def test_dense_predictions(batches):
    def dense(seed):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).double().eval()

    ensemble = AdaptedEnsemble([PTBN().wrap(dense(seed)) for seed in range(2)])
    logits = [PTBN().wrap(dense(seed))(batches[0]) for seed in range(2)]
    expected = ((logits[0].softmax(1) + logits[1].softmax(1)) / 2).log()
    torch.testing.assert_close(ensemble(batches[0]), expected)


def test_networks_that_return_structures(make_net, images):
    class Answers(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, images):
            return {"logits": self.net(images), "other": images}

    ensemble = AdaptedEnsemble(
        [PTBN().wrap(Answers(make_net())), PTBN(output=lambda logits: 2 * logits).wrap(make_net())], "logits"
    )
    expected = 1.5 * PTBN().wrap(make_net())(images)
    torch.testing.assert_close(ensemble(images), expected)
    torch.testing.assert_close(ensemble.export()(images), expected)


class TestStates:
    def test_resumes_in_the_middle_of_a_stream(self, members, batches):
        ensemble = AdaptedEnsemble(members())
        for batch in batches[:2]:
            ensemble(batch)
        state = ensemble.state_dict()
        expected = [ensemble(batch) for batch in batches[2:]]
        other = AdaptedEnsemble(members())
        other.load_state_dict(state)
        assert all(map(torch.equal, [other(batch) for batch in batches[2:]], expected))

    def test_reset_and_release(self, members, batches, state_of, same_state):
        ensemble = AdaptedEnsemble(members())
        before = [state_of(member.release()) for member in members()]
        first = ensemble(batches[0])
        ensemble(batches[1])
        ensemble.reset()
        assert torch.equal(ensemble(batches[0]), first)
        networks = ensemble.release()
        assert len(networks) == len(MAKERS)
        for network, state in zip(networks, before, strict=True):
            same_state(network, state)
        with pytest.raises(RuntimeError, match="was released"):
            ensemble(batches[0])

    def test_the_end_of_a_block_releases(self, make_net, images):
        net = make_net()
        before = copy.deepcopy(net.state_dict())
        with AdaptedEnsemble([Tent(lr=0.1).wrap(net), PTBN().wrap(make_net())]) as ensemble:
            ensemble(images)
            ensemble.members[1].release()
        assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())

    def test_training_mode_is_that_after_the_release(self, members, batches):
        ensemble = AdaptedEnsemble(members())
        assert ensemble.train() is ensemble
        ensemble(batches[0])
        assert not any(member.module.training for member in ensemble.members)
        assert ensemble.members[0].training
        ensemble.members[0].eval()
        assert [network.training for network in ensemble.release()] == [False, True, True]
        assert not any(member.release().training for member in AdaptedEnsemble(members()).train().eval().members)

    def test_freeze_and_export(self, members, batches):
        ensemble = AdaptedEnsemble(members())
        ensemble(batches[0])
        assert ensemble.freeze() is ensemble
        expected, forwards = ensemble(batches[1]), ensemble.forwards
        module = ensemble.export()
        assert not module.training
        torch.testing.assert_close(module(batches[1]), expected)
        torch.testing.assert_close(copy.deepcopy(module)(batches[1]), expected)
        assert torch.equal(ensemble(batches[1]), expected)
        assert ensemble.forwards == forwards
        ensemble.unfreeze()(batches[1])
        assert ensemble.forwards > forwards

    def test_what_cannot_be_exported(self, make_net, images):
        ensemble = AdaptedEnsemble([PTBN().wrap(make_net()), LAME().wrap(make_net())])
        ensemble(images)
        with pytest.raises(TypeError, match="LAME"):
            ensemble.export()

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))])
    def test_copies_have_networks_of_their_own(self, make_net, batches, copied):
        ensemble = AdaptedEnsemble([T3A().wrap(make_net()), Tent(lr=0.1).wrap(make_net())], "logits")
        ensemble(batches[0])
        other = copied(ensemble)
        assert torch.equal(other(batches[1]), ensemble(batches[1]))
        assert other.merge == "logits"
        assert other.members[0].module is not ensemble.members[0].module

    def test_a_state_that_does_not_fit_changes_nothing(self, members, batches):
        ensemble, other = AdaptedEnsemble(members()), AdaptedEnsemble(members())
        for each in (ensemble, other):
            each(batches[0])
        other(batches[1])
        state = other.state_dict()
        state["members"][2]["method"] = "Tent"
        with pytest.raises(ValueError, match="RoTTA"):
            ensemble.load_state_dict(state)
        for wrong in ({"members": state["members"][:2]}, {}, None):
            with pytest.raises(ValueError, match=r"the state is .*, and the ensemble has 3 members"):
                ensemble.load_state_dict(wrong)
        expected = AdaptedEnsemble(members())
        expected(batches[0])
        assert torch.equal(ensemble(batches[1]), expected(batches[1]))

    def test_moves(self, members, batches):
        ensemble, expected = AdaptedEnsemble(members()), AdaptedEnsemble(members())
        for each in (ensemble, expected):
            each(batches[0])
        assert ensemble.to("cpu") is ensemble
        assert torch.equal(ensemble(batches[1]), expected(batches[1]))


class TestFailures:
    @pytest.mark.parametrize("done", [0, 2])
    @pytest.mark.parametrize("options", [{}, {"adapt_every": 2}], ids=["every", "every second"])
    def test_members_before_the_failing_one_are_undone(self, make_net, batches, done, options):
        def make():
            failing = make_net()
            failing.insert(1, Fails())
            nets = [make_net(), make_net(), failing, make_net()]
            makers = [
                EATA(fisher="stream", fisher_samples=6, margin=1.0, lr=0.02, **options),
                Tent(lr=0.1, **options),
                PTBN(),
                PTBN(),
            ]
            windows = [None, 8, None, None]
            return AdaptedEnsemble(
                [method.wrap(net, window) for method, net, window in zip(makers, nets, windows, strict=True)]
            )

        ensemble, expected = make(), make()
        for batch in batches[:done]:
            assert torch.equal(ensemble(batch), expected(batch))
        with pytest.raises(ArithmeticError, match="too bright"):
            ensemble(batches[1] * 1e5)
        assert (ensemble.forwards, ensemble.backwards) == (expected.forwards, expected.backwards)
        for batch in batches:
            assert torch.equal(ensemble(batch), expected(batch))
        states = [each.state_dict()["members"] for each in (ensemble, expected)]
        for own, other in zip(*states, strict=True):
            assert own["counters"] == other["counters"]

    def test_other_numbers_of_classes(self, make_net, images):
        ensemble = AdaptedEnsemble([Tent(lr=0.1).wrap(make_net()), PTBN().wrap(make_net(classes=5))])
        with pytest.raises(ValueError, match=r"logits of the shapes \(6, 4\), \(6, 5\): .* same classes"):
            ensemble(images)
        assert [member.engine.batches for member in ensemble.members] == [0, 0]
        assert ensemble.forwards == 0

    def test_wrong_members(self, net, make_net):
        adapted = Tent().wrap(net)
        with pytest.raises(ValueError, match="at least one member"):
            AdaptedEnsemble([])
        with pytest.raises(TypeError, match=r"must be a list of adapted networks, got AdaptedNetwork"):
            AdaptedEnsemble(adapted)
        with pytest.raises(TypeError, match=r"must be an adapted network, .*Tent\(\).wrap.*, got Sequential"):
            AdaptedEnsemble([adapted, make_net()])
        with pytest.raises(ValueError, match=r"two members share a network: .*copy\.deepcopy"):
            AdaptedEnsemble([adapted, adapted])
        with pytest.raises(RuntimeError, match="is being adapted already"):
            PTBN().wrap(net)
        with pytest.raises(ValueError, match="merge must be 'probabilities' or 'logits', got 'mean'"):
            AdaptedEnsemble([adapted], "mean")
        adapted.release()
        with pytest.raises(RuntimeError, match="a member was released"):
            AdaptedEnsemble([adapted])

    def test_repr_shows_members(self, net):
        assert repr(AdaptedEnsemble([Tent().wrap(net)])).endswith("0 updates),\n], merge='probabilities')")
