"""Maps between stages, of networks of this package and of timm, and the decoder that goes back through them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ttalight.models import create_encoder
from ttalight.models.maps import capture_maps, find_stages, parameters_through, select_stages
from ttalight.models.reverse_decoder import ReverseDecoder


@pytest.mark.parametrize(
    ("name", "stem", "channels"),
    [
        ("cifar_resnet8", "cifar", [16, 32, 64]),
        ("cifar_wrn40_2", "cifar", [32, 64, 128]),
        ("cifar_resnet26_gn", "cifar", [16, 32, 64]),
        ("resnet18", "cifar", [64, 128, 256, 512]),
        ("resnet18", "imagenet", [64, 128, 256, 512]),
        ("convnext_atto", "imagenet", [40, 80, 160, 320]),
    ],
)
def test_stages_and_maps(name, stem, channels):
    encoder = create_encoder(name, stem=stem).eval()
    stages = find_stages(encoder)
    assert [stage.number for stage in stages] == list(range(1, len(channels) + 1))
    assert [stage.channels for stage in stages] == channels
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        plain = encoder(images)
        with capture_maps(encoder, stages) as maps:
            assert torch.equal(encoder(images), plain)
    sides = [maps[stage.number].shape[2] for stage in stages]
    assert sides == [sides[0] >> n for n in range(len(channels))]
    assert [maps[stage.number].shape[1] for stage in stages] == channels
    assert not any(module._forward_hooks for module in encoder.modules())


def test_maps_are_those_that_timm_hands_out():
    encoder = create_encoder("resnet18", stem="imagenet").eval()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad(), capture_maps(encoder, select_stages(encoder, [3, 1])) as maps:
        encoder(images)
    theirs = encoder.forward_intermediates(images, intermediates_only=True)  # from the stem's activation on
    assert list(maps) == [1, 3]
    assert torch.equal(maps[1], theirs[1])
    assert torch.equal(maps[3], theirs[3])


def test_hooks_go_when_a_pass_fails():
    encoder = create_encoder("cifar_resnet8")
    with pytest.raises(RuntimeError), capture_maps(encoder, find_stages(encoder)):
        encoder(torch.rand(2, 5, 32, 32))
    assert not any(module._forward_hooks for module in encoder.modules())


def test_parameters_end_with_the_stage():
    encoder = create_encoder("resnet18")
    stages = find_stages(encoder)
    found = {id(parameter) for parameter in parameters_through(encoder, stages[1])}
    heads = {name.split(".")[0] for name, parameter in encoder.named_parameters() if id(parameter) in found}
    assert heads == {"conv1", "bn1", "layer1", "layer2"}
    expected = sum(len(list(getattr(encoder, name).parameters())) for name in heads)
    assert len(found) == expected


def test_networks_without_stages_are_an_error():
    with pytest.raises(ValueError, match="Sequential does not say where its stages end"):
        find_stages(nn.Sequential(nn.Linear(3, 3)))


def test_tokens_are_no_maps():
    encoder = create_encoder("vit_tiny_patch16_224", stem="imagenet")
    stages = find_stages(encoder)
    with pytest.raises(ValueError, match=r"puts out shape \(1, 197, 192\), expected maps \(B, 192, H, W\)"):
        with capture_maps(encoder, stages[:1]):
            encoder(torch.rand(1, 3, 224, 224))


class TestReverseDecoder:
    @pytest.fixture
    def maps(self):
        generator = torch.Generator().manual_seed(0)
        shapes = ((8, 8, 16, 12), (8, 12, 8, 6), (8, 20, 4, 2 + 1))
        return [torch.rand(shape, generator=generator) for shape in shapes]

    @pytest.fixture
    def decoder(self):
        torch.manual_seed(0)
        return ReverseDecoder([8, 12, 20], blocks=[1, 2, 1])

    def test_gives_each_stream_maps_like_its_own(self, decoder, maps):
        maps = [values[..., : 8 >> n] for n, values in enumerate(maps)]
        decoded = decoder(maps)
        assert [len(stream) for stream in decoded] == [3] * 4
        for stream in decoded:
            assert [tuple(values.shape) for values in stream] == [(2, *values.shape[1:]) for values in maps]

    def test_maps_share_statistics_in_training_only(self, decoder, maps):
        maps = [values[..., : 8 >> n] for n, values in enumerate(maps)]
        changed = [torch.cat([values[:6], values[6:] + 1]) for values in maps]
        for mode in (True, False):
            first, second = decoder.train(mode)(maps)[0], decoder.train(mode)(changed)[0]
            same = [torch.equal(a, b) for a, b in zip(first, second, strict=True)]
            assert same == ([False] * 3 if mode else [True] * 3)

    def test_streams_have_last_layers_of_their_own(self, decoder, maps):
        maps = [values[:2, ..., : 8 >> n].repeat(4, 1, 1, 1) for n, values in enumerate(maps)]
        first, second = decoder.eval()(maps)[:2]
        assert not torch.allclose(first[0], second[0])

    def test_odd_sides_are_an_error(self, decoder, maps):
        with pytest.raises(ValueError, match=r"the third with even sides, got .*\(4, 3\)"):
            decoder(maps)
