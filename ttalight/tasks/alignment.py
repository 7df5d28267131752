"""Cross-task alignment: the self-supervised encoder learns to speak to the supervised classifier."""

from __future__ import annotations

from typing import Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from ttalight.distributed import average, gather_with_gradients, rank_and_world_size
from ttalight.errors import InputError
from ttalight.losses import alignment_loss
from ttalight.models import Normalize, create_encoder
from ttalight.tasks.classifier_steps import ClassifierSteps
from ttalight.tasks.two_view import TwoViewTask
from ttalight.transforms import RandomCropFlip

__all__ = ["AlignmentTask"]


class AlignmentTask(ClassifierSteps, TwoViewTask):
    """Aligns pi(g(x)) with the features f(x) of a supervised model by a contrastive loss.

    Second stage of S. Barbeau et al., *CTA: Cross-Task Alignment for Better Test Time Training*, arXiv 2507.05221.
    Supervised encoder f and classifier h stay frozen, in eval mode; what it classifies with is h(pi(g(x))). Where the
    paper is ambiguous: the target is f(x), not h(f(x)), since h reads pi(g(x)) later; the teacher sees the clean
    image; the sibling view counts as a negative, as Eq. 4 has it.

    With ``freeze_teacher=False`` f is trained too, by the sum of the alignment loss and the cross-entropy of h(f(x)),
    as the paper's section 3.4 mentions. What it leaves open is settled so: both losses have weight 1, the alignment's
    gradients reach f, h stays frozen, f is in train mode and sees one view of an image for both losses.

    Without ``self_supervised`` the student starts as a copy of the supervised model: g as f, pi as the identity, so
    that h(pi(g(x))) is h(f(x)) before the first step. One file of pretrained weights, with its classifier, is enough.

    Args:
        supervised: Checkpoint of a ``SupervisedTask``, or a state dict of encoder and classifier under the backbone's
            own names or those of its public files, such as that of a pretrained network of timm's; ``true`` for the
            weights that timm downloads.
        self_supervised: Checkpoint of a ``ContrastiveTask``; by default the student is a copy.
        num_classes: Number of classes C.
        temperature: Temperature of the alignment loss.
        teacher_view: What the teacher sees: ``clean`` images, whose features are computed once, or a ``weak``
            augmentation (padded crop and flip), computed again for every batch.
        sibling: What the other view of an image is to a view: ``negative``, ``exclude`` or ``positive``.
        freeze_teacher: Keep f as it is. Otherwise it is trained, which needs labels, its own pass for every batch and
            the optimizer's memory for two encoders.
        kwargs: See ``TwoViewTask`` and ``BaseTask``.

    Raises:
        ValueError: If an argument is out of range, or a file does not fit.
        FileNotFoundError: If a file does not exist.
    """

    def __init__(
        self,
        supervised: bool | str | None = None,
        self_supervised: str | None = None,
        encoder: str = "resnet50",
        num_classes: int = 10,
        stem: Literal["cifar", "imagenet"] = "cifar",
        temperature: float = 0.5,
        teacher_view: Literal["clean", "weak"] = "clean",
        sibling: Literal["negative", "exclude", "positive"] = "negative",
        freeze_teacher: bool = True,
        flip: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(encoder=encoder, stem=stem, temperature=temperature, flip=flip, **kwargs)
        self.num_classes = num_classes
        self.teacher_view = teacher_view
        self.sibling = sibling
        self.freeze_teacher = freeze_teacher
        self.teacher = nn.ModuleDict({"normalize": Normalize(), "encoder": create_encoder(encoder, stem=stem)})
        self.classifier = nn.Linear(self.encoder.num_features, num_classes)  # type: ignore[arg-type]
        self.teacher.requires_grad_(not freeze_teacher)
        self.classifier.requires_grad_(False)
        self.train()  # the trainer takes the modes as it finds them
        self.weak = RandomCropFlip(flip=flip)
        #: Mean norms of f(x) and pi(g(x)) over recent batches; the ratio rescales features at test time.
        self.register_buffer("feature_norms", torch.ones(2))
        self.feature_norms: Tensor
        self._cache: Tensor | None = None
        shared = {"encoder": encoder, "stem": stem}
        if supervised:
            self._load_teacher(supervised, shared | {"num_classes": num_classes})
        if self_supervised is not None:
            parts = {name: name for name in ("normalize.", "encoder.", "projector.")}
            self.load_stage(self_supervised, "self_supervised", "ContrastiveTask", parts, shared)
        elif supervised:
            if kwargs.get("pretrained"):
                raise InputError(
                    "without self_supervised the encoder starts as a copy of the supervised one: leave pretrained out, "
                    "or train a ContrastiveTask from these weights and give its checkpoint as self_supervised"
                )
            self._copy_teacher()
        self._complete = bool(supervised)

    def _load_teacher(self, given: bool | str, architecture: dict[str, Any]) -> None:
        checkpoint = self.read_weights(given, "supervised")
        if "ttalight" in checkpoint:
            parts = {"normalize.": "teacher.normalize.", "encoder.": "teacher.encoder.", "classifier.": "classifier."}
            self.load_stage(str(given), "supervised", "SupervisedTask", parts, architecture)
        else:
            self.load_public(checkpoint, given, "supervised", self.teacher["encoder"], self.classifier)
            self.teacher["normalize"].load_state_dict(self.normalize.state_dict())

    def _copy_teacher(self) -> None:
        self.encoder.load_state_dict(self.teacher["encoder"].state_dict())
        nn.init.eye_(self.projector.weight)
        nn.init.zeros_(self.projector.bias)
        if not self.preparation.is_given:
            self.normalize.load_state_dict(self.teacher["normalize"].state_dict())
        self.teacher["normalize"] = self.normalize  # one module: what changes it changes both
        rank_zero_info("self_supervised: none given, the student starts as a copy of the supervised model")

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits h(pi(g(x))), (B, C), of images in [0, 1], (B, 3, H, W)."""
        logits: Tensor = self.classifier(self.project(images))
        return logits

    def train(self, mode: bool = True) -> AlignmentTask:
        """Set the mode; the classifier, and a teacher that is frozen, stay in eval mode."""
        super().train(mode)
        self.teacher.train(mode and not self.freeze_teacher)
        self.classifier.eval()
        return self

    def setup(self, stage: str) -> None:
        """Ask the data module for the samples' indices, by which teacher features are kept."""
        super().setup(stage)
        if stage != "fit":
            return
        if not self._complete:
            raise InputError(
                "alignment starts from a trained model: give supervised= (checkpoint of a SupervisedTask, or a file of "
                "pretrained weights) and, unless the student is to be its copy, self_supervised= (checkpoint of a "
                "ContrastiveTask)"
            )
        data: Any = getattr(self.trainer, "datamodule", None)
        if self._teaches_once and hasattr(data, "with_index"):
            data.with_index = True

    def on_train_start(self) -> None:
        """Compute the teacher's features of all training images once, if they stay the same."""
        super().on_train_start()
        data: Any = getattr(self.trainer, "datamodule", None)
        if self._teaches_once and getattr(data, "with_index", False):
            self._cache = self._teacher_features(data)

    @property
    def _teaches_once(self) -> bool:
        return self.freeze_teacher and self.teacher_view == "clean"

    @torch.no_grad()
    def _teacher_features(self, data: Any) -> Tensor:
        """Return the features of all training images; several processes compute a stretch each."""
        images, (rank, ranks) = data.train_set, rank_and_world_size()
        size = -(-len(images) // ranks)  # the last part starts from the first image again
        own = [index % len(images) for index in range(rank * size, (rank + 1) * size)]
        loader = DataLoader(images, data.batch_size, sampler=own, collate_fn=lambda batch: batch)
        batches = (data.on_after_batch_transfer((batch[0].to(self.device),), 0)[0] for batch in loader)
        features = torch.cat([self.teach(images) for images in batches])
        return gather_with_gradients(features)[: len(images)]

    def teach(self, images: Tensor) -> Tensor:
        """Return the supervised model's features f(x), (B, D), of images in [0, 1], (B, 3, H, W).

        They have gradients only where the teacher is trained.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_teacher):
            features: Tensor = self.teacher["encoder"](self.teacher["normalize"](self.crop(images)))
        return features

    def training_step(self, batch: Any, batch_idx: int) -> Tensor | None:
        """Return the alignment loss of two fresh views with the teacher's features; None skips a single image.

        A teacher that is trained adds the cross-entropy of what the classifier says of its features.
        """
        images = batch[0]
        if self.is_rest(images, batch_idx):
            return None
        if self.teacher_view == "weak":
            target = self.teach(self.weak(images, self.draws))
        elif self._cache is not None:
            target = self._cache[batch[2]]
        else:
            target = self.teach(images)
        first, second = self.project(self.views(images, self.draws)).chunk(2)
        loss = alignment_loss(first, second, target, self.temperature, sibling=self.sibling, gather=self.gathers)
        self._note_norms(target, first)
        if not self.freeze_teacher:
            supervised = cross_entropy(self.classifier(target), batch[1])
            self.log("train/alignment", loss)
            self.log("train/supervised", supervised)
            loss = loss + supervised
        self.log("train/loss", loss, prog_bar=True)
        return loss

    @torch.no_grad()
    def _note_norms(self, target: Tensor, aligned: Tensor) -> None:
        norms = torch.stack([target.float().norm(dim=1).mean(), aligned.float().norm(dim=1).mean()])
        average([norms])
        self.feature_norms.lerp_(norms, 0.05)
        self.log("train/teacher_norm", norms[0])
        self.log("train/aligned_norm", norms[1])
