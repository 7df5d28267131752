"""Tent, RPL, STAG, ETA, EATA, SAR and DeYO against slow references written from their formulas, sample by sample."""

from __future__ import annotations

import copy
import math
from functools import partial
from typing import NamedTuple

import pytest
import timm
import torch
from torch import nn

from ttalight.adapters import EATA, ETA, RPL, SAR, STAG, DeYO, Tent
from ttalight.losses import decoupled_entropy
from ttalight.seeding import derive_seed


class Step(NamedTuple):
    """State after a batch."""

    logits: torch.Tensor
    loss: float | None
    kept: int
    state: object


@pytest.fixture
def net() -> nn.Sequential:
    """Two convolutions with a BatchNorm layer each; its predictions lie between uncertain and sure."""
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, stride=2), nn.BatchNorm2d(6), nn.ReLU(),
        nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 4),
    )  # fmt: skip
    with torch.no_grad():
        for layer in (net[1], net[4]):
            nn.init.uniform_(layer.weight, 0.5, 1.5)
            nn.init.normal_(layer.bias)
        net[8].weight -= net[8].weight.mean(1, keepdim=True)
        net[8].weight *= 12
    return net.double().eval()


@pytest.fixture
def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    base = torch.randn(9, 3, 1, 1, generator=generator, dtype=torch.float64)
    base = base + torch.randn(9, 3, 12, 12, generator=generator, dtype=torch.float64)
    base[:4] *= 3
    return [base, base.flip(0) * 0.3 + 1, base[:1], base[2:5], base.roll(3, 0) * 2]


def on_batch_statistics(net: nn.Sequential) -> nn.Sequential:
    net = copy.deepcopy(net)
    for layer in net.modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.train()
            layer.track_running_stats, layer.running_mean, layer.running_var = False, None, None
    return net


def entropy_of(row: torch.Tensor) -> torch.Tensor:
    shifted = row - max(row.tolist())
    total = sum(value.exp() for value in shifted)
    return -sum(value.exp() / total * (value - total.log()) for value in shifted)


def probabilities(row: torch.Tensor) -> list[float]:
    top = max(row.tolist())
    exponentials = [math.exp(value - top) for value in row.tolist()]
    return [value / sum(exponentials) for value in exponentials]


def cosine(u: list[float], v: list[float]) -> float:
    dot = sum(a * b for a, b in zip(u, v, strict=True))
    return dot / math.sqrt(sum(a * a for a in u)) / math.sqrt(sum(b * b for b in v))


def affines(net: nn.Sequential) -> list[nn.Parameter]:
    return [parameter for layer in (net[1], net[4]) for parameter in (layer.weight, layer.bias)]


def agrees(adapted, images: torch.Tensor, step: Step) -> None:
    updates = adapted.engine.updates
    torch.testing.assert_close(adapted(images), step.logits, rtol=1e-8, atol=1e-8)
    last = adapted.engine.last
    assert last["selected"] * len(images) == pytest.approx(step.kept)
    assert adapted.engine.updates - updates == (step.kept > 0)
    if step.loss is not None:
        assert last["loss"] == pytest.approx(step.loss, rel=1e-8)


def sgd(lr: float):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def same_affines(net: nn.Sequential, reference: nn.Sequential) -> None:
    for found, expected in zip(affines(net), affines(reference), strict=True):
        torch.testing.assert_close(found.data, expected.data, rtol=1e-8, atol=1e-10)


# -- Tent, RPL and STAG: every sample counts alike


def tent_loss(net: nn.Sequential, features: torch.Tensor) -> torch.Tensor:
    return entropy_of(net[8](features))


def come_loss(net: nn.Sequential, features: torch.Tensor) -> torch.Tensor:
    row = net[8](features)
    length = sum(value**2 for value in row).sqrt()
    evidence = [(value / length * length.item()).exp() for value in row]
    total = sum(evidence) + 4
    shares = [*(value / total for value in evidence), 4 / total]
    return -sum(share * share.log() for share in shares)


