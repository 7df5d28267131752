"""The base of all tasks: optimizer and schedule, keyed draws, weights of an earlier stage."""

from __future__ import annotations

from abc import ABC
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

from ttalight.adapters import Adapter
from ttalight.callbacks.search import find_callback
from ttalight.models import CenterCrop, Normalize, Preprocessing, create_encoder, preprocessing_of
from ttalight.models.encoder import download_weights, with_normalisation
from ttalight.models.label_space import select_classes
from ttalight.models.weight_files import public_weights
from ttalight.seeding import derive_seed, global_seed
from ttalight.tasks.batches import check_batch, check_values
from ttalight.tasks.checkpoint import (
    check_architecture,
    check_weights,
    file_sha256,
    load_weights,
    read_checkpoint,
    select,
)
from ttalight.version import __version__

__all__ = ["BaseTask"]

# Where the preparation of images comes from, as the line at the start of a run says it.
_BY_DATA, _BY_MODEL, _BY_FILE, _GIVEN = (
    "from the data module", "from the model's pretrained configuration", "from the checkpoint", "given"
)  # fmt: skip


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
        #: The file that the task's weights start from, and its SHA-256; of weights that timm downloads their name.
        self.source: dict[str, str | None] = {"file": None, "sha256": None}
        self._compile = compile
        #: How pretrained weights want their images; data modules that scale images read it.
        self.preprocessing: Preprocessing | None = None
        self._given = None if mean is None or std is None else (mean, std)
        self._normalized_by = _BY_DATA if self._given is None else _GIVEN
        self._sized_by = _BY_DATA if image_size is None else _GIVEN
        self._whole_classifier: tuple[nn.Linear, ...] = ()
        self._draws: torch.Generator | None = None

    # -- the network

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
        images = self.normalize(self.crop(images))
        if self.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        features: Tensor = self.encoder(images)
        return features

    def take_preprocessing(self, network: nn.Module) -> None:
        """Prepare images as the weights of a network expect, as far as no argument says otherwise.

        Args:
            network: A network of timm's; its ``pretrained_cfg`` is read.
        """
        self.preprocessing = preprocessing_of(network)
        if self.preprocessing is None:
            return
        if self._given is None:
            self.normalize.set(self.preprocessing.mean, self.preprocessing.std)
            self._normalized_by = _BY_MODEL
        if self._sized_by != _GIVEN and self.preprocessing.size is not None:
            self.set_image_size(self.preprocessing.size)
            self._sized_by = _BY_MODEL

    def set_image_size(self, size: int | None) -> None:
        """Let the encoder see the centre of ``size`` pixels; None shows it images as they come."""
        self.crop.size = size

    def setup(self, stage: str) -> None:
        """Check the data module against the task, and take its normalisation where the task has none."""
        data: Any = getattr(self.trainer, "datamodule", None)
        self._take_label_space(data)
        own, theirs = getattr(self, "num_classes", None), getattr(data, "num_classes", None)
        if None not in (own, theirs) and own != theirs:
            raise ValueError(
                f"{type(data).__name__} has {theirs} classes, {type(self).__name__} was made for {own}: "
                f"set --model.num_classes {theirs}"
            )
        if self._normalized_by == _BY_DATA and hasattr(data, "mean"):
            self.normalize.set(data.mean, data.std)
        line = self._describe_input(data)
        if stage == "fit" and hasattr(self, "augment"):
            line += f"; augmentation {self.augment or 'none'}"
        rank_zero_info(line)
        if self.channels_last:
            self.to(memory_format=torch.channels_last)
        if self._compile:
            self.encoder.compile()
            self._compile = False

    def _take_label_space(self, data: Any) -> None:
        """Keep the rows of the classifier that a data module's ``source_classes`` name; all of them without such."""
        if self._whole_classifier:
            self._set_classifier(self._whole_classifier[0].to(self.device))
            self._whole_classifier = ()
        classifier, classes = getattr(self, "classifier", None), getattr(data, "source_classes", None)
        if classes is not None and isinstance(classifier, nn.Linear) and classifier.out_features > len(classes):
            self._whole_classifier = (classifier,)  # a tuple, which no state_dict looks into
            self._set_classifier(select_classes(classifier, classes))

    def _set_classifier(self, classifier: nn.Linear) -> None:
        self.classifier, self.num_classes = classifier, classifier.out_features

    def teardown(self, stage: str) -> None:
        """Restore the classes of the classifier that the data module does not have."""
        self._take_label_space(None)

    def _describe_input(self, data: Any) -> str:
        mean, std = (" ".join(f"{value:.4g}" for value in part.tolist()) for part in self.normalize.buffers())
        scaled = (getattr(data, "resize", None), getattr(data, "interpolation", None))
        size = "as delivered" if scaled[0] is None else f"{scaled[0]} {scaled[1]}"
        crop = "none" if self.crop.size is None else f"{self.crop.size} ({self._sized_by})"
        line = f"Preprocessing: mean {mean}, std {std} ({self._normalized_by}); size {size}, crop {crop}"
        wanted = self.preprocessing
        if wanted is None or None in (scaled[0], wanted.resize) or scaled == (wanted.resize, wanted.interpolation):
            return line
        return f"{line}; the model's pretrained configuration has size {wanted.resize} {wanted.interpolation}"

    # -- what the data module delivers

    def _check_first(self, batch: Any, batch_idx: int) -> None:
        if batch_idx > 0:
            return
        weights = self.normalize.mean.dtype
        mixed = "mixed" in str(self.trainer.precision)
        dtypes = (torch.float32, torch.float16, torch.bfloat16) if mixed else (weights,)
        adapter = find_callback(self.trainer, Adapter)
        adapted = adapter is not None and adapter.engine is not None
        check_batch(batch, dtypes, getattr(self, "num_classes", None), adapted)

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Check the first batch."""
        self._check_first(batch, batch_idx)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    # -- training

    def on_train_start(self) -> None:
        """Fix the seed that the run's draws are keyed by."""
        self._seed = global_seed()
        self._draws = torch.Generator(device=self.device)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Key all draws of the coming batch by (seed, epoch, batch, rank), whatever was drawn before."""
        self._check_first(batch, batch_idx)
        check_values(batch, getattr(self, "num_classes", None))  # one would be the end of all weights
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
        checkpoint["ttalight"] = {
            "task": type(self).__name__,
            "version": __version__,
            "image_size": self.crop.size,
            "source": self.source,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to resume from another task's file, or one of another architecture."""
        task = checkpoint.get("ttalight", {}).get("task")
        if task is not None and task != type(self).__name__:
            raise ValueError(
                f"the checkpoint was written by {task}, and ckpt_path resumes the same class only, here "
                f"{type(self).__name__}. To start from its weights, name the file with one of the task's own arguments"
            )
        names = [name for name in ("encoder", "stem", "num_classes") if name in self.hparams]
        check_architecture(checkpoint, {name: self.hparams[name] for name in names}, "the checkpoint", "ckpt_path")
        check_weights(self, select(checkpoint, {"": ""}), "the checkpoint", "ckpt_path")

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
        self._normalized_by = _BY_FILE
        if self._given is not None:
            self.normalize.set(*self._given)
            self._normalized_by = _GIVEN
        if self._sized_by == _BY_DATA and checkpoint["ttalight"].get("image_size") is not None:
            self.set_image_size(checkpoint["ttalight"]["image_size"])
            self._sized_by = _BY_FILE
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
        try:
            file = public_weights(checkpoint, encoder)
        except ValueError as error:
            raise ValueError(f"{argument}: {path} holds no weights: it is {error}") from error
        theirs = f"{getattr(encoder, 'pretrained_cfg', {}).get('classifier', 'fc')}."
        named = {
            f"classifier.{key.removeprefix(theirs)}" if key.startswith(theirs) else f"encoder.{key}": value
            for key, value in file.weights.items()
        }
        weight = named.get("classifier.weight")
        if weight is not None and weight.shape[2:] == (1, 1):  # a convolution of pooled maps is a linear layer
            named["classifier.weight"] = weight.flatten(1)
        load_weights(nn.ModuleDict({"encoder": encoder, "classifier": classifier}), named, path, argument)
        with_normalisation(encoder, file)
        self.take_preprocessing(encoder)
        self._note_source(given, encoder)

    def _parts(self, prefixes: Any) -> list[tuple[str, nn.Module]]:
        names = dict.fromkeys(prefix.partition(".")[0] for prefix in prefixes)
        return [(name, getattr(self, name)) for name in names]
