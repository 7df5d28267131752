"""Depthwise convolutions: the same numbers as torch's, gradients of gradients and transforms included."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from ttalight.models.depthwise import DepthwiseConv2d, depthwise_weight_gradient, with_fast_depthwise


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 3, 5, (3, 5)])
def test_gradient_equals_autograd(stride: int, kernel: int | tuple[int, int]) -> None:
    plain = nn.Conv2d(6, 6, kernel, stride, 2, groups=6, bias=False).double()
    for size in ((1, 1), (2, 2), (4, 4), (5, 3), (7, 7)):
        images = torch.randn(3, 6, *size, dtype=torch.float64)
        output = plain(images)
        errors = torch.randn_like(output)
        (expected,) = torch.autograd.grad(output, plain.weight, errors)
        height, width = plain.weight.shape[2:]
        got = depthwise_weight_gradient(images, errors, (height, width), (stride, stride), (2, 2))
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_layer_equals_the_one_it_replaces() -> None:
    plain = nn.Conv2d(6, 6, 3, 2, 1, groups=6, bias=False).double()
    layer = DepthwiseConv2d(plain)
    images = torch.randn(2, 6, 5, 5, dtype=torch.float64, requires_grad=True)
    for one, other in zip(_gradients(plain, images), _gradients(layer, images), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradgradcheck(lambda x, w: torch.func.functional_call(layer, {"weight": w}, x),
                                        (images, layer.weight))  # fmt: skip


def test_layer_under_vmap() -> None:
    layer = DepthwiseConv2d(nn.Conv2d(4, 4, 3, 1, 1, groups=4, bias=False)).double()
    images = torch.randn(3, 4, 4, 4, dtype=torch.float64)

    def loss(weight: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = torch.func.functional_call(layer, {"weight": weight}, image[None])
        return output.square().sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(layer.weight.detach(), images)
    single = torch.stack([torch.func.grad(loss)(layer.weight.detach(), image) for image in images])
    torch.testing.assert_close(each, single)


def test_network_keeps_outputs_weights_and_names() -> None:
    torch.manual_seed(0)
    plain = timm.create_model("tf_efficientnet_lite0", num_classes=3).double()
    fast = with_fast_depthwise(copy.deepcopy(plain))
    assert sum(isinstance(layer, DepthwiseConv2d) for layer in fast.modules()) == 16
    assert list(fast.state_dict()) == list(plain.state_dict())
    images = torch.randn(2, 3, 64, 64).double()
    for network in (plain, fast):
        network.eval()(images).square().sum().backward()
    for one, other in zip(plain.parameters(), fast.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-9, atol=1e-9)


def _gradients(layer: nn.Module, images: torch.Tensor) -> list[torch.Tensor]:
    output = layer(images)
    return [output, *torch.autograd.grad(output.sin().sum(), [images, *layer.parameters()])]
