"""NC-TTT: test-time training by a discriminator of noise on feature maps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ttalight.adapters import Adapter, TestTimeTraining
from ttalight.errors import InputError
from ttalight.losses import in_distribution_loss, noise_contrastive_loss, noise_logits
from ttalight.models.maps import capture_maps, select_stages
from ttalight.tasks.map_task import MapTask

__all__ = ["NCTTT"]


class NCTTT(MapTask):
    """A classifier beside a discriminator that knows source maps; at test time maps must look like them.

    The map of one stage is projected (1x1 convolution) to D numbers. In source training the discriminator tells
    projections with a little noise from those with much noise; its soft label is the probability that the noise drawn
    is of the large kind. At test time the projections themselves, without noise, must pass for the small kind: the
    encoder up to the stage adapts, projector and discriminator are frozen.

    Source: D. Osowiechi et al., *NC-TTT: A Noise Contrastive Approach for Test-Time Training*, CVPR 2024, arXiv
    2404.08392. The authors' source training is SGD (``optimizer``) at 1e-3 with momentum 0.9 and weight decay 1e-4,
    batches of 128, 100 epochs, a constant rate (``scheduler``); without these arguments the schedule is ``BaseTask``'s.
    Their code projects to 1536 channels, the only public value, which is 393,216 numbers in stage 2 at 32 pixels. The
    paper names none, and 128 channels are the default here and in the configurations. There the discriminator fits
    stage 2 on CIFAR only; here it is made for the maps of the chosen stage at ``image_size``.

    Args:
        layer: Number of the stage whose map is read, from 1 on.
        channels: Channels of the projection.
        hidden: Width of the discriminator's hidden layer.
        small_noise: Standard deviation of the small noise.
        large_noise: Standard deviation of the large noise.
        image_size: Side of the images that the encoder sees, in pixels; see ``BaseTask``.
        weights: Checkpoint of this task.
        kwargs: See ``SupervisedTask`` and ``BaseTask``; crops are ``padded`` here.

    Raises:
        ValueError: If an argument is out of range, or the file does not fit.
        FileNotFoundError: If the file does not exist.
    """

    def __init__(
        self,
        layer: int = 2,
        channels: int = 128,
        hidden: int = 4,
        small_noise: float = 0.015,
        large_noise: float = 0.1,
        image_size: int = 32,
        weights: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(image_size=image_size, weights=weights, **kwargs)
        if channels < 1 or hidden < 1:
            raise InputError(f"channels and hidden must be at least 1, got {channels} and {hidden}")
        if not 0 < small_noise < large_noise:
            raise InputError(f"noise must satisfy 0 < small_noise < large_noise, got {small_noise} and {large_noise}")
        self.small_noise, self.large_noise = small_noise, large_noise
        self.stages = select_stages(self.encoder, [layer])
        self.map_size = self._map_size(image_size)
        self.projector = nn.Conv2d(self.stages[0].channels, channels, 1)
        self.discriminator = nn.Sequential(
            nn.Linear(channels * self.map_size[0] * self.map_size[1], hidden),
            nn.BatchNorm1d(hidden),
            nn.LeakyReLU(0.2),
            nn.Linear(hidden, 1, bias=False),
        )
        for module in (self.projector, self.discriminator[0], self.discriminator[3]):
            nn.init.xavier_normal_(module.weight)  # type: ignore[arg-type]
        self.load_trained(weights, "layer", "channels", "hidden", "image_size")

    @torch.no_grad()
    def _map_size(self, image_size: int) -> tuple[int, ...]:
        with capture_maps(self.encoder, self.stages) as maps:
            self.encoder.eval()(self.normalize.mean.new_zeros(1, 3, image_size, image_size))
        self.encoder.train()
        return tuple(maps[self.stages[0].number].shape[2:])

    def project(self, maps: dict[int, Tensor]) -> Tensor:
        """Return the projections, (B, D), in float32: the small noise is below what bf16 resolves."""
        values = maps[self.stages[0].number]
        if tuple(values.shape[2:]) != self.map_size:
            seen, expected = ("x".join(map(str, size)) for size in (values.shape[2:], self.map_size))
            raise InputError(
                f"these images give maps of {seen} in layer {self.stages[0].number}, and the discriminator was made "
                f"for {expected}: set image_size to the side of the images"
            )
        projected: Tensor = self.projector(values)
        return (projected if projected.dtype == torch.float64 else projected.float()).flatten(1)

    def score(self, projections: Tensor) -> Tensor:
        """Return the discriminator's logits, (B,), of projections, (B, D): high for much noise."""
        with torch.autocast(projections.device.type, enabled=False):
            scores: Tensor = self.discriminator(projections)
        return scores.flatten()

    def training_losses(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return cross-entropy and noise-contrastive loss of one pass."""
        features, maps = self.encode_with_maps(images)
        contrast = self._contrast(self.project(maps))
        return {"supervised": cross_entropy(self.classifier(features), labels), "auxiliary": contrast}

    def _contrast(self, projections: Tensor) -> Tensor:
        """Return the loss of telling small from large noise on the same projections, a scalar."""
        noise = torch.cat(
            [
                deviation * torch.randn(projections.shape, generator=self.draws, device=projections.device)
                for deviation in (self.large_noise, self.small_noise)
            ]
        ).to(projections.dtype)
        targets = noise_logits(noise, self.small_noise, self.large_noise)
        return noise_contrastive_loss(self.score(projections.repeat(2, 1) + noise), targets).mean()

    def auxiliary_loss(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return how little the maps look like source maps with small noise, (B,); nothing is drawn.

        Args:
            images: (B, 3, H, W) in [0, 1].
            generator: Not used.
        """
        return in_distribution_loss(self.score(self.project(self.encode_with_maps(images)[1])))

    def default_adapter(self) -> Adapter:
        """Return the published test-time training: Adam at 1e-5, here with 20 of the published numbers of steps."""
        return TestTimeTraining(steps=20, lr=1e-5)
