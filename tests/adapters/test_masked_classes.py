"""A network that masks classes adapts as one whose classifier does not have them."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from support.methods import QUICK, methods
from torch import nn

from ttalight.models.label_space import select_classes

LEFT, MASKED = 5, 5
#: With margins of ln 10 all images would count; with margins of ln 5 some do.
OPEN: dict[str, dict] = {
    **QUICK,
    "ETA": {"margin": 0.19, "redundancy": 1.0},
    "EATA": {"margin": 0.19, "redundancy": 1.0, "fisher": "stream"},
    "RDumb": {"margin": 0.19, "redundancy": 1.0},
    "SAR": {"margin": 0.19},
    "DeYO": {"margin": 0.19, "threshold": -1.0},
    "NCTTA": {"margin": 0.19},
    "MoETTA": {"margin": 0.19},
    **{name: {"memory": 6} for name in ("RoTTA", "NOTE")},
}
METHODS = methods(OPEN)

pytestmark = pytest.mark.filterwarnings("ignore:.*source")


class Masked(nn.Module):
    """Fills the logits of the last classes with a value, or adds it."""

    def __init__(self, net: nn.Module, value: float, adds: bool = False) -> None:
        super().__init__()
        self.net, self.value, self.adds = net, value, adds

    def forward(self, images):
        logits = self.net(images)
        last = torch.arange(LEFT + MASKED) >= LEFT
        return logits + self.value * last if self.adds else logits.masked_fill(last, self.value)


class Cut(nn.Module):
    """Has a classifier without the last classes."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        net[9] = select_classes(net[9], range(LEFT))

    def forward(self, images):
        return self.net(images)


MASKS = {
    "minus infinity": partial(Masked, value=-torch.inf),
    "lowest of float32": partial(Masked, value=torch.finfo(torch.float32).min),
    "-1e9 added": partial(Masked, value=-1e9, adds=True),
    "-1e4": partial(Masked, value=-1e4),
}


@pytest.fixture
def run(make_net):
    def run(method, kind, batches):
        net = make_net(classes=LEFT + MASKED)
        net[9].weight.data *= 8  # predictions of which some are certain
        adapted = method(seed=0).wrap(kind(net))
        logits = [adapted(batch) for batch in batches]
        return logits, adapted.engine

    return run


@pytest.mark.parametrize("name", METHODS)
def test_masked_classes_are_as_classes_cut_off(name, run, images):
    images = (images - 0.5) / 2  # in [0, 1]
    batches = [images, images.flip(0) * 0.5, images[:3]]
    cut, other = run(METHODS[name], Cut, batches)
    assert not other.net.parameters or other.updates
    assert "margin" not in OPEN.get(name, {}) or 0 < other.last["selected"] < 1
    for mask, kind in MASKS.items():
        masked, engine = run(METHODS[name], kind, batches)
        for ours, expected in zip(masked, cut, strict=True):
            assert (ours[:, LEFT:] <= ours[:, :LEFT].amin() - 1e3).all(), mask
            torch.testing.assert_close(ours[:, :LEFT], expected, rtol=1e-7, atol=1e-9, msg=f"{{}} ({mask})".format)
        assert (engine.updates, engine.skipped) == (other.updates, other.skipped), mask
        assert engine.last == pytest.approx(other.last, rel=1e-6), mask