def rpl_loss(net: nn.Sequential, features: torch.Tensor, q: float = 0.8) -> torch.Tensor:
    row = net[8](features)
    likely = max(range(4), key=row.tolist().__getitem__)
    return (1 - (row[likely].exp() / sum(value.exp() for value in row)) ** q) / q


def entropy_slope(logits: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """The gradient of the entropy by the feature: minus the sum of p_j (l_j - mean l) w_j."""
    total = sum(value.exp() for value in logits)
    p = [value.exp() / total for value in logits]
    mean = sum(share * value for share, value in zip(p, logits, strict=True))
    return -sum(share * (value - mean) * row for share, value, row in zip(p, logits, rows, strict=True))


def stag_loss(net: nn.Sequential, features: torch.Tensor, weight: float = 0.7) -> torch.Tensor:
    rows, logits = net[8].weight.detach(), net[8](features)
    likely = max(range(4), key=logits.tolist().__getitem__)
    gradient = entropy_slope(logits, rows)
    anchor = entropy_slope(torch.stack([rows[likely] @ row for row in rows]), rows)
    lengths = math.sqrt(sum(value**2 for value in anchor.tolist())) * sum(value**2 for value in gradient).sqrt()
    return entropy_of(logits) + weight * (1 - sum(g * a for g, a in zip(gradient, anchor, strict=True)) / lengths)


@pytest.mark.parametrize(("steps", "prediction"), [(1, "before"), (1, "after"), (3, "before"), (3, "after")])
@pytest.mark.parametrize(
    ("method", "loss_of"),
    [
        (Tent, tent_loss),
        (partial(Tent, entropy="opinion"), come_loss),
        (RPL, rpl_loss),
        (partial(Tent, terms=[STAG(0.7)]), stag_loss),
    ],
)
def test_methods_that_keep_every_sample(net, batches, method, loss_of, steps, prediction):
    net[8].weight.data *= 0.25  # gradients that STAG would leave out as too short have no place in its reference
    adapted = method(lr=0.02, steps=steps, prediction=prediction).wrap(copy.deepcopy(net))
    reference = on_batch_statistics(net)
    optimizer = torch.optim.Adam(affines(reference), lr=0.02)
    for images in batches:
        for _ in range(steps):
            features = reference[:8](images)
            loss = sum(loss_of(reference, vector) for vector in features) / len(images)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        scored = reference(images) if prediction == "after" else reference[8](features)
        torch.testing.assert_close(adapted(images), scored.detach(), rtol=1e-7, atol=1e-8)
        assert adapted.engine.last["loss"] == pytest.approx(loss.item(), rel=1e-7)
        same_affines(adapted.module, reference)
    assert adapted.engine.updates == adapted.engine.backwards == steps * len(batches)
    moved = [
        name for name, value in adapted.module.state_dict().items() if not torch.equal(value, net.state_dict()[name])
    ]
    assert moved == ["1.weight", "1.bias", "4.weight", "4.bias"]


def test_the_decoupled_entropy_has_the_running_mean_of_predictions(net, batches):
    adapted = Tent(lr=0.02, entropy="decoupled").wrap(copy.deepcopy(net))
    reference, mean = on_batch_statistics(net), [0.25] * 4
    optimizer = torch.optim.Adam(affines(reference), lr=0.02)
    for images in batches:
        logits = reference(images)
        predictions = [probabilities(row) for row in logits]
        mean = [0.9 * mean[c] + 0.1 * sum(p[c] for p in predictions) / len(images) for c in range(4)]
        loss = sum(decoupled_entropy(row[None], torch.tensor(mean, dtype=row.dtype))[0] for row in logits) / len(images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(adapted(images), logits.detach(), rtol=1e-7, atol=1e-8)
        same_affines(adapted.module, reference)


# -- ETA and EATA


def fisher_of(net: nn.Sequential, batches: list[torch.Tensor]) -> list[torch.Tensor]:
    """The mean over batches of the squared gradient of the cross-entropy to the likeliest class."""
    total = [torch.zeros_like(parameter) for parameter in affines(net)]
    for images in batches:
        loss = 0
        for row in net(images):
            likely = max(range(4), key=row.tolist().__getitem__)
            loss = loss - (row[likely] - row.exp().sum().log()) / len(images)
        for sum_, gradient in zip(total, torch.autograd.grad(loss, affines(net)), strict=True):
            sum_ += gradient**2
    return [sum_ / len(batches) for sum_ in total]


def eta_reference(net, batches, lr, margin, redundancy, weight=0.0, fisher=None):
    """Run ETA; with a function that gives the Fisher information for the number of a batch, EATA."""
    net = on_batch_statistics(net)
    source = [parameter.detach().clone() for parameter in affines(net)]
    optimizer = torch.optim.SGD(affines(net), lr=lr, momentum=0.9)
    mean: list[float] | None = None
    for number, images in enumerate(batches):
        logits = net(images)
        limit = margin * math.log(4)
        total, kept = 0.0, []
        for row in logits:
            h, p = entropy_of(row), probabilities(row)
            if h.item() < limit and (mean is None or abs(cosine(p, mean)) < redundancy):
                total = total + math.exp(limit - h.item()) * h
                kept.append(p)
        loss = None
        if kept:
            loss = total / len(kept)
            if fisher is not None:
                drifts = [(w - s) ** 2 * f for w, s, f in zip(affines(net), source, fisher(number), strict=True)]
                loss = loss + weight * sum(drift.sum() for drift in drifts)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            new = [sum(p[c] for p in kept) / len(kept) for c in range(4)]
            mean = new if mean is None else [0.9 * old + 0.1 * value for old, value in zip(mean, new, strict=True)]
        yield net, Step(logits.detach(), None if loss is None else loss.item(), len(kept), mean)


def test_eta(net, batches):
    adapted = ETA(margin=0.6, redundancy=0.95, optimizer=sgd(0.05)).wrap(copy.deepcopy(net))
    confident = sum(step.kept for _, step in eta_reference(net, batches, 0.05, 0.6, 2.0))
    kept = 0
    for images, (reference, step) in zip(batches, eta_reference(net, batches, 0.05, 0.6, 0.95), strict=True):
        agrees(adapted, images, step)
        kept += step.kept
        mean = adapted.engine.capture()["tensors"]["method.mean_prediction"]
        torch.testing.assert_close(mean, torch.tensor(step.state, dtype=torch.float64))
        same_affines(adapted.module, reference)
    assert 0 < kept < confident < sum(map(len, batches))  # both filters had something to do


@pytest.mark.parametrize("samples", [18, 13, 9, 4])
def test_eata_with_source_images(net, batches, samples):
    source = [batches[4] * 0.8, batches[1] + 0.5]
    read = [images[: samples - 9 * index] for index, images in enumerate(source[: 1 + (samples > 9)])]
    fisher = fisher_of(on_batch_statistics(net), read)
    adapted = EATA(
        source=[(images, "a label") for images in source], fisher_samples=samples, fisher_weight=30.0, margin=0.6,
        redundancy=0.95, optimizer=sgd(0.05),
    ).wrap(copy.deepcopy(net))  # fmt: skip
    expected = eta_reference(net, batches, 0.05, 0.6, 0.95, 30.0, lambda number: fisher)
    for images, (reference, step) in zip(batches, expected, strict=True):
        agrees(adapted, images, step)
        same_affines(adapted.module, reference)
    tensors = adapted.engine.capture()["tensors"]
    torch.testing.assert_close(tensors["method.fisher"], torch.cat([value.flatten() for value in fisher]))
    assert adapted.engine.net.forwards == adapted.engine.backwards == len(read) + len(batches)


def test_eata_with_the_stream(net, batches):
    source = on_batch_statistics(net)
    counted = [batches[0], batches[1][:4]]  # 13 images

    def fisher(number):
        return fisher_of(source, counted[: number + 1])

    adapted = EATA(
        fisher="stream", fisher_samples=13, fisher_weight=30.0, margin=0.6, redundancy=0.95, optimizer=sgd(0.05)
    ).wrap(copy.deepcopy(net))
    expected = eta_reference(net, batches, 0.05, 0.6, 0.95, 30.0, fisher)
    for images, (reference, step) in zip(batches, expected, strict=True):
        agrees(adapted, images, step)
        same_affines(adapted.module, reference)
    assert adapted.engine.net.forwards == adapted.engine.backwards == 2 + len(batches)


# -- SAR


def sar_reference(net, batches, lr, margin, rho, recovery, free=affines, classes=4):
    net = on_batch_statistics(net)
    weights = free(net)
    source = [weight.detach().clone() for weight in weights]
    velocity = [torch.zeros_like(weight) for weight in weights]
    mean, limit = None, margin * math.log(classes)
    for images in batches:
        logits = net(images)
        first = [i for i, row in enumerate(logits) if entropy_of(row).item() < limit]
        loss, second, recovered = None, [], False
        if first:
            gradients = torch.autograd.grad(sum(entropy_of(logits[i]) for i in first) / len(first), weights)
            length = math.sqrt(sum(value**2 for gradient in gradients for value in gradient.tolist()))
            with torch.no_grad():
                start = [weight.clone() for weight in weights]
                for weight, gradient in zip(weights, gradients, strict=True):
                    weight += rho * gradient / (length + 1e-12)
            climbed = net(images)
            second = [i for i in first if entropy_of(climbed[i]).item() < limit]
            if second:
                loss = sum(entropy_of(climbed[i]) for i in second) / len(second)
                gradients = torch.autograd.grad(loss, weights)
                mean = loss.item() if mean is None else 0.9 * mean + 0.1 * loss.item()
            with torch.no_grad():
                for index, weight in enumerate(weights):
                    weight.copy_(start[index])
                    if second:
                        velocity[index] = 0.9 * velocity[index] + gradients[index]
                        weight -= lr * velocity[index]
                recovered = mean is not None and mean < recovery
                if recovered:
                    mean = None
                    for index, weight in enumerate(weights):
                        weight.copy_(source[index])
                        velocity[index].zero_()
        loss = None if loss is None else loss.item()
        yield net, Step(logits.detach(), loss, len(second), (mean, recovered))


@pytest.mark.parametrize(("parameters", "recovery"), [("norm", 0.0), ("norm", 0.5), (None, 0.0), (None, 0.5)])
def test_sar(net, batches, parameters, recovery):
    adapted = SAR(
        margin=0.6, rho=0.5, recovery=recovery, lr=0.05, parameters=parameters, reset="never"
    ).wrap(copy.deepcopy(net))  # fmt: skip
    batches = batches * 2
    recoveries, kept = 0, []
    for images, (reference, step) in zip(batches, sar_reference(net, batches, 0.05, 0.6, 0.5, recovery), strict=True):
        agrees(adapted, images, step)
        mean, recovered = step.state
        found = adapted.engine.capture()["tensors"]["method.mean_entropy"].item()
        assert found == pytest.approx(math.nan if mean is None else mean, nan_ok=True)
        recoveries += recovered
        assert adapted.engine.recoveries == recoveries
        same_affines(adapted.module, reference)
        kept.append(step.kept)
    assert 0 < sum(kept) < sum(map(len, batches))
    assert (0 < recoveries < len(batches)) == (recovery > 0)
    assert adapted.engine.net.forwards == adapted.engine.backwards == 2 * len(batches)


def public_affines(net: nn.Module) -> list[nn.Parameter]:
    """Parameters that the public code of SAR and DeYO adapts, by its list of names."""
    chosen = []
    for name, module in net.named_modules():
        if any(part in name for part in ("layer4", "blocks.9", "blocks.10", "blocks.11", "norm.")) or name == "norm":
            continue
        if isinstance(module, (nn.BatchNorm2d, nn.LayerNorm, nn.GroupNorm)):
            chosen += [module.weight, module.bias]
    return chosen


@pytest.mark.parametrize("name", ["cifar_resnet20", "cifar_resnet26_gn"])
def test_sar_adapts_parameters_of_the_public_code(name):
    torch.manual_seed(0)
    net = timm.create_model(name).double().eval()
    net.get_classifier().weight.data *= 5
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    adapted = SAR(margin=1.0, recovery=0.0, lr=0.05).wrap(copy.deepcopy(net))
    steps = sar_reference(net, [images, images.flip(0) * 0.5], 0.05, 1.0, 0.05, 0.0, public_affines, classes=10)
    for batch, (reference, step) in zip([images, images.flip(0) * 0.5], steps, strict=True):
        agrees(adapted, batch, step)
        for found, expected in zip(adapted.module.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(found.data, expected.data, rtol=1e-8, atol=1e-10)
    free = [found for found in adapted.module.parameters() if found.requires_grad]
    assert len(free) == len(public_affines(adapted.module)) == (38 if name == "cifar_resnet20" else 48)


# -- DeYO


def shuffled(image: torch.Tensor, order: list[int]) -> torch.Tensor:
    """Put the 4 x 4 patches of 3 x 3 pixels of an image into an order."""
    result = torch.empty_like(image)
    for place, patch in enumerate(order):
        y, x, from_y, from_x = 3 * (place // 4), 3 * (place % 4), 3 * (patch // 4), 3 * (patch % 4)
        result[:, y : y + 3, x : x + 3] = image[:, from_y : from_y + 3, from_x : from_x + 3]
    return result


def deyo_reference(net, batches, lr, margin, weight_margin, threshold):
    net = on_batch_statistics(net)
    optimizer = torch.optim.SGD(affines(net), lr=lr, momentum=0.9)
    for number, images in enumerate(batches):
        generator = torch.Generator().manual_seed(derive_seed(0, "adapt", 0, number, 0))
        orders = torch.rand(len(images), 16, generator=generator).argsort(1).tolist()
        logits = net(images)
        confident = [i for i, row in enumerate(logits) if entropy_of(row).item() < margin * math.log(4)]
        total, kept = 0.0, 0
        if confident:
            with torch.no_grad():
                changed = net(torch.stack([shuffled(images[i], orders[i]) for i in confident]))
            for i, row in zip(confident, changed, strict=True):
                p, q, h = probabilities(logits[i]), probabilities(row), entropy_of(logits[i])
                likely = p.index(max(p))
                drop = p[likely] - q[likely]
                if drop > threshold:
                    kept += 1
                    total = total + h * (math.exp(weight_margin * math.log(4) - h.item()) + math.exp(drop))
        if kept:
            optimizer.zero_grad()
            (total / kept).backward()
            optimizer.step()
        yield net, Step(logits.detach(), (total / kept).item() if kept else None, kept, len(confident))


def test_deyo(net, batches):
    adapted = DeYO(margin=0.7, weight_margin=0.5, threshold=0.2, lr=0.05, seed=0).wrap(copy.deepcopy(net))
    kept = confident = forwards = 0
    for images, (reference, step) in zip(batches, deyo_reference(net, batches, 0.05, 0.7, 0.5, 0.2), strict=True):
        agrees(adapted, images, step)
        same_affines(adapted.module, reference)
        kept += step.kept
        confident += step.state
        forwards += 1 + step.state / len(images)
    assert 0 < kept < confident < sum(map(len, batches))  # both filters had something to do
    assert adapted.engine.net.forwards == pytest.approx(forwards)
    assert adapted.engine.backwards == len(batches)
