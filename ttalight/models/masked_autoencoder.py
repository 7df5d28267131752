"""Parts of a masked autoencoder: patches, masks, a transformer on visible patches, decoder and classification head."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from ttalight.errors import InputError

__all__ = [
    "PatchDecoder",
    "TokenHead",
    "check_transformer",
    "draw_visible",
    "encode_visible",
    "patchify",
    "set_fixed_positions",
    "sine_positions",
]


def patchify(images: Tensor, patch: tuple[int, int]) -> Tensor:
    """Return the pixels of patches, row by row, (B, L, P * Q * C); pixels go row by row, channels last.

    Args:
        images: (B, C, H, W).
        patch: Height P and width Q of a patch, which divide H and W.
    """
    high, wide = patch
    tiles = images.unfold(2, high, high).unfold(3, wide, wide)  # (B, C, H / P, W / Q, P, Q)
    return tiles.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)


def draw_visible(count: int, patches: int, mask_ratio: float, generator: torch.Generator) -> Tensor:
    """Draw which patches stay visible, int64 (count, K): K = patches * (1 - mask_ratio), rounded down, without order.

    Args:
        count: Number of masks.
        patches: Number of patches L of an image.
        mask_ratio: Share of the patches that is masked.
        generator: Source of the draws; the result is on its device.
    """
    noise = torch.rand(count, patches, generator=generator, device=generator.device)
    return noise.argsort(dim=1)[:, : int(patches * (1 - mask_ratio))]


def encode_visible(encoder: Any, images: Tensor, visible: Tensor | None = None) -> Tensor:
    """Return the tokens of a vision transformer, prefix tokens first, of which masked patches are not part.

    Args:
        encoder: A ``VisionTransformer`` of timm.
        images: Normalised, (B, 3, H, W); one image serves all masks.
        visible: Places of the patches that pass, int64 (N, K), N = B or, of one image, any number. All by default.

    Returns:
        (N, prefix + K, D).
    """
    tokens: Tensor = encoder._pos_embed(encoder.patch_embed(images))
    if visible is not None:
        prefix = encoder.num_prefix_tokens
        tokens = tokens.expand(len(visible), -1, -1)
        places = visible[..., None].expand(-1, -1, tokens.shape[2])
        tokens = torch.cat([tokens[:, :prefix], tokens[:, prefix:].gather(1, places)], dim=1)
    encoded: Tensor = encoder.norm(encoder.blocks(encoder.norm_pre(tokens)))
    return encoded


def check_transformer(encoder: nn.Module, name: str) -> VisionTransformer:
    """Return the encoder, if ``encode_visible`` computes what it computes itself.

    Args:
        encoder: A network of timm's.
        name: Its name, for messages.

    Raises:
        ValueError: If it is no such vision transformer.
    """
    if isinstance(encoder, VisionTransformer):
        size: Any = encoder.patch_embed.img_size
        images = torch.linspace(-1, 1, 3 * size[0] * size[1]).view(1, 3, *size)
        training = encoder.training
        try:
            with torch.no_grad():
                if torch.equal(encode_visible(encoder.eval(), images), encoder.forward_features(images)):
                    return encoder
        except (AttributeError, RuntimeError, TypeError):
            pass  # it is refused below
        finally:
            encoder.train(training)
    raise InputError(
        f"{name} is no vision transformer whose tokens pass its blocks one after the other, and a masked autoencoder "
        "leaves patches out: use a vit_* or deit_* network of timm, or cifar_vit4"
    )


def sine_positions(height: int, width: int, size: int) -> Tensor:
    """Return sines and cosines of the places of a grid, row by row, (height * width, size).

    The first half of the numbers tells the column, the second half the row: sines, then cosines, of the place divided
    by 10000 ** (i / n) for i = 0 ... n - 1, with n = size / 4.

    Args:
        height: Rows.
        width: Columns.
        size: A multiple of 4.

    Raises:
        ValueError: If the size is no multiple of 4.
    """
    if size < 4 or size % 4:
        raise InputError(f"positions of a grid have a size that is a multiple of 4, got {size}")
    rates = 10000.0 ** (-torch.arange(size // 4, dtype=torch.float64) / (size // 4))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [places.reshape(-1, 1) * rates for places in (columns, rows)]
    return torch.cat([wave(angle) for angle in angles for wave in (torch.sin, torch.cos)], dim=1).float()


@torch.no_grad()
def set_fixed_positions(encoder: Any) -> None:
    """Replace the position embeddings of a vision transformer by those of ``sine_positions``, 0 for prefix tokens."""
    embedding, (height, width) = encoder.pos_embed, encoder.patch_embed.grid_size
    embedding.zero_()
    embedding[0, -height * width :] = sine_positions(height, width, embedding.shape[2])


class _Blocks(nn.Module):
    """Blocks of a transformer behind a linear layer that changes the width, with fixed positions.

    Args:
        encoder: The vision transformer whose tokens come in.
        width: Width of the tokens here, a multiple of 4 and of the width of a head.
        depth: Number of blocks.
        head_width: Width of an attention head.

    Raises:
        ValueError: If a size is out of range.
    """

    positions: Tensor

    def __init__(self, encoder: VisionTransformer, width: int, depth: int, head_width: int) -> None:
        super().__init__()
        if depth < 1 or width < head_width or width % head_width:
            raise InputError(
                f"a transformer has a block or more, and heads of {head_width}: got depth={depth}, width={width}"
            )
        height, wide = encoder.patch_embed.grid_size
        self.prefix: int = encoder.num_prefix_tokens
        self.embed = nn.Linear(encoder.embed_dim, width)
        places = sine_positions(height, wide, width)
        places = torch.cat([places.new_zeros(self.prefix, width), places])
        self.register_buffer("positions", places, persistent=False)
        norm: Any = partial(nn.LayerNorm, eps=1e-6)
        blocks = [Block(width, width // head_width, qkv_bias=True, norm_layer=norm) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = norm(width)

    def draw_weights(self) -> None:
        """Draw the weights of linear layers uniformly, after X. Glorot and Y. Bengio; biases are 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)


