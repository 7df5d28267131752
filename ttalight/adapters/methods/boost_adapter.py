"""BoostAdapter: the caches of TDA, and for each image the surest of its own crops."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ttalight.adapters.components.class_cache import similarities
from ttalight.adapters.methods.tda import TDA
from ttalight.adapters.views import ViewAdapter, check_share, surest_views
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError
from ttalight.losses.entropy import entropy

__all__ = ["BoostAdapter", "Crops", "kept_with_crops"]


class BoostAdapter(TDA, ViewAdapter):
    """Lets each image read its own surest crops beside the images in the positive cache of ``TDA``.

    The crops belong to the classes that are predicted for them. Together with the cache they compete for the places of
    their class, of which there are ``crop_places`` more. They are gone after the image. All else is as in ``TDA``.
    Images are taken one after another, so how a stream is cut into batches changes nothing but the random crops.
    ``views`` forwards a batch.

    Source: T. Zhang, J. Wang, H. Guo, T. Dai, B. Chen, S.-T. Xia, *BoostAdapter: Improving Vision-Language Test-Time
    Adaptation via Regional Bootstrapping*, NeurIPS 2024, arXiv 2410.15430, after the authors' code. Different from it:
    an image is predicted by itself, as for the fine-grained sets there, and not by the mean of its surest views as for
    ImageNet's variants; and the negative cache keeps images of lowest entropy, as in ``TDA``, where the code keeps the
    latest.

    Args:
        crop_places: Places of a class for crops, beside ``positive_size``.
        share: Share of the views that are read, those of lowest entropy, in (0, 1].
        kwargs: See ``TDA`` and ``ViewAdapter``.

    Raises:
        ValueError: If an argument is out of range; at the first batch, if the classifier cannot be found.
    """

    def __init__(self, crop_places: int = 3, share: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if crop_places < 0:
            raise InputError(f"crop_places must be at least 0, got {crop_places}")
        check_share(share)
        self.crop_places, self.share = crop_places, share

    @torch.no_grad()
    def adapt(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Insert and predict each image of the batch."""
        logits, units = self.read_views(net, images)
        own, features = logits[:, 0], units[:, 0]
        entropies = entropy(own)
        positive, places = self._read_with_crops(logits, units, entropies)
        self._positive.insert(places[-1], own.argmax(1), features, entropies)
        return self._fuse(own, positive, self._follow_uncertain(own, features, entropies))

    @torch.no_grad()
    def predict(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Predict the batch by the present caches and its own crops."""
        logits, units = self.read_views(net, images)
        absent = torch.full_like(logits[:, 0, 0], torch.inf)
        positive, _ = self._read_with_crops(logits, units, absent)
        return self._fuse(logits[:, 0], positive, self._negative.read(units[:, 0], self.negative_sharpness))

    def _read_with_crops(self, logits: Tensor, units: Tensor, entropies: Tensor) -> tuple[Tensor, Tensor]:
        """Return what images read from the positive cache and their crops, (B, C), and all places; see ``TDA``.

        Args:
            logits: Of the views, (B, V, C).
            units: Unit vectors along their features, (B, V, D).
            entropies: Of the images, (B,); infinite for those that are not inserted.
        """
        cache, classes, features = self._positive, logits[:, 0].argmax(1), units[:, 0]
        places = cache.places(classes, entropies)
        kept, crop_units = surest_views(logits, self.share, units)
        crops = Crops(kept.argmax(2), entropy(kept.flatten(0, 1)).view(kept.shape[:2]))
        places_in_all = cache.entropies.shape[1] + self.crop_places
        present, is_read = kept_with_crops(places, cache.entropies, classes, entropies, crops, places_in_all)
        read = cache.read_present(features, classes, present, self.positive_sharpness)
        near = similarities(features[:, None], crop_units, self.positive_sharpness)[:, 0]
        return read.scatter_add(1, crops.classes, near * is_read), places

    def export(self, net: AdaptiveNetwork, module: nn.Module) -> None:
        """Raise a TypeError: the prediction is no network's."""
        super().export(net, module)

    def protocol(self) -> dict[str, Any]:
        """Return the settings that are saved with a result, so that results can be compared."""
        return super().protocol() | {"crop_places": self.crop_places, "share": self.share}


class Crops(NamedTuple):
    """The surest crops of each image, ascending by entropy.

    Args:
        classes: Predicted for them, (B, K).
        entropies: (B, K).
    """

    classes: Tensor
    entropies: Tensor


def kept_with_crops(
    places: Tensor, kept: Tensor, classes: Tensor, entropies: Tensor, crops: Crops, size: int
) -> tuple[Tensor, Tensor]:
    """Return which features of the cache, (B, C * M + B), and which crops, (B, K), an image reads.

    They are the ``size`` of lowest entropy of each class, of equal ones those of the cache, then the first crop.

    Args:
        places: Of ``places_along_batch``, (B, C * M + B).
        kept: Entropies of the cache, (C, M).
        classes: Class of each image, (B,).
        entropies: Of each image, (B,).
        crops: Of each image.
        size: Places of a class for the cache and the crops.
    """
    count, width = kept.shape
    owners = torch.cat([torch.arange(count, device=kept.device).repeat_interleave(width), classes])
    values = torch.cat([kept.flatten(), entropies])
    present = places < width
    is_same = crops.classes[:, :, None] == owners
    is_lower = crops.entropies[:, :, None] < values
    ahead = (is_same & is_lower).sum(1)
    cached = (is_same & ~is_lower & present[:, None]).sum(2)
    earlier = (crops.classes[:, :, None] == crops.classes[:, None]).tril(-1).sum(2)
    return present & (places + ahead < size), cached + earlier < size
