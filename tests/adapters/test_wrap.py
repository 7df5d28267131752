"""Plain networks: what the engine promises about resets, releases, states and odd batches."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import threading

import pytest
import torch
from torch import nn

from ttalight.adapters import EMABN, MEMO, PTBN, ROID, SAR, T3A, TIPI, Source, Tent
from ttalight.adapters.adapter import Adapter
from ttalight.adapters.methods.roid import smoothed_prior

METHODS = [Source, PTBN, EMABN, Tent]


@dataclasses.dataclass
class Answer:
    logits: torch.Tensor
    note: str


class Answering(nn.Module):
    """Answers with a structure made of a network's logits."""

    def __init__(self, net, make) -> None:
        super().__init__()
        self.net, self.make = net, make

    def forward(self, images):
        return self.make(self.net(images))


class KeepsAll(ROID):
    """Passes views of all images, so that both passes have the batch's size."""

    def weigh(self, net, images, outputs):
        return torch.ones_like(super().weigh(net, images, outputs))


def doubled(logits):
    return {"logits": logits, "doubled": 2 * logits}


@pytest.fixture(params=METHODS)
def adapter(request) -> Adapter:
    return request.param()


class TestReset:
    def test_restores_the_source_bit_for_bit(self, adapter, net, images, state_of):
        adapted = adapter.wrap(net)
        first = adapted(images)
        adapted.reset()
        source = state_of(net)[0]
        adapted(images * 0.3)
        adapted(images[:4])
        adapted.reset()
        after = state_of(net)[0]
        assert all(torch.equal(after[name], source[name]) for name in source)
        assert torch.equal(adapted(images), first)

    def test_restores_the_optimizer(self, net, images):
        adapted = Tent(optimizer=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9)).wrap(net)
        first = [adapted(images) for _ in range(3)]
        adapted.engine.net.optimizer.param_groups[0]["lr"] = 7.0
        adapted.reset()
        second = [adapted(images) for _ in range(3)]
        assert all(map(torch.equal, first, second))

    def test_before_every_batch(self, net, images):
        adapted = Tent(lr=0.1, reset="batch").wrap(net)
        expected = adapted(images)
        adapted(images * 0.1)
        assert torch.equal(adapted(images), expected)

    def test_after_every_second_update(self, net, images):
        adapted = Tent(lr=0.1, reset=2).wrap(net)
        logits = [adapted(images) for _ in range(4)]
        assert torch.equal(logits[0], logits[2])
        assert torch.equal(logits[1], logits[3])
        assert not torch.equal(logits[0], logits[1])


class TestRelease:
    def test_takes_the_hook_on_the_classifier_away(self, net, images):
        for _ in range(2):
            adapted = T3A().wrap(net)
            adapted(images)
            adapted.release()
        assert not any(module._forward_pre_hooks for module in net.modules())

    def test_gives_everything_back(self, network, images, state_of, same_state):
        network.train()
        first = next(network.parameters())
        first.requires_grad_(False)
        first.grad = torch.ones_like(first)
        before = state_of(network)
        adapted = Tent(lr=0.1).wrap(network)
        adapted(images)
        assert adapted.release() is network
        same_state(network, before)

    def test_before_the_first_batch(self, net, state_of, same_state):
        before = state_of(net)
        Tent().wrap(net).release()
        same_state(net, before)

    def test_ends_the_wrapper_and_frees_the_network(self, net, images):
        adapted = Tent().wrap(net)
        with pytest.raises(RuntimeError, match="Sequential is being adapted already"):
            PTBN().wrap(net)
        adapted.release()
        with pytest.raises(RuntimeError, match="was released"):
            adapted(images)
        assert PTBN().wrap(net)(images).shape == (6, 4)

    def test_after_an_exception_in_the_network(self, net, images, state_of, same_state):
        before = state_of(net)
        adapted = Tent(lr=0.1).wrap(net)
        adapted(images)
        with pytest.raises(RuntimeError):
            adapted(images[:, :2])
        adapted.release()
        same_state(net, before)


