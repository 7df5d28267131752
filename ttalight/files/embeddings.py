"""Files of saved embeddings: features of images with their labels and domains, and text features."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ttalight.errors import InputError, MissingFileError
from ttalight.files.atomic import open_replacing
from ttalight.files.tensors import load_tensors
from ttalight.labels import UNLABELLED

__all__ = ["Embeddings", "read_embeddings", "write_embeddings"]

_ADVICE = "write it with ttalight.data.save_embeddings, or see its description for the keys"


class Embeddings(NamedTuple):
    """Content of a file of embeddings.

    Args:
        features: Features of images, (N, D).
        labels: int64, (N,).
        domain: Number of each image's domain, int64, (N,).
        domains: Name and severity of each domain, 0 for ``clean`` and for domains without severities.
        text_features: Text features of the classes, (C, D).
        names: Names of the classes, None where they are not known.
        sha256: SHA-256 of the file, None before it is written.
    """

    features: Tensor
    labels: Tensor
    domain: Tensor
    domains: list[tuple[str, int]]
    text_features: Tensor | None = None
    names: list[str] | None = None
    sha256: str | None = None


def write_embeddings(path: Path, embeddings: Embeddings) -> None:
    """Write a file of embeddings; it replaces one of that name only once it is complete."""
    content = {"image_features": embeddings.features, **embeddings._asdict()}
    del content["features"], content["sha256"]
    content["domains"] = [list(domain) for domain in embeddings.domains]
    with open_replacing(path) as file:
        torch.save({name: value for name, value in content.items() if value is not None}, file)


def read_embeddings(path: Path) -> Embeddings:
    """Read a file of embeddings. Nothing in it can run code.

    Args:
        path: A file of ``torch.save`` with a dict of ``image_features`` and ``labels``, and at will of ``domain``,
            ``domains``, ``text_features`` and ``names``. Without ``domain`` all images are of one, ``clean``.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or holds something else.
    """
    if not path.is_file():
        raise MissingFileError(f"there is no file of embeddings {path}: {_ADVICE}")
    data = path.read_bytes()
    try:
        content: Any = load_tensors(data)
    except Exception as error:  # what archive, unpickler and tensors say of damage has no common base class
        raise InputError(f"{path} is no readable file of tensors and plain values: {_ADVICE}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds a {type(content).__name__}, expected a dict of image_features: {_ADVICE}")
    features = content.get("image_features")
    if not isinstance(features, Tensor) or features.ndim != 2 or not features.is_floating_point():
        raise InputError(f"{path}: image_features must be a matrix (N, D), got {_seen(features)}: {_ADVICE}")
    labels, domain = (_numbers(content, name, len(features), path) for name in ("labels", "domain"))
    domains = _domains(content.get("domains", [["clean", 0]]), domain, path)
    texts, names, digest = content.get("text_features"), content.get("names"), hashlib.sha256(data).hexdigest()
    return Embeddings(features, labels, domain, domains, texts, names, digest)


def _numbers(content: dict[str, Any], name: str, count: int, path: Path) -> Tensor:
    """Return one whole number for each image: domains are 0 and labels unknown where they are not given."""
    value = content.get(name)
    if value is None:
        return torch.full((count,), 0 if name == "domain" else UNLABELLED)
    if not isinstance(value, Tensor) or value.shape != (count,) or value.is_floating_point():
        raise InputError(f"{path}: {name} must be {count} whole numbers, one for each image, got {_seen(value)}")
    return value.long()


def _domains(value: Any, domain: Tensor, path: Path) -> list[tuple[str, int]]:
    pairs = [tuple(each) for each in value if isinstance(each, (list, tuple))] if isinstance(value, list) else []
    if not pairs or len(pairs) != len(value) or any([*map(type, pair)] != [str, int] for pair in pairs):
        raise InputError(f"{path}: domains must be a list of [name, severity], got {value!r:.80}")
    if len(set(pairs)) != len(pairs):
        raise InputError(f"{path}: domains has the same name and severity twice: {value!r:.80}")
    if len(domain) and not (0 <= int(domain.min()) and int(domain.max()) < len(pairs)):
        raise InputError(
            f"{path}: domain numbers the {len(pairs)} domains from 0, got {int(domain.min())} to {int(domain.max())}"
        )
    return pairs


def _seen(value: Any) -> str:
    return f"{value.dtype} of shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
