"""Files of the moments of a source's activations."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from ttalight.adapters.components.activation_moments import Moments, measure_moments
from ttalight.errors import InputError, InputTypeError
from ttalight.files.atomic import write_files
from ttalight.files.tensors import load_tensors
from ttalight.models.network import Network

__all__ = ["add_bytes", "measure_and_write", "read_moments", "weights_sha256"]


def measure_and_write(net: Network, batches: Iterable[Tensor], path: str | Path, weights: str) -> Moments:
    """Return the moments of the outputs of all normalisation layers, and write them to a file.

    Args:
        net: The network.
        batches: Images, (B, 3, H, W), of one size.
        path: The file. Its folder is made if need be.
        weights: SHA-256 of the network's weights.

    Raises:
        ValueError: If there are no images, or images of several sizes.
        OSError: If the disk is full or the folder not writable.
    """
    digest = hashlib.sha256()

    def hashed() -> Iterator[Tensor]:
        for images in batches:
            add_bytes(digest, images)
            yield images

    moments = measure_moments(net, net.norms, hashed())
    content = io.BytesIO()
    saved = [[value.cpu() for value in pair] for pair in moments]
    torch.save({"weights": weights, "images": digest.hexdigest(), "moments": saved}, content)
    write_files(Path(path).parent, {Path(path).name: content.getvalue()})
    return moments


def read_moments(path: str | Path, weights: str, images: str | None) -> Moments | None:
    """Return the moments in a file, on the CPU. None if there is no file, or it is of other weights or images.

    Args:
        path: The file.
        weights: SHA-256 of the weights.
        images: SHA-256 of the images. None takes those of any images.

    Raises:
        ValueError: If the file is damaged.
    """
    if not Path(path).is_file():
        return None
    try:
        content = load_tensors(Path(path))
        moments = [(mean, var) for mean, var in content["moments"]]
        if not all(isinstance(each, Tensor) for each in chain(*moments)):
            raise InputTypeError("moments are tensors")
        is_wanted = content["weights"] == weights and images in (None, content["images"])
    except Exception as error:  # what archive, unpickler and tensors say of damage has no common base class
        raise InputError(
            f"{path} is not a file of activation statistics ({type(error).__name__}: {error}): delete it, or name "
            "another"
        ) from error
    return moments if is_wanted else None


def weights_sha256(module: nn.Module) -> str:
    """Return the SHA-256 of the parameters and buffers of a module, in their order."""
    digest = hashlib.sha256()
    for tensor in chain(module.parameters(), module.buffers()):
        add_bytes(digest, tensor)
    return digest.hexdigest()


def add_bytes(digest: hashlib._Hash, tensor: Tensor) -> None:
    """Add the values of a tensor to a digest."""
    digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
