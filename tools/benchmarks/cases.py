"""Networks, images and configurations of every adapter that ``golden.py`` records."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import ttalight  # isort: skip  (first: it makes torchvision importable)
import lightning
import torch
from timm.models import VisionTransformer
from torch import Tensor, nn

from ttalight import adapters as A
from ttalight.data import ImageArrays, ImageDataModule
from ttalight.data.streams import Domain
from ttalight.tasks import CrossTaskTTT, RotationTTT

__all__ = ["CONFIGURATIONS", "NETWORKS", "Images", "Plain", "batches", "networks_of", "ttalight"]

CLASSES, SIDE = 4, 16


def convolutional(norm: Callable[[int], nn.Module]) -> nn.Module:
    # No bias in front of BatchNorm: Adam would divide a gradient that is rounding alone by its own size.
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, bias=False), norm(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, bias=False), norm(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, bias=False), norm(8), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES),
    )  # fmt: skip


#: A network of each kind of normalisation, and two tasks with an auxiliary loss.
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "batch norm": lambda: prepared(lambda: convolutional(nn.BatchNorm2d)),
    "group norm": lambda: prepared(lambda: convolutional(lambda channels: nn.GroupNorm(2, channels))),
    # Nor a bias of keys, whose gradient is rounding alone too.
    "layer norm": lambda: prepared(
        lambda: VisionTransformer(SIDE, 8, embed_dim=16, depth=4, num_heads=2, qkv_bias=False, num_classes=CLASSES)
    ),
    "cross task": lambda: prepared(lambda: CrossTaskTTT(encoder="cifar_resnet8", num_classes=CLASSES)),
    "rotation task": lambda: prepared(lambda: RotationTTT(encoder="cifar_resnet8", num_classes=CLASSES)),
}


def prepared(make: Callable[[], nn.Module]) -> nn.Module:
    """Return a network in double precision with random statistics and affines."""
    torch.manual_seed(0)
    net = make()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.3)
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, nn.BatchNorm2d | nn.GroupNorm | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.3)
        if isinstance(module, nn.Linear) and module.out_features == CLASSES:
            nn.init.normal_(module.weight)
    return net.double().eval()


def images(count: int, seed: int) -> Tensor:
    """Return images in [0, 1] that differ in colour, slope and noise, (count, 3, 16, 16)."""
    generator = torch.Generator().manual_seed(seed)
    colour, slope = torch.rand((2, count, 3, 1, 1), generator=generator, dtype=torch.float64)
    noise = torch.rand(count, 3, SIDE, SIDE, generator=generator, dtype=torch.float64)
    return (0.5 * colour + (slope - 0.5) * torch.linspace(0, 1, SIDE, dtype=torch.float64) + 0.5 * noise).clamp(0, 1)


def batches() -> list[Tensor]:
    """Return a stream whose last batches are smaller."""
    return [images(size, seed) for seed, size in enumerate((6, 6, 6, 6, 3, 1))]


class Images(ImageDataModule):
    """Three domains of unequal sizes, in memory."""

    num_classes = CLASSES
    mean, std = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)

    def load(self, split: Any) -> ImageArrays:
        return _arrays(10, 20)

    def load_domains(self) -> list[tuple[Domain, ImageArrays]]:
        sizes = {"red": 8, "green": 5, "blue": 7}
        return [(Domain(name), _arrays(size, 30 + size)) for name, size in sizes.items()]


def _arrays(count: int, seed: int) -> ImageArrays:
    return ImageArrays((images(count, seed) * 255).to(torch.uint8), torch.arange(count) % CLASSES)


class Plain(lightning.LightningModule):
    """A module whose test step calls its forward, and nothing else."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self(batch[0])


Make = Callable[..., A.Adapter]
_SURE: dict[str, Any] = {"margin": 1.0, "redundancy": 0.99995}
_SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, nesterov=True)
_ADAMW = partial(torch.optim.AdamW, lr=0.02, weight_decay=0.1)