class TestBatches:
    def test_of_one(self, adapter, net, images):
        assert adapter.wrap(net)(images[:1]).shape == (1, 4)

    def test_one_value_a_channel_uses_running_statistics(self, images):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 8), nn.BatchNorm1d(8), nn.Linear(8, 4)).double().eval()
        expected = net(images[:1])
        adapted = PTBN().wrap(net)
        assert torch.equal(adapted(images[:1]), expected)
        assert not torch.equal(adapted(images), net(images)[0])

    def test_inside_inference_mode(self, net, images):
        expected = Tent(lr=0.1).wrap(copy.deepcopy(net))
        adapted = Tent(lr=0.1).wrap(net)
        for _ in range(2):
            with torch.inference_mode():
                logits = adapted(images.clone())
            assert torch.equal(logits, expected(images))
        assert not logits.requires_grad

    def test_are_not_tensors(self, net):
        with pytest.raises(TypeError, match="images must be a tensor of shape"):
            Tent().wrap(net)([1, 2])

    def test_users_train_mode_changes_nothing(self, net, images):
        adapted = Tent(lr=0.1).wrap(copy.deepcopy(net))
        disturbed = Tent(lr=0.1).wrap(net)
        for _ in range(3):
            net.train()
            assert torch.equal(disturbed(images), adapted(images))

    def test_autocast_is_of_passes_only(self, net, images):
        net, images = net.float(), images.float()
        adapted = Tent().wrap(net)
        seen = []
        net[0].register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
        with torch.autocast("cpu", torch.bfloat16):
            logits = adapted(images)
        assert seen == [torch.bfloat16]
        assert logits.dtype == torch.float32

    def test_structures_are_kept(self, network, images):
        before, after = network(images), Source().wrap(network)(images)
        assert type(before) is type(after)
        if isinstance(after, dict):
            assert torch.equal(after["doubled"], before["doubled"])
            assert not after["doubled"].requires_grad

    @pytest.mark.parametrize(
        "adapter",
        [
            SAR(lr=0.1, margin=1.0),
            KeepsAll(lr=0.1),
            TIPI(lr=0.1, prediction="before"),
            Tent(lr=0.1, prediction="after"),
        ],
        ids=lambda adapter: type(adapter).__name__,
    )
    def test_all_parts_are_of_the_pass_that_predicts(self, adapter, net, images):
        given = adapter.wrap(Answering(net, doubled))(images)
        logits = given["doubled"] / 2
        prior = smoothed_prior(logits).log() if isinstance(adapter, ROID) else 0  # put on top of the pass
        torch.testing.assert_close(given["logits"], logits + prior)

    def test_parts_that_no_pass_of_the_batch_gave_are_none(self, net, images):
        given = MEMO(lr=0.1, views=2).wrap(Answering(net, doubled))((images - 0.5) / 2)
        assert given["logits"].shape == (6, 4)
        assert given["doubled"] is None

    def test_nothing_that_is_given_back_carries_a_graph(self, net, images):
        def deep(logits):
            return {"logits": logits, "hidden": (logits * 2, [logits * 3]), "answer": Answer(logits, "seen")}

        given = Tent(lr=0.1).wrap(Answering(net, deep))(images)
        tensors = [given["logits"], given["hidden"][0], given["hidden"][1][0], given["answer"].logits]
        assert not any(tensor.requires_grad for tensor in tensors)


