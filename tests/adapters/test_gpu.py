"""Steps on a CUDA device: the numbers of the CPU, and one wait of the host."""

from __future__ import annotations

import pytest
import torch

from ttalight.adapters import ETA, SAR, TIPI, Tent
from ttalight.engine.adaptive_network import Guard

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
METHODS = {
    "Tent": lambda: Tent(lr=0.01),
    "ETA": lambda: ETA(lr=0.01, margin=1.0, redundancy=1.0),
    "SAR": lambda: SAR(lr=0.01, margin=1.0, recovery=0.0),
}


@pytest.mark.parametrize("method", METHODS)
def test_gives_the_numbers_of_the_cpu(method, make_net, images):
    own, there = METHODS[method]().wrap(make_net()), METHODS[method]().wrap(make_net().cuda())
    for batch in (images, images.flip(0) * 0.5):  # in double precision
        torch.testing.assert_close(there(batch.cuda()).cpu(), own(batch), rtol=1e-6, atol=1e-6)
    assert there.engine.updates == own.engine.updates == 2


@pytest.mark.parametrize("make", [*METHODS.values(), TIPI])
def test_waits_for_the_device_once(make, make_net, images, monkeypatch):
    """A step reads its numbers and all checks together; whatever else waits for the device is an error here."""
    adapted, images, reads = make().wrap(make_net().float().cuda()), images.float().cuda(), []
    read = Guard.read

    def allowed(guard, values=()):
        torch.cuda.set_sync_debug_mode("default")
        try:
            reads.append(len(values))
            return read(guard, values)
        finally:
            torch.cuda.set_sync_debug_mode("error")

    adapted(images)
    adapted(images)
    monkeypatch.setattr(Guard, "read", allowed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        adapted(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert reads
