"""Small networks of every kind that adapters meet."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode


def conv_net(norm=nn.BatchNorm2d, classes: int = 4, dropout: float = 0.5) -> nn.Module:
    """Two convolutions with a normalisation layer each, drop-out and a linear classifier; float64."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), norm(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1), norm(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout), nn.Linear(8, classes),
    )  # fmt: skip
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):  # statistics that a batch does not have
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return net.double().eval()


class DictNet(nn.Module):
    """Returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.net = conv_net()

    def forward(self, images):
        logits = self.net(images)
        return {"logits": logits, "doubled": 2 * logits}


@dataclasses.dataclass
class Answer:
    logits: torch.Tensor
    note: str


class DataclassNet(DictNet):
    """Returns a dataclass."""

    def forward(self, images):
        return Answer(self.net(images), "seen")


SMALL_VIT = {"img_size": 32, "embed_dim": 64, "depth": 6, "num_heads": 2}
NETWORKS = {
    "batch_norm": conv_net,
    "group_norm": lambda: conv_net(lambda channels: nn.GroupNorm(2, channels)),
    "dict": DictNet,
    "dataclass": DataclassNet,
    "timm_resnet": lambda: timm.create_model("resnet10t", num_classes=4).double().eval(),
    "timm_bn_act": lambda: timm.create_model("tf_efficientnet_lite0", num_classes=4).double().eval(),
    "timm_vit": lambda: timm.create_model("vit_tiny_patch16_224", num_classes=4, **SMALL_VIT).double().eval(),
    "torchvision_resnet": lambda: torchvision.models.resnet18(num_classes=4).double().eval(),
}
TOO_BRIGHT = 1e6
INDEXING = ("index", "index_put", "index_put_", "_index_put_impl", "_index_put_impl_")
HAS_BATCH_NORM = ("batch_norm", "dict", "dataclass", "timm_resnet", "timm_bn_act", "torchvision_resnet")


@pytest.fixture(params=NETWORKS)
def network(request):
    torch.manual_seed(0)
    return NETWORKS[request.param]()


@pytest.fixture(params=HAS_BATCH_NORM)
def batch_norm_network(request):
    torch.manual_seed(0)
    return NETWORKS[request.param]()


@pytest.fixture
def net() -> nn.Module:
    return conv_net()


@pytest.fixture
def make_net():
    return conv_net


@pytest.fixture
def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(6, 3, 32, 32, generator=generator, dtype=torch.float64) * 2 + 0.5


@pytest.fixture
def breaks():
    """Make a network answer images that hold the value ``TOO_BRIGHT`` with numbers that are not finite."""

    def spoil(module, inputs):
        broken = inputs[0].flatten(1).amax(1) >= TOO_BRIGHT
        return torch.where(broken.view(-1, *[1] * (inputs[0].ndim - 1)), torch.nan, inputs[0])

    def prepare(net: nn.Module) -> nn.Module:
        first = next(module for module in net.modules() if not list(module.children()))
        first.register_forward_pre_hook(spoil)
        return net

    return prepare


@pytest.fixture
def logits_in():
    def read(output):
        if isinstance(output, dict):
            return output["logits"]
        return output.logits if dataclasses.is_dataclass(output) else output

    return read


@pytest.fixture
def state_of():
    """Everything that a release must give back: tensors, flags, modes, forwards."""

    def state(net: nn.Module):
        tensors = {name: value.detach().clone() for name, value in net.state_dict().items()}
        flags = {name: (p.requires_grad, p.grad) for name, p in net.named_parameters()}
        modes = {name: module.training for name, module in net.named_modules()}
        forwards = [name for name, module in net.named_modules() if "forward" in vars(module)]
        return tensors, flags, modes, forwards

    return state


@pytest.fixture
def same_state(state_of):
    def compare(net, before):
        tensors, flags, modes, forwards = state_of(net)
        assert tensors.keys() == before[0].keys()
        assert all(torch.equal(tensors[name], before[0][name]) for name in tensors)
        assert (flags, modes, forwards) == before[1:]

    return compare


class Waits(TorchDispatchMode):
    """Counts what would make a GPU wait: values that the host reads, and shapes that depend on data."""

    def __init__(self):
        super().__init__()
        self.read, self.masked = [], []
        self.on = False

    def __enter__(self):
        self.on = True
        return super().__enter__()

    def __exit__(self, *error):
        self.on = False
        return super().__exit__(*error)

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        name = operation.overloadpacket.__name__
        if name in ("_local_scalar_dense", "equal") and not exempt():
            self.read.append(name)
        is_masked = name in INDEXING and any(map(is_mask, args[1]))
        if (is_masked or name in ("nonzero", "masked_select", "masked_scatter_backward")) and not exempt():
            self.masked.append(name)
        return operation(*args, **(kwargs or {}))


def is_mask(index):
    return index is not None and index.dtype == torch.bool


def exempt():
    """Return whether one of PyTorch's optimizers works, which count steps on the host, or the jitter of colors.

    The jitter reads its draws on the CPU only; ``tests/transforms/test_views.py`` runs it on the meta device.
    """
    frame = sys._getframe(1)
    while frame is not None:
        parts = Path(frame.f_code.co_filename).parts
        if parts[-3:-1] == ("torch", "optim") or parts[-2:] == ("transforms", "color.py"):
            return True
        frame = frame.f_back
    return False


@pytest.fixture
def waits(monkeypatch):
    """A context that counts what would make a GPU wait."""
    counted = Waits()
    for reading in ("tolist", "cpu", "numpy"):  # no operations of a tensor that is on the CPU
        real = getattr(torch.Tensor, reading)

        def read(tensor, *args, real=real, reading=reading, **kwargs):
            if counted.on and tensor.ndim and not exempt():  # single numbers are read by an operation
                counted.read.append(reading)
            return real(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, reading, read)
    return counted
