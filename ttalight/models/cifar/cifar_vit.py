"""Small vision transformers for 32-pixel images, registered with timm as cifar_vit4 and cifar_vit8."""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer

from ttalight.models.cifar.cifar_network import cifar_cfg

__all__ = ["CifarViT"]

default_cfgs = generate_default_cfgs(
    {name: cifar_cfg(first_conv="patch_embed.proj", classifier="head") for name in ("cifar_vit4", "cifar_vit8")}
)


class CifarViT(VisionTransformer):
    """timm's vision transformer on patches of 4 x 4 pixels of images of 32 x 32: 64 patches and a class token.

    Source: A. Dosovitskiy et al., *An Image is Worth 16x16 Words: Transformers for Image Recognition at Scale*, ICLR
    2021, arXiv 2010.11929; the width of 192 in 3 heads is that of DeiT-Ti (H. Touvron et al., ICML 2021, arXiv
    2012.12877).

    Args:
        img_size: Side of the images in pixels.
        patch_size: Side of the patches in pixels.
        embed_dim: Width of the tokens.
        depth: Number of blocks.
        num_heads: Number of attention heads.
        kwargs: See timm's ``VisionTransformer``.
    """

    def __init__(
        self,
        img_size: int = 32,
        patch_size: int = 4,
        embed_dim: int = 192,
        depth: int = 4,
        num_heads: int = 3,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            img_size=img_size,
            patch_size=patch_size,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            **kwargs,
        )


@register_model
def cifar_vit4(pretrained: bool = False, **kwargs: Any) -> CifarViT:
    """Vision transformer of four blocks for images of 32 pixels."""
    return _create("cifar_vit4", pretrained, **kwargs)


@register_model
def cifar_vit8(pretrained: bool = False, **kwargs: Any) -> CifarViT:
    """Vision transformer of eight blocks for images of 32 pixels."""
    return _create("cifar_vit8", pretrained, **{"depth": 8, **kwargs})


def _create(name: str, pretrained: bool, **kwargs: Any) -> CifarViT:
    model: CifarViT = build_model_with_cfg(CifarViT, name, pretrained, **kwargs)
    return model
