"""MoETTA against a loop over images and layers; a method's own parameters in states, copies and resets."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import timm
import torch
from torch import nn

from ttalight.adapters import STAG, MoETTA
from ttalight.adapters.components.routed_norm import load_balance, route


@pytest.fixture
def images():
    """Images that differ in brightness, so that they go to different experts and entropies differ."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.rand(6, 3, 32, 32, generator=generator, dtype=torch.float64)
    return noise * torch.tensor([0.2, 0.5, 1, 1.5, 2, 3], dtype=torch.float64).view(-1, 1, 1, 1)


@pytest.fixture
def batches(images):
    return [images, images.flip(0) * 0.5, images[:3] - 0.3, images[4:5]]


class Net(nn.Module):
    """Three normalisation layers of three kinds, one of them over the last dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.first = nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)
        self.middle, self.second = nn.Conv2d(6, 6, 3, stride=4), nn.GroupNorm(2, 6)
        self.third, self.fc = nn.LayerNorm(6), nn.Linear(6, 4)

    def layers(self):
        yield lambda x: self.stem(x)
        yield self.first
        yield lambda x: self.middle(x.relu())
        yield self.second
        yield lambda x: x.relu().movedim(1, -1)
        yield self.third
        yield lambda x: self.fc(x.mean((1, 2)))

    def forward(self, x):
        for layer in self.layers():
            x = layer(x)
        return x


@pytest.fixture
def three_norms():
    torch.manual_seed(0)
    net = Net()
    for norm in (net.first, net.second, net.third):
        nn.init.uniform_(norm.weight, 0.5, 1.5)
        nn.init.normal_(norm.bias)
    nn.init.uniform_(net.first.running_mean, -0.2, 0.2)  # statistics that no batch has
    nn.init.uniform_(net.first.running_var, 0.06, 0.3)
    net.fc.weight.data *= 4
    return net.double().eval()


class PlainMoETTA:
    """The method image by image, layer by layer, expert by expert."""

    def __init__(self, net, routed, parameters, top, lr):
        self.net, self.routed, self.top = net, routed, top
        self.own = {name: value.clone().requires_grad_() for name, value in parameters.items()}
        self.optimizer = torch.optim.SGD(self.own.values(), lr=lr, momentum=0.9)
        self.means = []

    def normalized(self, name, norm, x):
        if isinstance(norm, nn.BatchNorm2d) and name not in self.routed:  # the authors' network is in eval mode
            return (x - norm.running_mean[:, None, None]) / (norm.running_var[:, None, None] + norm.eps).sqrt()
        if isinstance(norm, nn.BatchNorm2d):
            return (x - x.mean((0, 2, 3), keepdim=True)) / (
                x.var((0, 2, 3), keepdim=True, correction=0) + norm.eps
            ).sqrt()
        if isinstance(norm, nn.LayerNorm):
            return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, correction=0) + norm.eps).sqrt()
        groups = x.reshape(len(x), norm.num_groups, -1)
        spread = (groups.var(-1, keepdim=True, correction=0) + norm.eps).sqrt()
        groups = (groups - groups.mean(-1, keepdim=True)) / spread
        return groups.reshape(x.shape)

    def apply(self, name, norm, x):
        """Return the layer's output and its load balance."""
        channels_last = isinstance(norm, nn.LayerNorm)
        out, chances, chosen = [], [], []
        for image, normal in zip(x, self.normalized(name, norm, x), strict=True):
            mean = image.mean((0, 1)) if channels_last else image.mean((1, 2))
            weight, bias = norm.weight, norm.bias
            if name in self.routed:
                r = (self.own[f"{name}.router.weight"] @ mean + self.own[f"{name}.router.bias"]).softmax(0)
                best = sorted(range(len(r)), key=lambda e: -r[e].item())[: self.top]
                for e in best:
                    c = r[e] / sum(r[j].item() for j in best)
                    weight = weight + c * self.own[f"{name}.experts.weight"][e]
                    bias = bias + c * self.own[f"{name}.experts.bias"][e]
                chances.append(r)
                chosen.extend(best)
            if not channels_last:
                weight, bias = weight[:, None, None], bias[:, None, None]
            out.append(normal * weight + bias)
        balance = 0
        if name in self.routed:
            experts = len(chances[0])
            for e in range(experts):
                mean = sum(r[e] for r in chances) / len(chances)
                balance = balance + experts * (chosen.count(e) / len(chosen)) * mean
        return torch.stack(out), balance

    def __call__(self, images):
        x, balance = images, 0
        names = {id(module): name for name, module in self.net.named_modules()}
        for layer in self.net.layers():
            if isinstance(layer, nn.Module):
                x, own = self.apply(names[id(layer)], layer, x)
                balance = balance + own
            else:
                x = layer(x)
        p = x.softmax(1)
        entropies = -(p * p.log()).sum(1)
        self.means.append(entropies.mean().item())
        average = sum(self.means) / len(self.means)
        kept = [h for h in entropies if h.item() <= average]
        self.fraction = len(kept) / len(images)
        if kept:
            margin = 0.4 * math.log(x.shape[1])
            loss = sum(math.exp(margin - h.item()) * h for h in kept) / len(kept) + 0.2 * average * balance
            self.loss = loss.item()
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return x.detach()


