"""NCTTA against a loop over samples, and its edges."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from ttalight.adapters import NCTTA


@pytest.fixture
def sure_net(make_net):
    """A network that is sure of some images and unsure of others."""
    net = make_net(classes=5)
    net[-1].weight.data *= 20
    return net


@pytest.fixture
def images():
    """Images that differ in what is on them, so that entropies do."""
    generator = torch.Generator().manual_seed(1)
    patches = 3 * torch.randn(6, 3, 3, 3, generator=generator, dtype=torch.float64)
    return nn.functional.interpolate(patches, size=(32, 32), mode="bilinear")


@pytest.fixture
def batches(images):
    return [images, images.flip(0) * 0.5, images[:3] - 0.3, images[:2]]


def batch_statistics(net):
    net = copy.deepcopy(net)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.train()
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
    return net


def plain_losses(features, logits, rows, margin, settings):
    """Weights and losses, sample by sample and class by class."""
    top_k, share, scale = settings
    weights, losses = [], []
    for h, values in zip(features, logits, strict=True):
        p = [value.exp() / sum(v.exp() for v in values) for value in values]
        entropy = -sum(q * q.log() for q in p)
        h = h / h.norm()
        s = [h @ row / row.norm() for row in rows]
        chosen = sorted(range(len(p)), key=lambda k: -p[k].item())[:top_k]
        distances = torch.stack([1 - s[k] for k in chosen])
        deviations = distances - distances.mean()
        geometric = (-deviations / (deviations.square().mean().sqrt() + 1e-8)).exp()
        mass = sum(p[k] for k in chosen)
        targets = {k: (1 - share) * geometric[i] / geometric.sum() + share * p[k] / mass for i, k in enumerate(chosen)}
        aligned = -torch.log(sum(targets[k] * s[k].exp() for k in chosen) / sum(value.exp() for value in s))
        near = (h - rows[chosen[0]] / rows[chosen[0]].norm()).norm()
        weights.append((math.exp(margin - entropy.item()) + 5 / (1 + near.item())) * (entropy.item() < margin))
        losses.append(entropy + scale * aligned)
    return weights, losses


@pytest.mark.parametrize(
    ("arguments", "settings"),
    [
        ({"margin": 0.2}, (10, 0.3, 5.0)),
        ({"margin": 0.2, "top_k": 3, "share": 0.5, "scale": 2.0}, (3, 0.5, 2.0)),
        ({"margin": 0.2, "top_k": 2}, (2, 0.3, 5.0)),
        ({"margin": 0.4 * math.log(1000) / math.log(5)}, (10, 0.3, 5.0)),
    ],
)
def test_against_a_plain_loop(sure_net, batches, arguments, settings):
    reference = batch_statistics(sure_net)
    affines = [p for m in reference.modules() if isinstance(m, nn.BatchNorm2d) for p in m.parameters()]
    optimizer = torch.optim.SGD(affines, lr=0.01, momentum=0.9, nesterov=True)
    rows = reference[-1].weight.detach()
    margin = arguments["margin"] * math.log(5)
    adapted = NCTTA(lr=0.01, **arguments).wrap(sure_net)
    fractions = []
    for batch in batches:
        features = reference[:-1](batch)
        logits = reference[-1](features)
        weights, losses = plain_losses(features, logits, rows, margin, settings)
        torch.testing.assert_close(adapted(batch), logits.detach(), rtol=1e-8, atol=1e-8)
        kept = [weight * loss for weight, loss in zip(weights, losses, strict=True) if weight]
        fractions.append(len(kept) / len(batch))
        assert adapted.engine.last["selected"] == pytest.approx(fractions[-1])
        if kept:
            loss = sum(kept) / len(kept)
            assert adapted.engine.last["loss"] == pytest.approx(loss.item(), rel=1e-9)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for own, expected in zip((sure_net[1], sure_net[4]), (reference[1], reference[4]), strict=True):
            torch.testing.assert_close(own.weight.data, expected.weight.data, rtol=1e-8, atol=1e-10)
            torch.testing.assert_close(own.bias.data, expected.bias.data, rtol=1e-8, atol=1e-10)
    if arguments["margin"] > 1:
        assert fractions == [1, 1, 1, 1]  # the margin of 1000 classes never filters 5
    else:
        assert any(0 < fraction < 1 for fraction in fractions)  # the filter had something to do


@pytest.mark.parametrize("kept", [1e-9, 1.0])
def test_samples_are_dropped_not_the_run(make_net, images, kept):
    adapted = NCTTA(margin=kept).wrap(make_net())
    before = {name: value.clone() for name, value in adapted.module.state_dict().items()}
    for batch in (images, images[:1]):
        assert adapted(batch).isfinite().all()
    moved = any(not torch.equal(value, before[name]) for name, value in adapted.module.state_dict().items())
    assert moved == (kept == 1.0)
    assert adapted.engine.skipped == (0 if moved else 2)


def test_rows_stay_those_of_the_source(sure_net, images):
    source = sure_net[-1].weight.detach().clone()
    adapted = NCTTA(lr=0.05, margin=1.0, parameters="all").wrap(sure_net)
    adapted(images)
    assert not torch.equal(sure_net[-1].weight, source)
    adapted.to("cpu")
    expected = torch.nn.functional.normalize(source, dim=1)
    torch.testing.assert_close(adapted.engine.method._rows, expected)


def test_optimizer_is_the_published_one(sure_net, images):
    adapted = NCTTA().wrap(sure_net)
    adapted(images)
    group = adapted.engine.net.optimizer.param_groups[0]
    assert (group["lr"], group["momentum"], group["nesterov"]) == (1e-3, 0.9, True)


def test_dense_outputs_are_refused(images):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 5, 1)).double()
    with pytest.raises(ValueError, match=r"one feature an image, got dense logits \(6, 5, 30, 30\)"):
        NCTTA().wrap(net)(images)


def test_protocol_tells_runs_apart():
    assert NCTTA(top_k=3).protocol() != NCTTA().protocol()
