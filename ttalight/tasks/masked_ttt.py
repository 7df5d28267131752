"""Test-time training with masked autoencoders."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ttalight.adapters import Adapter, MaskedReconstruction
from ttalight.errors import InputError
from ttalight.models.masked_autoencoder import TokenHead, encode_visible
from ttalight.tasks.classifier_steps import ClassifierSteps
from ttalight.tasks.masked_autoencoder import MaskedAutoencoderTask

__all__ = ["MaskedTTT"]

#: What the encoder has beside the way of its tokens.
_UNUSED = ("pos_embed", "fc_norm.", "head.", "head_drop.", "attn_pool.")


class MaskedTTT(ClassifierSteps, MaskedAutoencoderTask):
    """A classifier on the tokens of a masked autoencoder, whose encoder adapts by reconstructing the test image.

    Source: Y. Gandelsman, Y. Sun, X. Chen, A. A. Efros, *Test-Time Training with Masked Autoencoders*, NeurIPS 2022,
    arXiv 2209.07522. The classifier is a transformer of its own on all tokens of the frozen encoder, trained by
    cross-entropy. At test time the reconstruction of masked patches adapts encoder and mask token. Decoder,
    classifier and position embeddings are frozen, and the image is predicted without a mask.

    By default images adapt one by one (``MaskedReconstruction``), as published. With ``TestTimeTraining`` all images
    of a batch make the steps together, each with a mask of its own.

    The published network is ViT-L/16 with a decoder of 8 blocks of 512 and a head of 12 blocks of 768. Its head was
    trained with ``optimizer`` (AdamW at 1e-3 for each 256 images of a batch, weight decay 0.2) for 20 epochs. Without
    that argument the schedule is ``BaseTask``'s. Heads of attention are 32 wide in the classifier here and 64 there.

    Args:
        autoencoder: Checkpoint of a ``MaskedAutoencoderTask``, to train the classifier on.
        weights: Checkpoint of this task, to adapt; not together with ``autoencoder``.
        num_classes: Number of classes C.
        head_width: Width of the classifier's tokens, a multiple of 32.
        head_depth: Blocks of the classifier.
        kwargs: See ``MaskedAutoencoderTask`` and ``BaseTask``. Network and decoder are those of the checkpoint.

    Raises:
        ValueError: If an argument is out of range, or a file does not fit.
        FileNotFoundError: If a file does not exist.
    """

    def __init__(
        self,
        autoencoder: str | None = None,
        weights: str | None = None,
        num_classes: int = 10,
        head_width: int = 192,
        head_depth: int = 2,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if autoencoder is not None and weights is not None:
            raise InputError(
                "give autoencoder (a model to train the classifier on) or weights (a trained classifier), not both"
            )
        self.num_classes = num_classes
        self.head = TokenHead(self.encoder, head_width, head_depth)  # type: ignore[arg-type]
        self.classifier = nn.Linear(head_width, num_classes)
        parts = {name: name for name in ("normalize.", "encoder.", "decoder.")}
        architecture: dict[str, Any] = {name: self.hparams[name] for name in ("encoder", "stem")}
        if autoencoder is not None:
            self.load_stage(autoencoder, "autoencoder", "MaskedAutoencoderTask", parts, architecture)
        if weights is not None:
            own = {name: name for name in ("head.", "classifier.")}
            self.load_stage(weights, "weights", "MaskedTTT", parts | own, architecture | {"num_classes": num_classes})
        self.encoder.requires_grad_(False)
        self.decoder.requires_grad_(False)
        self.train()  # the trainer takes the modes as it finds them
        self._started = autoencoder is not None or weights is not None

    def classify(self, images: Tensor) -> Tensor:
        """Return logits, (B, C), of images in [0, 1], (B, 3, H, W), of which nothing is masked."""
        logits: Tensor = self.classifier(self.head(encode_visible(self.encoder, self.prepare_images(images))))
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, (B, C), of images in [0, 1], (B, 3, H, W)."""
        return self.classify(images)

    def train(self, mode: bool = True) -> MaskedTTT:
        """Set the mode; encoder and decoder stay in eval mode."""
        super().train(mode)
        self.encoder.eval()
        self.decoder.eval()
        return self

    def setup(self, stage: str) -> None:
        """Make sure that there is a model to train a classifier on."""
        super().setup(stage)
        if stage == "fit" and not self._started:
            raise InputError(
                "the classifier is trained on a masked autoencoder: give autoencoder= (checkpoint of a "
                "MaskedAutoencoderTask)"
            )

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the classifier's cross-entropy on the frozen tokens of augmented images."""
        images, labels = batch[:2]
        if self.augment is not None:
            images = self.augment(images, self.draws)
        with torch.no_grad():
            tokens = encode_visible(self.encoder, self.prepare_images(images))
        loss = cross_entropy(self.classifier(self.head(tokens)), labels)
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def auxiliary_loss(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the reconstruction loss of each image with a mask of its own, (B,).

        Args:
            images: (B, 3, H, W) in [0, 1].
            generator: Source of the masks' random draws.
        """
        return self.reconstruction_losses(images, self.draw_masks(len(images), generator))

    def adaptable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of the encoder, without position embeddings, and the mask token."""
        encoder = [value for name, value in self.encoder.named_parameters() if not name.startswith(_UNUSED)]
        return [*encoder, self.decoder.mask_token]

    def default_adapter(self) -> Adapter:
        """Return the published steps: 20 of SGD at 5e-3 with momentum 0.9, 128 masks each, for every image."""
        return MaskedReconstruction()