@pytest.mark.parametrize(
    ("arguments", "routed"),
    [
        ({}, ("second", "third")),
        ({"frozen": []}, ("first", "second", "third")),
        ({"frozen": [0, 2], "experts": 3, "top": 2}, ("second",)),
        ({"frozen": 0.7, "experts": 2}, ("third",)),
    ],
)
def test_against_a_plain_loop(three_norms, batches, arguments, routed):
    original = copy.deepcopy(three_norms)
    adapted = MoETTA(lr=0.3, **arguments).wrap(three_norms)
    seen = [(adapted(batch), dict(adapted.engine.last), adapted.state_dict()["tensors"]) for batch in batches]
    source = dict(zip(adapted.engine.net.own, adapted.engine.net.source, strict=True))
    assert {name.split(".")[0] for name in source} == set(routed)
    reference = PlainMoETTA(original, routed, source, arguments.get("top", 1), lr=0.3)
    for batch, (logits, last, state) in zip(batches, seen, strict=True):
        torch.testing.assert_close(logits, reference(batch), rtol=1e-8, atol=1e-9)
        assert last["selected"] == pytest.approx(reference.fraction)
        if reference.fraction:
            assert last["loss"] == pytest.approx(reference.loss, rel=1e-9)
        for name, value in reference.own.items():
            torch.testing.assert_close(state[f"own.{name}"], value.data, rtol=1e-8, atol=1e-10)
        assert state["method.batches"] == len(reference.means)
        assert state["method.mean_entropy"].item() == pytest.approx(sum(reference.means) / len(reference.means))
    assert any(0 < last["selected"] < 1 for _, last, _ in seen)


