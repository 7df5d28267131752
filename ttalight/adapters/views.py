"""The bases of the methods that read random views of each image."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttalight.adapters.components.pixel_space import PixelSpace, check_normalization, pixel_space
from ttalight.adapters.feature import FeatureAdapter
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError, InputTypeError
from ttalight.losses.entropy import entropy
from ttalight.transforms import AugMixViews, RandomResizedCropFlip
from ttalight.transforms.checks import positive_range

__all__ = ["EpisodicViewAdapter", "ViewAdapter", "check_share", "count_of", "order_by_entropy", "surest_views"]


class ViewAdapter(FeatureAdapter):
    """Reads logits and features of each image and of random views of it, of a frozen network.

    The views are those of test-time prompt tuning (M. Shu et al., NeurIPS 2022, arXiv 2209.07511): random resized crops
    with flips, made on the device. They are drawn for each image by itself and passed in parts, so that memory does not
    grow with the size of a batch. Different from it: crops are cut from the image as the network gets it, and not from
    the file, and they are resized bilinearly.

    Args:
        views: Views of an image, the image itself among them, at least 2.
        crop_scale: Least and greatest share of the area that a crop has.
        augmix: Mix the crops by AugMix, as published for fine-grained sets; see ``AugMixViews``.
        pass_size: Greatest number of crops in one pass of the network.
        mean: Channel means of a normalisation outside the network; see ``pixel_space``.
        std: Channel standard deviations of it.
        kwargs: See ``FeatureAdapter``. ``norm`` is ``source``.

    Raises:
        ValueError: If an argument is out of range; at the first batch, if the classifier cannot be found.
    """

    images_are_for = ("compares random crops of images", "views")
    #: Fewest views that the method can use.
    least_views: ClassVar[int] = 2

    def __init__(
        self,
        views: int = 64,
        crop_scale: Sequence[float] = (0.08, 1.0),
        augmix: bool = False,
        pass_size: int = 64,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if views < self.least_views:
            raise InputError(f"views must be at least {self.least_views}, the image among them, got {views}")
        if pass_size < 1:
            raise InputError(f"pass_size must be at least 1, got {pass_size}")
        if self.norm != "source":
            raise InputError("norm must be 'source': statistics of a batch would be those of the views in a pass")
        check_normalization(mean, std)
        self.views, self.augmix, self.pass_size, self.mean, self.std = views, augmix, pass_size, mean, std
        self.crop_scale = positive_range("crop_scale", crop_scale, upper=1.0)
        self._space = PixelSpace()

    def configure(self, net: AdaptiveNetwork) -> None:
        """Find the classifier, and the pixels behind the images."""
        super().configure(net)
        self._space = pixel_space(net, self.mean, self.std)
        self._crop = RandomResizedCropFlip(scale=self.crop_scale)
        self._mix = AugMixViews("resized")
        self._mix.crop = self._crop

    def read_views(self, net: AdaptiveNetwork, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits, (B, V, C), and unit vectors along the features, (B, V, D), in the type of the classifier.

        The first view is the image itself.
        """
        logits, features = self.read_view_features(net, images)
        return logits, F.normalize(features, dim=2)

    @torch.no_grad()
    def read_view_features(self, net: AdaptiveNetwork, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits, (B, V, C), and features of any length, (B, V, D); see ``read_views``.

        Raises:
            ValueError: If there are no images, but for example saved features.
        """
        if images.ndim != 4:
            raise InputError(
                f"{type(self).__name__} reads crops of images, (B, 3, H, W), and got shape {tuple(images.shape)}: "
                "use a method that reads features alone, or the images and a VisionLanguageTask"
            )
        if self.views == 1:
            logits, features = self.read(net, images)
            return logits[:, None], features[:, None].to(net.head.weight.dtype)
        seed, settings = net.draws().initial_seed(), self._settings() | self._space.protocol()
        rows = len(images), self.views - 1
        crops = self.cached(net, images, f"views {seed} {settings}", rows, lambda: self._read_crops(net, images))
        net.drop_outputs()  # other parts of the output are those of the images themselves
        both = zip(self.read(net, images), crops, strict=True)
        logits, features = (torch.cat([own[:, None], others], 1) for own, others in both)
        return logits, features.to(net.head.weight.dtype)

    def _read_crops(self, net: AdaptiveNetwork, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits, (B, V - 1, C), and features, (B, V - 1, D), of random views, in passes of bounded size."""
        pixels, batch, count = self._space.to_pixels(images), len(images), self.views - 1
        together = max(1, self.pass_size // count)
        read: list[tuple[Tensor, Tensor]] = []
        for first in range(0, batch, together):
            numbers = range(first, min(first + together, batch))
            made = torch.cat([self._views(pixels[number : number + 1], net.draws(number)) for number in numbers])
            for part in torch.split(self._space.from_pixels(made), self.pass_size):
                # Counted with the first part, since fractions would not add up to whole batches.
                read.append(self.pass_images(net, part, 0.0 if read else float(count)))
        logits, features = map(torch.cat, zip(*read, strict=True))
        return logits.view(batch, count, -1), features.view(batch, count, -1)

    def _views(self, image: Tensor, draws: torch.Generator) -> Tensor:
        """Return random views, (V - 1, 3, S, S), of the pixels of one image, (1, 3, H, W)."""
        count = self.views - 1
        views: Tensor = (
            self._mix(image, draws, count) if self.augmix else self._crop(image.expand(count, -1, -1, -1), draws)
        )
        return views

    def _settings(self) -> dict[str, Any]:
        return {"views": self.views, "crop_scale": list(self.crop_scale), "augmix": self.augmix}

    def protocol(self) -> dict[str, Any]:
        """Return the settings that are saved with a result, so that results can be compared."""
        return super().protocol() | self._settings() | self._space.protocol()


class EpisodicViewAdapter(ViewAdapter):
    """Predicts each image by its views alone. There is no state."""

    @abstractmethod
    def merge(self, net: AdaptiveNetwork, logits: Tensor, features: Tensor) -> Tensor:
        """Return the prediction of each image, (B, C).

        Args:
            net: The network.
            logits: Of the views, (B, V, C); the first is the image itself.
            features: Of the views, (B, V, D).
        """

    @torch.no_grad()
    def adapt(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Predict each image by its views."""
        return self.merge(net, *self.read_view_features(net, images))

    def predict(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Return what ``adapt`` returns: there is no state."""
        return self.adapt(net, images)

    def export(self, net: AdaptiveNetwork, module: nn.Module) -> None:
        """Raise a TypeError: the prediction is no network's."""
        raise InputTypeError(
            f"{type(self).__name__} predicts by random views of an image, so there is no network to export"
        )


def check_share(share: float) -> None:
    """Refuse a share of the views that is not in (0, 1], with a ValueError."""
    if not 0 < share <= 1:
        raise InputError(f"share must lie in (0, 1], got {share}")


def order_by_entropy(logits: Tensor) -> Tensor:
    """Return the places of the views of each image by their entropy, the lowest first, (B, V).

    Args:
        logits: Of the views, (B, V, C).
    """
    return entropy(logits.flatten(0, 1)).view(logits.shape[:2]).argsort(dim=1, stable=True)


def count_of(share: float, views: int) -> int:
    """Return how many of the views a share is, rounded down, and at least one."""
    return max(1, int(share * views))


def surest_views(logits: Tensor, share: float, *others: Tensor) -> list[Tensor]:
    """Return logits, and whatever else there is of the views, of the surest views of each image, (B, K, ...) each.

    Args:
        logits: Of the views, (B, V, C).
        share: Share of the views that is kept, those of lowest entropy first.
        others: (B, V, ...).
    """
    places = order_by_entropy(logits)[:, : count_of(share, logits.shape[1])]
    rows = torch.arange(len(logits), device=logits.device)[:, None]
    return [values[rows, places] for values in (logits, *others)]
