"""TTAug: predictions averaged over augmented views."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ttalight.adapters.adapter import Adapter
from ttalight.adapters.components.image_predictions import check_image_predictions
from ttalight.adapters.components.pixel_space import PixelSpace, check_normalization, pixel_space
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError, InputTypeError
from ttalight.models.network import Network
from ttalight.transforms import AugMixViews

__all__ = ["TTAug"]


class TTAug(Adapter):
    """Predicts the mean of the logits of augmented views. Nothing is learned.

    Known as test-time augmentation. The views are those of MEMO, and the statistics of BatchNorm layers are mixed as in
    ``AlphaBN``, here those of one view of the whole batch. A batch costs ``views`` forwards, one after the other, so
    that memory does not grow with the number of views.

    Source: the rows named TTAug of the benchmark of R. Marsden, M. Döbler, B. Yang, arXiv 2306.00650, with the views of
    M. Zhang, S. Levine, C. Finn, *MEMO: Test Time Robustness via Adaptation and Augmentation*, NeurIPS 2022, arXiv
    2110.09506. The benchmark's code takes the statistics of all views of one image together, with a share of 0.1.

    Args:
        views: Augmented views of an image, at least 1.
        prior: The images N that the source statistics count as, at least 0.
        crop: How views are cropped; see ``AugMixViews``.
        mean: Channel means of a normalisation outside the network; see ``pixel_space``.
        std: Channel standard deviations of it.
        kwargs: See ``Adapter``.

    Raises:
        ValueError: If an argument is out of range. At the first batch, if the network predicts pixel by pixel.
    """

    norm = "prior"

    def __init__(
        self,
        views: int = 32,
        prior: float = 16.0,
        crop: Literal["padded", "resized"] = "padded",
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if views < 1:
            raise InputError(f"views must be at least 1, got {views}")
        if prior < 0:
            raise InputError(f"prior must be at least 0, got {prior}")
        check_normalization(mean, std)
        self.views, self.prior, self.crop, self.mean, self.std = views, prior, crop, mean, std
        self._augmentation = AugMixViews(crop)
        self._space = PixelSpace()

    def check(self, net: Network) -> None:
        """Check that the statistics of layers can be chosen."""
        for layer in net.norms:
            layer.check()

    def configure(self, net: AdaptiveNetwork) -> None:
        """Mix the statistics of BatchNorm layers."""
        net.set_norm_mode("prior")
        for layer in net.norms:
            layer.prior = self.prior
        self._space = pixel_space(net, self.mean, self.std)

    @torch.no_grad()
    def adapt(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Predict views of the batch."""
        pixels, draws = self._space.to_pixels(images), net.draws()
        logits = [self._passed(net, pixels, draws) for _ in range(self.views)]
        return torch.stack(logits).mean(0)

    def _passed(self, net: AdaptiveNetwork, pixels: Tensor, draws: torch.Generator) -> Tensor:
        """Return the logits of one view of the batch, (B, C)."""
        logits = net(self._space.from_pixels(self._augmentation(pixels, draws, 1))).logits
        check_image_predictions(logits, "TTAug", "averages predictions over cropped and turned views")
        return logits

    def predict(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Return what ``adapt`` returns: there is no state."""
        return self.adapt(net, images)

    def export(self, net: AdaptiveNetwork, module: nn.Module) -> None:
        """Raise a TypeError: the prediction is no network's."""
        raise InputTypeError("TTAug averages predictions of random views, so there is no network to export")

    def protocol(self) -> dict[str, Any]:
        """Return the settings that are saved with a result, so that results can be compared."""
        own = {"views": self.views, "prior": self.prior, "crop": self.crop}
        return super().protocol() | own | self._space.protocol()
