"""The base of all tasks: arguments, encoder, keyed draws and the hooks of Lightning that they share."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from ttalight.adapters import Adapter
from ttalight.callbacks.search import find_callback
from ttalight.errors import InputError
from ttalight.models import Preprocessing, create_encoder
from ttalight.models.encoder import download_weights
from ttalight.seeding import derive_seed, global_seed
from ttalight.tasks.batches import check_batch, check_values
from ttalight.tasks.checkpoint import file_sha256, read_checkpoint
from ttalight.tasks.label_space import LabelSpace
from ttalight.tasks.preparation import InputPreparation
from ttalight.tasks.schedule import warmup_cosine
from ttalight.tasks.stages import check_resumed, load_public_classifier, load_stage_modules
from ttalight.version import __version__

__all__ = ["BaseTask"]


class BaseTask(LightningModule, ABC):
    """Base of the tasks.

    The default schedule is the one of S. Barbeau et al., *CTA: Cross-Task Alignment for Better Test Time Training*,
    arXiv 2507.05221, Table 3: Adam, two epochs of warm-up, cosine annealing from 5e-4 to 1e-6. The paper leaves the
    shape of the warm-up open; here it is linear from the final learning rate, and both are updated at every step.

    Args:
        lr: Learning rate after the warm-up.
        final_lr: Learning rate at the start of the warm-up and at the end.
        warmup_epochs: Epochs of warm-up.
        optimizer: Another optimizer than Adam; its own learning rate replaces ``lr``.
        scheduler: Another schedule, stepped once an epoch.
        image_size: Side of the images that the encoder sees, in pixels: larger ones are cropped at the centre, random
            crops and views are made of this size. By default pretrained weights say it, by timm's configuration of
            the network; without them images are taken as they come.
        mean: Channel means of the input normalisation, RGB in [0, 1]; by default those that pretrained weights expect,
            without them the data module's.
        std: Channel standard deviations; by default as the means.
        channels_last: Keep weights and activations in channels-last order, which is quicker for convolutions.
        compile: Compile the encoder with ``torch.compile``.

    Raises:
        ValueError: If a rate or a number of epochs is out of range.
    """

    encoder: nn.Module
    #: Label of pixels that do not count, of a task that predicts pixels.
    ignore_index: int | None = None
    #: Passes of the encoder, in whole batches, that one call of ``auxiliary_loss`` makes.
    auxiliary_views: int = 1
    #: Arguments that are no plain values, so that checkpoints do not have them.
    unsaved_arguments: tuple[str, ...] = ()
    #: What to do where the data have another number of classes, for an error.
    classes_advice: str = "set --model.num_classes {}"

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
        self.save_hyperparameters(ignore=["optimizer", "scheduler", *self.unsaved_arguments])
        if lr <= 0 or final_lr <= 0 or final_lr > lr:
            raise InputError(f"learning rates must satisfy 0 < final_lr <= lr, got lr={lr}, final_lr={final_lr}")
        if warmup_epochs < 0:
            raise InputError(f"warmup_epochs must be at least 0, got {warmup_epochs}")
        self.lr, self.final_lr, self.warmup_epochs = lr, final_lr, warmup_epochs
        self.optimizer, self.scheduler = optimizer, scheduler
        self.channels_last = channels_last
        self.preparation = InputPreparation(image_size, mean, std)
        self.crop, self.normalize = self.preparation.crop, self.preparation.normalize
        #: The file that the task's weights start from, and its SHA-256; of weights that timm downloads their name.
        self.source: dict[str, str | None] = {"file": None, "sha256": None}
        self._compile = compile
        self._label_space = LabelSpace()
        self._filled = False
        self._draws: torch.Generator | None = None

    # -- the network

    @property
    def has_random_weights(self) -> bool:
        """Whether nothing was loaded into the task, and it was not trained."""
        return not self._filled and self.source["file"] is None

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load weights; arguments as PyTorch's."""
        self._filled = True
        return super().load_state_dict(state_dict, strict, assign)

    def start_encoder(self, name: str, stem: Literal["cifar", "imagenet"], pretrained: bool | str) -> nn.Module:
        """Return a new encoder; images are prepared, and ``source`` is set, as its pretrained weights have it.

        Args:
            name: Name of a timm backbone.
            stem: See ``create_encoder``.
            pretrained: See ``create_encoder``.
        """
        encoder = create_encoder(name, pretrained=pretrained, stem=stem)
        if pretrained:
            self.take_preprocessing(encoder)
            self._note_source(pretrained, encoder)
        return encoder

    def _note_source(self, given: bool | str, encoder: nn.Module) -> None:
        if isinstance(given, str):
            self.source = {"file": given, "sha256": file_sha256(given)}
        else:
            config: Any = encoder.pretrained_cfg
            self.source = {"file": f"timm/{config['architecture']}.{config['tag']}", "sha256": None}

    # -- input

    def encode(self, images: Tensor) -> Tensor:
        """Return the encoder's features, (B, D), of images in [0, 1], (B, 3, H, W)."""
        features: Tensor = self.encoder(self.prepare_images(images))
        return features

    def prepare_images(self, images: Tensor) -> Tensor:
        """Return what the encoder sees, (B, 3, S, S), of images in [0, 1], (B, 3, H, W)."""
        images = self.normalize(self.crop(images))
        return images.contiguous(memory_format=torch.channels_last) if self.channels_last else images

    def take_preprocessing(self, network: nn.Module) -> None:
        """Prepare images as the weights of a network expect, as far as no argument says otherwise.

        Args:
            network: A network of timm's; its ``pretrained_cfg`` is read.
        """
        self.preparation.follow_model(network)
        self.set_image_size(self.crop.size)

    @property
    def preprocessing(self) -> Preprocessing | None:
        """Preparation that pretrained weights expect, None without such; data modules that scale images read it."""
        return self.preparation.preprocessing

    def set_image_size(self, size: int | None) -> None:
        """Let the encoder see the centre of ``size`` pixels; None shows it images as they come."""
        self.crop.size = size

    def setup(self, stage: str) -> None:
        """Check the data module against the task, and take its normalisation where the task has none."""
        data: Any = getattr(self.trainer, "datamodule", None)
        self.check_classes(data)
        self.preparation.follow_data(data)
        line = self.preparation.describe(data)
        if stage == "fit" and hasattr(self, "augment"):
            line += f"; augmentation {self.augment or 'none'}"
        rank_zero_info(line)
        if self.channels_last:
            self.to(memory_format=torch.channels_last)
        if self._compile:
            self.encoder.compile()
            self._compile = False

    def check_classes(self, data: Any) -> None:
        """Check the classes of a data module against those of the task, and leave out those that it does not have."""
        self._label_space.restrict(self, getattr(data, "source_classes", None))
        own, theirs = getattr(self, "num_classes", None), getattr(data, "num_classes", None)
        if None not in (own, theirs) and own != theirs:
            raise InputError(
                f"{type(data).__name__} has {theirs} classes, {type(self).__name__} was made for {own}: "
                f"{self.classes_advice.format(theirs)}"
            )

    def teardown(self, stage: str) -> None:
        """Restore the classes of the classifier that the data module does not have."""
        self._label_space.restrict(self, None)

    # -- what the data module delivers

    def _check_first(self, batch: Any, batch_idx: int) -> None:
        if batch_idx > 0:
            return
        weights = self.normalize.mean.dtype
        mixed = "mixed" in str(self.trainer.precision)
        dtypes = (torch.float32, torch.float16, torch.bfloat16) if mixed else (weights,)
        adapter = find_callback(self.trainer, Adapter)
        adapted = adapter is not None and adapter.engine is not None
        check_batch(batch, dtypes, getattr(self, "num_classes", None), adapted, self.ignore_index)

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Check the first batch."""
        self._check_first(batch, batch_idx)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    # -- training

    def on_train_start(self) -> None:
        """Fix the seed that the run's draws are keyed by."""
        self._filled = True
        self._seed = global_seed()
        self._draws = torch.Generator(device=self.device)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Key all draws of the coming batch by (seed, epoch, batch, rank), whatever was drawn before."""
        self._check_first(batch, batch_idx)
        check_values(
            batch, getattr(self, "num_classes", None), ignore_index=self.ignore_index
        )  # a single NaN would corrupt all weights
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
            raise InputError("the cosine schedule needs an end: set trainer.max_epochs, or give another scheduler")
        steps = max(1, int(steps))
        return warmup_cosine(optimizer, steps, steps * self.warmup_epochs // epochs, self.final_lr)

    # -- checkpoints

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note which task wrote the file."""
        checkpoint["ttalight"] = {
            "task": type(self).__name__,
            "version": __version__,
            "image_size": self.crop.size,
            "source": self.source,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another task's file, or one of another architecture; keep the file's preparation of images."""
        check_resumed(self, checkpoint)
        self.preparation.follow_file(checkpoint.get("ttalight", {}).get("image_size"))
        self.set_image_size(self.crop.size)

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
        checkpoint = load_stage_modules(self, path, argument, task, prefixes, architecture)
        self.preparation.follow_file(checkpoint["ttalight"].get("image_size"))
        self.set_image_size(self.crop.size)
        self._note_source(path, self.encoder)
        return checkpoint

    def read_weights(self, given: bool | str, argument: str) -> dict[str, Any]:
        """Return what a file of a classifier's weights holds, or for ``true`` those that timm downloads.

        Args:
            given: The file, or true.
            argument: The task argument that named it.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, or holds anything but tensors and plain values.
            RuntimeError: If timm cannot get the weights.
        """
        return read_checkpoint(given, argument) if isinstance(given, str) else download_weights(self.hparams["encoder"])

    def load_public(
        self, checkpoint: Mapping[str, Any], given: bool | str, argument: str, encoder: nn.Module, classifier: nn.Linear
    ) -> None:
        """Load a classifier from weights that are not of this package, and prepare images as they expect.

        Args:
            checkpoint: What ``read_weights`` returned: a state dict of encoder and classifier under the backbone's own
                names or those of its public files (see ``create_encoder``). The classifier may be a 1x1 convolution.
            given: The file, or true.
            argument: The task argument that named it.
            encoder: Receives the weights of the encoder, a network of timm's.
            classifier: Receives those of the classifier.

        Raises:
            ValueError: If there are no weights in it, or they do not fit.
        """
        path = given if isinstance(given, str) else "what timm downloads"
        load_public_classifier(checkpoint, path, argument, encoder, classifier)
        self.take_preprocessing(encoder)
        self._note_source(given, encoder)
