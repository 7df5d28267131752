"""Reading the weights that one stage hands to the next."""

from __future__ import annotations

import hashlib
import pickle
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from ttalight.errors import InputError, MissingFileError
from ttalight.files.difference import Between, difference
from ttalight.files.tensors import load_tensors
from ttalight.models.weight_files import numbers_allowed

__all__ = [
    "check_architecture",
    "check_weights",
    "file_sha256",
    "load_weights",
    "read_checkpoint",
    "read_content",
    "select",
]

#: What names of files inside the package begin with.
_PACKAGED = "ttalight:"
#: What checkpoints say of their task, where they do.
_NOTE = {"task": str, "image_size": Between(1, 1 << 20)}


def read_checkpoint(path: str, argument: str) -> dict[str, Any]:
    """Read a checkpoint or weight file; nothing in it can run code.

    Args:
        path: A local file; as the file of a stage also ``ttalight:NAME``, one that travels inside the package.
        argument: The task argument that named it, for messages.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or holds anything but tensors and plain values.
    """
    content = read_content(path, argument)
    if not isinstance(content, dict):
        raise InputError(f"{argument}: {path} holds a {type(content).__name__}, expected a checkpoint or a state_dict")
    for name in ("state_dict", "hyper_parameters", "ttalight"):
        if not isinstance(content.get(name, {}), dict):
            kind = type(content[name]).__name__
            raise InputError(f"{argument}: {path} is not a checkpoint: its {name} is a {kind}, expected a dict")
    note = content.get("ttalight", {})
    if fault := difference({name: kind for name, kind in _NOTE.items() if note.get(name) is not None}, note):
        raise InputError(f"{argument}: {path} is not a checkpoint of this package: its {fault}")
    return content


def read_content(path: str, argument: str) -> Any:
    """Read what a file of tensors holds; nothing in it can run code.

    Args:
        path: See ``read_checkpoint``.
        argument: The task argument that named it, for messages.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or holds anything but tensors and plain values.
    """
    file = _located(path)
    if not file.is_file():
        raise MissingFileError(
            f"{argument}: there is no file {path}. Run the stage that writes it first, or name another file with "
            f"--model.{argument}"
        )
    try:
        with numbers_allowed():
            content: Any = load_file(file) if file.suffix == ".safetensors" else load_tensors(file)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{argument}: {path} was refused: it holds something other than tensors and plain values, or is damaged "
            f"({_last_line(error)}). Files that could run code are never opened; save a state_dict instead"
        ) from error
    except Exception as error:  # what archive, unpickler and tensors say of damage has no common base class
        raise InputError(
            f"{argument}: {path} is not a readable checkpoint ({_first_line(error)}): is it complete?"
        ) from error
    return content


def check_architecture(checkpoint: Mapping[str, Any], expected: Mapping[str, Any], path: str, argument: str) -> None:
    """Compare the networks' hyper-parameters in a checkpoint with the task's own.

    Args:
        checkpoint: What the file holds; files without hyper-parameters pass.
        expected: Names and values that must agree.
        path: The file, for messages.
        argument: The task argument that named it.

    Raises:
        ValueError: If any differs; the message names each.
    """
    saved = checkpoint.get("hyper_parameters", {})
    differing = {name: value for name, value in expected.items() if name in saved and not _is_same(saved[name], value)}
    if differing:
        listing = "; ".join(
            f"{name}: file {reprlib.repr(saved[name])}, here {value!r}" for name, value in differing.items()
        )
        raise InputError(
            f"{argument}: {path} is of another architecture ({listing}). Set these arguments to the file's values, or "
            "name another file"
        )


def _is_same(seen: Any, value: Any) -> bool:
    if isinstance(seen, (list, tuple)) and isinstance(value, (list, tuple)):
        return len(seen) == len(value) and all(map(_is_same, seen, value))
    plain = isinstance(seen, (str, int, float, type(None)))  # a tensor has no single answer
    return plain and seen == value


def select(checkpoint: Mapping[str, Any], prefixes: Mapping[str, str]) -> dict[str, Tensor]:
    """Return the part of a checkpoint's state dict under some prefixes, with the prefixes replaced.

    Args:
        checkpoint: What the file holds: a Lightning checkpoint, ``{"state_dict": ...}``, or a bare state dict.
        prefixes: Old prefix to new prefix; keys under none are left out.
    """
    state = checkpoint.get("state_dict", checkpoint)
    return {
        new + key[len(old) :]: value
        for key, value in state.items()
        for old, new in prefixes.items()
        if isinstance(key, str) and key.startswith(old) and isinstance(value, Tensor)
    }


def load_weights(module: nn.Module, state: Mapping[str, Tensor], path: str, argument: str) -> None:
    """Load a state dict, all of it or nothing.

    Args:
        module: Receives the weights.
        state: The weights, by the module's own names.
        path: The file they come from, for messages.
        argument: The task argument that named it.

    Raises:
        ValueError: If keys are missing or left over, or shapes differ; the message lists them.
    """
    # A counter that weights from before PyTorch 0.4.1 do not have, and that no forward reads.
    counters = {key: value for key, value in module.state_dict().items() if key.endswith("num_batches_tracked")}
    state = counters | dict(state)
    check_weights(module, state, path, argument)
    module.load_state_dict(state)


def check_weights(module: nn.Module, state: Mapping[str, Tensor], path: str, argument: str) -> None:
    """Compare a state dict with that of a module.

    Args:
        module: Would receive the weights.
        state: The weights, by the module's own names.
        path: The file they come from, for messages.
        argument: The argument that named it.

    Raises:
        ValueError: If keys are missing or left over, or shapes differ; the message lists them.
    """
    own = module.state_dict()
    faults = {
        "missing": sorted(own.keys() - state.keys()),
        "unexpected": sorted(state.keys() - own.keys()),
        "of another shape": [
            f"{key} {tuple(state[key].shape)} instead of {tuple(own[key].shape)}"
            for key in own.keys() & state.keys()
            if state[key].shape != own[key].shape
        ],
        "of another type": [
            f"{key} {state[key].dtype} instead of {own[key].dtype}"
            for key in own.keys() & state.keys()
            if state[key].is_floating_point() != own[key].is_floating_point() or state[key].is_complex()
        ],
    }
    if any(faults.values()):
        listing = "; ".join(f"{len(keys)} {kind}: {_shortened(keys)}" for kind, keys in faults.items() if keys)
        raise InputError(f"{argument}: {path} does not fit this {type(module).__name__}: {listing}")


def _located(path: str) -> Path:
    """Return the path of a file, of one inside the package for ``ttalight:NAME``."""
    if not path.startswith(_PACKAGED):
        return Path(path)
    return Path(__file__).parents[1] / "data" / Path(path.removeprefix(_PACKAGED)).name


def file_sha256(path: str) -> str:
    """Return the SHA-256 of a file as 64 hexadecimal digits."""
    with _located(path).expanduser().open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(file)


def _digest(file: Any) -> str:  # Python 3.10 has no hashlib.file_digest
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


def _first_line(error: BaseException) -> str:
    text = str(error).strip().partition("\n")[0][:200]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _last_line(error: BaseException) -> str:
    """Return the reason alone: before it PyTorch advises to turn the protection off, after it comes a link."""
    reasons = [line for line in str(error).splitlines() if line and not line.startswith("Check the documentation")]
    return reasons[-1].strip()[:200] if reasons else type(error).__name__


def _shortened(keys: list[str], most: int = 4) -> str:
    return ", ".join(keys[:most]) + (", ..." if len(keys) > most else "")
