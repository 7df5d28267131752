"""Text features of class names and projections of image features: in Python, or in files."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ttalight.adapters.components.moments_file import add_bytes, weights_sha256
from ttalight.errors import InputError
from ttalight.files.atomic import write_files
from ttalight.models.class_prompts import ClassPrompts
from ttalight.tasks.checkpoint import read_content

__all__ = ["class_texts", "encoded_texts", "features_sha256", "projection_layer"]


def encoded_texts(prompts: ClassPrompts, cache: str | None) -> tuple[Tensor, str]:
    """Return the text features of classes, (C, D), and the SHA-256 of all that they depend on.

    Args:
        prompts: Names, templates and text tower.
        cache: A folder of files with text features, whose names are such hashes. A missing file is written. None
            keeps no file.

    Raises:
        ValueError: If the folder is a file, or a file in it is damaged.
        OSError: If the folder is not writable.
    """
    digest = hashlib.sha256(weights_sha256(prompts.tower).encode())
    digest.update(json.dumps([prompts.names, prompts.templates]).encode())
    add_bytes(digest, prompts.tower.tokenize(prompts.texts(prompts.templates[0])))
    name = f"{digest.hexdigest()}.pt"
    if cache is not None and Path(cache).is_file():
        raise InputError(f"text_cache must be a folder, and {cache} is a file: name another path")
    if cache is None or not Path(cache, name).is_file():
        features = prompts.features()
        if cache is not None:
            content = io.BytesIO()
            torch.save({"features": features.cpu(), "names": prompts.names}, content)
            write_files(cache, {name: content.getvalue()})
    else:
        features, _ = class_texts(str(Path(cache, name)))
    return features, digest.hexdigest()


def features_sha256(features: Tensor) -> str:
    """Return the SHA-256 of text features, (C, D)."""
    digest = hashlib.sha256()
    add_bytes(digest, features.float())
    return digest.hexdigest()


def class_texts(given: str | Tensor) -> tuple[Tensor, list[str] | None]:
    """Return text features of the classes, (C, D), and the names of the classes, None where they are not known.

    Args:
        given: The features, or a file: with them, with a dict of ``features`` and ``names``, or of saved embeddings.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or the features have another shape, are not finite or are zero.
    """
    content: Any = read_content(given, "text_features") if isinstance(given, str) else given
    names = None
    if isinstance(content, dict):
        if not {"text_features", "features"} & {*content}:
            seen = ", ".join(map(str, content)) or "nothing"
            raise InputError(f"text_features: a dict must have features (C, D), and names at will, got {seen:.80}")
        content, names = content.get("text_features", content.get("features")), content.get("names")
    features = _matrix(content, "text_features", "of a row for each of two or more classes, or a dict of features")
    if len(features) < 2 or not bool((features.norm(dim=1) > 0).all()):
        raise InputError(
            f"text_features must have two classes or more and no row of zeros, got shape {tuple(features.shape)}"
        )
    if names is None:
        return features, None
    if not isinstance(names, (list, tuple)) or len(names) != len(features) or {*map(type, names)} != {str}:
        raise InputError(f"text_features: names must be a list of {len(features)} strings, got {names!r:.80}")
    return features, list(names)


def projection_layer(given: str | Tensor, width: int) -> nn.Linear:
    """Return a linear map from image features to those of the text, as a layer.

    Args:
        given: Its weight, (D, features), or a file: with the weight, with a dict of ``weight`` and at will ``bias``,
            or a checkpoint of an ``EmbeddingTask``.
        width: D, the dimension of the text features.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is damaged, or the weight has another shape or is not finite.
    """
    content: Any = read_content(given, "projection") if isinstance(given, str) else given
    if isinstance(content, dict):
        state = content.get("state_dict", {})
        content = {name: state.get(f"projection.{name}", content.get(name)) for name in ("weight", "bias")}
    else:
        content = {"weight": content}
    weight = _matrix(content["weight"], "projection", "from features of the image tower, or a dict with such a weight")
    if len(weight) != width:
        raise InputError(f"projection: {tuple(weight.shape)} does not map to text features of dimension {width}")
    state, bias = {"weight": weight}, content.get("bias")
    if bias is not None:
        state["bias"] = _matrix(bias[None] if isinstance(bias, Tensor) else bias, "projection: bias", "row")[0]
    layer = nn.Linear(weight.shape[1], width, bias=bias is not None, dtype=weight.dtype)
    if bias is not None and len(state["bias"]) != width:
        raise InputError(f"projection: a bias of {len(state['bias'])} numbers does not fit {width} dimensions")
    layer.load_state_dict(state)
    return layer


def _matrix(content: Any, argument: str, what: str) -> Tensor:
    if not isinstance(content, Tensor) or content.ndim != 2 or not content.is_floating_point():
        seen = f"of shape {tuple(content.shape)}" if isinstance(content, Tensor) else type(content).__name__
        raise InputError(f"{argument} must be a matrix {what}, got {seen}")
    if not bool(content.isfinite().all()):
        raise InputError(f"{argument} has values that are not finite")
    return content.detach() if content.dtype.itemsize >= 4 else content.detach().float()
