"""FOA: prompts of a vision transformer found by forward passes alone, and features moved towards the source's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ttalight.adapters.components.evolution import Evolution, require_cmaes
from ttalight.adapters.components.image_predictions import check_image_predictions
from ttalight.adapters.components.prompted_transformer import ClassTokens, PromptedTransformer
from ttalight.adapters.source_data import SourceDataAdapter
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.errors import InputError, InputTypeError
from ttalight.losses.entropy import entropy
from ttalight.models.network import Network
from ttalight.seeding import derive_seed

__all__ = ["FOA", "SourceTokens", "candidate_fitness", "shifted_logits"]

#: Images of the batch for which the distance to the source weighs ``fitness_weight``.
_BATCH = 64


class FOA(SourceDataAdapter):
    """Finds prompts for a vision transformer by forward passes alone. No gradient, and no weight changes.

    A few prompts stand behind the class token. For each batch, CMA-ES draws candidates of them, and the best one of the
    last batch is one more. Each candidate gets one forward. Its fitness is the entropy of the predictions plus the
    distance of mean and standard deviation of the class tokens, behind every block, to those of source images. The
    prediction is that of the best candidate, with its features shifted by what the source's mean differs from the
    running mean of the stream. Then CMA-ES and the running mean are updated. K forwards a batch.

    Source images are read once, when the first batch arrives, and need no labels. Without any the method warns, takes
    the entropy alone as the fitness and shifts nothing.

    Source: S. Niu, C. Miao, G. Chen, P. Wu, P. Zhao, *Test-Time Model Adaptation with Only Forward Passes*, ICML 2024,
    arXiv 2404.01650, after the authors' code. Different from it: CMA-ES is that of the library cmaes, with all K
    candidates as the population, where the code takes pycma with the weights of a population of 27. A reset starts with
    the prompts of the first time again instead of new ones. Source statistics come from ``source_samples`` images as in
    the paper, where the code reads a whole set. A batch of one image has no standard deviation, and its fitness leaves
    that out, where it is NaN in the code. A candidate whose fitness is not finite is the worst. The shift is that of
    what the classifier reads, which is the class token unless the network pools otherwise.

    Args:
        prompts: Number P of prompts.
        population: Candidates K of a batch, the best one of the last batch among them.
        sigma: Initial step size of CMA-ES, whose initial mean is zero.
        fitness_weight: Weight of the distance to the source for 64 images; it grows with the batch, as the sum of
            entropies does. The authors take 0.2 for ImageNet-R.
        shift: Factor on the shift of features; 0 for none.
        momentum: Share of a batch in the running mean of features, in (0, 1].
        source_samples: Number of source images.
        kwargs: See ``SourceDataAdapter``.

    Raises:
        ValueError: If an argument is out of range, or the network has no vision transformer of timm or torchvision with
            a class token. At the first batch, if the classifier cannot be found, or ``source`` gives too few images.
        ImportError: If the package cmaes is not installed.
    """

    prediction = "after"

    def __init__(
        self,
        prompts: int = 3,
        population: int = 28,
        sigma: float = 1.0,
        fitness_weight: float = 0.4,
        shift: float = 1.0,
        momentum: float = 0.1,
        source_samples: int = 32,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        least = {"prompts": (prompts, 1), "population": (population, 4), "source_samples": (source_samples, 2)}
        for name, (count, fewest) in least.items():
            if count < fewest:
                raise InputError(f"{name} must be at least {fewest}, got {count}")
        if not sigma > 0:
            raise InputError(f"sigma must be positive, got {sigma}")
        for name, value in (("fitness_weight", fitness_weight), ("shift", shift)):
            if value < 0:
                raise InputError(f"{name} must be at least 0, got {value}")
        if not 0 < momentum <= 1:
            raise InputError(f"momentum must lie in (0, 1], got {momentum}")
        self.prompts, self.population, self.sigma = prompts, population, sigma
        self.fitness_weight, self.shift, self.momentum = fitness_weight, shift, momentum
        self.source_samples = source_samples
        #: What is known of the source. None before a run.
        self._source: SourceTokens | None = None

    def check(self, net: Network) -> None:
        """Check that there is a vision transformer whose class tokens can be read, a classifier, and CMA-ES."""
        PromptedTransformer(net.module)
        net.classifier.check()
        require_cmaes()

    def configure(self, net: AdaptiveNetwork) -> None:
        """Begin with random prompts, and measure class tokens of source images."""
        self._transformer = PromptedTransformer(net.module)
        weight, parts = net.head.weight, self._transformer.parts
        self._evolution = Evolution(self.prompts * parts.width, self.population, self.sigma, net.device)
        limit = self._transformer.limit()
        generator = torch.Generator().manual_seed(derive_seed(net.seed, "prompts"))
        drawn = torch.rand(self.prompts, parts.width, generator=generator, dtype=torch.float64)
        #: The best prompts of the last batch, (P, D), and the running mean of features.
        self._best = (limit * (2 * drawn - 1)).to(net.device)
        self._mean = weight.new_zeros(weight.shape[1])
        tokens = weight.new_zeros(len(parts.blocks) * parts.width)
        self._source = SourceTokens(tokens, self._mean)
        if net.images is not None and not net.is_bad:  # otherwise a state follows, or a prediction without prompts
            self._measure(net)

    def _measure(self, net: AdaptiveNetwork) -> None:
        """Measure the class tokens and features of source images, without prompts."""
        assert self._source is not None
        without = "its fitness is the entropy alone, and it shifts no features"
        batches = self.source_batches(net, self.source_samples, without)
        if batches is None:
            return
        with self._transformer.prompted() as tokens:
            seen = [self._pass(net, batch.images.to(net.device), tokens) for batch in batches]
        net.drop_outputs()
        self._source.measure(torch.cat([each for _, _, each in seen]), torch.cat([each for _, each, _ in seen]))

    def method_state(self) -> dict[str, Tensor]:
        """Return the state of CMA-ES, the best prompts, the running mean, and what is known of the source."""
        assert self._source is not None
        evolution = {f"evolution.{name}": value for name, value in self._evolution.state.items()}
        return evolution | {"best": self._best, "mean": self._mean} | self._source.state

    @torch.no_grad()
    def adapt(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Predict by the best of the candidates, then let CMA-ES and the running mean follow the batch."""
        assert self._source is not None
        if net.is_bad:
            return self.predict(net, images)
        size = self.population - 1, self._best.numel()
        noise = torch.randn(size, generator=net.draws(), dtype=torch.float64, device=net.device)
        candidates = torch.cat([self._evolution.draw(noise), self._best.flatten()[None].cpu()])
        inserted, passes, values = torch.empty_like(self._best), [], []
        with self._transformer.prompted(inserted) as tokens:
            for candidate in candidates:
                inserted.copy_(candidate.view_as(inserted))
                logits, features, seen = self._pass(net, images, tokens)
                passes.append((logits, features.mean(0)))
                values.append(candidate_fitness(logits, seen, self._source, self.fitness_weight))
        fitness = torch.stack(values).nan_to_num(torch.inf, torch.inf, torch.inf)
        if not bool(fitness.isfinite().any()):
            return self.predict(net, images)
        best = int(fitness.argmin())
        prediction = self._shift(net, passes[best][0])
        self._follow(torch.stack([mean for _, mean in passes]).mean(0))
        self._evolution.tell(candidates, fitness.tolist())
        self._best.copy_(candidates[best].view_as(self._best))
        return prediction

    @torch.no_grad()
    def predict(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        """Predict by the best prompts of the last batch; before the first one, as the network does."""
        if self._evolution.generation == 0:
            return net(images).logits
        with self._transformer.prompted(self._best):
            return self._shift(net, net(images).logits)

    def _pass(self, net: AdaptiveNetwork, images: Tensor, tokens: ClassTokens) -> tuple[Tensor, Tensor, Tensor]:
        """Return logits, (B, C), what the classifier reads, (B, D), and the class tokens of all blocks, (B, L * D)."""
        with torch.no_grad():
            outputs = net(images)
        check_image_predictions(outputs.logits, "FOA", "reads the class token of each image", "class tokens")
        return outputs.logits, outputs.vectors, tokens.take()

    def _shift(self, net: AdaptiveNetwork, logits: Tensor) -> Tensor:
        """Return the logits of shifted features. Before the first batch is followed there is no shift."""
        assert self._source is not None
        if self.shift == 0 or not self._source.measured or self._evolution.generation == 0:
            return logits
        weight, _, scale = net.head
        return shifted_logits(logits, self.shift * (self._source.features - self._mean), scale * weight)

    def _follow(self, mean: Tensor) -> None:
        """Move the running mean of features by that of a batch, of which the first one is taken whole."""
        self._mean.lerp_(mean.to(self._mean.dtype), 1.0 if self._evolution.generation == 0 else self.momentum)

    def export(self, net: AdaptiveNetwork, module: nn.Module) -> None:
        """Raise a TypeError: the prompts are no part of the network."""
        raise InputTypeError(
            "FOA gives a vision transformer tokens that its forward has no place for, so there is no network to export"
        )

    def protocol(self) -> dict[str, Any]:
        """Return what a result must say to be comparable; ``source_samples`` is None where it ran without them."""
        names = ("prompts", "population", "sigma", "fitness_weight", "shift", "momentum", "source_samples")
        ran_without = self._source is not None and not self._source.measured
        settings = {name: getattr(self, name) for name in names}
        return super().protocol() | settings | ({"source_samples": None} if ran_without else {})


class SourceTokens:
    """Statistics of the source: those of class tokens behind all blocks, and the mean of what the classifier reads.

    Args:
        tokens: A tensor like the class tokens of an image, (L * D).
        features: A tensor like what the classifier reads of an image, (D).
    """

    def __init__(self, tokens: Tensor, features: Tensor) -> None:
        self.mean, self.std = torch.zeros_like(tokens), torch.zeros_like(tokens)
        self.features = torch.zeros_like(features)
        self._measured = torch.zeros((), dtype=torch.bool)  # in host memory, to be read without a wait

    @property
    def measured(self) -> bool:
        """Whether there were source images."""
        return bool(self._measured)

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors, by name."""
        parts = {"mean": self.mean, "std": self.std, "features": self.features, "measured": self._measured}
        return {f"source.{name}": value for name, value in parts.items()}

    def measure(self, tokens: Tensor, features: Tensor) -> None:
        """Take the statistics of source images.

        Args:
            tokens: Class tokens of the images, (B, L * D).
            features: What the classifier reads of them, (B, D).

        Raises:
            ValueError: If there is only one image, or the statistics are not finite.
        """
        if len(tokens) < 2:
            raise InputError("source gave 1 image, and a standard deviation needs 2 or more: give about 32")
        std, mean = torch.std_mean(tokens, dim=0)
        if not bool(std.isfinite().all() & mean.isfinite().all()):
            raise InputError(
                "class tokens of the source images are not finite: check images and weights, and normalise images as "
                "the network expects them"
            )
        self.mean.copy_(mean)
        self.std.copy_(std)
        self.features.copy_(features.mean(0))
        self._measured.fill_(True)


def candidate_fitness(logits: Tensor, tokens: Tensor, source: SourceTokens, weight: float) -> Tensor:
    """Return how bad a candidate is, a scalar.

    It is the sum of the entropies of the predictions plus, times ``weight`` B / 64, the squared distances of mean and
    standard deviation of the class tokens to the source's, summed over blocks and channels.

    Args:
        logits: Of the batch, (B, C).
        tokens: Class tokens behind all blocks, (B, L * D).
        source: Statistics of the source. Where there are none the entropies are all.
        weight: At least 0.
    """
    entropies = entropy(logits).sum()
    if not source.measured or weight == 0:
        return entropies
    distance = (tokens.mean(0) - source.mean).square().sum()
    if len(tokens) > 1:
        distance = distance + (tokens.std(0) - source.std).square().sum()
    return entropies + weight * len(tokens) / _BATCH * distance


def shifted_logits(logits: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
    """Return the logits that a linear classifier gives for features that are all shifted alike, (B, C).

    Args:
        logits: Of the features as they are, (B, C).
        shift: (D,).
        weight: Of the classifier, (C, D).
    """
    return logits + (weight @ shift.to(weight.dtype)).to(logits.dtype)
