"""SHOT, TIPI, ROID, CMF, MEMO and TTAug against plain loops over their formulas, in float64 over several batches."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from support.networks import small_net
from torch import nn

from ttalight.adapters import CMF, MEMO, ROID, SHOT, TIPI, TTAug
from ttalight.seeding import derive_seed
from ttalight.transforms import AugMixViews, RandomJitterAffineFlip

CLOSE = {"rtol": 1e-8, "atol": 1e-9}
CLASSES = 5
make_net = partial(small_net, CLASSES, scale=3.0)


def batches() -> list[torch.Tensor]:
    """Images in [0, 1]: two full batches, a smaller one, one image."""
    generator = torch.Generator().manual_seed(5)
    base = torch.rand(8, 3, 12, 12, generator=generator, dtype=torch.float64)
    base[:3] *= 0.3
    return [base, 1 - base.flip(0), base[2:5], base[6:7]]


def draws(batch: int, step: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(0, "adapt", 0, batch, step))


def run(net: nn.Sequential, images: torch.Tensor, statistics="batch") -> torch.Tensor:
    """Run the network layer by layer, with BatchNorm written out; ``statistics`` is a share of the batch or a name."""
    x = images
    for module in net:
        if not isinstance(module, nn.BatchNorm2d):
            x = module(x)
            continue
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)
        if statistics == "moving":
            count = x.numel() / x.shape[1]
            module.running_mean += 0.1 * (mean.detach() - module.running_mean)
            module.running_var += 0.1 * (var.detach() * count / (count - 1) - module.running_var)
        elif statistics == "source":
            mean, var = module.running_mean, module.running_var
        elif statistics != "batch":
            mean = (1 - statistics) * module.running_mean + statistics * mean.detach()
            var = (1 - statistics) * module.running_var + statistics * var.detach()
        x = (x - mean[:, None, None]) / (var + module.eps).sqrt()[:, None, None]
        x = x * module.weight[:, None, None] + module.bias[:, None, None]
    return x


def affines(net: nn.Sequential) -> list[nn.Parameter]:
    return [parameter for module in net if isinstance(module, nn.BatchNorm2d) for parameter in module.parameters()]


def check_weights(net: nn.Module, reference: nn.Module) -> None:
    for (name, value), expected in zip(net.state_dict().items(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(value, expected, msg=lambda text, name=name: f"{name}: {text}", **CLOSE)


def entropy(p: torch.Tensor) -> torch.Tensor:
    return -sum(value * value.log() for value in p)


class Nesterov:
    """SGD with Nesterov momentum: v = m v + g, then the weights move by -lr (g + m v)."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, momentum: float = 0.9) -> None:
        self.parameters, self.lr, self.momentum = parameters, lr, momentum
        self.velocity = [torch.zeros_like(parameter) for parameter in parameters]

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def step(self) -> None:
        for index, parameter in enumerate(self.parameters):
            self.velocity[index] = self.momentum * self.velocity[index] + parameter.grad
            parameter -= self.lr * (parameter.grad + self.momentum * self.velocity[index])


def test_shot():
    adapted, reference = (
        SHOT(lr=0.01, confidence=0.95).wrap(make_net()),
        make_net(),
    )
    parameters = [p for name, p in reference.named_parameters() if not name.startswith("8.")]
    optimizer = Nesterov(parameters, 0.01)
    counts = []
    for images in batches():
        logits = run(reference, images)
        p = [row.softmax(0) for row in logits]
        sure = [row for row in p if row.max() > 0.95]
        counts.append(len(sure))
        loss = sum(map(entropy, p)) / len(p) - entropy(sum(p) / len(p))
        if sure:
            loss = loss + 0.3 * sum(-row.max().log() for row in sure) / len(sure)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(adapted(images), logits.detach(), **CLOSE)
        assert adapted.engine.last["loss"] == pytest.approx(loss.item(), rel=1e-8)
    assert 0 < counts[0] < 8
    check_weights(adapted.module, reference)


