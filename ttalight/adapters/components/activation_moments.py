"""Means and variances of the outputs of normalisation layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ttalight.errors import InputError
from ttalight.models.network import Network
from ttalight.models.norm import NormLayer

__all__ = ["Moments", "affine_moments", "collect_moments", "measure_moments", "moment_distance"]

#: Mean and variance of each call of a layer in a pass: of each position over the images, or of each channel.
Moments = list[tuple[Tensor, Tensor]]


@contextmanager
def collect_moments(net: Network, layers: Sequence[NormLayer], of_channels: bool = False) -> Iterator[Moments]:
    """Fill a list with the moments of what layers return in the passes inside, with gradients.

    A layer that is fused with an activation counts without it. Passes are the network's own, however they are computed
    otherwise.

    Args:
        net: The network.
        layers: Layers of it.
        of_channels: Whether positions of a map count like images, so that there is a mean and a variance a channel.
    """
    found: Moments = []
    handles: list[Any] = []

    def after(_: nn.Module, __: Any, output: Tensor) -> None:
        found.append(_moments(output, of_channels))

    def before(_: nn.Module, given: tuple[Tensor]) -> None:
        found.append(_moments(given[0], of_channels))

    run, net.run = net.run, net.original
    try:
        for layer in layers:
            if layer.tail:
                handles.append(layer.module.get_submodule(layer.tail[0]).register_forward_pre_hook(before))
            else:
                handles.append(layer.module.register_forward_hook(after))
        yield found
    finally:
        net.run = run
        for handle in handles:
            handle.remove()


def _moments(output: Tensor, of_channels: bool) -> tuple[Tensor, Tensor]:
    # A copy, since activations in place change the output before the gradient needs it.
    output = output.to(torch.promote_types(output.dtype, torch.float32), copy=True)
    if of_channels:
        output = output.transpose(0, 1).flatten(1).T
    return output.mean(0), output.var(0) if len(output) > 1 else torch.zeros_like(output[0])


def moment_distance(found: Moments, source: Moments) -> Tensor:
    """Return half the sum over layers of the mean absolute differences of means and of variances, a scalar.

    Args:
        found: Of the batch.
        source: The same shapes.

    Raises:
        ValueError: If the shapes are others.
    """
    seen, expected = ([tuple(mean.shape) for mean, _ in each] for each in (found, source))
    if seen != expected:
        raise InputError(
            f"the batch gives activations of shapes {_brief(seen)}, and those of the source have {_brief(expected)}: "
            "give source images of the size of the stream's"
        )
    pairs = zip(chain(*found), chain(*source), strict=True)
    return torch.stack([(own - other.to(own)).abs().mean() for own, other in pairs]).sum() / 2


def _brief(shapes: list[tuple[int, ...]]) -> str:
    return ", ".join("x".join(map(str, shape)) for shape in shapes[:3]) + (", ..." if len(shapes) > 3 else "")


@torch.no_grad()
def measure_moments(net: Network, layers: Sequence[NormLayer], batches: Iterable[Tensor]) -> Moments:
    """Return the moments of each position over all images of some batches, with the present weights.

    Batches are merged as they come (T. Chan, G. Golub, R. LeVeque, *Updating Formulae and a Pairwise Algorithm for
    Computing Sample Variances*, 1979).

    Args:
        net: The network, in the normalisation that it has.
        layers: Layers of it.
        batches: Images, (B, 3, H, W), of one size.
    """
    count, means, scatters = 0, list[Tensor](), list[Tensor]()
    for images in batches:
        size = len(images)
        with collect_moments(net, layers) as found:
            net(images.to(net.device))
        if not count:
            means, scatters = [mean for mean, _ in found], [var * (size - 1) for _, var in found]
        elif [mean.shape for mean, _ in found] != [mean.shape for mean in means]:
            raise InputError("the source images have several sizes: give images of one, that of the stream's")
        else:
            for (mean, var), whole, scatter in zip(found, means, scatters, strict=True):
                shift = mean - whole
                scatter += var * (size - 1) + shift.square() * (count * size / (count + size))
                whole += shift * (size / (count + size))
        count += size
    return [(mean, scatter / max(1, count - 1)) for mean, scatter in zip(means, scatters, strict=True)]


def affine_moments(layers: Sequence[NormLayer]) -> Moments:
    """Return the moments of the channels of BatchNorm layers, as running statistics have them: bias and weight squared.

    Args:
        layers: BatchNorm layers with running statistics.
    """
    found: Moments = []
    for layer in layers:
        mean, _ = layer.statistics
        module: Any = layer.module
        shift = torch.zeros_like(mean) if module.bias is None else module.bias.detach().clone()
        found.append((shift, torch.ones_like(mean) if module.weight is None else module.weight.detach().square()))
    return found