class PatchDecoder(_Blocks):
    """Predicts the pixels of all patches from the tokens of those that are visible.

    Source: K. He et al., *Masked Autoencoders Are Scalable Vision Learners*, CVPR 2022, arXiv 2111.06377. A learned
    token stands for each masked patch.

    Args:
        encoder: The vision transformer whose tokens come in.
        width: Width of the tokens here, a multiple of 32, which is the width of a head.
        depth: Number of blocks.

    Raises:
        ValueError: If a size is out of range.
    """

    def __init__(self, encoder: VisionTransformer, width: int, depth: int) -> None:
        super().__init__(encoder, width, depth, head_width=32)
        high, wide = encoder.patch_embed.patch_size
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.predict = nn.Linear(width, 3 * high * wide)
        self.draw_weights()
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """Return pixels of all patches, (N, L, P * Q * 3); see ``patchify``.

        Args:
            tokens: Of ``encode_visible``, (N, prefix + K, D).
            visible: Places of the K patches, int64 (N, K).
        """
        tokens = self.embed(tokens)
        prefix, patches = tokens[:, : self.prefix], tokens[:, self.prefix :]
        count, length, width = len(tokens), len(self.positions) - self.prefix, tokens.shape[2]
        places = visible[..., None].expand(-1, -1, width)
        masked = self.mask_token.to(tokens.dtype).expand(count, length, width)
        tokens = torch.cat([prefix, masked.scatter(1, places, patches)], dim=1) + self.positions
        pixels: Tensor = self.predict(self.norm(self.blocks(tokens))[:, self.prefix :])
        return pixels


class TokenHead(_Blocks):
    """Maps all tokens of an image to features, (B, E): those of the class token behind blocks of its own.

    The classifier of Y. Gandelsman et al., *Test-Time Training with Masked Autoencoders*, NeurIPS 2022, arXiv
    2209.07522, without its last linear layer. Where the encoder has no class token, features are means over patches.

    Args:
        encoder: The vision transformer whose tokens come in.
        width: Width E of the tokens here, a multiple of 32, which is the width of a head.
        depth: Number of blocks.

    Raises:
        ValueError: If a size is out of range.
    """

    def __init__(self, encoder: VisionTransformer, width: int, depth: int) -> None:
        super().__init__(encoder, width, depth, head_width=32)
        self.draw_weights()

    def forward(self, tokens: Tensor) -> Tensor:
        """Return features, (B, E), of tokens (B, prefix + L, D)."""
        tokens = self.norm(self.blocks(self.embed(tokens) + self.positions))
        return tokens[:, 0] if self.prefix else tokens.mean(1)
