"""Depthwise convolutions whose weight gradient is fast on small maps on the CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.conv2d_same import Conv2dSame
from timm.layers.padding import pad_same
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

__all__ = ["DepthwiseConv2d", "depthwise_weight_gradient", "with_fast_depthwise"]

#: Positions of an output map up to which the gradient is computed here. oneDNN needs 150 ms for 480 channels of 4x4 in
#: batches of 64, and 13 ms are needed here; at 8x8 both are equal, and above it oneDNN is faster.
_MOST_POSITIONS = 36


def depthwise_weight_gradient(
    images: Tensor, gradient: Tensor, kernel: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int]
) -> Tensor:
    """Return the gradient of the weights of a depthwise convolution, (C, 1, kH, kW).

    Each entry of the kernel is one product of the gradient and the images shifted by it. Shifts that see nothing but
    padding are skipped.

    Args:
        images: Inputs, (B, C, H, W).
        gradient: Gradient of the outputs, (B, C, h, w).
        kernel: Height and width of the kernel.
        stride: Vertical and horizontal stride.
        padding: Zeros on both sides, vertically and horizontally.
    """
    pixels, errors = images.permute(0, 2, 3, 1), gradient.permute(0, 2, 3, 1)
    rows, columns = (
        [_overlap(offset - padding[axis], stride[axis], images.shape[2 + axis], gradient.shape[2 + axis])
         for offset in range(kernel[axis])]
        for axis in (0, 1)
    )  # fmt: skip
    zero = images.new_zeros(images.shape[1])
    entries = [
        zero if not row or not column else (pixels[:, row[0], column[0]] * errors[:, row[1], column[1]]).sum((0, 1, 2))
        for row in rows
        for column in columns
    ]
    return torch.stack(entries, dim=1).view(-1, 1, *kernel)


def _overlap(offset: int, stride: int, size: int, outputs: int) -> tuple[slice, slice] | None:
    """Return the inputs that one entry of a kernel reads along an axis, and the outputs that they go to."""
    first = max(0, -(offset // stride))
    last = min(outputs - 1, (size - 1 - offset) // stride)
    if first > last:
        return None
    return slice(first * stride + offset, last * stride + offset + 1, stride), slice(first, last + 1)


class _Depthwise(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(images: Tensor, weight: Tensor, stride: tuple[int, int], padding: tuple[int, int]) -> Tensor:
        return F.conv2d(images, weight, None, stride, padding, groups=len(weight))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        images, weight, ctx.stride, ctx.padding = inputs
        ctx.save_for_backward(images, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        images, weight = ctx.saved_tensors
        to_images = to_weight = None
        if ctx.needs_input_grad[0]:
            to_images = conv2d_input(  # type: ignore[no-untyped-call]
                images.shape, weight, gradient, ctx.stride, ctx.padding, groups=len(weight)
            )
        if ctx.needs_input_grad[1]:
            kernel = (weight.shape[2], weight.shape[3])
            to_weight = depthwise_weight_gradient(images, gradient, kernel, ctx.stride, ctx.padding)
        return to_images, to_weight, None, None


class DepthwiseConv2d(nn.Conv2d):
    """A depthwise ``nn.Conv2d`` whose weight gradient on small maps on the CPU does not wait for oneDNN.

    It computes what the layer that it replaces computes, with the same parameters. Its weight gradient is summed in
    another order.

    Args:
        layer: The layer to replace: depthwise, without bias, without dilation, with zeros as padding.
    """

    def __init__(self, layer: nn.Conv2d) -> None:
        super().__init__(
            layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding,  # type: ignore[arg-type]
            groups=layer.groups, bias=False, device="meta",
        )  # fmt: skip
        self.weight = layer.weight
        #: Whether the padding depends on the size of the input, as in TensorFlow.
        self.pads_same = isinstance(layer, Conv2dSame)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve (B, C, H, W)."""
        stride, padding = (self.stride[0], self.stride[1]), (int(self.padding[0]), int(self.padding[1]))
        if self.pads_same:
            input, padding = pad_same(input, list(self.kernel_size), list(self.stride)), (0, 0)
        positions = (input.shape[2] // stride[0]) * (input.shape[3] // stride[1])
        is_slow = input.device.type == "cpu" and positions <= _MOST_POSITIONS
        if is_slow and self.weight.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            output: Tensor = _Depthwise.apply(input, self.weight, stride, padding)  # type: ignore[no-untyped-call]
            return output
        return F.conv2d(input, self.weight, None, stride, padding, groups=self.groups)


def with_fast_depthwise(network: nn.Module) -> nn.Module:
    """Replace the depthwise convolutions of a network that ``DepthwiseConv2d`` can stand for, and return the network.

    Args:
        network: Changed in place. Its parameters and their names stay.
    """
    for name, layer in list(network.named_modules()):
        if type(layer) in (nn.Conv2d, Conv2dSame) and _can_replace(layer):
            network.set_submodule(name, DepthwiseConv2d(layer))
    return network


def _can_replace(layer: nn.Module) -> bool:
    return (
        isinstance(layer, nn.Conv2d)
        and 1 < layer.groups == layer.in_channels == layer.out_channels
        and layer.bias is None
        and layer.dilation == (1, 1)
        and layer.padding_mode == "zeros"
        and not isinstance(layer.padding, str)
    )
