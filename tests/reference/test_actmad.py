"""ActMAD against plain loops over its formulas, in float64 over several batches."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support.networks import small_net
from torch import nn

from ttalight.adapters import ActMAD

NORMS = (1, 4)
LR, MOMENTUM, DECAY = 1e-2, 0.9, 5e-4


def pictures(count: int, seed: int) -> torch.Tensor:
    return torch.rand(count, 3, 10, 10, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def outputs(net: nn.Sequential, images: torch.Tensor) -> list[torch.Tensor]:
    found, x = [], images
    for number, layer in enumerate(net):
        x = layer(x)
        if number in NORMS:
            found.append(x)
    return found


def mean_and_variance(values: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    mean = sum(values) / len(values)
    return mean, sum((value - mean) ** 2 for value in values) / (len(values) - 1)


def position_moments(output: torch.Tensor) -> tuple[list, list]:
    """Means and variances of each position in turn."""
    rows = [image.flatten() for image in output]
    pairs = [mean_and_variance([row[place] for row in rows]) for place in range(len(rows[0]))]
    return [mean for mean, _ in pairs], [var for _, var in pairs]


def channel_moments(output: torch.Tensor) -> tuple[list, list]:
    pairs = [mean_and_variance(list(output[:, channel].flatten())) for channel in range(output.shape[1])]
    return [mean for mean, _ in pairs], [var for _, var in pairs]


def distance(found: list, source: list) -> torch.Tensor:
    layers = []
    for own, other in zip(found, source, strict=True):
        for mine, theirs in zip(own, other, strict=True):
            layers.append(sum(abs(a - b) for a, b in zip(mine, theirs, strict=True)) / len(mine))
    return sum(layers) / 2


@pytest.mark.filterwarnings("ignore:ActMAD found no source images")
@pytest.mark.parametrize("given", ["positions", "channels"])
def test_steps(given):
    images, stream = pictures(11, 1), [pictures(5, seed) * 0.5 for seed in (2, 3, 4)]
    reference = small_net()
    if given == "positions":
        source, moments = [images[:4], images[4:]], position_moments
        with torch.no_grad():
            expected = [moments(output) for output in outputs(reference, images)]
    else:
        source, moments = None, channel_moments
        expected = [
            (list(net.bias.detach().clone()), list(net.weight.detach() ** 2)) for net in (reference[1], reference[4])
        ]
    adapted = ActMAD(source=source, reset="never").wrap(small_net())
    buffers = {name: torch.zeros_like(value) for name, value in reference.named_parameters()}
    for number, batch in enumerate(stream):
        loss = distance([moments(output) for output in outputs(reference, batch)], expected)
        gradients = torch.autograd.grad(loss, list(reference.parameters()), allow_unused=True)
        with torch.no_grad():
            for (name, value), gradient in zip(reference.named_parameters(), gradients, strict=True):
                if gradient is None:
                    continue
                gradient = gradient + DECAY * value
                buffers[name] = gradient if number == 0 else MOMENTUM * buffers[name] + gradient
                value -= LR * (gradient + MOMENTUM * buffers[name])
        logits = adapted(batch)
        assert adapted.engine.last["loss"] == pytest.approx(loss.item(), rel=1e-9)
        torch.testing.assert_close(logits, reference(batch).detach(), rtol=1e-9, atol=1e-9)
    for mine, theirs in zip(adapted.module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


def test_a_source_of_the_stream_has_no_distance():
    images = pictures(8, 5)
    adapted = ActMAD(source=[images[:3], images[3:]], optimizer=lambda group: torch.optim.SGD(group, lr=0.0)).wrap(
        small_net()
    )
    adapted(images)
    assert math.isclose(adapted.engine.last["loss"], 0, abs_tol=1e-12)


def test_activations_in_place_and_fused_layers():
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = copy.deepcopy(small_net())
            self.net[2], self.net[5] = nn.ReLU(inplace=True), nn.ReLU(inplace=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

    losses = []
    for net in (small_net(), InPlace()):
        adapted = ActMAD(source=[pictures(6, 1)]).wrap(net)
        adapted(pictures(5, 2))
        losses.append(adapted.engine.last["loss"])
    assert losses[0] == losses[1]

    from timm.layers import BatchNormAct2d

    fused = small_net()
    for place in NORMS:
        layer = BatchNormAct2d(6).double().eval()
        layer.load_state_dict(fused[place].state_dict())
        fused[place], fused[place + 1] = layer, nn.Identity()
    adapted = ActMAD(source=[pictures(6, 1)]).wrap(fused)
    adapted(pictures(5, 2))
    assert adapted.engine.last["loss"] == pytest.approx(losses[0], rel=1e-12)
