"""Probes: stretches of a stream that a method meets as any other, and of which nothing stays."""

from __future__ import annotations

import pytest
import torch

from ttalight.adapters import EATA, EMABN, SAR, DeYO, RDumb, Tent

OPEN = {"margin": 1.0, "redundancy": 1.0, "lr": 0.02}  # every sample counts


@pytest.mark.parametrize(
    "method",
    [
        lambda: Tent(lr=0.05, reset="never"),
        lambda: Tent(lr=0.05, reset=2),
        lambda: Tent(lr=0.05, prediction="after", reset="domain"),
        lambda: EMABN(steps=2, reset="never"),
        lambda: RDumb(**OPEN, reset=2),
        lambda: EATA(**OPEN, fisher="stream", fisher_samples=10, fisher_weight=100.0),
        lambda: SAR(margin=1.0, lr=0.05, recovery=1.3),
        lambda: DeYO(margin=1.0, threshold=-1.0, lr=0.05),
    ],
)
@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_probe_changes_nothing_that_follows(make_net, images, method, first):
    batches = [images, images.flip(0) * 0.5, images * 2, images[:3] - 1]
    plain, probed = method().wrap(make_net()), method().wrap(make_net())
    for index, batch in enumerate(batches):
        expected = plain(batch)
        if index == first:
            probed.engine.probe(True)
            seen = [probed(images + 3) for _ in range(2)]
            assert not torch.equal(*seen) or probed.engine.recoveries  # it adapts while it is probed
            probed.engine.probe(False)
        assert torch.equal(probed(batch), expected)
    states = [adapted.engine.capture() for adapted in (probed, plain)]
    assert states[0]["counters"] == states[1]["counters"]
    torch.testing.assert_close(*(state["tensors"] for state in states), rtol=0, atol=0, equal_nan=True)


def test_a_state_is_a_copy(make_net, images):
    adapted = Tent(lr=0.05).wrap(make_net())
    adapted(images)
    state = adapted.engine.capture()
    moment = state["optimizer"]["state"][0]["exp_avg"].clone()
    first = adapted(images * 0.5)
    assert torch.equal(state["optimizer"]["state"][0]["exp_avg"], moment)
    for _ in range(2):
        adapted.engine.restore(state)
        assert torch.equal(adapted(images * 0.5), first)
