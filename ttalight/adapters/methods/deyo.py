"""DeYO: entropy minimisation on samples whose prediction rests on the shape of objects."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ttalight.adapters.components.filters import confidence_weight, entropy_margins, probability_drop
from ttalight.adapters.entropy import EntropyAdapter
from ttalight.adapters.methods.sar import SAR
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError
from ttalight.models.network import Outputs, Selection

__all__ = ["DeYO", "occlude", "shuffle_patches", "shuffle_pixels"]


class DeYO(EntropyAdapter):
    """Minimises the weighted entropy of confident predictions that suffer when objects are destroyed.

    A sample counts if its entropy H is below ``margin`` ln C and its likeliest class loses more than ``threshold`` of
    its probability, D, when the image's patches are shuffled: a prediction that does not need the shape of objects is
    one of texture or background. It weighs exp(E0 - H) + exp(D) with E0 = ``weight_margin`` ln C. One forward, one
    without gradient of the confident images only, destroyed, and one backward a batch; BatchNorm layers take the
    statistics of just these images in the second, as in the code. Where nothing counts, nothing changes.

    Source: J. Lee, D. Jung, S. Lee, J. Park, J. Shin, U. Hwang, S. Yoon, *Entropy is not Enough for Test-Time
    Adaptation: From the Perspective of Disentangled Factors*, ICLR 2024, arXiv 2403.07366. The authors have no settings
    for CIFAR-C; the defaults are those of their code. The benchmark of R. Marsden, M. Döbler, B. Yang, arXiv
    2306.00650, runs it there with Adam at 1e-3 on batches of 200. Which layers adapt is as in ``SAR``. Unlike the
    authors' code all margins follow the network's own number of classes, pixels are shuffled differently in every
    image, images need not be square, and the network stays in eval mode.

    Args:
        margin: Samples with an entropy below this share of ln C are confident, in (0, 1].
        weight_margin: E0 as a share of ln C, in (0, 1].
        threshold: Least loss of probability, in [-1, 1).
        destroy: What happens to objects: ``patch`` and ``pixel`` shuffle, ``occlusion`` hides the middle.
        patches: Patches in a row and in a column.
        occlusion: Share of height and width that is hidden, in (0, 1].
        kwargs: See ``EntropyAdapter``. By default the affines in front of the last block adapt, see above.

    Raises:
        ValueError: If an argument is out of range; at the first batch, if the network does not give one prediction an
            image, or images are smaller than the patches.
    """

    shards_batches = True

    published_parameters: Selection = "norm_before_last_block"
    published: ClassVar[dict[str, dict[str, Any]]] = {
        "cifar": {**SAR.published["cifar"], "threshold": 0.2},
        "imagenet": {**SAR.published["imagenet"], "threshold": 0.3},
        "imagenet_wild": {**SAR.published["imagenet"], "threshold": 0.2},
        "imagenet_below_32": {**SAR.published["imagenet_below_32"], "threshold": 0.2},
        "imagenet_vit": {**SAR.published["imagenet_vit"], "threshold": 0.2},
        "waterbirds": {**SAR.published["imagenet"], "lr": 1.25e-3, "threshold": 0.5},
        "colored_mnist": {
            **SAR.published["imagenet"],
            **{"lr": 1.25e-3, "margin": 1.0, "weight_margin": 1.0, "threshold": 0.5},
        },
    }

    def __init__(
        self,
        margin: float = 0.5,
        weight_margin: float = 0.4,
        threshold: float = 0.2,
        destroy: Literal["patch", "pixel", "occlusion"] = "patch",
        patches: int = 4,
        occlusion: float = 0.5,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, value in (("margin", margin), ("weight_margin", weight_margin)):
            if not 0 < value <= 1:
                raise InputError(f"{name} must be a share of ln C in (0, 1], got {value}")
        if not -1 <= threshold < 1:
            raise InputError(f"threshold must be a difference of probabilities in [-1, 1), got {threshold}")
        if destroy not in ("patch", "pixel", "occlusion"):
            raise InputError(f"destroy must be 'patch', 'pixel' or 'occlusion', got {destroy!r}")
        if patches < 2:
            raise InputError(f"patches must be at least 2 in a row and a column, got {patches}")
        if not 0 < occlusion <= 1:
            raise InputError(f"occlusion must be a share of the image's sides in (0, 1], got {occlusion}")
        self.margin, self.weight_margin, self.threshold = margin, weight_margin, threshold
        self.destroy, self.patches, self.occlusion = destroy, patches, occlusion

    def adapt(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Step on the batch; the shuffles of its steps are drawn one after another."""
        net.draws(0)
        return super().adapt(net, images)

    def weigh(self, net: AdaptiveNetwork, images: Tensor, outputs: Outputs) -> Tensor:
        """Return exp(E0 - H) + exp(D) of the samples that count, 0 for the others."""
        logits = outputs.logits.detach()
        if logits.ndim != 2:
            raise InputError(
                f"DeYO needs one prediction an image, logits of shape (B, C), got {tuple(logits.shape)}: shuffling "
                "patches moves pixels away from their labels. Use Tent or SAR for dense predictions"
            )
        entropies = self.entropies(outputs).detach()
        confident = entropies < entropy_margins(self.margin, logits)
        drops = self._drops(net, images, logits, confident)
        weights = confidence_weight(entropies, entropy_margins(self.weight_margin, logits)) + drops.exp()
        return weights.where(confident & (drops > self.threshold), 0)

    def _drops(self, net: AdaptiveNetwork, images: Tensor, logits: Tensor, confident: Tensor) -> Tensor:
        """Return what the confident samples lose when objects are destroyed, minus infinity for the others: (B,)."""
        drops = torch.full_like(logits[:, 0], -torch.inf)
        keep = confident.nonzero()[:, 0]
        if len(keep) == 0:
            return drops
        with torch.no_grad():
            changed = net(self._destroyed(images, net.generator), keep=keep).logits
        return drops.index_copy_(0, keep, probability_drop(logits.index_select(0, keep), changed))

    def _destroyed(self, images: Tensor, generator: torch.Generator) -> Tensor:
        if self.destroy == "patch":
            return shuffle_patches(images, self.patches, generator)
        if self.destroy == "pixel":
            return shuffle_pixels(images, generator)
        return occlude(images, self.occlusion)

    def protocol(self) -> dict[str, Any]:
        """Return what a result must say about this method to be comparable."""
        return super().protocol() | {
            "margin": self.margin,
            "weight_margin": self.weight_margin,
            "threshold": self.threshold,
            "destroy": self.destroy,
            "patches": self.patches if self.destroy == "patch" else None,
            "occlusion": self.occlusion if self.destroy == "occlusion" else None,
        }