#: Adapters by name. The part in front of the comma is the class.
CONFIGURATIONS: dict[str, Make] = {
    "Source": A.Source,
    "PTBN": A.PTBN,
    "AlphaBN": A.AlphaBN,
    "AlphaBN, constant": partial(A.AlphaBN, alpha=0.3),
    "EMABN": A.EMABN,
    "EMABN, two steps": partial(A.EMABN, steps=2, momentum=0.3),
    "FIND": A.FIND,
    "FIND, all": partial(A.FIND, layers="all"),
    "FIND, source": partial(A.FIND, layers=[0, 2], others="source", alpha=0.5),
    "T3A": partial(A.T3A, supports=5),
    "T3A, batch": partial(A.T3A, norm="batch"),
    "LAME": A.LAME,
    "LAME, knn": partial(A.LAME, kernel="knn", neighbors=3, symmetric=True),
    "LAME, linear": partial(A.LAME, kernel="linear", norm="batch"),
    "Tent": partial(A.Tent, lr=0.02),
    "Tent, clip": partial(A.Tent, lr=0.02, clip_norm=0.05),
    "Tent, SGD": partial(A.Tent, optimizer=_SGD),
    "Tent, AdamW": partial(A.Tent, optimizer=_ADAMW),
    "Tent, two steps": partial(A.Tent, lr=0.02, steps=2),
    "Tent, after": partial(A.Tent, lr=0.02, prediction="after", steps=2, clip_norm=0.5),
    "Tent, STAG": partial(A.Tent, lr=0.02, terms=[A.STAG()], clip_norm=1.0),
    "Tent, features": partial(A.Tent, lr=0.005, parameters="features"),
    "Tent, all SGD": partial(A.Tent, optimizer=_SGD, parameters="all"),
    "RPL": partial(A.RPL, lr=0.02),
    "ETA": partial(A.ETA, lr=0.02, **_SURE),
    "ETA, few": partial(A.ETA, lr=0.02, margin=0.9, redundancy=0.95),
    "ETA, STAG": partial(A.ETA, lr=0.02, terms=[A.STAG(reweight=True)], clip_norm=1.0, **_SURE),
    "EATA": lambda **options: A.EATA(
        source=[images(6, 11), images(6, 12)], fisher_weight=50.0, fisher_samples=12, lr=0.02, **_SURE, **options
    ),
    "EATA, stream": partial(A.EATA, fisher="stream", fisher_samples=8, fisher_weight=50.0, lr=0.02, **_SURE),
    "EATA, validation": partial(A.EATA, fisher_samples=6, fisher_weight=50.0, lr=0.02, **_SURE),
    "RDumb": partial(A.RDumb, lr=0.02, **_SURE),
    "RDumb, two updates": partial(A.RDumb, lr=0.02, reset=2, **_SURE),
    "SAR": partial(A.SAR, margin=1.0, lr=0.02),
    "SAR, recovers": partial(A.SAR, margin=1.0, lr=0.02, recovery=5.0),
    "SAR, few": partial(A.SAR, margin=0.9, lr=0.02, parameters="norm", terms=[A.STAG()], clip_norm=1.0),
    "DeYO": partial(A.DeYO, margin=1.0, threshold=-1.0, lr=0.02),
    "DeYO, pixel": partial(A.DeYO, margin=0.9, threshold=-0.1, lr=0.02, destroy="pixel", parameters="norm"),
    "DeYO, occlusion": partial(A.DeYO, margin=0.9, threshold=-0.1, lr=0.02, destroy="occlusion"),
    "SHOT": partial(A.SHOT, lr=0.02, confidence=0.4),
    "TIPI": partial(A.TIPI, lr=0.02),
    "TIPI, entropy": partial(A.TIPI, lr=0.02, entropy_weight=1.0, reverse=False, large_batch=4),
    "ROID": partial(A.ROID, lr=0.02),
    "ROID, Adam": partial(A.ROID, optimizer=_ADAMW, prior_correction="none"),
    "CMF": partial(A.CMF, lr=0.02),
    "MEMO": partial(A.MEMO, views=4, lr=0.02),
    "MEMO, joint": partial(A.MEMO, views=4, joint=True, lr=0.02),
    "NCTTA": partial(A.NCTTA, margin=1.0, lr=0.02),
    "NCTTA, few": partial(A.NCTTA, margin=0.9, lr=0.02, parameters="all", clip_norm=1.0),
    "MoETTA": partial(A.MoETTA, lr=0.02, experts=3),
    "MoETTA, two": partial(A.MoETTA, lr=0.02, experts=3, top=2, plain=[1]),
}
#: Configurations for tasks with an auxiliary loss.
_TASKS: dict[str, Make] = {
    "EMABN, views": partial(A.EMABN, steps=2, momentum=0.3),
    "TestTimeTraining": partial(A.TestTimeTraining, steps=2, lr=0.01),
    "TestTimeTraining, batch": partial(A.TestTimeTraining, steps=2, lr=0.01, norm="batch", clip_norm=0.5),
    "TestTimeTraining, source": partial(A.TestTimeTraining, steps=1, optimizer=_SGD, norm="source"),
    "TestTimeTraining, STAG": partial(A.TestTimeTraining, steps=1, lr=0.01, terms=[A.STAG()]),
    "TestTimeTraining, read": partial(A.TestTimeTraining, steps=2, lr=0.01, reset="batch", read_at=[1]),
}
CONFIGURATIONS |= _TASKS


def networks_of(name: str) -> tuple[str, ...]:
    """Return the names of the networks that a configuration is recorded on."""
    return ("cross task", "rotation task") if name in _TASKS else ("batch norm", "group norm", "layer norm")
