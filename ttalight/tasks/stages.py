"""Files that a task starts from or resumes: those of an earlier stage, and public weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning import LightningModule
from torch import nn

from ttalight.errors import InputError
from ttalight.models.encoder import with_normalisation
from ttalight.models.weight_files import public_weights
from ttalight.tasks.checkpoint import check_architecture, check_weights, load_weights, read_checkpoint, select

__all__ = ["check_resumed", "load_public_classifier", "load_stage_modules"]


def load_stage_modules(
    module: nn.Module,
    path: str,
    argument: str,
    task: str,
    prefixes: Mapping[str, str],
    architecture: Mapping[str, Any],
) -> dict[str, Any]:
    """Load some submodules of a module from the file of an earlier stage; see ``BaseTask.load_stage``."""
    checkpoint = read_checkpoint(path, argument)
    writer = checkpoint.get("ttalight", {}).get("task")
    if writer != task:
        raise InputError(
            f"{argument}: {path} was written by {writer or 'something other than this package'}, expected the "
            f"checkpoint of a {task}"
        )
    check_architecture(checkpoint, {"norm": "batch", **architecture}, path, argument)
    names = dict.fromkeys(prefix.partition(".")[0] for prefix in prefixes.values())
    part = nn.ModuleDict({name: getattr(module, name) for name in names})
    load_weights(part, select(checkpoint, prefixes), path, argument)
    return checkpoint


def load_public_classifier(
    checkpoint: Mapping[str, Any], path: str, argument: str, encoder: nn.Module, classifier: nn.Linear
) -> None:
    """Load encoder and classifier from weights that are not of this package.

    Args:
        checkpoint: A state dict under the backbone's own names or those of its public files (see ``create_encoder``).
            The classifier may be a 1x1 convolution.
        path: The file, for messages.
        argument: The task argument that named it.
        encoder: Receives the weights of the encoder, a network of timm's, and the normalisation that the file names.
        classifier: Receives those of the classifier.

    Raises:
        ValueError: If there are no weights in it, or they do not fit.
    """
    try:
        file = public_weights(checkpoint, encoder)
    except ValueError as error:
        raise InputError(f"{argument}: {path} holds no weights: it is {error}") from error
    config: Any = getattr(encoder, "pretrained_cfg", {})
    theirs = f"{config.get('classifier', 'fc')}."
    named = {
        f"classifier.{key.removeprefix(theirs)}" if key.startswith(theirs) else f"encoder.{key}": value
        for key, value in file.weights.items()
    }
    weight = named.get("classifier.weight")
    if weight is not None and weight.shape[2:] == (1, 1):  # a convolution of pooled maps is a linear layer
        named["classifier.weight"] = weight.flatten(1)
    load_weights(nn.ModuleDict({"encoder": encoder, "classifier": classifier}), named, path, argument)
    with_normalisation(encoder, file)


def check_resumed(task: LightningModule, checkpoint: Mapping[str, Any]) -> None:
    """Refuse to resume a task from another task's checkpoint, or one of another architecture.

    Raises:
        ValueError: If the checkpoint does not fit.
    """
    writer = checkpoint.get("ttalight", {}).get("task")
    if writer is not None and writer != type(task).__name__:
        raise InputError(
            f"the checkpoint was written by {writer}, and ckpt_path resumes the same class only, here "
            f"{type(task).__name__}. To start from its weights, name the file with one of the task's own arguments"
        )
    names = ("encoder", "stem", "num_classes", "norm")
    architecture = {name: task.hparams[name] for name in names if name in task.hparams}
    check_architecture(checkpoint, architecture, "the file", "checkpoint")
    check_weights(task, select(checkpoint, {"": ""}), "the file", "checkpoint")
