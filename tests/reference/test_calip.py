"""CALIP against loops over images and patches, and the image towers that it works on."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.nn import functional as F

from ttalight.adapters import CALIP, Source
from ttalight.models.patch_tokens import encode_tokens, has_tokens
from ttalight.tasks import VisionLanguageTask

CLASSES, WIDTH = 5, 6
VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 8, "depth": 1, "num_heads": 2, "num_classes": 0}


class Tower(nn.Module):
    """A tower of the user's: patches are 4x4 pixels, and the image is the mean of the first two."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.embed = nn.Conv2d(3, WIDTH, 4, stride=4)

    def encode_tokens(self, images):
        tokens = self.embed(images).flatten(2).transpose(1, 2)
        return tokens[:, :2].mean(1), tokens

    def forward(self, images):
        return self.encode_tokens(images)[0]


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def make_task(tower, width: int = WIDTH) -> VisionLanguageTask:
    torch.manual_seed(4)
    return VisionLanguageTask(torch.randn(CLASSES, width), image_tower=tower, scale=20.0).double().eval()


def test_against_loops(images):
    task = make_task(Tower().double())
    adapted = CALIP(visual_weight=0.7, text_weight=0.3).wrap(task)
    logits = adapted(images)
    texts = task.classifier.weight.detach()
    features, tokens = task.encoder.model.encode_tokens(images)
    for number in range(len(images)):
        own = F.normalize(features[number], dim=0)
        patches = [F.normalize(patch, dim=0) for patch in tokens[number]]
        attention = torch.tensor([[2 * float(patch @ text) for text in texts] for patch in patches]).double()
        columns, rows = attention.softmax(0), attention.softmax(1)
        visual = [sum(columns[p, c] * patch for p, patch in enumerate(patches)) for c in range(CLASSES)]
        seen = torch.stack([sum(rows[p, c] * texts[c] for c in range(CLASSES)) for p in range(len(patches))])
        mixed = seen.mean(0) + seen.max(0).values
        expected = [
            20 * float(own @ text + 0.7 * (own @ visual[c]) + 0.3 * (mixed @ text)) for c, text in enumerate(texts)
        ]
        assert logits[number].tolist() == pytest.approx(expected)
    assert adapted.engine.net.forwards == 1
    assert torch.equal(adapted(images, adapt=False), logits)
    alone = CALIP().wrap(adapted.release())(images[:1])
    torch.testing.assert_close(alone, CALIP().wrap(make_task(Tower()))(images)[:1])


def test_without_weights_is_the_network(images):
    expected = Source().wrap(make_task(Tower()))(images)
    assert torch.equal(CALIP(visual_weight=0.0, text_weight=0.0).wrap(make_task(Tower()))(images), expected)


def test_masked_classes_stay_masked(images):
    class Masking(VisionLanguageTask):
        def forward(self, images):
            return super().forward(images).index_fill(1, torch.tensor([1]), -torch.inf)

    torch.manual_seed(4)
    task = Masking(torch.randn(CLASSES, WIDTH), image_tower=Tower(), scale=20.0).double().eval()
    logits = CALIP().wrap(task)(images)
    assert logits.isneginf().nonzero()[:, 1].tolist() == [1] * len(images)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_transformers_of_timm(images, pool):
    torch.manual_seed(0)
    encoder = timm.create_model("vit_tiny_patch16_224", global_pool=pool, **VIT).double().eval()
    assert has_tokens(encoder)
    features, tokens = encode_tokens(encoder, images)
    assert torch.equal(features, encoder(images))
    assert tokens.shape == (3, 4, 8)
    if pool == "token":
        assert torch.equal(tokens, encoder.forward_features(images)[:, 1:])
    logits = CALIP().wrap(make_task(encoder, width=8))(images)
    assert logits.isfinite().all()


def test_transformers_of_open_clip(images):
    transformer = pytest.importorskip("open_clip.transformer")
    torch.manual_seed(0)
    visual = transformer.VisionTransformer(
        image_size=16, patch_size=8, width=8, layers=1, heads=2, mlp_ratio=2, output_dim=WIDTH
    )
    visual.double().eval()
    features, tokens = encode_tokens(make_task(visual).encoder, images)
    assert torch.equal(features, visual(images))
    assert tokens.shape == (3, 4, WIDTH)
    assert CALIP().wrap(make_task(visual))(images).shape == (3, CLASSES)


@pytest.mark.parametrize(
    "network",
    [
        lambda: make_task(nn.Sequential(nn.Flatten(), nn.Linear(768, WIDTH))),
        lambda: nn.Sequential(nn.Flatten(), nn.Linear(768, WIDTH)).double(),
    ],
)
def test_towers_without_patches(network):
    with pytest.raises(ValueError, match=r"CALIP needs features of patches .* has none: use a VisionLanguageTask"):
        CALIP().wrap(network())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"visual_weight": -1.0}, "visual_weight must be at least 0 and finite"),
        ({"cache": "folder"}, "cache does not keep: leave it out"),
    ],
)
def test_wrong_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        CALIP(**settings)


def test_all_settings_are_in_the_protocol():
    assert {"visual_weight": 0.5, "text_weight": 0.1}.items() <= CALIP(0.5, 0.1).protocol().items()
