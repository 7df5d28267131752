"""Methods that encode texts: states, resets, interrupted batches, bad pixels, networks without a text tower."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from support.methods import EVERY_CLASS, TEXT_ONLY
from support.networks import small_net
from support.vision_language import NAMES, tiny_clip, tokenize

from ttalight.tasks import VisionLanguageTask

pytest.importorskip("open_clip")

pytestmark = pytest.mark.filterwarnings("ignore:.*small", "ignore:.*runs with its settings for CIFAR")
SETTINGS = {
    "BATCLIP": {"lr": 0.01},
    "CLIPArTT": {"lr": 0.01, "steps": 2},
    "WATT": {"lr": 0.01, "rounds": 2, "templates": ["a {}", "the {}"]},
    **{name: {"views": 4, "share": 0.5} for name in ("TPT", "CTPT", "OTPT")},
}
#: Those that move weights; the others tune prompts for each image and keep nothing.
MOVING = ("BATCLIP", "CLIPArTT", "WATT")


def maker(name):
    return partial(EVERY_CLASS[name], seed=0, **SETTINGS[name])


@pytest.fixture(params=MOVING)
def moving(request):
    return maker(request.param)


@pytest.fixture(params=TEXT_ONLY)
def method(request):
    return maker(request.param)


@pytest.fixture
def task():
    return VisionLanguageTask(image_tower=tiny_clip(), class_names=NAMES, tokenizer=tokenize).double().eval()


@pytest.fixture
def batches():
    return list(torch.rand(4, 5, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64))


@pytest.mark.parametrize("reset", ["never", "batch"])
def test_a_state_continues_bit_for_bit(method, reset, task, batches):
    whole = method(reset=reset).wrap(copy.deepcopy(task))
    expected = [whole(batch) for batch in batches]
    first, fresh = method(reset=reset).wrap(copy.deepcopy(task)), method(reset=reset).wrap(copy.deepcopy(task))
    assert all(torch.equal(first(batch), logits) for batch, logits in zip(batches[:2], expected, strict=False))
    fresh.load_state_dict(copy.deepcopy(first.state_dict()))
    assert all(torch.equal(fresh(batch), logits) for batch, logits in zip(batches[2:], expected[2:], strict=True))


def test_a_reset_and_a_release_restore_the_source(moving, task, batches):
    before = {name: value.clone() for name, value in task.state_dict().items()}
    adapted = moving(reset="never").wrap(task)
    source = adapted(batches[0], adapt=False)
    first = adapted(batches[0])
    assert not torch.equal(adapted(batches[0], adapt=False), source)
    adapted.reset()
    assert torch.equal(adapted(batches[0], adapt=False), source)
    assert torch.equal(adapted(batches[0]), first)
    released = adapted.release()
    assert all(torch.equal(value, before[name]) for name, value in released.state_dict().items())
    assert not any(parameter.requires_grad for parameter in task.class_prompts.tower.parameters())


@pytest.mark.parametrize("place", ["image", "optimizer"])
def test_an_interrupted_batch_changes_nothing(moving, place, task, batches, monkeypatch):
    adapted, twin = (moving(reset="never").wrap(copy.deepcopy(task)) for _ in range(2))
    for each in (adapted, twin):
        each(batches[0])

    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    optimizer = adapted.engine.net.optimizer
    step = optimizer.step
    with monkeypatch.context() as patch:
        patch.setattr(optimizer, "step", lambda: (step(), place == "optimizer" and fail()))
        if place == "image":  # the pass after the last step
            patch.setattr(type(adapted.engine.method), "predict", fail)
            patch.setattr(type(adapted.engine.method), "optimizer_step", lambda *_: fail())
        with pytest.raises(KeyboardInterrupt):
            adapted(batches[1])
    assert all(torch.equal(adapted(batch), twin(batch)) for batch in batches[1:])


def test_pixels_that_are_not_finite(method, task, batches):
    adapted, twin = (method(reset="never", on_bad_batch="skip").wrap(copy.deepcopy(task)) for _ in range(2))
    bad = batches[0].clone()
    bad[0, 0, 0, 0] = torch.nan
    for each in (adapted, twin):
        each(batches[0])
    with pytest.warns(UserWarning, match="1 of 5 images"):
        assert adapted(bad).isfinite().all()
    if adapted.engine.updates:  # views are other ones, in another batch
        assert torch.equal(adapted(batches[1]), twin(batches[1]))
    assert adapted.engine.bad_batches == 1


def test_exports_predict_the_same(moving, task, batches):
    adapted = moving(reset="never").wrap(task)
    adapted(batches[0])
    exported = adapted.export()
    torch.testing.assert_close(exported(batches[1]), adapted(batches[1], adapt=False))


def test_single_precision_and_some_classes(method, task, batches):
    task = task.float()
    task._label_space.restrict(task, [3, 0, 1])
    adapted = method().wrap(task)
    logits = adapted(batches[0].float())
    assert logits.dtype == torch.float32
    assert logits.shape == (5, 3)
    assert adapted.engine.skipped == 0


def test_networks_without_a_text_tower(method):
    with pytest.raises(ValueError, match="encodes texts, and Sequential has no text tower: adapt a VisionLanguageTask"):
        method().wrap(small_net())


def test_settings_are_saved(method):
    described = method().protocol()
    assert described["norm"] in ("source", "batch")
    assert described["optimizer"] in ("Adam", "AdamW")
