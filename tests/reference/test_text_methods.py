"""BATCLIP, CLIPArTT and WATT against loops over images, classes and templates, on a tiny model of open_clip."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support.vision_language import NAMES, tiny_clip, tokenize
from torch.nn.functional import normalize

from ttalight.adapters import BATCLIP, WATT, CLIPArTT
from ttalight.losses import prototype_losses, transductive_loss
from ttalight.tasks import VisionLanguageTask

pytest.importorskip("open_clip")

pytestmark = pytest.mark.filterwarnings("ignore:.*small", "ignore:.*runs with its settings for CIFAR")
TEMPLATES = ["a photo of a {}.", "art of the {}."]
SIZES = {"atol": 1e-6, "rtol": 1e-6}


@pytest.fixture(params=["vit", "resnet"])
def model(request):
    model = tiny_clip(vision=request.param)
    model.side = 8 if request.param == "vit" else 32
    return model


@pytest.fixture
def batches(model):
    return list(torch.rand(2, 6, 3, model.side, model.side, generator=torch.Generator().manual_seed(1)).double())


def make(model, templates=TEMPLATES):
    task = VisionLanguageTask(image_tower=model, class_names=NAMES, tokenizer=tokenize, templates=templates)
    return task.double().eval()


def affines(module, batch_statistics=False):
    kinds = (torch.nn.LayerNorm, torch.nn.BatchNorm2d)
    layers = [layer for layer in module.modules() if isinstance(layer, kinds)]
    for layer in layers:
        if batch_statistics and isinstance(layer, torch.nn.BatchNorm2d):
            layer.running_mean = layer.running_var = None
    return [parameter for layer in layers for parameter in layer.parameters()]


def encode(model, texts):
    return normalize(model.encode_text(tokenize(texts)), dim=1)


def named(template, names):
    return [template.replace("{}", name) for name in names]


def ensemble(model, templates):
    return normalize(torch.stack([encode(model, named(template, NAMES)) for template in templates]).mean(0), dim=1)


def entropies(logits):
    return torch.stack([torch.distributions.Categorical(logits=row).entropy() for row in logits])


def pair_loss(features, texts, scale, temperature):
    """The loss of pairs, image by image."""
    count, total = len(features), 0.0
    similarity = [
        [(features[i] @ features[j] + texts[i] @ texts[j]) / 2 / temperature for j in range(count)]
        for i in range(count)
    ]
    for i in range(count):
        logits = torch.stack([scale * features[i] @ texts[j] for j in range(count)])
        for j in range(count):
            column = torch.stack([similarity[k][j] for k in range(count)])
            target = (similarity[i][j] - column.logsumexp(0)).exp()
            total = total - target * (logits[j] - logits.logsumexp(0))
    return total / count


def test_prototype_losses():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(7, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    texts, classes = normalize(torch.randn(5, 4, generator=generator).double(), dim=1), [0, 2, 2, 4, 0, 0, 2]
    means = [
        torch.stack([row for row, own in zip(features, classes, strict=True) if own == number]).mean(0)
        for number in (0, 2, 4)
    ]
    agreement = sum(mean @ texts[number] for mean, number in zip(means, (0, 2, 4), strict=True)) / 3
    separation = sum(
        1 - torch.cosine_similarity(one, other, dim=0) for one in means for other in means if one is not other
    )
    found = prototype_losses(features, torch.tensor(classes), texts)
    torch.testing.assert_close(found, (agreement, separation))
    gradients = [torch.autograd.grad(pair[0] + pair[1], features)[0] for pair in (found, (agreement, separation))]
    torch.testing.assert_close(*gradients)
    single = prototype_losses(features, torch.zeros(7, dtype=torch.long), texts)
    assert single[1].item() == pytest.approx(0.0, abs=1e-12)


def test_transductive_loss():
    generator = torch.Generator().manual_seed(0)
    features, texts = (normalize(torch.randn(4, 5, generator=generator).double(), dim=1) for _ in range(2))
    features.requires_grad_()
    losses = transductive_loss(features, texts, 7.0, 0.2)
    expected = pair_loss(features, texts, 7.0, 0.2)
    torch.testing.assert_close(losses.mean(), expected)
    torch.testing.assert_close(*(torch.autograd.grad(each, features)[0] for each in (losses.mean(), expected)))


@pytest.mark.parametrize("prediction", ["before", "after"])
def test_batclip(prediction, model, batches):
    other = copy.deepcopy(model)
    adapted = BATCLIP(lr=0.01, prediction=prediction).wrap(make(model))
    optimizer = torch.optim.AdamW(affines(other, batch_statistics=True), lr=0.01, weight_decay=0.01)
    scale = float(model.logit_scale.exp())

    def run(images):
        features = other.encode_image(images)
        texts = ensemble(other, TEMPLATES)
        return features, texts, scale * normalize(features, dim=1) @ texts.T

    for batch in batches:
        features, texts, logits = run(batch)
        classes = logits.argmax(1).tolist()
        groups = [(c, features[[i for i, own in enumerate(classes) if own == c]].mean(0)) for c in sorted({*classes})]
        loss = entropies(logits).mean() - sum(mean @ texts[c] for c, mean in groups) / len(groups)
        for c, one in groups:
            for d, two in groups:
                loss = loss - (1 - torch.cosine_similarity(one, two, dim=0)) * (c != d)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if prediction == "after":
            logits = run(batch)[2]
        torch.testing.assert_close(adapted(batch), logits.detach(), **SIZES)
    assert adapted.engine.updates == 2
    torch.testing.assert_close(adapted(batches[0], adapt=False), run(batches[0])[2].detach(), **SIZES)


def test_batclip_leaves_the_text_tower_alone(batches, model):
    before = copy.deepcopy(model.state_dict())
    adapted = BATCLIP(lr=0.1, reset="never").wrap(make(model))
    source = adapted(batches[0], adapt=False)
    adapted(batches[0])
    moved = {name.split(".")[0] for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"visual"}
    exported = adapted.export()
    torch.testing.assert_close(exported(batches[0]), adapted(batches[0], adapt=False))
    assert not torch.allclose(exported.classifier.weight, adapted.engine.net.module.classifier.weight)
    adapted.reset()
    assert torch.equal(adapted(batches[0], adapt=False), source)
    adapted.release()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("reset", ["batch", "never"])
def test_clipartt(reset, model, batches):
    other = copy.deepcopy(model)
    adapted = CLIPArTT(lr=0.01, steps=3, temperature=0.1, reset=reset).wrap(make(model))
    scale, texts = float(model.logit_scale.exp()), ensemble(model, TEMPLATES).detach()
    source = copy.deepcopy(other.state_dict())
    optimizer = torch.optim.Adam(affines(other.visual), lr=0.01)
    for batch in batches:
        if reset == "batch":
            other.load_state_dict(source)
            optimizer = torch.optim.Adam(affines(other.visual), lr=0.01)
        for _ in range(3):
            features = normalize(other.encode_image(batch), dim=1)
            own = []
            for feature in features:
                order = sorted(range(len(NAMES)), key=lambda place, f=feature: -(f @ texts[place]).item())
                own.append(f"a photo of a {' or '.join(NAMES[place] for place in order[:3])}")
            loss = pair_loss(features, encode(other, own).detach(), scale, 0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        logits = scale * normalize(other.encode_image(batch), dim=1) @ texts.T
        torch.testing.assert_close(adapted(batch), logits.detach(), **SIZES)
    assert adapted.engine.updates == 6
    assert adapted.engine.backwards == 6
    assert adapted.engine.net.forwards == 8


def test_clipartt_encodes_a_prompt_once_a_batch(batches, model, monkeypatch):
    adapted, seen = CLIPArTT(steps=2).wrap(make(model)), []
    method = adapted.engine.method
    encode_texts = method.encode
    monkeypatch.setattr(method, "encode", lambda texts: seen.extend(texts) or encode_texts(texts))
    adapted(batches[0])
    assert len(seen) == len({*seen}) > 0
    assert all(text.count(" or ") == 2 for text in seen)


@pytest.mark.parametrize("merge", ["sequential", "parallel"])
def test_watt(merge, model, batches):
    other = copy.deepcopy(model)
    settings = {"lr": 0.01, "rounds": 3, "steps": 2, "temperature": 0.1, "templates": TEMPLATES}
    adapted = WATT(merge=merge, **settings).wrap(make(model, "not averaged over a {}"))
    scale = float(model.logit_scale.exp())
    texts = [encode(model, named(template, NAMES)).detach() for template in TEMPLATES]
    parameters = affines(other.visual)
    source = [parameter.detach().clone() for parameter in parameters]

    def put(values):
        with torch.no_grad():
            for parameter, value in zip(parameters, values, strict=True):
                parameter.copy_(value)

    for batch in batches:
        put(source)
        average, optimizer = source, torch.optim.Adam(parameters, lr=0.01)
        for number in range(3):
            ends = []
            for features_of_classes in texts:
                if merge == "parallel":
                    put(average)
                    if number == 0:
                        optimizer = torch.optim.Adam(parameters, lr=0.01)
                for _ in range(2):
                    features = normalize(other.encode_image(batch), dim=1)
                    chosen = [int((feature @ features_of_classes.T).argmax()) for feature in features]
                    loss = pair_loss(features, features_of_classes[chosen], scale, 0.1)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                ends.append([parameter.detach().clone() for parameter in parameters])
            average = [sum(values) / len(texts) for values in zip(*ends, strict=True)]
            put(average)
        mean = normalize(sum(texts) / 2, dim=1)
        logits = scale * normalize(other.encode_image(batch), dim=1) @ mean.T
        torch.testing.assert_close(adapted(batch), logits.detach(), atol=1e-4, rtol=1e-4)
    assert adapted.engine.updates == 24
    assert adapted.engine.net.forwards == 26
    exported = adapted.export()  # of the source, which the next batch begins with
    torch.testing.assert_close(exported(batches[0]), adapted(batches[0], adapt=False))


@pytest.mark.parametrize(
    ("method", "arguments", "message"),
    [
        (BATCLIP, {"agreement_weight": -1}, "agreement_weight must be at least 0 and finite, got -1"),
        (CLIPArTT, {"classes": 0}, "classes must be at least 1"),
        (CLIPArTT, {"template": "a photo"}, r"template needs \{\}"),
        (CLIPArTT, {"temperature": 0.0}, "temperature must be positive"),
        (WATT, {"merge": "both"}, "merge must be 'sequential' or 'parallel', got 'both'"),
        (WATT, {"rounds": 0}, "rounds must be at least 1"),
        (WATT, {"temperature": math.inf}, "temperature must be positive"),
        (WATT, {"templates": ["a photo"]}, r"each template needs \{\}"),
    ],
)
def test_arguments(method, arguments, message):
    with pytest.raises(ValueError, match=message):
        method(**arguments)
