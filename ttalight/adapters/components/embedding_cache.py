"""Logits and features of a frozen network on disk, so that a second method needs no passes."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError
from ttalight.files.atomic import open_replacing
from ttalight.files.tensors import load_tensors
from ttalight.version import __version__

__all__ = ["EmbeddingCache"]

#: Logits, (..., C), and features, (..., D), of the images of a batch.
Embeddings = tuple[Tensor, Tensor]


class EmbeddingCache:
    """Keeps logits and features of batches in a folder, one file each, under a hash of all that they depend on.

    That is the pixels and their type, the network's layers, weights and buffers, its statistics, the precision of a
    pass, the kind of device and the version of this package. Weights are hashed once, so they must stay as they are.
    Files that are damaged or hold something else are computed again and replaced.

    Args:
        folder: Where the files are. It is made with the first of them.
        net: The network, configured, its classifier found.
        norm: Statistics of its BatchNorm layers.

    Raises:
        ValueError: If ``folder`` is a file.
    """

    def __init__(self, folder: str, net: AdaptiveNetwork, norm: str) -> None:
        self._folder = Path(folder)
        if self._folder.exists() and not self._folder.is_dir():
            raise InputError(f"cache must be a folder, and {folder} is a file: name another path")
        self._widths = net.classes, net.head.weight.shape[1]
        self._network = _digest_network(net, norm)

    def fetch(
        self, net: AdaptiveNetwork, images: Tensor, key: str, rows: tuple[int, ...], compute: Callable[[], Embeddings]
    ) -> Embeddings:
        """Return logits, (*rows, C), and features, (*rows, D), from the disk, or compute them and keep them there.

        Args:
            net: The network.
            images: The batch, (B, 3, H, W).
            key: Whatever else they depend on.
            rows: Their first dimensions.
            compute: Returns both.

        Raises:
            ValueError: If the network takes more than images, or returns more than logits.
            OSError: If a file cannot be written.
        """
        if net.call is not None and (net.call.args or net.call.kwargs):
            raise InputError("cache knows images alone, and the network is called with further arguments: leave it out")
        path = self._path(net, images, key)
        kept = self._read(path, rows)
        if kept is not None:
            logits, features = (value.to(images.device) for value in kept)
            return logits, features
        logits, features = compute()
        if net.rebuild_output(logits) is not logits:
            raise InputError(
                "cache keeps logits and features alone, and the network returns more than logits: leave it out, or let "
                "the network return a tensor"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        with open_replacing(path, path.with_name(f".{path.name}.{os.getpid()}.part")) as file:
            torch.save({"logits": logits.detach().cpu().clone(), "features": features.detach().cpu().clone()}, file)
        return logits, features

    def _path(self, net: AdaptiveNetwork, images: Tensor, key: str) -> Path:
        kind = images.device.type
        with net.precision():
            precision = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else "full"
        digest = hashlib.blake2b(digest_size=20)
        settings = (self._network, key, images.dtype, tuple(images.shape), kind, precision, __version__)
        digest.update(repr(settings).encode())
        digest.update(_bytes(images))
        name = digest.hexdigest()
        return self._folder / name[:2] / f"{name}.pt"

    def _read(self, path: Path, rows: tuple[int, ...]) -> Embeddings | None:
        """Return the content of a file; None where there is none, or nothing that fits."""
        if not path.is_file():
            return None
        try:
            content = load_tensors(path)
            logits, features = content["logits"], content["features"]
            shapes = tuple(logits.shape), tuple(features.shape)
            is_floating = logits.is_floating_point() and features.is_floating_point()
        except Exception:  # an unpickler raises any class on damage
            return None
        expected = tuple((*rows, width) for width in self._widths)
        return (logits, features) if shapes == expected and is_floating else None


def _digest_network(net: AdaptiveNetwork, norm: str) -> str:
    module = net.module
    digest = hashlib.blake2b(digest_size=20)
    digest.update(f"{norm} {re.sub('0x[0-9a-f]+', '', repr(module))}".encode())  # without addresses in memory
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(_bytes(value))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