def test_begins_as_the_source_on_batch_statistics(network, logits_in):
    images = torch.rand(4, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    expected = copy.deepcopy(network)
    for module in expected.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.train()
    adapted = MoETTA(frozen=[]).wrap(network)
    torch.testing.assert_close(logits_in(adapted(images)), logits_in(expected(images)), rtol=1e-9, atol=1e-9)
    assert len(adapted.engine.method._routed) == len(adapted.engine.net.norms)


def test_other_layers_are_not_counted():
    net = timm.create_model("test_convnext", num_classes=4).eval()  # has LayerNorm and, over dimension 1, LayerNorm2d
    kinds = [type(module).__name__ for module in net.modules() if isinstance(module, nn.LayerNorm)]
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = net(images)
    adapted = MoETTA(frozen=[0]).wrap(net)
    torch.testing.assert_close(adapted(images), expected, rtol=1e-4, atol=1e-5)
    assert len(adapted.engine.method._routed) == kinds.count("LayerNorm") - 1 < len(kinds) - 1


class TestRoute:
    def test_gate_is_one_with_the_gradient_of_a_log(self):
        inputs = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        gates, load = route(inputs.softmax(1), 1)
        best = inputs.argmax(1)
        assert torch.equal(gates.detach(), nn.functional.one_hot(best, 4).double())
        assert load.tolist() == (torch.bincount(best, minlength=4).double() / 5).tolist()
        (own,) = torch.autograd.grad(gates.sum(), inputs)
        (expected,) = torch.autograd.grad(inputs.log_softmax(1).gather(1, best[:, None]).sum(), inputs)
        torch.testing.assert_close(own, expected)

    def test_gates_of_several_sum_to_one(self):
        chances = torch.tensor([[0.5, 0.3, 0.2]])
        gates, load = route(chances, 2)
        torch.testing.assert_close(gates, torch.tensor([[0.625, 0.375, 0.0]]))
        assert load.tolist() == [0.5, 0.5, 0.0]

    def test_balance_between_its_limits(self):
        even = torch.full((6, 3), 1 / 3)
        assert load_balance(even, torch.full((3,), 1 / 3)).item() == pytest.approx(1)
        alone = torch.tensor([[1.0, 0.0, 0.0]]).expand(6, 3)
        assert load_balance(alone, torch.tensor([1.0, 0.0, 0.0])).item() == pytest.approx(3)


class TestOwnParameters:
    def test_have_names_in_the_state(self, three_norms, images):
        adapted = MoETTA(experts=5).wrap(three_norms)
        adapted(images)
        shapes = {name: tuple(value.shape) for name, value in adapted.state_dict()["tensors"].items()}
        assert shapes == {
            **{f"own.{layer}.experts.weight": (5, 6) for layer in ("second", "third")},
            **{f"own.{layer}.experts.bias": (5, 6) for layer in ("second", "third")},
            **{f"own.{layer}.router.weight": (5, 6) for layer in ("second", "third")},
            **{f"own.{layer}.router.bias": (5,) for layer in ("second", "third")},
            "method.mean_entropy": (),
            "method.batches": (),
        }

    def test_reset_bit_for_bit(self, three_norms, batches):
        adapted = MoETTA(lr=0.3).wrap(three_norms)
        first = [adapted(batch) for batch in batches]
        adapted.reset()
        tensors = adapted.state_dict()["tensors"]
        for name, value in tensors.items():
            assert ("router.weight" in name) == bool(value.any()), name
        assert all(torch.equal(adapted(batch), logits) for batch, logits in zip(batches, first, strict=True))
        assert not torch.equal(adapted(batches[0]), first[0])

    def test_move_no_weight_of_the_model(self, three_norms, images):
        before = {name: value.clone() for name, value in three_norms.state_dict().items()}
        adapted = MoETTA(lr=0.3).wrap(three_norms)
        for _ in range(3):
            adapted(images)
        assert all(torch.equal(value, before[name]) for name, value in three_norms.state_dict().items())
        assert any(value.any() for name, value in adapted.engine.net.own.items() if "experts" in name)

    def test_continue_in_a_new_run(self, three_norms, batches):
        twin = copy.deepcopy(three_norms)
        adapted = MoETTA(lr=0.3).wrap(three_norms)
        adapted(batches[0])
        state = pickle.loads(pickle.dumps(adapted.state_dict()))
        resumed = MoETTA(lr=0.3).wrap(twin)
        resumed.load_state_dict(state)
        for batch in batches:
            assert torch.equal(resumed(batch), adapted(batch))
        resumed.reset()
        adapted.reset()
        assert torch.equal(resumed(batches[0]), adapted(batches[0]))

    @pytest.mark.parametrize(
        "passed",
        [copy.deepcopy, lambda adapted: pickle.loads(pickle.dumps(adapted)), lambda adapted: adapted.to("cpu")],
        ids=["deepcopy", "pickle", "to"],
    )
    def test_survive_copies_and_moves(self, passed, three_norms, batches):
        expected = MoETTA(lr=0.3, terms=[STAG()]).wrap(copy.deepcopy(three_norms))
        adapted = MoETTA(lr=0.3, terms=[STAG()]).wrap(three_norms)
        for batch in batches[:2]:
            expected(batch)
            adapted(batch)
        twin = passed(adapted)
        for batch in batches[2:]:
            assert torch.equal(twin(batch), expected(batch))
        if twin is not adapted:  # and it is independent
            expert = adapted.engine.net.own["third.experts.weight"]
            before = expert.clone()
            twin(batches[0])
            assert torch.equal(expert, before)
        twin.reset()
        expected.reset()
        assert torch.equal(twin(batches[0]), expected(batches[0]))

    @pytest.mark.parametrize("first", [0, 1])
    def test_are_as_before_after_a_probe(self, three_norms, batches, first):
        plain, probed = (MoETTA(lr=0.3, reset="never").wrap(copy.deepcopy(three_norms)) for _ in range(2))
        for index, batch in enumerate(batches):
            if index == first:
                probed.engine.probe(True)
                probed(batch + 1)
                probed.engine.probe(False)
            assert torch.equal(probed(batch), plain(batch))

    def test_are_drawn_by_the_seed(self, three_norms, images):
        def routers(seed):
            adapted = MoETTA(seed=seed).wrap(three_norms)
            adapted(images)
            drawn = [v.clone() for k, v in adapted.engine.net.own.items() if "router.weight" in k]
            adapted.release()
            return drawn

        assert all(map(torch.equal, routers(1), routers(1)))
        assert not any(map(torch.equal, routers(1), routers(2)))

    def test_count_as_adapted_beside_plain_layers(self, three_norms, images):
        adapted = MoETTA(frozen=[0], plain=[2], experts=2, lr=0.3).wrap(three_norms)
        adapted(images)
        assert list(adapted.state_dict()["tensors"])[:3] == ["third.weight", "third.bias", "own.second.experts.weight"]
        source = adapted.engine.net.source[0]
        assert adapted.engine.net.parameters[0] is three_norms.third.weight
        assert not torch.equal(three_norms.third.weight, source)


def test_memory_does_not_grow_with_the_stream(three_norms, images):
    adapted = MoETTA(lr=0.1).wrap(three_norms)
    adapted(images)
    size = len(pickle.dumps(adapted))
    for _ in range(4):
        adapted(images)
    assert len(pickle.dumps(adapted)) == pytest.approx(size, abs=20)  # counters have more digits


class TestFilter:
    def test_nothing_kept_changes_nothing(self, three_norms, images):
        adapted = MoETTA(lr=0.3).wrap(three_norms)
        p = three_norms(images).softmax(1)
        order = (-(p * p.log()).sum(1)).argsort()
        sure, unsure = images[order[:1]], images[order[-1:]]
        adapted(sure)  # its entropy is the threshold that the unsure image exceeds
        first = adapted(unsure)
        assert torch.equal(adapted(unsure), first)
        assert (adapted.engine.updates, adapted.engine.skipped) == (1, 2)

    def test_a_broken_batch_does_not_stay_in_the_threshold(self, three_norms, images, breaks):
        adapted = MoETTA(lr=0.1).wrap(breaks(three_norms))
        adapted(images + 1e6)
        assert adapted.engine.skipped == 1
        adapted(images)
        state = adapted.state_dict()["tensors"]
        assert state["method.batches"] == 1
        assert state["method.mean_entropy"].isfinite()
        assert adapted.engine.updates == 1

    def test_a_single_image_is_learned_from(self, three_norms, images):
        adapted = MoETTA(lr=0.1).wrap(three_norms)
        adapted(images[:1])
        assert adapted.engine.updates == 1


def test_runs_under_autocast(three_norms, images):
    adapted = MoETTA(lr=0.1).wrap(three_norms.float())
    with torch.autocast("cpu", torch.bfloat16):
        logits = adapted(images.float())
    assert logits.isfinite().all()
    assert adapted.engine.updates == 1
    assert all(value.dtype == torch.float32 for value in adapted.engine.net.own.values())


def test_layers_without_bias_and_on_vectors(images):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 6), nn.LayerNorm(6, bias=False), nn.Linear(6, 4)).double()
    expected = net(images)
    adapted = MoETTA(frozen=[], lr=0.3).wrap(net)
    torch.testing.assert_close(adapted(images), expected)
    assert list(adapted.engine.net.own) == ["2.experts.weight", "2.router.weight", "2.router.bias"]
    assert adapted(images).isfinite().all()
    assert adapted.engine.updates == 2


def test_a_network_that_cuts_the_graph_is_named(images):
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        @torch.no_grad()
        def forward(self, x):
            return self.norm(x).mean((2, 3))

    with pytest.raises(RuntimeError, match="does not depend on the parameters to adapt"):
        MoETTA(frozen=[]).wrap(Frozen())(images.float())


@pytest.mark.filterwarnings("error")
def test_does_not_warn_on_many_classes(make_net, images):
    assert MoETTA().wrap(make_net(classes=1000))(images.repeat(2, 1, 1, 1)).shape == (12, 1000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frozen": [3]}, r"frozen takes indices of the 3 normalisation layers of Net .*, 0 to 2, got \[3\]"),
        ({"plain": [-1]}, r"plain takes indices .* got \[-1\]"),
        ({"frozen": [0], "plain": [0]}, r"layers \[0\] are in frozen and in plain"),
        ({"frozen": [0, 1, 2]}, "Net has 3 normalisation layers .* frozen and plain leave none"),
    ],
)
def test_says_which_layers_there_are(three_norms, images, arguments, message):
    with pytest.raises(ValueError, match=message):
        MoETTA(**arguments).wrap(three_norms)(images)
