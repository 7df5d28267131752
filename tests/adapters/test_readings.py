"""Predictions after fewer steps, read from one run."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ttalight.adapters import EMABN, TestTimeTraining


class Task(nn.Module):
    """A network with an auxiliary loss on noisy views."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images):
        return self.net(images)

    def auxiliary_loss(self, images, generator):
        noise = torch.randn(images.shape, generator=generator, dtype=images.dtype)
        return (self.net(images + 0.1 * noise) ** 2).mean()

    def adaptable_parameters(self):
        return list(self.net.parameters())


@pytest.mark.parametrize(
    ("method", "arguments"),
    [
        (TestTimeTraining, {"lr": 0.01}),
        (TestTimeTraining, {"lr": 0.01, "norm": "batch"}),
        (EMABN, {"reset": "batch"}),
    ],
)
def test_readings_are_the_predictions_of_shorter_runs(make_net, images, method, arguments):
    adapted = method(steps=4, read_at=[3, 0, 1], **arguments).wrap(Task(make_net()))
    batches = [images, images.flip(0) * 0.5, images[:3]]
    seen = []
    for batch in batches:
        logits = adapted(batch)
        seen.append({**adapted.engine.net.readings, 4: logits})
    assert list(seen[0]) == [0, 1, 3, 4]
    for steps in seen[0]:
        shorter = method(steps=steps, **arguments).wrap(Task(make_net()))
        for batch, found in zip(batches, seen, strict=True):
            assert torch.equal(shorter(batch), found[steps])
    assert not torch.equal(seen[0][0], seen[0][1])


@pytest.mark.parametrize("read_at", [[4], [-1]])
def test_says_which_readings_there_can_be(read_at):
    with pytest.raises(ValueError, match=r"read_at takes numbers of steps from 0 to 3 .*got \["):
        TestTimeTraining(steps=4, read_at=read_at)


def test_readings_need_a_reset_every_batch():
    with pytest.raises(ValueError, match="read_at needs reset='batch', got reset='domain'"):
        EMABN(steps=4, read_at=[1])
