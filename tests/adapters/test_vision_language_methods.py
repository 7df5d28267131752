"""Invariances of all methods for vision-language models, on a tiny model of two towers."""

from __future__ import annotations

import pytest
import torch
from support.methods import EVERY_CLASS, TEXT_ONLY
from support.vision_language import NAMES, tiny_clip, tokenize

from ttalight.adapters import BCA, DMN, TDA, Source
from ttalight.adapters.feature import FeatureAdapter
from ttalight.adapters.views import ViewAdapter
from ttalight.tasks import EmbeddingTask, VisionLanguageTask

pytest.importorskip("open_clip")

pytestmark = pytest.mark.filterwarnings("ignore:.*small", "ignore:.*runs with its settings for CIFAR")
GRADIENT = {
    "BATCLIP": {"lr": 0.01},
    "CLIPArTT": {"lr": 0.01, "steps": 1},
    "WATT": {"lr": 0.01, "rounds": 1, "templates": ["a {}", "the {}"]},
}
VIEWS = {name: {"views": 3, "share": 0.5} for name, cls in EVERY_CLASS.items() if issubclass(cls, ViewAdapter)}
VIEWS["MTA"] = {"views": 3}
#: Those that read features of whole images.
FEATURES = {
    name: {} for name, cls in EVERY_CLASS.items() if issubclass(cls, FeatureAdapter) and name not in (*VIEWS, "CALIP")
}
FEATURES["ECALP"] = {"memory": 6}
SETTINGS = {**GRADIENT, **VIEWS, **FEATURES, "CALIP": {}}
ORDER = [3, 0, 4, 1, 2]


def make(names=None, **arguments):
    texts = {} if "text_features" in arguments else {"class_names": names or NAMES, "tokenizer": tokenize}
    return VisionLanguageTask(image_tower=tiny_clip(), **texts, **arguments).double().eval()


def run(name, task, batches):
    adapted = EVERY_CLASS[name](seed=0, **SETTINGS[name]).wrap(task)
    return torch.cat([adapted(batch) for batch in batches])


@pytest.fixture
def batches():
    images = torch.rand(10, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return images.split([5, 1, 4])


@pytest.mark.parametrize("name", SETTINGS)
def test_classes_in_another_order(name, batches):
    expected = run(name, make(), batches)[:, ORDER]
    torch.testing.assert_close(run(name, make([NAMES[place] for place in ORDER]), batches), expected)


@pytest.mark.parametrize("name", [*VIEWS, "CALIP"])
@pytest.mark.parametrize("classes", [2, 1000])
def test_few_and_many_classes(name, classes, batches):
    if name in TEXT_ONLY:
        task = make([f"{number}" for number in range(classes // 20 + 2)])
    else:
        generator = torch.Generator().manual_seed(2)
        task = make(text_features=torch.randn(classes, 6, generator=generator), scale=20.0)
    logits = run(name, task, [batches[0][:2]])
    assert logits.shape == (2, task.num_classes)
    assert logits.isfinite().all()


@pytest.mark.parametrize("name", FEATURES)
def test_saved_features_are_predicted_as_images(name, batches):
    task = make()
    with torch.no_grad():
        features = [task.encode_image(batch) for batch in batches]
    saved = EmbeddingTask(task.classifier.weight.detach(), scale=task.classifier.scale).double().eval()
    torch.testing.assert_close(run(name, saved, features), run(name, task, batches), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", [name for name in VIEWS if name not in TEXT_ONLY])
def test_saved_features_have_no_crops(name):
    with pytest.raises(ValueError, match=rf"{name} reads crops of images, .* got shape \(4, 6\): use a method"):
        run(name, EmbeddingTask(torch.eye(6)), [torch.randn(4, 6)])


@torch.no_grad()
def test_empty_caches_are_the_model_bit_for_bit(batches):
    task = make()
    expected = Source().wrap(make())(batches[0])
    assert torch.equal(TDA().wrap(task)(batches[0], adapt=False), expected)


@pytest.mark.parametrize("method", [BCA, DMN])
def test_the_scale_is_that_of_the_model(method, batches):
    """At the beginning both are the model."""
    task = make()
    assert task.classifier.scale == pytest.approx(20.0855, abs=1e-3)
    logits = method().wrap(task)(batches[0], adapt=False)
    torch.testing.assert_close(logits, Source().wrap(make())(batches[0]).log_softmax(1))
    explicit = method(scale=task.classifier.scale)
    assert torch.equal(run(method.__name__, make(), batches), torch.cat([*map(explicit.wrap(make()), batches)]))
