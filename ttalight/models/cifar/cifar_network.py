"""The base of the networks for 32-pixel images: timm's interface around stages of convolutions."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from timm.layers import SelectAdaptivePool2d  # type: ignore[attr-defined]  # public, but not marked as exported
from torch import Tensor, nn
from torch.nn import functional as F

from ttalight.errors import InputError

__all__ = ["CifarNetwork", "cifar_cfg", "draw_weights"]


class CifarNetwork(nn.Module, ABC):
    """Base of the networks for 32-pixel images: ``forward_features``, pooling, dropout and a linear classifier.

    Subclasses build their layers, set ``num_features`` and call ``reset_classifier``.

    Args:
        num_classes: Number of classes; 0 leaves the pooled features as the output.
        in_chans: Channels of the images.
        drop_rate: Probability of dropout before the classifier.
    """

    #: Name of the linear layer.
    classifier_name: ClassVar[str] = "fc"
    #: How the names in public weight files become the network's own: patterns and what replaces them, all tried in
    #: order; a name that becomes empty is of nothing that the network has. Own names stay as they are.
    public_names: ClassVar[tuple[tuple[str, str], ...]] = ()
    num_features: int
    global_pool: Any

    def __init__(self, num_classes: int, in_chans: int, drop_rate: float) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.in_chans = in_chans
        self.drop_rate = drop_rate

    def describe_three_stages(self, depth: int, width: int) -> int:
        """Set what timm reads of a network of 6n + 2 layers in three stages, and return its n blocks a stage.

        Args:
            depth: Number of layers.
            width: Channels of the first stage; they double from one to the next.

        Raises:
            ValueError: If the depth is not 6n + 2 with n >= 1.
        """
        if depth < 8 or (depth - 2) % 6:
            raise InputError(f"depth must be 6n + 2 with n >= 1 (8, 14, 20, ...), got {depth}")
        self.num_features = self.head_hidden_size = 4 * width
        self.feature_info = [
            {"num_chs": width << stage, "reduction": 1 << stage, "module": f"layer{stage + 1}"} for stage in range(3)
        ]
        return (depth - 2) // 6

    @abstractmethod
    def forward_features(self, x: Tensor) -> Tensor:
        """Feature maps (B, num_features, H / r, W / r) of images (B, in_chans, H, W)."""

    def get_classifier(self) -> nn.Module:
        """The last linear layer (an identity when there are no classes)."""
        return self.get_submodule(self.classifier_name)

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a freshly initialised one.

        Args:
            num_classes: Number of classes; 0 removes the classifier.
            global_pool: Another pooling; None keeps the present one.

        Raises:
            ValueError: If there are classes but no pooling.
        """
        pool_type = self.global_pool.pool_type if global_pool is None else global_pool
        if num_classes and not pool_type:
            raise InputError('global_pool="" gives maps, which the classifier cannot take: set num_classes=0')
        self.num_classes = num_classes
        self.global_pool = SelectAdaptivePool2d(pool_type=pool_type, flatten=bool(pool_type))
        self.head_hidden_size = self.num_features * (2 if pool_type == "catavgmax" else 1)
        linear = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()
        setattr(self, self.classifier_name, linear.to(next(self.parameters())))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Logits (B, num_classes) of feature maps, or the pooled features (B, head_hidden_size) if ``pre_logits``."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=self.drop_rate, training=self.training)
        return x if pre_logits else self.get_classifier()(x)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, num_classes) of images (B, in_chans, H, W)."""
        return self.forward_head(self.forward_features(x))


def cifar_cfg(**own: Any) -> dict[str, Any]:
    """Return timm's description of a network for 32-pixel images; ``own`` has what differs, such as mean and std."""
    shared = {
        "num_classes": 10,
        "input_size": (3, 32, 32),
        "pool_size": (8, 8),
        "crop_pct": 1.0,
        "interpolation": "bilinear",
        "first_conv": "conv1",
        "classifier": "fc",
    }
    return shared | own


def draw_weights(network: nn.Module) -> None:
    """Draw the convolutions of a network from a normal distribution with variance 2 / fan-out.

    K. He et al., "Delving Deep into Rectifiers", ICCV 2015, arXiv 1502.01852; all networks here are trained like that.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
