"""Views of vision-language methods, and the cache of embeddings on disk."""

from __future__ import annotations

import pytest
import torch
from support.networks import small_net
from torch import nn
from torch.nn import functional as F

from ttalight.adapters import T3A, TDA, DoTA, Source
from ttalight.adapters.views import EpisodicViewAdapter, surest_views
from ttalight.losses import entropy
from ttalight.seeding import derive_seed
from ttalight.transforms import AugMixViews, RandomResizedCropFlip


class Views(EpisodicViewAdapter):
    """Keeps what it reads."""

    def merge(self, net, logits, features):
        self.seen = logits, features
        return logits.mean(1)


class Both(nn.Module):
    """Returns a dict."""

    def __init__(self):
        super().__init__()
        self.net = small_net()

    def forward(self, images):
        return {"logits": self.net(images), "brightness": images.mean((1, 2, 3))}


class Mirroring(Both):
    """Takes another argument."""

    def forward(self, images, mirror):
        return self.net(images.flip(3) if mirror else images)


def draws(image: int, batch: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(0, "adapt", 0, batch, image))


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def views(images, **settings):
    """Return logits and unit features of views, and the engine."""
    adapted = Views(views=4, seed=0, **settings).wrap(small_net())
    adapted(images)
    logits, features = adapted.engine.method.seen
    return logits, F.normalize(features, dim=2), adapted.engine


@pytest.mark.parametrize("augmix", [False, True])
def test_are_the_image_and_crops_of_it(images, augmix):
    logits, units, engine = views(images, augmix=augmix, crop_scale=(0.3, 0.9))
    net, crop = small_net(), RandomResizedCropFlip(scale=(0.3, 0.9))
    for number, image in enumerate(images):
        if augmix:
            mix = AugMixViews("resized")
            mix.crop = crop
            crops = mix(image[None], draws(number), 3)
        else:
            crops = crop(image.repeat(3, 1, 1, 1), draws(number))
        features = net[:-1](torch.cat([image[None], crops]))
        torch.testing.assert_close(units[number], F.normalize(features, dim=1))
        torch.testing.assert_close(logits[number], net[-1](features))
    assert torch.equal(logits[:, 0], Source().wrap(net)(images))
    assert engine.net.forwards == 4


def test_do_not_depend_on_the_size_of_passes(images):
    logits, units, _ = views(images)
    sizes = []

    def note(module, inputs):
        sizes.append(len(inputs[0]))

    for pass_size in (1, 2, 3, 7, 100):
        adapted = Views(views=4, seed=0, pass_size=pass_size).wrap(small_net())
        adapted(images)  # configured, which probes the network
        hook = adapted.module.register_forward_pre_hook(note)
        adapted.engine.net.counters.batch = 0
        adapted(images)
        hook.remove()
        assert max(sizes[:-1]) <= pass_size
        assert sizes.pop() == len(images)
        sizes.clear()
        seen = adapted.engine.method.seen
        torch.testing.assert_close((seen[0], F.normalize(seen[1], dim=2)), (logits, units))


@pytest.mark.parametrize("prediction", ["before", "after"])
def test_other_outputs_are_those_of_the_images(images, prediction):
    adapter = Views(views=images.shape[0] + 1, seed=0)  # as many crops as images
    adapter.prediction = prediction
    output = adapter.wrap(Both())(images)
    torch.testing.assert_close(output["brightness"], images.mean((1, 2, 3)))
    assert output["logits"].shape == (len(images), 4)


def test_images_that_are_no_squares(images):
    logits, units, _ = views(images[:, :, :, :12])
    assert logits.shape == (5, 4, 4)
    assert units.isfinite().all()


