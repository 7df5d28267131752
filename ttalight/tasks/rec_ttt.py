"""ReC-TTT: test-time training by reconstructing the maps of one encoder from those of another."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ttalight.adapters import Adapter, TestTimeTraining
from ttalight.errors import InputError
from ttalight.losses import mutual_divergence, reconstruction_loss
from ttalight.models.maps import capture_maps, parameters_through, select_stages
from ttalight.models.reverse_decoder import ReverseDecoder
from ttalight.tasks.map_task import MapTask

__all__ = ["ReCTTT"]


class ReCTTT(MapTask):
    """Two classifiers on an image and its mirror image, tied to a frozen encoder by a decoder that they share.

    Encoders E1 (``encoder``, sees the image), E2 (``mirror_encoder``, sees it mirrored) and F (``frozen``, sees both,
    never changes) start from the same weights. The decoder turns the maps of E1's first three stages into F's and F's
    into E1's, and does the same with E2 and F on the mirrored image; targets get no gradient. Source training minimises
    that ``reconstruction_loss`` on hard positions, the cross-entropies of both classifiers and their
    ``mutual_divergence``. At test time the reconstruction adapts E1 and E2 up to the third stage; decoder, F and
    classifiers are frozen. The logits are the mean of both classifiers', which decides as their sum does.

    Source: M. Colussi et al., *ReC-TTT: Contrastive Feature Reconstruction for Test-Time Training*, WACV 2025, arXiv
    2411.17869. The authors start from weights on ImageNet at 32 pixels that were never released: ``pretrained`` or
    ``supervised`` name others. Their source training is SGD (``optimizer``) at 0.1 with momentum 0.9 and weight decay
    5e-4, batches of 128, 350 epochs; without that argument the schedule is ``BaseTask``'s. Differences from their code:
    the divergence runs over classes, not over the batch; no number of steps is chosen by test accuracy; the same layers
    adapt their statistics in every batch (there the stem's do in the first one only).

    Args:
        supervised: Checkpoint of a ``SupervisedTask`` that encoders and classifiers start from.
        decoder_blocks: Residual blocks of the decoder's stages, from deep to shallow.
        mine_at_test: Learn from hard positions only at test time too, an option of the authors' code.
        weights: Checkpoint of this task.
        kwargs: See ``SupervisedTask`` and ``BaseTask``; crops are ``padded`` here.

    Raises:
        ValueError: If an argument is out of range, the encoder has fewer than three stages, or a file does not fit.
        FileNotFoundError: If a file does not exist.
    """

    auxiliary_views = 4

    def __init__(
        self,
        encoder: str = "resnet50",
        num_classes: int = 10,
        stem: Literal["cifar", "imagenet"] = "cifar",
        pretrained: bool | str = False,
        supervised: str | None = None,
        decoder_blocks: Sequence[int] = (3, 4, 6),
        mine_at_test: bool = False,
        weights: str | None = None,
        **kwargs: Any,
    ) -> None:
        given = {"encoder": encoder, "num_classes": num_classes, "stem": stem}
        super().__init__(
            encoder=encoder,
            num_classes=num_classes,
            stem=stem,
            pretrained=pretrained if supervised is None else False,
            weights=weights,
            **kwargs,
        )
        self.stages = select_stages(self.encoder, [1, 2, 3])
        self.mine_at_test = mine_at_test
        self._random = not pretrained and supervised is None and weights is None
        if supervised is not None and weights is None:
            parts = {name: name for name in ("normalize.", "encoder.", "classifier.")}
            self.load_stage(supervised, "supervised", "SupervisedTask", parts, given)
        self.mirror_encoder = copy.deepcopy(self.encoder)
        self.mirror_classifier = copy.deepcopy(self.classifier)
        self.frozen = copy.deepcopy(self.encoder).requires_grad_(False)
        self.decoder = ReverseDecoder([stage.channels for stage in self.stages], blocks=decoder_blocks)
        self.train()  # the trainer takes the modes as it finds them
        self.load_trained(weights)

    def train(self, mode: bool = True) -> ReCTTT:
        """Set the mode; the frozen encoder stays in eval mode."""
        super().train(mode)
        if "frozen" in self._modules:
            self.frozen.eval()
        return self

    def setup(self, stage: str) -> None:
        """Warn where the frozen encoder knows nothing, and refuse a data module that keeps some classes only."""
        super().setup(stage)
        if self.classifier.out_features != self.mirror_classifier.out_features:
            raise InputError(
                "ReC-TTT has two classifiers, and a data module that keeps only some classes of one (source_classes) "
                "cannot be used with it: train it on these classes alone"
            )
        if stage == "fit" and self._random:
            warnings.warn(
                "the frozen encoder of ReC-TTT has random weights, and its maps are what is reconstructed: give "
                "pretrained= (weights of the encoder) or supervised= (checkpoint of a SupervisedTask)",
                stacklevel=2,
            )

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, (B, C), of images in [0, 1], (B, 3, H, W): the mean of both classifiers'."""
        images = self.normalize(self.crop(images))
        mirrored = self.mirror_classifier(self.mirror_encoder(images.flip(3)))
        logits: Tensor = (self.classifier(self.encoder(images)) + mirrored) / 2
        return logits

    def _streams(self, images: Tensor) -> tuple[Tensor, Tensor, list[list[Tensor]]]:
        """Return the features of E1 and E2, and the maps of E1, F, F on the mirrored images, and E2."""
        images = self.normalize(self.crop(images))
        mirrored = images.flip(3)
        first, first_maps = self._pass(self.encoder, images)
        second, second_maps = self._pass(self.mirror_encoder, mirrored)
        with torch.no_grad():
            targets = [self._pass(self.frozen, seen)[1] for seen in (images, mirrored)]
        return first, second, [first_maps, *targets, second_maps]

    def _pass(self, encoder: nn.Module, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        with capture_maps(encoder, self.stages) as maps:
            features = encoder(images)
        return features, [maps[stage.number] for stage in self.stages]

    def _reconstruction(self, streams: list[list[Tensor]], alpha: float | None) -> Tensor:
        """Return the reconstruction loss, (B,): E1 and F stand for each other, as do F on mirrored images and E2."""
        decoded = self.decoder([torch.cat(maps) for maps in zip(*streams, strict=True)])
        targets = (streams[1], streams[0], streams[3], streams[2])
        losses = [reconstruction_loss(ours, theirs, alpha) for ours, theirs in zip(decoded, targets, strict=True)]
        return torch.stack(losses).mean(0)

    @property
    def alpha(self) -> float:
        """Standard deviations above the mean at which a position is hard: from -3 to 1 in the first tenth of steps."""
        ramp = 0.1 * float(self.trainer.estimated_stepping_batches)
        return min(-3 + 4 * self.global_step / ramp, 1.0)

    def training_losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return both cross-entropies, reconstruction and mutual divergence."""
        first, second, streams = self._streams(images)
        logits, mirrored = self.classifier(first), self.mirror_classifier(second)
        return {
            "supervised": cross_entropy(logits, labels) + cross_entropy(mirrored, labels),
            "auxiliary": self._reconstruction(streams, self.alpha).mean(),
            "divergence": mutual_divergence(logits, mirrored).mean(),
        }

    def auxiliary_loss(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the reconstruction loss, (B,); nothing is drawn.

        Args:
            images: (B, 3, H, W) in [0, 1].
            generator: Not used.
        """
        return self._reconstruction(self._streams(images)[2], 1.0 if self.mine_at_test else None)

    def adaptable_parameters(self) -> list[nn.Parameter]:
        """Return the parameters of E1 and E2 up to the third stage."""
        deepest = self.stages[-1]
        return [*parameters_through(self.encoder, deepest), *parameters_through(self.mirror_encoder, deepest)]

    def adaptation_modes(self) -> list[nn.Module]:
        """Return the modules of the first three stages of E1 and E2; all others keep the source's statistics."""
        return [
            module
            for encoder in (self.encoder, self.mirror_encoder)
            for stage in self.stages
            for module in encoder.get_submodule(stage.name).modules()
        ]

    def default_adapter(self) -> Adapter:
        """Return the test-time training that the authors' code begins with: AdamW at 1e-3, weight decay 1e-5, 10 steps.

        The paper's learning rate and number of steps are unknown; in the code the latter was the best of a list by test
        accuracy, which nothing here looks at.
        """
        return TestTimeTraining(steps=10, optimizer=partial(torch.optim.AdamW, lr=1e-3, weight_decay=1e-5))
