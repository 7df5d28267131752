"""Models of open_clip by name, with weights from a local file."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from torch import nn

from ttalight.errors import DownloadError, InputError, MissingFileError, MissingPackageError
from ttalight.models.class_names import import_open_clip

__all__ = ["OPEN_CLIP", "create_open_clip"]

#: What names of these models begin with.
OPEN_CLIP = "open_clip/"


def create_open_clip(name: str, pretrained: bool | str) -> tuple[nn.Module, Any]:
    """Return a model and its tokenizer.

    Args:
        name: Name of the architecture, such as "ViT-B-32". OpenAI's weights belong to the names that end in
            "-quickgelu".
        pretrained: A local file of weights, or a tag of open_clip, which downloads them; false for random weights.

    Raises:
        ValueError: If there is no such model, ``pretrained`` is true, or the file does not fit.
        FileNotFoundError: If there is neither such a file nor such a tag.
        ConnectionError: If weights or tokenizer cannot be downloaded.
        ImportError: If open_clip is not installed, or a package that it needs for this model.
    """
    package = import_open_clip(f"encoder={OPEN_CLIP + name!r}")
    if name not in (known := package.list_models()):
        near = difflib.get_close_matches(name, known)
        raise InputError(f"open_clip has no model {name!r}; the nearest names are {', '.join(near) or 'none'}")
    tags = package.list_pretrained_tags_by_model(name)
    listed = ", ".join(tags) or "none"
    if pretrained is True:
        raise InputError(f"pretrained must name a local file of weights or a tag of {name}, which are {listed}")
    file = Path(pretrained).expanduser() if pretrained else None
    if file is not None and not file.is_file() and pretrained not in tags:
        raise MissingFileError(
            f"pretrained: there is no file {pretrained}, and it is no tag of {name} ({listed}). "
            "Give the path of a local weight file, or false for random weights"
        )
    tag = pretrained if file is not None and not file.is_file() else None
    try:
        model: nn.Module = package.create_model(name, pretrained=tag, load_weights=tag is not None)
        tokenizer = package.get_tokenizer(name)
    except ImportError as error:
        raise MissingPackageError(f"open_clip needs one more package for {name} ({error}): install it") from error
    except Exception as error:  # hubs, caches and archives have no common base class
        raise DownloadError(_download_message(package, name, tag, error)) from error
    if file is not None and tag is None:
        try:
            package.load_checkpoint(model, str(file), strict=True)
        except Exception as error:  # unpickler, archives and state dicts have no common base class
            reason = str(error).strip().splitlines()[0]
            raise InputError(f"pretrained: {pretrained} has no weights of {name}: {reason}") from error
    return model.eval(), tokenizer


def _download_message(package: Any, name: str, tag: Any, error: Exception) -> str:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if tag is None:
        return f"open_clip cannot make {name} without a download ({reason}): give the model in Python as image_tower="
    config = package.get_pretrained_cfg(name, tag) or {}
    place = config.get("hf_hub") or config.get("url")
    return (
        f"open_clip cannot download the weights {tag} of {name} ({reason}): get them from {place} elsewhere, and give "
        "the file as pretrained="
    )
