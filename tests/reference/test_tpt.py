"""TPT, C-TPT and O-TPT against loops over images, with the text transformer written out."""

from __future__ import annotations

import math

import pytest
import torch
from support.vision_language import NAMES, tiny_clip, tokenize
from torch.nn.functional import normalize

from ttalight.adapters import CTPT, OTPT, TPT
from ttalight.adapters.methods.tpt import text_orthogonality
from ttalight.models import TextTower
from ttalight.models.tuned_prompts import TunedPrompts
from ttalight.tasks import VisionLanguageTask

pytest.importorskip("open_clip")

pytestmark = pytest.mark.filterwarnings("ignore:.*small")
VIEWS = 10
PENALTIES = {
    TPT: lambda texts: 0.0,
    CTPT: lambda texts: -50.0 * sum((row - texts.mean(0)).norm() for row in texts) / len(texts),
    OTPT: lambda texts: 18.0 * householder_distance(texts),
}


def householder_distance(texts):
    """The distance from right angles by reflections of the rows of the matrix of cosines."""
    cosines = texts @ texts.T
    total = 0.0
    for place, row in enumerate(cosines):
        axis = torch.zeros_like(row)
        axis[place] = 1.0
        mirror = row - row.norm() * axis
        mirror = mirror / mirror.norm()
        total = total + (row - 2 * mirror * (mirror @ row) - axis).norm()
    return total / len(texts)


def encode(model, words, names):
    """The features of "<words> <name>." with vectors for the words."""
    tokens = tokenize([f"a photo of a {name}." for name in names])
    embeddings = model.token_embedding(tokens)
    prompts = torch.cat([embeddings[:, :1], words.expand(len(names), -1, -1), embeddings[:, 5:]], dim=1)
    hidden = model.transformer(prompts + model.positional_embedding, attn_mask=model.attn_mask)
    ends = model.ln_final(hidden)[torch.arange(len(names)), tokens.argmax(1)]
    return normalize(ends @ model.text_projection, dim=1)


def entropy_of_mean(logits):
    mean = sum(row.softmax(0) for row in logits) / len(logits)
    return -(mean * mean.log()).sum()


def tuned(model, method, units, steps, share):
    """Logits of one image by its views, (V, D)."""
    scale = float(model.logit_scale.exp())
    words = model.token_embedding(tokenize(["a photo of a"]))[0, 1:5].detach().clone().requires_grad_()
    optimizer = torch.optim.AdamW([words], lr=0.005)
    kept = None
    for _ in range(steps):
        texts = encode(model, words, NAMES)
        logits = scale * units @ texts.T
        if kept is None:
            entropies = [torch.distributions.Categorical(logits=row).entropy().item() for row in logits]
            kept = sorted(range(len(units)), key=entropies.__getitem__)[: int(share * len(units))]
        loss = entropy_of_mean(logits[kept]) + PENALTIES[method](texts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return (scale * encode(model, words, NAMES) @ units[0]).detach()


@pytest.fixture
def model():
    return tiny_clip()


@pytest.fixture
def images():
    return torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.fixture
def features():
    return torch.randn(4, VIEWS, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def make(model):
    return VisionLanguageTask(image_tower=model, class_names=NAMES, tokenizer=tokenize).double().eval()


def with_features(method, task, features):
    """Return an adapted task whose views have these features."""
    adapted = method.wrap(task)
    method.read_view_features = lambda net, images: (None, features[: len(images)])
    return adapted


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("method", PENALTIES)
def test_against_one_image_at_a_time(method, steps, model, images, features):
    adapted = with_features(method(steps=steps, share=0.3, views=VIEWS), make(model), features)
    logits = adapted(images)
    for row, views in zip(logits, normalize(features, dim=2), strict=True):
        torch.testing.assert_close(row, tuned(model, method, views, steps, 0.3), atol=1e-6, rtol=1e-6)
    assert torch.equal(adapted(images, adapt=False), logits)
    untuned = float(model.logit_scale.exp()) * normalize(features[:, 0], dim=1) @ adapted.engine.method._texts.T
    assert (logits - untuned).abs().max() > 1e-3


@pytest.mark.parametrize("method", PENALTIES)
def test_batches_change_nothing(method, model, images, features):
    whole = with_features(method(share=0.3, text_pass_size=1000), make(model), features)(images)
    parts = with_features(method(share=0.3, text_pass_size=11), make(model), features)(images)
    torch.testing.assert_close(parts, whole, atol=1e-12, rtol=1e-12)
    alone = [
        with_features(method(share=0.3), make(tiny_clip()), features[place : place + 1])(images[place : place + 1])
        for place in range(len(images))
    ]
    torch.testing.assert_close(torch.cat(alone), whole, atol=1e-12, rtol=1e-12)


def test_views_are_those_of_the_images(model, images):
    adapted = TPT(views=4, share=0.5, seed=0).wrap(make(model))
    logits = adapted(images)
    assert logits.shape == (4, len(NAMES))
    assert adapted.engine.net.forwards == 4.0
    assert not adapted.engine.net.parameters
    assert torch.equal(TPT(views=4, share=0.5, seed=0).wrap(make(tiny_clip()))(images), logits)
    with pytest.raises(TypeError, match="TPT predicts by random views"):
        adapted.export()


def test_right_angles():
    texts = torch.eye(4, dtype=torch.float64)[None, :3]
    torch.testing.assert_close(text_orthogonality(texts), torch.zeros(1).double())
    same = texts[:, :1].expand(1, 3, 4)
    torch.testing.assert_close(text_orthogonality(same), torch.full((1,), math.sqrt(3) - 1).double())


class TestTunedPrompts:
    def test_words_themselves_change_nothing(self, model):
        prompts = TunedPrompts(TextTower(model, tokenize), NAMES, "a photo of a")
        assert prompts.initial.shape == (4, 8)
        expected = model.encode_text(tokenize([f"a photo of a {name}." for name in NAMES]))
        encoded = prompts.encode(prompts.initial.expand(2, -1, -1))
        torch.testing.assert_close(encoded, expected.expand(2, -1, -1))

    def test_names_with_the_same_first_word(self, model):
        prompts = TunedPrompts(TextTower(model, tokenize), ["digit 1", "digit 2"], "one")
        assert prompts.initial.shape == (1, 8)

    def test_a_tokenizer_that_turns_words_around(self, model):
        tower = TextTower(model, lambda texts: tokenize([text[::-1] for text in texts]))
        with pytest.raises(ValueError, match="tokens of the prompt 'a photo' do not begin those of 'a photo' and a"):
            TunedPrompts(tower, NAMES, "a photo")


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        (TPT, {"lr": -1.0}, "lr must be at least 0 and finite, got -1"),
        (TPT, {"steps": 0}, "steps must be at least 1"),
        (TPT, {"text_pass_size": 0}, "text_pass_size must be at least 1"),
        (TPT, {"prompt": " "}, "prompt must have a word or more"),
        (TPT, {"share": 0.0}, "share must lie in"),
        (CTPT, {"dispersion_weight": -1.0}, "dispersion_weight must be at least 0"),
        (OTPT, {"orthogonality_weight": math.inf}, "orthogonality_weight must be at least 0"),
    ],
)
def test_arguments(method, arguments, message):
    with pytest.raises(ValueError, match=message):
        method(**arguments)
