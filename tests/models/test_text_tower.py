"""The text tower: texts without their padding, gradients to embeddings and to other parameters, copies."""

from __future__ import annotations

import copy

import pytest
import torch
from support.vision_language import LENGTH, tiny_clip, tokenize
from torch import nn

from ttalight.models import ImageTower, TextTower
from ttalight.models.class_names import class_names_of, templates_of
from ttalight.models.two_towers import image_half

open_clip = pytest.importorskip("open_clip")

TEXTS = ["a cat .", "a photo of one more red dog ."]


@pytest.fixture(params=[False, True], ids=["CLIP", "CustomTextCLIP"])
def model(request):
    return tiny_clip(request.param)


@pytest.fixture
def tower(model):
    return TextTower(model, tokenize)


def test_features_are_those_of_the_model_without_the_padding(tower, model):
    tokens = tower.tokenize(TEXTS)
    assert tokens.shape == (2, 10)
    torch.testing.assert_close(tower.encode_text(tokens), model.encode_text(tokenize(TEXTS)))
    assert torch.equal(tower.encode_text(tokenize(TEXTS)), model.encode_text(tokenize(TEXTS)))


def test_texts_of_other_towers_keep_their_padding(model):
    owner = getattr(model, "text", model)
    owner.attn_mask = torch.zeros_like(owner.attn_mask)  # tokens see the padding
    assert TextTower(model, tokenize).tokenize(TEXTS).shape == (2, LENGTH)


def test_gradients_reach_embeddings(tower):
    tokens = tower.tokenize(TEXTS)
    embeddings = tower.embed(tokens).requires_grad_()
    assert torch.equal(tower.encode_text(tokens, embeddings), tower.encode_text(tokens))
    assert torch.autograd.gradcheck(lambda value: tower.encode_text(tokens, value), embeddings, atol=1e-6)
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    assert torch.equal(tower.encode_text(tokens, 2 * embeddings), tower.encode_text(tokens, 2 * embeddings))
    torch.testing.assert_close(tower.encode_text(tokens), tower.encode_text(tokens, embeddings))  # no hook is left


def test_other_parameters_leave_the_tower_alone(tower, model):
    tokens, before = tower.tokenize(TEXTS), copy.deepcopy(model.state_dict())
    affines = {name: (value + 0.1).requires_grad_() for name, value in tower.norm_affines().items()}
    assert len(affines) == 10
    features = tower.encode_text(tokens, parameters=affines)
    gradients = torch.autograd.grad(features.square().sum(), [*affines.values()])
    assert all(bool(gradient.abs().sum() > 0) for gradient in gradients)
    for name, value in affines.items():
        tower.get_parameter(name).data.copy_(value)
    torch.testing.assert_close(tower.encode_text(tokens), features)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert len(moved) == 10
    assert not any(name.startswith("visual") for name in moved)


def test_copies(tower, model):
    assert copy.deepcopy(tower) is tower
    assert tower.converted(torch.zeros(1, dtype=torch.float64)) is tower
    other = tower.converted(torch.zeros(1))
    tokens = tower.tokenize(TEXTS)
    torch.testing.assert_close(other.encode_text(tokens).double(), tower.encode_text(tokens), atol=1e-4, rtol=1e-4)
    assert model.logit_scale.dtype == torch.float64
    assert model.visual.conv1.weight.requires_grad


def test_the_image_half_has_no_text(model):
    half, images = image_half(model), torch.rand(2, 3, 8, 8, dtype=torch.float64)
    assert torch.equal(ImageTower(half)(images), model.encode_image(images))
    assert all(name.startswith("visual.") for name in half.state_dict())
    assert half.visual is model.visual
    other = nn.Linear(2, 2)
    assert image_half(other) is other


def test_tokens_of_another_tokenizer(model):
    for tokens, message in (
        ([[1, 2], [3]], r"must map 2 texts to a tensor of tokens, \(2, length\), got list"),
        (torch.ones(3, 4).long(), r"got shape \(3, 4\)"),
    ):
        with pytest.raises(TypeError, match=message):
            TextTower(model, lambda _, tokens=tokens: tokens).tokenize(TEXTS)
    with pytest.raises(ValueError, match="makes token 49407, and the text tower has 40 tokens: give the tokenizer of"):
        TextTower(model, open_clip.get_tokenizer("ViT-B-32")).tokenize(TEXTS)


def test_models_without_texts():
    with pytest.raises(ValueError, match="Linear encodes no texts: it has neither encode_text"):
        TextTower(nn.Linear(2, 2), tokenize)
    model = nn.Linear(2, 2)
    model.encode_text = model.forward
    with pytest.raises(ValueError, match="Linear has no layer token_embedding"):
        TextTower(model, tokenize).embed(torch.zeros(1, 2))


@pytest.mark.parametrize(("name", "count"), [("cifar10", 10), ("cifar100", 100), ("digits", 10), ("imagenet", 1000)])
def test_names_of_sets(name, count):
    names = class_names_of(name)
    assert len(set(names)) == len(names) == count or name == "imagenet"
    assert not any("_" in each for each in names)


def test_names_that_come_twice():
    with pytest.warns(UserWarning, match="class_names has 'cat' more than once: .* equal text features"):
        assert class_names_of(["cat", "dog", "cat"]) == ["cat", "dog", "cat"]


def test_templates():
    assert len(set(templates_of("cifar"))) == 18
    assert "a low contrast photo of the {}." in templates_of("cifar")
    assert "a photo of a big {}." in templates_of("cifar")
    assert len(set(templates_of("imagenet"))) == 80
    assert templates_of("itap of a {}.") == ["itap of a {}."]


@pytest.mark.parametrize(
    ("function", "given", "message"),
    [
        (class_names_of, "cifar", "or one of cifar10, cifar100, digits, imagenet, got 'cifar'"),
        (class_names_of, ["cat"], "list of two or more strings"),
        (class_names_of, ["cat", 2], "list of two or more strings"),
        (class_names_of, ["cat", " "], "class 1 .* has no name, got ' '"),
        (templates_of, "a photo", r"each template needs \{\} .*, got 'a photo'; lists are cifar"),
        (templates_of, [], "list of one string or more"),
    ],
)
def test_wrong_names(function, given, message):
    with pytest.raises(ValueError, match=message):
        function(given)
