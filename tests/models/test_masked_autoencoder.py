"""Parts of a masked autoencoder against walks through pixels and tokens."""

from __future__ import annotations

import math

import pytest
import timm
import torch

from ttalight.models import create_encoder
from ttalight.models.masked_autoencoder import (
    PatchDecoder,
    TokenHead,
    check_transformer,
    draw_visible,
    encode_visible,
    patchify,
    set_fixed_positions,
    sine_positions,
)

TINY = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 2, "num_heads": 2, "num_classes": 0}


@pytest.fixture(params=["class token", "registers", "no class token"])
def encoder(request):
    torch.manual_seed(0)
    options = {
        "class token": {},
        "registers": {"reg_tokens": 2, "no_embed_class": True, "pre_norm": True},
        "no class token": {"class_token": False, "global_pool": "avg"},
    }[request.param]
    return timm.create_model("vit_tiny_patch16_224", **TINY, **options).eval()


@pytest.fixture
def images():
    return torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_patches_are_the_pixels_of_tiles(images):
    patches = patchify(images[..., :8], (4, 2))
    expected = [
        [images[b, c, row + y, column + x] for y in range(4) for x in range(2) for c in range(3)]
        for b in range(3)
        for row in range(0, 16, 4)
        for column in range(0, 8, 2)
    ]
    assert torch.equal(patches, torch.tensor(expected).view(3, 16, 24))


def test_masks_are_drawn_evenly_without_repetition():
    visible = draw_visible(4000, 10, 0.75, torch.Generator().manual_seed(0))
    assert visible.shape == (4000, 2)
    assert (visible[:, 0] != visible[:, 1]).all()
    shares = visible.flatten().bincount(minlength=10) / 4000
    assert (shares - 0.2).abs().max() < 0.03


def test_encoder_never_sees_masked_patches(encoder, images):
    visible = draw_visible(3, 16, 0.75, torch.Generator().manual_seed(1))
    tokens = encode_visible(encoder, images, visible)
    assert tokens.shape == (3, encoder.num_prefix_tokens + 4, 64)
    seen = torch.zeros(3, 16, dtype=torch.bool).scatter(1, visible, True)
    tiles = seen.view(3, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
    torch.testing.assert_close(encode_visible(encoder, images.where(tiles, 0.5), visible), tokens)
    assert not torch.allclose(encode_visible(encoder, images.where(~tiles, 0.5), visible), tokens)
    everything = torch.arange(16).expand(3, -1)
    torch.testing.assert_close(encode_visible(encoder, images, everything), encoder.forward_features(images))
    several = encode_visible(encoder, images[:1], visible)  # masks of one image
    torch.testing.assert_close(several, encode_visible(encoder, images[:1].expand(3, -1, -1, -1), visible))


def test_decoder_puts_tokens_into_their_places(encoder, images):
    """With blocks that change nothing, a token leaves where its patch is, and the mask token everywhere else."""
    visible = draw_visible(3, 16, 0.75, torch.Generator().manual_seed(1))
    decoder = PatchDecoder(encoder, width=32, depth=1)
    decoder.blocks, decoder.norm, decoder.predict = (torch.nn.Identity() for _ in range(3))
    tokens = encode_visible(encoder, images, visible)
    pixels = decoder(tokens, visible) - sine_positions(4, 4, 32)
    embedded = decoder.embed(tokens[:, encoder.num_prefix_tokens :])
    for image in range(3):
        for place in range(16):
            at = (visible[image] == place).nonzero().flatten().tolist()
            expected = embedded[image, at[0]] if at else decoder.mask_token[0, 0]
            torch.testing.assert_close(pixels[image, place], expected)


def test_head_reads_the_class_token_or_all_patches(encoder, images):
    head = TokenHead(encoder, width=32, depth=1)
    features = head(encoder.forward_features(images))
    assert features.shape == (3, 32)
    if encoder.num_prefix_tokens == 0:
        tokens = head.norm(head.blocks(head.embed(encoder.forward_features(images)) + sine_positions(4, 4, 32)))
        torch.testing.assert_close(features, tokens.mean(1))


def test_positions_are_sines_of_rows_and_columns(encoder):
    positions = sine_positions(2, 3, 8)
    for row in range(2):
        for column in range(3):
            expected = [
                wave(place / 10000 ** (i / 2))
                for place in (column, row)
                for wave in (math.sin, math.cos)
                for i in (0, 1)
            ]
            torch.testing.assert_close(positions[3 * row + column], torch.tensor(expected))
    set_fixed_positions(encoder)
    torch.testing.assert_close(encoder.pos_embed[0, -16:], sine_positions(4, 4, 64))
    assert not encoder.pos_embed[0, :-16].any()
    with pytest.raises(ValueError, match="multiple of 4, got 6"):
        sine_positions(2, 2, 6)
    with pytest.raises(ValueError, match="heads of 32: got depth=1, width=48"):
        TokenHead(encoder, width=48, depth=1)


@pytest.mark.parametrize("name", ["cifar_resnet8", "eva02_tiny_patch14_224"])
def test_networks_that_cannot_leave_patches_out_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} is no vision transformer whose tokens"):
        check_transformer(create_encoder(name, stem="cifar" if "cifar" in name else "imagenet"), name)


@pytest.mark.parametrize("blocks", [4, 8])
def test_small_transformers_have_64_patches(blocks):
    encoder = create_encoder(f"cifar_vit{blocks}")
    assert (encoder.num_features, encoder.patch_embed.num_patches, len(encoder.blocks)) == (192, 64, blocks)
