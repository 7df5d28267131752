"""Warnings about runs in which a method cannot do what it is for."""

from __future__ import annotations

import warnings

import pytest
import torch

from ttalight.adapters import PTBN, AlphaBN, Source, Tent


@pytest.mark.parametrize(("images", "told"), [(7, 1), (8, 0)])
def test_small_batches_are_reported_once(make_net, images, told):
    batch = torch.rand(images, 3, 16, 16, dtype=torch.float64)
    for method in (Tent(), PTBN()):
        adapted = method.wrap(make_net())
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(3):
                adapted(batch)
        assert ["say little" in str(warning.message) for warning in caught] == [True] * told


@pytest.mark.parametrize("method", [Source, AlphaBN])
@pytest.mark.filterwarnings("error")
def test_small_batches_without_batch_statistics(make_net, method, images):
    method().wrap(make_net())(images[:1])


def filtered(**settings):
    class Picky(Tent):
        def weigh(self, net, images, outputs):
            return torch.zeros_like(outputs.logits[:, 0])

    return Picky(**settings)


def test_method_without_a_step_is_reported_at_the_end(make_net, images):
    batch = images.repeat(2, 1, 1, 1)
    adapted = filtered().wrap(make_net())
    adapted(batch), adapted(batch)
    with pytest.warns(
        UserWarning, match="Picky has made no step in 2 batches: in all 2 steps every sample was filtered"
    ):
        adapted.release()


def test_no_step_in_a_long_stream_warns(make_net):
    batch, adapted = torch.rand(8, 3, 8, 8, dtype=torch.float64), filtered().wrap(make_net())
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(51):
            adapted(batch)
        adapted.release()
    assert ["has made no step in 50 batches" in str(warning.message) for warning in caught] == [True]