@pytest.mark.parametrize(
    ("entropy_weight", "reverse", "setting"),
    [(0.0, True, ""), (2.0, True, ""), (0.0, False, ""), (1.0, True, "imagenet")],
)
def test_tipi(entropy_weight, reverse, setting):
    epsilon, limit, rate = 0.05, 5, {"lr": 0.01}
    if setting:  # the authors' constants
        published = TIPI.published[setting]
        assert (published["lr"], published["momentum"], published["entropy_weight"]) == (2.5e-4, 0.9, entropy_weight)
        epsilon, limit = 2 / 255, math.inf if published["large_batch"] is None else 0
        rate = {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=2.5e-4, momentum=0.9)}
    adapter = TIPI(
        **rate, epsilon=epsilon, entropy_weight=entropy_weight, reverse=reverse, seed=0, reset="never",
        large_batch=None if limit == math.inf else limit,
    )  # fmt: skip
    adapted, reference = adapter.wrap(make_net()), make_net()
    make = rate.get("optimizer", lambda parameters: torch.optim.Adam(parameters, lr=0.01))
    optimizer = make(affines(reference))

    def kl(one, two):
        return sum((a * (a.log() - b.log())).sum() for a, b in zip(one.softmax(1), two.softmax(1), strict=True))

    def apart(clean, perturbed):
        return kl(perturbed, clean) if reverse else kl(clean, perturbed)

    for index, images in enumerate(batches()):
        clean = run(reference, images, "moving")
        start = epsilon * (2 * torch.rand(images.shape, generator=draws(index)).double() - 1)
        start.requires_grad_()
        (slope,) = torch.autograd.grad(apart(clean.detach(), run(reference, images + start)), start)
        moves = [
            r + math.copysign(epsilon, g) for r, g in zip(*(t.flatten().tolist() for t in (start, slope)), strict=True)
        ]
        delta = torch.tensor([min(max(move, -epsilon), epsilon) for move in moves], dtype=torch.float64)
        assert 0.3 < (delta.abs() < epsilon).double().mean() < 0.7  # where the start pointed against the gradient
        perturbed = run(reference, images + delta.view_as(images))
        loss = apart(clean.detach(), perturbed) + entropy_weight * sum(map(entropy, clean.softmax(1)))
        loss = loss / len(images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected = run(reference, images, "batch" if len(images) > limit else "source")
        torch.testing.assert_close(adapted(images), expected.detach(), rtol=1e-6, atol=1e-7)
        assert adapted.engine.last["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert loss > 1e-5
    for value, other in zip(adapted.module.state_dict().values(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-7)
    passes = 3 if entropy_weight else 2
    assert (adapted.engine.net.forwards, adapted.engine.backwards) == (4 * 4, 4 * passes)


class ReferenceROID:
    """One image at a time, in the order of the paper."""

    def __init__(self, setting: str) -> None:
        self.net, self.source = make_net(), make_net()
        adam = setting == "cifar"
        self.optimizer = torch.optim.Adam(affines(self.net), 0.02) if adam else Nesterov(affines(self.net), 2.5e-4)
        self.mean = torch.full((CLASSES,), 1 / CLASSES).double()
        self.batch = 0

    def weights(self, p: list[torch.Tensor]) -> list[float]:
        def scaled(values):
            low, high = min(values), max(values)
            return [0.0 if high == low else (value - low) / (high - low) for value in values]

        cosines = [(row @ self.mean / row.norm() / self.mean.norm()).item() for row in p]
        diversity = scaled([1 - cosine for cosine in cosines])
        certainty = scaled([-entropy(row).item() for row in p])
        average = sum(diversity) / len(diversity)
        return [0.0 if d < average else math.exp(3 * d * c) for d, c in zip(diversity, certainty, strict=True)]

    def step(self, images: torch.Tensor) -> torch.Tensor:
        logits = run(self.net, images)
        p = list(logits.softmax(1))
        weights = self.weights([row.detach() for row in p])
        kept = [n for n, weight in enumerate(weights) if weight]
        self.mean = 0.9 * self.mean + 0.1 * sum(row.detach() for row in p) / len(p)
        views = RandomJitterAffineFlip()(images, draws(self.batch))
        q = dict(zip(kept, run(self.net, views[kept]).softmax(1), strict=True))
        loss = 0
        for n in kept:
            clipped = p[n].clamp(max=0.99)
            ratio = -sum(value * (value / (1 - value)).log() for value in clipped)
            both = -0.5 * (p[n] * q[n].log()).sum() - 0.5 * (q[n] * p[n].log()).sum()
            loss = loss + weights[n] * (ratio + both)
        self.loss = loss / len(images)
        self.kept = len(kept)
        self.optimizer.zero_grad()
        self.loss.backward()
        self.optimizer.step()
        self.after()
        self.batch += 1
        return logits.detach()

    @torch.no_grad()
    def after(self) -> None:
        for weight, source in zip(affines(self.net), affines(self.source), strict=True):
            weight.copy_(0.99 * weight + 0.01 * source)


class ReferenceCMF(ReferenceROID):
    """The filter with its three steps written out."""

    def __init__(self, setting: str) -> None:
        super().__init__(setting)
        self.hidden, self.variance = affines(make_net()), 0.0
        self.q = 30.0 * sum(p.numel() for p in self.hidden) / 38400
        self.betas: list[float] = []

    @torch.no_grad()
    def after(self) -> None:
        self.variance = 0.99**2 * self.variance + self.q
        r = 1 - self.q
        beta = min(max(r / (self.variance + r), 0.89), 1.0)
        beta = 1.0 if beta >= 0.9999 else beta
        self.variance *= beta
        self.betas.append(beta)
        for weight, source, hidden in zip(affines(self.net), affines(self.source), self.hidden, strict=True):
            recovered = 0.99 * hidden + 0.01 * source
            hidden.copy_(beta * recovered + (1 - beta) * weight)
            weight.copy_(0.99 * weight + 0.01 * hidden)


@pytest.mark.parametrize("method", ["ROID", "CMF"])
@pytest.mark.parametrize(
    ("correction", "setting"), [("log", "cifar"), ("published", "cifar"), ("none", "cifar"), ("log", "imagenet")]
)
def test_roid_and_cmf(method, correction, setting):
    arguments = {"prior_correction": correction, "seed": 0, "reset": "never"}
    if setting == "cifar":
        arguments["lr"] = 0.02
    else:  # the optimizer as published
        options = {name: ROID.published[setting][name] for name in ("lr", "momentum", "nesterov")}
        arguments["optimizer"] = lambda parameters: torch.optim.SGD(parameters, **options)
    if method == "ROID":
        adapter, reference = ROID(**arguments), ReferenceROID(setting)
    else:
        adapter, reference = CMF(process_variance=30.0, **arguments), ReferenceCMF(setting)
    adapted = adapter.wrap(make_net())
    fractions = []
    for images in batches() * 2:
        logits = reference.step(images)
        prior = sum(logits.softmax(1)) / len(images)
        smooth = max(1 / len(images), 1 / CLASSES) / prior.max()
        prior = (prior + smooth) / (1 + smooth * CLASSES)
        expected = {"log": logits + prior.log(), "published": logits * prior, "none": logits}[correction]
        torch.testing.assert_close(adapted(images), expected, rtol=1e-6, atol=1e-7)
        assert adapted.engine.last["loss"] == pytest.approx(reference.loss.item(), rel=1e-6)
        assert adapted.engine.last["selected"] == pytest.approx(reference.kept / len(images))
        fractions.append(reference.kept / len(images))
    state = adapted.state_dict()["tensors"]
    torch.testing.assert_close(state["method.mean_prediction"], reference.mean, rtol=1e-6, atol=1e-8)
    for value, other in zip(affines(adapted.module), affines(reference.net), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-7)
    assert adapted.engine.net.forwards == pytest.approx(8 + sum(fractions))
    assert min(fractions) < 1
    if method == "CMF":
        assert state["method.variance"].item() == pytest.approx(reference.variance)
        assert len({round(beta, 6) for beta in reference.betas}) == 8
        hidden = torch.cat([value.data.flatten() for value in reference.hidden])
        torch.testing.assert_close(state["method.hidden"], hidden, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("reset", ["batch", "never"])
def test_memo(joint, reset):
    views, prior, steps = 3, 3.0, 2
    adapted = MEMO(lr=0.05, views=views, prior=prior, joint=joint, steps=steps, reset=reset, seed=0).wrap(make_net())
    reference = make_net()
    for index, images in enumerate(batches()):
        groups = [images] if joint else images.split(1)
        expected = []
        for episode, group in enumerate(groups):
            if reset == "batch":
                reference = make_net()
            for step in range(steps):
                made = AugMixViews()(group, draws(index, episode * steps + step), views)
                p = run(reference, made, 1 / (prior + 1)).softmax(1)
                means = [sum(p[view * len(group) + n] for view in range(views)) / views for n in range(len(group))]
                loss = sum(map(entropy, means)) / len(group)
                parameters = list(reference.parameters())
                with torch.no_grad():
                    for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                        parameter.sub_(0.05 * gradient)
            expected.append(run(reference, group, 1 / (prior + 1)).detach())
        torch.testing.assert_close(adapted(images), torch.cat(expected), **CLOSE)
        assert adapted.engine.last["loss"] == pytest.approx(loss.item(), rel=1e-8)
    check_weights(adapted.module, reference)
    engine = adapted.engine
    assert engine.net.forwards == pytest.approx(4 * (steps * views + 1))
    assert engine.backwards == pytest.approx(4 * steps * views)
    assert engine.updates == (4 * steps if joint else 20 * steps)


class TestTTAug:
    def test_against_loops(self):
        net, augmentation = make_net(), AugMixViews()
        adapted = TTAug(views=3, seed=0).wrap(make_net())
        for number, images in enumerate(batches()):
            generator, total = draws(number), 0
            for _ in range(3):
                views = augmentation(images, generator, 1)
                total = total + run(net, views, len(images) / (len(images) + 16))
            torch.testing.assert_close(adapted(images), (total / 3).detach(), **CLOSE)
            assert adapted.engine.net.forwards == 3 * (number + 1)
        check_weights(adapted.module, net)

    def test_refuses_predictions_of_pixels(self):
        dense = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1)).eval()
        with pytest.raises(ValueError, match=r"TTAug averages .* got logits of shape \(2, 5, 14, 14\)"):
            TTAug(views=2).wrap(dense)(torch.rand(2, 3, 16, 16))