class TestGuard:
    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_broken_pixels_are_refused_first(self, net, images, value):
        adapted = EMABN().wrap(net)
        adapted(images)
        before = adapted.state_dict()["tensors"]
        bad = images.clone()
        bad[[0, 2], 0, 0, 0] = value
        with pytest.raises(ValueError, match=r"2 of 6 images in batch 1 of visit 0 .* have NaN or infinite pixels"):
            adapted(bad)
        assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict()["tensors"].items())

    def test_a_broken_loss_does_not_reach_the_weights(self, net, images, breaks):
        adapted = Tent(lr=0.1).wrap(breaks(net))
        adapted(images)
        before = [parameter.clone() for parameter in net.parameters()]
        bad = images.clone()
        bad[0, 0, 0, 0] = 1e6
        adapted(bad)
        assert all(map(torch.equal, before, net.parameters()))
        assert (adapted.engine.updates, adapted.engine.skipped) == (1, 1)
        assert adapted(images).isfinite().all()

    def test_a_network_that_cuts_the_graph_is_named(self, images):
        class Frozen(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.norm = nn.BatchNorm2d(3)

            @torch.no_grad()
            def forward(self, x):
                return self.norm(x).mean((2, 3))

        with pytest.raises(RuntimeError, match="does not depend on the parameters to adapt"):
            Tent().wrap(Frozen())(images.float())


class TestState:
    def test_round_trip_in_the_middle_of_a_stream(self, adapter, net, images):
        adapted = adapter.wrap(copy.deepcopy(net))
        for scale in (1.0, 0.5):
            adapted(images * scale)
        state = pickle.loads(pickle.dumps(adapted.state_dict()))
        resumed = type(adapter)().wrap(net)
        resumed.load_state_dict(state)
        for scale in (0.7, 1.3, 0.2):
            assert torch.equal(resumed(images * scale), adapted(images * scale))
        assert resumed.engine.batches == 5

    @pytest.mark.parametrize("reset", ["batch", 1, 3])
    def test_a_reset_that_is_due_takes_place_after_loading(self, reset, make_net, images):
        adapted, resumed = (Tent(lr=0.1, reset=reset).wrap(make_net()) for _ in range(2))
        for scale in (1.0, 0.5):
            adapted(images * scale)
        resumed.load_state_dict(adapted.state_dict())
        for scale in (0.7, 1.3, 0.2):
            assert torch.equal(resumed(images * scale), adapted(images * scale))

    def test_is_there_before_the_first_batch(self, make_net, images):
        adapted, resumed, third = (Tent(lr=0.1).wrap(make_net()) for _ in range(3))
        source = adapted(images)
        resumed.load_state_dict(adapted.state_dict())
        third.load_state_dict(resumed.state_dict())
        after = adapted(images)
        assert torch.equal(third(images), after)
        resumed.reset()
        assert torch.equal(resumed(images), source)
        assert not torch.equal(source, after)

    def test_of_another_network_is_refused(self, net, images, make_net):
        adapted = Tent().wrap(net)
        adapted(images)
        other = Tent().wrap(make_net(lambda channels: nn.GroupNorm(2, channels)))
        other.load_state_dict(adapted.state_dict())
        assert other(images).shape == (6, 4)  # the same names and shapes: a fit
        third = Tent().wrap(
            nn.Sequential(
                nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 4)
            ).double()
        )
        with pytest.raises(ValueError, match="state does not fit Tent on Sequential"):
            third.load_state_dict(adapted.state_dict())

    def test_stays_with_the_adapter_after_a_release(self, net, images):
        adapter = Tent(lr=0.1)
        adapted = adapter.wrap(net)
        adapted(images)
        weight = net[1].weight.detach().clone()
        adapted.release()
        assert torch.equal(adapter.state_dict()["tensors"]["1.weight"], weight)
        assert not torch.equal(net[1].weight, weight)

    @pytest.mark.parametrize("copied", [copy.deepcopy, lambda adapted: pickle.loads(pickle.dumps(adapted))])
    def test_copies_are_complete_and_independent(self, adapter, net, images, copied):
        adapted = adapter.wrap(net)
        adapted(images)
        twin = copied(adapted)
        for scale in (0.5, 2.0):
            assert torch.equal(twin(images * scale), adapted(images * scale))
        twin.reset()
        expected = adapted.state_dict()["tensors"]
        twin(images * 9)
        assert all(torch.equal(value, expected[name]) for name, value in adapted.state_dict()["tensors"].items())

    def test_memory_does_not_grow(self, net, images):
        adapted = EMABN().wrap(net)
        adapted(images)
        size = len(pickle.dumps(adapted))
        for _ in range(5):
            adapted(images)
        assert len(pickle.dumps(adapted)) == size


class TestThreads:
    def test_calls_are_serialised(self, net, images):
        adapted = Tent(lr=1e-3).wrap(net)
        failures = []

        def call():
            try:
                for _ in range(5):
                    adapted(images)
            except Exception as error:
                failures.append(error)

        threads = [threading.Thread(target=call) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert adapted.engine.updates == 20


@pytest.mark.skipif(torch.__version__ < (2, 7), reason="torch 2.6 does not trace a forward of another object")
def test_a_compiled_network_moves_as_the_eager_one(net, images):
    adapted = Tent(lr=0.1).wrap(copy.deepcopy(net))
    compiled = torch.compile(net, backend="aot_eager")
    expected = [adapted(images * scale) for scale in (1.0, 0.5, 2.0)]
    with torch.no_grad():
        compiled(images)  # compiled before it is wrapped
    moved = Tent(lr=0.1).wrap(compiled)
    for scale, logits in zip((1.0, 0.5, 2.0), expected, strict=True):
        torch.testing.assert_close(moved(images * scale), logits, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("classifier", [None, "3"])
def test_two_layers_that_give_the_logits_are_listed(images, classifier):
    torch.manual_seed(0)
    features = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3))
    net = nn.Sequential(*features, nn.Linear(3, 4), nn.Linear(4, 4)).double()
    nn.init.eye_(net[4].weight)
    nn.init.zeros_(net[4].bias)
    adapted = PTBN(classifier=classifier).wrap(net)
    adapted.engine.net.images = images
    if classifier is None:
        with pytest.raises(ValueError, match=r"2 layers give the logits \(3, 4\)\. Name one with classifier="):
            _ = adapted.engine.net.head
    else:
        assert torch.equal(adapted.engine.net.head.weight, net[3].weight)


def test_an_unknown_classifier_is_named(net, images):
    with pytest.raises(
        ValueError, match="classifier='fc' is not a Linear layer or 1x1 convolution of Sequential; it has 9"
    ):
        PTBN(classifier="fc").wrap(net)


def test_weights_can_be_lent(net, images):
    adapted = Tent(lr=0.1).wrap(net)
    source = adapted(images)
    network = adapted.engine.net
    own = [parameter.detach().clone() for parameter in network.parameters]
    with network.with_weights(network.source), torch.no_grad():
        torch.testing.assert_close(network(images).logits, source)
    assert all(map(torch.equal, own, network.parameters))
