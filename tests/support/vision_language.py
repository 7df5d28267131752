"""Tiny models of two towers, of open_clip's classes, with random weights, and a tokenizer of a few words."""

from __future__ import annotations

import zlib

import torch
from torch import nn

WORDS, LENGTH = 40, 16
NAMES = ["cat", "red dog", "frog", "airplane", "old house"]


def tokenize(texts) -> torch.Tensor:
    """Return tokens, (N, 16): a begin, one for each word, the end, which is the largest, and zeros."""
    tokens = torch.zeros(len(texts), LENGTH, dtype=torch.long)
    for row, text in zip(tokens, texts, strict=True):
        words = [1 + zlib.crc32(word.encode()) % (WORDS - 4) for word in text.replace(".", " .").split()]
        row[: len(words) + 2] = torch.tensor([WORDS - 2, *words, WORDS - 1])
    return tokens


def tiny_clip(custom: bool = False, vision: str = "vit") -> nn.Module:
    """Return a model of open_clip in float64 whose features depend on images and texts.

    Args:
        custom: Whether the text tower is a module of its own, as for newer models.
        vision: ``vit``, or ``resnet`` for an image tower with BatchNorm.
    """
    import open_clip

    towers = {
        "vit": {"image_size": 8, "patch_size": 4, "layers": 2, "width": 8, "head_width": 4},
        "resnet": {"image_size": 32, "layers": (1, 1, 1, 1), "width": 8, "head_width": 4},
    }
    text = {"context_length": LENGTH, "vocab_size": WORDS, "width": 8, "heads": 2, "layers": 2}
    torch.manual_seed(0)
    make = open_clip.CustomTextCLIP if custom else open_clip.CLIP
    model = make(embed_dim=6, vision_cfg=towers[vision], text_cfg=text)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.5)
        elif name.endswith(("bias", "class_embedding")):
            nn.init.normal_(parameter, std=0.2)
    with torch.no_grad():
        model.logit_scale.fill_(3.0)
    return model.double().eval()
