"""What all tasks share: optimizer and schedule, keyed draws, and reading the weights of an earlier stage."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

import ttalight
from ttalight.models import CenterCrop, Normalize
from ttalight.seeding import derive_seed, global_seed
from ttalight.tasks.checkpoint import check_architecture, file_sha256, load_weights, read_checkpoint, select

__all__ = ["BaseTask"]


class BaseTask(LightningModule, ABC):
    """Base of the tasks.

    The default schedule is the one of S. Barbeau et al., *CTA: Cross-Task Alignment for Better Test Time Training*,
    arXiv 2507.05221, Table 3: Adam, two epochs of warm-up, cosine annealing from 5e-4 to 1e-6. The paper leaves the
    shape of the warm-up open; here it is linear from the final learning rate, and both move at every step.

    Args:
        lr: Learning rate after the warm-up.
        final_lr: Learning rate at the start of the warm-up and at the end.
        warmup_epochs: Epochs of warm-up.
        optimizer: Another optimizer than Adam; its own learning rate replaces ``lr``.
        scheduler: Another schedule, stepped once an epoch.
        image_size: Side of the images that the encoder sees, in pixels: larger ones are cropped at the centre, random
            crops and views are made of this size. By default images are taken as they come.
        mean: Channel means of the input normalisation, RGB in [0, 1]; by default the data module's.
        std: Channel standard deviations; by default the data module's.
        channels_last: Keep weights and activations in channels-last order, which is quicker for convolutions.
        compile: Compile the encoder with ``torch.compile``.

    Raises:
        ValueError: If a rate or a number of epochs is out of range.
    """

    normalize: Normalize
    encoder: nn.Module
    #: Passes of the encoder, in whole batches, that one call of ``auxiliary_loss`` makes.
    auxiliary_views: int = 1

    def __init__(
        self,
        lr: float = 5e-4,
        final_lr: float = 1e-6,
        warmup_epochs: int = 2,
        optimizer: OptimizerCallable | None = None,
        scheduler: LRSchedulerCallable | None = None,
        image_size: int | None = None,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["optimizer", "scheduler"])
        if lr <= 0 or final_lr <= 0 or final_lr > lr:
            raise ValueError(f"learning rates must satisfy 0 < final_lr <= lr, got lr={lr}, final_lr={final_lr}")
        if warmup_epochs < 0:
            raise ValueError(f"warmup_epochs must be at least 0, got {warmup_epochs}")
        if (mean is None) != (std is None):
            raise ValueError("give both mean and std, or neither")
        self.lr, self.final_lr, self.warmup_epochs = lr, final_lr, warmup_epochs
        self.optimizer, self.scheduler = optimizer, scheduler
        self.channels_last = channels_last
        self.crop = CenterCrop(image_size)
        self.normalize = Normalize(mean, std)
        #: The file that the source weights came from, and its SHA-256.
        self.source: dict[str, str | None] = {"file": None, "sha256": None}
        self._compile = compile
        self._normalize_by_data = mean is None
        self._draws: torch.Generator | None = None

    # -- input

    def encode(self, images: Tensor) -> Tensor:
        """Return the encoder's features, (B, D), of images in [0, 1], (B, 3, H, W)."""
        images = self.normalize(self.crop(images))
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        features: Tensor = self.encoder(images)
        return features

    def setup(self, stage: str) -> None:
        """Check the data module against the task, and take its normalisation where the task has none."""
        data: Any = getattr(self.trainer, "datamodule", None)
        own, theirs = getattr(self, "num_classes", None), getattr(data, "num_classes", None)
        if None not in (own, theirs) and own != theirs:
            raise ValueError(
                f"{type(data).__name__} has {theirs} classes, {type(self).__name__} was made for {own}: "
                f"set --model.num_classes {theirs}"
            )
        if self._normalize_by_data and hasattr(data, "mean"):
            self.normalize.set(data.mean, data.std)
        if self.channels_last:
            self.to(memory_format=torch.channels_last)
        if self._compile:
            self.encoder.compile()
            self._compile = False

    # -- training

    def on_train_start(self) -> None:
        """Fix the seed that the run's draws are keyed by."""
        self._seed = global_seed()
        self._draws = torch.Generator(device=self.device)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Key all draws of the coming batch by (seed, epoch, batch, rank), whatever was drawn before."""
        key = derive_seed(self._seed, "train", self.current_epoch, batch_idx, self.global_rank)
        torch.manual_seed(key)
        self.draws.manual_seed(key)

    @property
    def draws(self) -> torch.Generator:
        """The generator of the batch's augmentations, on the task's device."""
        assert self._draws is not None, "draws are made while training"
        return self._draws

    def configure_optimizers(self) -> Any:
        """Return optimizer and schedule."""
        parameters = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if self.optimizer is not None:
            optimizer = self.optimizer(parameters)
        else:
            optimizer = torch.optim.Adam(parameters, lr=self.lr, foreach=True)
        if self.scheduler is not None:
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.scheduler(optimizer)}}
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self._warmup_cosine(optimizer), "interval": "step"},
        }

    def _warmup_cosine(self, optimizer: torch.optim.Optimizer) -> LRScheduler:
        epochs, steps = self.trainer.max_epochs, self.trainer.estimated_stepping_batches
        if not epochs or epochs < 0 or steps == float("inf"):
            raise ValueError("the cosine schedule needs an end: set trainer.max_epochs, or give another scheduler")
        steps = max(1, int(steps))
        warmup = min(steps * self.warmup_epochs // epochs, steps - 1)
        cosine = CosineAnnealingLR(optimizer, T_max=steps - warmup, eta_min=self.final_lr)
        if warmup == 0:
            return cosine
        start = min(1.0, self.final_lr / optimizer.param_groups[0]["initial_lr"])
        linear = LinearLR(optimizer, start_factor=start, total_iters=warmup)
        return SequentialLR(optimizer, [linear, cosine], milestones=[warmup])

    # -- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which task wrote the file."""
        checkpoint["ttalight"] = {"task": type(self).__name__, "version": ttalight.__version__}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume from another task's file."""
        task = checkpoint.get("ttalight", {}).get("task")
        if task is not None and task != type(self).__name__:
            raise ValueError(
                f"the checkpoint was written by {task}, and ckpt_path resumes the same class only, here "
                f"{type(self).__name__}. To start from its weights, name the file with one of the task's own arguments"
            )

    def load_stage(
        self, path: str, argument: str, task: str, prefixes: Mapping[str, str], architecture: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Load some of the task's modules from the file of an earlier stage.

        Args:
            path: The file.
            argument: The task argument that named it.
            task: Class that must have written it.
            prefixes: Prefix of the keys in the file to the prefix here; the modules under the latter must be complete.
            architecture: Hyper-parameters that must agree with the file's.

        Returns:
            What the file holds.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, of another class or of another architecture.
        """
        checkpoint = read_checkpoint(path, argument)
        writer = checkpoint.get("ttalight", {}).get("task")
        if writer != task:
            raise ValueError(
                f"{argument}: {path} was written by {writer or 'something other than this package'}, expected the "
                f"checkpoint of a {task}"
            )
        check_architecture(checkpoint, architecture, path, argument)
        state = select(checkpoint, prefixes)
        part = nn.ModuleDict({key: module for key, module in self._parts(prefixes.values())})
        load_weights(part, state, path, argument)
        self._normalize_by_data = False
        self.source = {"file": path, "sha256": file_sha256(path)}
        return checkpoint

    def _parts(self, prefixes: Any) -> list[tuple[str, nn.Module]]:
        names = dict.fromkeys(prefix.partition(".")[0] for prefix in prefixes)
        return [(name, getattr(self, name)) for name in names]
