"""Windows of images: batches of one are adapted to with those before them."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
import torch
from support.methods import methods
from support.networks import small_net
from torch import nn

from ttalight.adapters import PTBN, Source, Tent
from ttalight.data.streams import Domain, PerDomain, SingleSample

METHODS = methods(MEMO={"views": 2, "joint": True})
WINDOW = 4

pytestmark = pytest.mark.filterwarnings("ignore:.*runs with its settings for CIFAR", "ignore:.*statistics of")


@pytest.fixture
def images():
    return torch.rand(7, 3, 12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def of_the_stream(adapted, images, visits):
    """Return the logits of a stream of single images with a window, (N, C), by hand."""
    order = SingleSample(PerDomain(), window=WINDOW)
    counts = [len(part) for part in visits]
    domains = [Domain(f"domain{i}") for i in range(len(counts))]
    stream = order.build(domains, [np.zeros(count, dtype=np.int64) for count in counts], 1, 0)
    logits = []
    for index in range(stream.batches):
        if stream.begins_visit(index):
            adapted.engine.announce()
        whole = adapted(images[stream.batch(index)])
        logits.append(whole[stream.scored(index)])
    return torch.cat(logits)


@pytest.mark.parametrize("name", METHODS)
def test_is_that_of_a_stream_of_single_images(name, images):
    visits = images.split([5, 2])
    ours, theirs = METHODS[name]().wrap(small_net(), window=WINDOW), METHODS[name]().wrap(small_net())
    expected = of_the_stream(theirs, images, visits)
    logits = []
    for visit in visits:
        ours.engine.announce()
        logits += [ours(image[None]) for image in visit]
    assert torch.equal(torch.cat(logits), expected)


def test_holds_the_newest_images_and_no_more(images):
    adapted = PTBN().wrap(small_net(), window=WINDOW)
    assert adapted.window is None
    for index, image in enumerate(images):
        logits = adapted(image[None])
        assert torch.equal(adapted.window, images[max(0, index + 1 - WINDOW) : index + 1])
        assert logits.shape == (1, 4)
    assert adapted.window.untyped_storage().nbytes() == adapted.window.nbytes
    adapted(images)  # a batch that is larger is adapted to as it is
    assert torch.equal(adapted.window, images[-WINDOW:])
    assert adapted.window.untyped_storage().nbytes() == adapted.window.nbytes
    images += 1  # the user's tensor
    assert not torch.equal(adapted.window, images[-WINDOW:])


def test_a_prediction_uses_it_and_leaves_it(images):
    adapted = Tent(lr=0.1).wrap(small_net(), window=WINDOW)
    for image in images[:5]:
        adapted(image[None])
    before, kept = adapted(images[5:6], adapt=False), adapted.window.clone()
    assert torch.equal(adapted.window, kept)
    assert torch.equal(adapted(images[5:6]), before)


def test_is_part_of_the_state(images):
    adapted = Tent(lr=0.1).wrap(small_net(), window=WINDOW)
    for image in images[:5]:
        adapted(image[None])
    state = adapted.state_dict()
    copies = [
        copy.deepcopy(adapted),
        pickle.loads(pickle.dumps(adapted)),
        Tent(lr=0.1).wrap(small_net(), window=WINDOW),
    ]
    copies[2].load_state_dict(state)
    expected = adapted(images[5:6])
    for other in copies:
        assert torch.equal(other(images[5:6]), expected)
    adapted.load_state_dict(state)
    assert torch.equal(adapted(images[5:6]), expected)
    adapted.reset()
    assert adapted.window is None
    assert torch.equal(adapted(images[5:6]), Tent(lr=0.1).wrap(small_net())(images[5:6]))


def test_states_with_another_window_are_refused_and_change_nothing(images):
    adapted, other = (Tent(lr=0.1).wrap(small_net(), window=window) for window in (WINDOW, WINDOW - 1))
    for image in images:
        adapted(image[None])
    state = adapted.state_dict()
    for refused in (other, Tent().wrap(small_net())):
        with pytest.raises(ValueError, match="wrap with the window that it had"):
            refused.load_state_dict(state)
        assert refused.engine.state is None
    for wrong in (torch.zeros(2, 3), torch.full((1, 3, 12, 12), torch.nan), [1]):
        with pytest.raises(ValueError, match="window of the state"):
            adapted.load_state_dict(state | {"window": wrong})


def test_bad_batches_stay_outside(images):
    adapted = Tent(lr=0.1, on_bad_batch="skip").wrap(small_net(), window=WINDOW)
    adapted(images[:1])
    bad = images[1:2].clone()
    bad[0, 0, 0, 0] = torch.nan
    with pytest.warns(UserWarning, match="NaN"):
        assert adapted(bad).isfinite().all()
    assert torch.equal(adapted.window, images[:1])
    failing = Tent(lr=0.1).wrap(small_net(), window=WINDOW)
    failing(images[:1])
    with pytest.raises(ValueError, match="NaN"):
        failing(bad)
    assert torch.equal(failing.window, images[:1])


def test_keeps_the_structure_of_the_output(images):
    class Answers(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = small_net()

        def forward(self, pixels, scale=1.0):
            logits = self.net(pixels) * scale
            return {"logits": logits, "doubled": 2 * logits, "count": logits.new_zeros(())}

    adapted = Source().wrap(Answers(), window=WINDOW)
    for image in images:
        answer = adapted(pixels=image[None])
    assert torch.equal(answer["doubled"], 2 * answer["logits"])
    assert answer["logits"].shape == (1, 4)
    with pytest.raises(TypeError, match="wrap without window="):
        adapted(images[:1], scale=2.0)


@pytest.mark.parametrize("window", [0, -1, 2.0, "8", True])
def test_wrong_sizes_are_refused(window):
    with pytest.raises(ValueError, match="window must be a whole number of images"):
        Tent().wrap(small_net(), window=window)


def test_images_of_another_kind_are_refused(images):
    adapted = PTBN().wrap(small_net(), window=WINDOW)
    adapted(images[:1])
    for other in (images[:1, :, :8, :8], images[:1].float()):
        with pytest.raises(ValueError, match="the window holds images of shape"):
            adapted(other)
    with pytest.raises(ValueError, match="add a dimension"):
        adapted(images[0])
    adapted.reset()
    adapted(images[:1, :, :8, :8])
