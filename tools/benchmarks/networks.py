"""Networks and methods that are measured."""

from __future__ import annotations

import math
from collections.abc import Callable

import ttalight  # noqa: F401  # isort: skip  (first: it makes torchvision importable)
import torch
from lightning import LightningModule
from timm.models import VisionTransformer, create_model
from torch import nn

from ttalight import adapters
from ttalight.adapters import Adapter, EntropyAdapter, GradientAdapter, SelfTrainingAdapter
from ttalight.models.cifar.cifar_resnet import cifar_resnet20
from ttalight.tasks import CrossTaskTTT

NOT_MEASURED = (
    Adapter,
    GradientAdapter,
    SelfTrainingAdapter,
    EntropyAdapter,
    adapters.FOA,
    adapters.MaskedReconstruction,
)
METHODS: dict[str, type[Adapter]] = {
    name: value
    for name in adapters.__all__
    if isinstance(value := getattr(adapters, name), type) and issubclass(value, Adapter) and value not in NOT_MEASURED
}
NETWORKS: dict[str, tuple[int, Callable[[], nn.Module]]] = {
    "resnet20": (32, cifar_resnet20),
    "vit": (64, lambda: VisionTransformer(64, 8, embed_dim=128, depth=6, num_heads=4, num_classes=10)),
    "lite0": (224, lambda: create_model("tf_efficientnet_lite0", num_classes=10)),
    "resnet50": (224, lambda: create_model("resnet50")),
    "vit_b": (224, lambda: create_model("vit_base_patch16_224")),
}
#: Those small enough for one core of a CPU.
SMALL = ("resnet20", "vit", "lite0")
#: The same as encoders of a task, by name.
ENCODERS = {"resnet20": "cifar_resnet20", "lite0": "tf_efficientnet_lite0"}


class Classifier(LightningModule):
    """The least that the Trainer can test."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images)

    def test_step(self, images: torch.Tensor, batch_idx: int) -> None:
        self(images)


class Task(CrossTaskTTT):
    """The task of test-time training, without the labels that its own step asks for."""

    def test_step(self, images: torch.Tensor, batch_idx: int) -> None:
        self(images)

    on_test_batch_start = LightningModule.on_test_batch_start


def make_network(method: str, network: str, device: str) -> nn.Module:
    """A network of random weights whose predictions of random images are confident, each class as often as another."""
    torch.manual_seed(0)
    size, make = NETWORKS[network]
    if method == "TestTimeTraining":
        if network not in ENCODERS:
            raise ValueError("no task has this encoder")
        return Task(encoder=ENCODERS[network], stem="imagenet").to(device)
    with torch.device(device):
        net = make()
    few = torch.rand(4 if size > 100 else 16, 8, 3, size, size).to(device)  # little memory: the peak is the method's
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # the plain mean of what it sees
        net.train()
        for images in few:
            net(images)
        net.eval()
        logits = torch.cat([net(images) for images in few])
        head: nn.Linear = net.get_classifier()  # type: ignore[operator]
        scale = 4 * math.sqrt(math.log10(logits.shape[1])) / logits.std(0)  # as confident with more classes
        head.weight.mul_(scale[:, None])
        head.bias.copy_((head.bias - logits.mean(0)) * scale)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    return net