def test_surest_views_come_first():
    logits = torch.randn(3, 10, 4, generator=torch.Generator().manual_seed(0))
    kept, places = surest_views(logits, 0.39, torch.arange(10).expand(3, 10))
    for number, own in enumerate(logits):
        assert places[number].tolist() == entropy(own).argsort()[:3].tolist()
        assert torch.equal(kept[number], own[places[number]])
    assert surest_views(logits, 0.01)[0].shape == (3, 1, 4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"views": 1}, "views must be at least 2"),
        ({"pass_size": 0}, "pass_size must be at least 1"),
        ({"norm": "batch"}, "norm must be 'source'"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale must be two finite numbers"),
        ({"mean": (0.5, 0.5, 0.5)}, "give mean and std together"),
    ],
)
def test_wrong_arguments(settings, message):
    with pytest.raises(ValueError, match=message):
        Views(**settings)


class TestCache:
    def run(self, method, net, batches, **settings):
        adapted = method(seed=0, **settings).wrap(net)
        return torch.cat([adapted(images) for images in batches]), adapted.engine.net.forwards

    def test_a_second_method_makes_no_pass(self, images, tmp_path):
        batches, cache = [images, images[:2]], str(tmp_path / "embeddings")
        for method, more, expected in ((TDA, {}, 2), (DoTA, {}, 0), (Views, {"views": 3}, 4), (Views, {"views": 3}, 0)):
            plain, _ = self.run(method, small_net(), batches, **more)
            logits, forwards = self.run(method, small_net(), batches, cache=cache, **more)
            assert torch.equal(logits, plain)
            assert forwards == pytest.approx(expected)

    def test_a_resumed_method_reads_it(self, images, tmp_path):
        first = TDA(cache=str(tmp_path)).wrap(small_net())
        first(images)
        state = first.state_dict()
        expected = first(images[:3])
        resumed = TDA(cache=str(tmp_path)).wrap(small_net())
        resumed.load_state_dict(state)
        assert torch.equal(resumed(images[:3]), expected)
        assert resumed.engine.net.forwards == 1  # of the saved state

    def test_depends_on_what_the_embeddings_depend_on(self, images, tmp_path):
        other = small_net()
        other[1].running_mean += 1e-9
        cases = [
            ({}, small_net(), images),
            ({"seed": 1}, small_net(), images),
            ({"crop_scale": (0.2, 1.0)}, small_net(), images),
            ({"augmix": True}, small_net(), images),
            ({}, other, images),
            ({}, small_net(), images + 1e-12),
            ({}, nn.Sequential(*small_net(), nn.Identity()), images),
            ({"mean": (0.1,) * 3, "std": (0.2,) * 3}, small_net(), images),
        ]
        for settings, net, batch in cases:
            adapted = Views(**{"views": 3, "seed": 0, "cache": str(tmp_path)} | settings).wrap(net)
            adapted(batch)
            assert adapted.engine.net.forwards >= 2
        for norm, forwards in (("source", 0), ("batch", 1), ("batch", 0)):
            assert self.run(T3A, small_net(), [images], cache=str(tmp_path), norm=norm)[1] == forwards

    @pytest.mark.parametrize(
        "spoil",
        [
            lambda path: path.write_bytes(path.read_bytes()[:-40]),
            lambda path: path.write_bytes(b""),
            lambda path: torch.save({"logits": torch.zeros(1, 4), "features": torch.zeros(1, 6)}, path),
            lambda path: torch.save([1, 2], path),
        ],
    )
    def test_damaged_and_foreign_files_are_computed_again(self, images, tmp_path, spoil):
        expected, _ = self.run(TDA, small_net(), [images], cache=str(tmp_path))
        (path,) = tmp_path.rglob("*.pt")
        spoil(path)
        for forwards in (1, 0):
            logits, made = self.run(TDA, small_net(), [images], cache=str(tmp_path))
            assert torch.equal(logits, expected)
            assert made == forwards
        assert [file.name for file in tmp_path.rglob("*") if file.is_file()] == [path.name]

    def test_refusals(self, images, tmp_path):
        with pytest.raises(ValueError, match="the network returns more than logits"):
            TDA(cache=str(tmp_path)).wrap(Both())(images)
        with pytest.raises(ValueError, match="the network is called with further arguments"):
            TDA(cache=str(tmp_path)).wrap(Mirroring())(images, True)
        assert not list(tmp_path.iterdir())
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match="cache must be a folder"):
            TDA(cache=str(tmp_path / "file")).wrap(small_net())(images)