def shuffle_patches(images: Tensor, patches: int, generator: torch.Generator) -> Tensor:
    """Cut images into a grid of patches and put these into another order, each image's own.

    Images whose sides the grid does not divide are resized to the next smaller ones that it does, and back.

    Args:
        images: (B, C, H, W).
        patches: Patches in a row and in a column.
        generator: On the images' device.

    Raises:
        ValueError: If a side has fewer pixels than patches.
    """
    count, channels, *size = images.shape
    height, width = (side // patches for side in size)
    if height == 0 or width == 0:
        raise InputError(f"{patches} x {patches} patches need images of at least as many pixels a side, got {size}")
    if (height * patches, width * patches) != tuple(size):
        images = _resize(images, (height * patches, width * patches))
    tiles = images.reshape(count, channels, patches, height, patches, width).permute(0, 2, 4, 1, 3, 5)
    tiles = tiles.reshape(count, patches**2, channels, height, width)
    order = torch.rand(count, patches**2, generator=generator, device=images.device).argsort(1)
    tiles = tiles.take_along_dim(order[:, :, None, None, None], 1)
    tiles = tiles.reshape(count, patches, patches, channels, height, width).permute(0, 3, 1, 4, 2, 5)
    shuffled = tiles.reshape(images.shape)
    return shuffled if list(shuffled.shape[2:]) == size else _resize(shuffled, tuple(size))


def shuffle_pixels(images: Tensor, generator: torch.Generator) -> Tensor:
    """Put the pixels of each image into another order, each image's own.

    Args:
        images: (B, C, H, W).
        generator: On the images' device.
    """
    pixels = images.flatten(2)
    order = torch.rand(len(images), 1, pixels.shape[2], generator=generator, device=images.device).argsort(2)
    return pixels.take_along_dim(order, 2).reshape(images.shape)


def occlude(images: Tensor, share: float) -> Tensor:
    """Fill the middle of each image with its mean colour.

    Args:
        images: (B, C, H, W).
        share: Share of height and width that is filled, in (0, 1].
    """
    filled = images.clone()
    rows, columns = (_middle(side, share) for side in images.shape[2:])
    filled[:, :, rows, columns] = images.mean((2, 3), keepdim=True)
    return filled


def _middle(side: int, share: float) -> slice:
    length = max(1, round(side * share))
    start = (side - length) // 2
    return slice(start, start + length)


def _resize(images: Tensor, size: tuple[int, ...]) -> Tensor:
    return F.interpolate(images, size, mode="bilinear", antialias=True)
