"""Finite-value checks, read together with the numbers of a step."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from support.images import with_nan
from torch import nn

from ttalight.adapters import EMABN, ETA, T3A, Tent

pytestmark = pytest.mark.filterwarnings("ignore:.*runs with its settings for CIFAR", "ignore:.*source")


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(3)
    return torch.rand(7, 6, 3, 16, 16, generator=generator, dtype=torch.float64)


def weights_of(adapted):
    return torch.cat([value.flatten() for value in adapted.engine.net.parameters])


def test_methods_see_finite_pixels_once_a_batch(make_net, batches):
    class Counts(Tent):
        calls = 0

        def adapt(self, net, images):
            self.calls += 1
            assert images.isfinite().all()
            return super().adapt(net, images)

    method = Counts(reset="never")
    adapted = method.wrap(make_net())
    adapted(batches[0])
    with pytest.raises(ValueError, match="2 of 6 images in batch 1 of visit 0"):
        adapted(with_nan(batches[1]))
    assert method.calls == 2


def test_other_errors_of_a_method_stay(make_net, batches):
    class Fails(Tent):
        def adapt(self, net, images):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        Fails().wrap(make_net())(batches[0])


def test_spoiled_model_is_restored_to_source(make_net, batches):
    adapted = Tent(lr=0.05, reset="never").wrap(make_net())
    adapted(batches[0])
    with torch.no_grad():
        adapted.engine.net.parameters[0].fill_(float("nan"))
    with pytest.warns(UserWarning, match="has left weights or statistics that are not finite, before batch 1"):
        logits = adapted(batches[1])
    assert torch.equal(logits, make_net().eval()(batches[1]))
    assert all(map(torch.equal, adapted.engine.net.parameters, adapted.engine.net.source))
    assert not adapted.engine.net.optimizer.state
    assert (adapted.engine.recoveries, adapted.engine.updates) == (1, 1)


def test_unchanged_weights_are_not_checked_again(make_net, batches):
    class Bright(Tent):
        def weigh(self, net, images, outputs):
            return (images.mean((1, 2, 3)) > 0.3).to(images.dtype)

    adapted = Bright(reset="never").wrap(make_net())
    guard = adapted.engine.net.guard
    adapted(batches[0])
    assert guard.moved
    adapted(batches[1] * 0.1)
    assert not guard.moved


def test_pixels_too_large_for_a_sum_are_adapted_to():
    net = nn.Sequential(nn.Flatten(), nn.LayerNorm(12), nn.Linear(12, 3))
    images = torch.rand(4, 3, 2, 2) + 1
    images[0] *= 1e38
    adapted = Tent(reset="never").wrap(net)
    for _ in range(2):
        assert adapted(images).shape == (4, 3)
    assert (adapted.engine.updates + adapted.engine.skipped, adapted.engine.bad_batches) == (2, 0)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda adapted: pickle.loads(pickle.dumps(adapted))])
def test_copies_check_their_own_tensors(make_net, batches, copied):
    for method in (EMABN(reset="never", on_bad_batch="skip"), T3A(reset="never", on_bad_batch="skip")):
        clean = method.wrap(make_net())
        clean(batches[0]), clean(batches[1])
        dirty = copied(clean)
        dirty(with_nan(batches[2]))
        clean.engine.net.counters.batch += 1
        assert torch.equal(dirty(batches[3]), clean(batches[3]))
    adapted = ETA(margin=1.0, redundancy=0.99995, reset="never").wrap(make_net())
    adapted(batches[0])
    dirty = copied(adapted)
    with torch.no_grad():
        dirty.engine.net.parameters[0].fill_(float("nan"))
    with pytest.warns(UserWarning, match="has left weights or statistics that are not finite"):
        assert torch.isfinite(dirty(batches[1])).all()
