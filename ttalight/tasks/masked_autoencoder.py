"""Self-supervised source training of a masked autoencoder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ttalight.errors import InputError
from ttalight.losses import masked_patch_loss
from ttalight.models.masked_autoencoder import (
    PatchDecoder,
    check_transformer,
    draw_visible,
    encode_visible,
    patchify,
    set_fixed_positions,
)
from ttalight.tasks.augmentation import supervised_augmentation
from ttalight.tasks.base import BaseTask

__all__ = ["MaskedAutoencoderTask"]


class MaskedAutoencoderTask(BaseTask):
    """A vision transformer that sees a quarter of an image's patches, and a decoder that predicts the others.

    Source: K. He et al., *Masked Autoencoders Are Scalable Vision Learners*, CVPR 2022, arXiv 2111.06377. The encoder
    passes the visible patches alone. Position embeddings stay fixed: those of pretrained weights, otherwise sines and
    cosines. The published schedule sets ``optimizer`` (AdamW, betas 0.9 and 0.95, weight decay 0.05, 1.5e-4 for
    each 256 images of a batch) and 800 epochs; without that argument it is ``BaseTask``'s.

    Args:
        encoder: Name of a vision transformer of timm.
        stem: ``imagenet``, the network as timm has it; of ``cifar_vit4`` either word is.
        pretrained: ``true`` for timm's weights, or a local file; of the encoder alone.
        decoder_width: Width of the decoder's tokens, a multiple of 32; 512 in the paper.
        decoder_depth: Blocks of the decoder; 8 in the paper.
        mask_ratio: Share of the patches that is masked, in training and at test time.
        crop: ``resized``, ``padded`` or ``none``.
        crop_scale: Range of a resized crop's share of the image.
        padding: Pixels on each side for padded crops.
        flip: Probability of a horizontal flip.
        kwargs: See ``BaseTask``.

    Raises:
        ValueError: If an argument is out of range, or the encoder is no such network.
    """

    def __init__(
        self,
        encoder: str = "cifar_vit4",
        stem: Literal["cifar", "imagenet"] = "imagenet",
        pretrained: bool | str = False,
        decoder_width: int = 96,
        decoder_depth: int = 2,
        mask_ratio: float = 0.75,
        crop: Literal["resized", "padded", "none"] = "resized",
        crop_scale: Sequence[float] = (0.2, 1.0),
        padding: int = 4,
        flip: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        network = check_transformer(self.start_encoder(encoder, stem, pretrained), encoder)
        self.encoder = network
        if not pretrained:
            set_fixed_positions(network)
        self.patch: tuple[int, int] = network.patch_embed.patch_size
        self.patches = int(network.patch_embed.num_patches)
        self.mask_ratio = mask_ratio
        if not 0 < mask_ratio < 1 or int(self.patches * (1 - mask_ratio)) < 1:
            raise InputError(
                f"mask_ratio must lie in (0, 1) and leave a patch or more of {self.patches}, got {mask_ratio}"
            )
        self.decoder = PatchDecoder(network, decoder_width, decoder_depth)
        fixed = getattr(network, "pos_embed", None)
        if isinstance(fixed, nn.Parameter):
            fixed.requires_grad_(False)
        self.augment = supervised_augmentation(crop, self.crop.size, crop_scale, padding, flip)

    def draw_masks(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw the places of visible patches, int64 (count, K); see ``draw_visible``."""
        return draw_visible(count, self.patches, self.mask_ratio, generator)

    def reconstruction_losses(self, images: Tensor, visible: Tensor) -> Tensor:
        """Return the loss of each mask, (N,).

        Args:
            images: (N, 3, H, W) in [0, 1], or a single one for all masks, (1, 3, H, W).
            visible: Places of visible patches, int64 (N, K).
        """
        images = self.prepare_images(images)
        predicted = self.decoder(encode_visible(self.encoder, images, visible), visible)
        return masked_patch_loss(predicted, patchify(images, self.patch), visible)

    def forward(self, images: Tensor) -> Tensor:
        """Return the encoder's features, (B, D), of images in [0, 1], (B, 3, H, W), of which nothing is masked."""
        return self.encode(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of augmented images, a mask for each."""
        images = batch[0]
        if self.augment is not None:
            images = self.augment(images, self.draws)
        loss = self.reconstruction_losses(images, self.draw_masks(len(images), self.draws)).mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Log the loss with masks that are the same in every epoch."""
        images = batch[0]
        generator = torch.Generator(device=images.device).manual_seed(batch_idx)
        loss = self.reconstruction_losses(images, self.draw_masks(len(images), generator)).mean()
        self.log("val/loss", loss, batch_size=len(images), prog_bar=True, sync_dist=True)
