"""FOA against plain loops over candidates, and CMA-ES against the formulas of Hansen's tutorial (arXiv 1604.00772)."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support.transformers import timm_vit, torchvision_vit

pytest.importorskip("cmaes", reason="needs the extra: pip install ttalight[forward-only]")

from ttalight.adapters import FOA
from ttalight.adapters.components.evolution import Evolution
from ttalight.seeding import derive_seed

WIDTH, PROMPTS, POPULATION, WEIGHT, MOMENTUM, SIGMA, SEED = 6, 2, 9, 0.4, 0.1, 0.7, 3
DIMENSION = PROMPTS * WIDTH


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    base = torch.rand(6, 3, 8, 8, generator=generator, dtype=torch.float64)
    return [base, base.flip(0) * 0.4, base[:1], base[1:5] + 0.5, 1 - base]


def source() -> torch.Tensor:
    return torch.rand(7, 3, 8, 8, generator=torch.Generator().manual_seed(9), dtype=torch.float64)


class Strategy:
    """The update of the tutorial, version of 2016, candidate by candidate."""

    def __init__(self) -> None:
        n = DIMENSION
        raw = [math.log((POPULATION + 1) / 2) - math.log(i) for i in range(1, POPULATION + 1)]
        self.parents = POPULATION // 2
        better, worse = raw[: self.parents], raw[self.parents :]
        self.effective = sum(better) ** 2 / sum(w * w for w in better)
        effective_worse = sum(worse) ** 2 / sum(w * w for w in worse)
        self.c1 = 2 / ((n + 1.3) ** 2 + self.effective)
        self.cmu = min(1 - self.c1, 2 * (self.effective - 2 + 1 / self.effective) / ((n + 2) ** 2 + self.effective))
        limits = (
            1 + self.c1 / self.cmu,
            1 + 2 * effective_worse / (self.effective + 2),
            (1 - self.c1 - self.cmu) / (n * self.cmu),
        )
        positive, negative = sum(w for w in raw if w > 0), -sum(w for w in raw if w < 0)
        self.weights = [w / positive if w >= 0 else min(limits) * w / negative for w in raw]
        self.c_sigma = (self.effective + 2) / (n + self.effective + 5)
        self.damping = 1 + 2 * max(0, math.sqrt((self.effective - 1) / (n + 1)) - 1) + self.c_sigma
        self.cc = (4 + self.effective / n) / (n + 4 + 2 * self.effective / n)
        self.length = math.sqrt(n) * (1 - 1 / (4 * n) + 1 / (21 * n * n))
        self.mean, self.sigma, self.count = torch.zeros(n).double(), SIGMA, 0
        self.covariance = torch.eye(n).double()
        self.path_sigma, self.path = torch.zeros(n).double(), torch.zeros(n).double()

    def tell(self, candidates: torch.Tensor, values: list[float]) -> None:
        n, self.count = DIMENSION, self.count + 1
        order = sorted(range(len(values)), key=lambda place: values[place])
        steps = [(candidates[place] - self.mean) / self.sigma for place in order]
        values2, basis = torch.linalg.eigh(self.covariance)
        whiten = basis @ torch.diag(values2**-0.5) @ basis.T
        step = sum(w * y for w, y in zip(self.weights[: self.parents], steps, strict=False))
        self.mean = self.mean + self.sigma * step
        factor = math.sqrt(self.c_sigma * (2 - self.c_sigma) * self.effective)
        self.path_sigma = (1 - self.c_sigma) * self.path_sigma + factor * (whiten @ step)
        norm = float(self.path_sigma.norm())
        self.sigma *= math.exp(self.c_sigma / self.damping * (norm / self.length - 1))
        usual = math.sqrt(1 - (1 - self.c_sigma) ** (2 * (self.count + 1)))
        moves = float(norm / usual < (1.4 + 2 / (n + 1)) * self.length)
        factor = math.sqrt(self.cc * (2 - self.cc) * self.effective)
        self.path = (1 - self.cc) * self.path + moves * factor * step
        rest = 1 + self.c1 * (1 - moves) * self.cc * (2 - self.cc) - self.c1 - self.cmu * sum(self.weights)
        updated = rest * self.covariance + self.c1 * torch.outer(self.path, self.path)
        for weight, y in zip(self.weights, steps, strict=True):
            scale = 1 if weight >= 0 else n / float((whiten @ y).norm() ** 2)
            updated = updated + self.cmu * weight * scale * torch.outer(y, y)
        self.covariance = updated


def timm_pass(net, images, prompts, shift):
    """The forward of timm's transformer, written out: logits, and the class tokens of each block."""
    x = net._pos_embed(net.patch_embed(images))
    if prompts is not None:
        x = torch.cat([x[:, :1], prompts.expand(len(x), -1, -1), x[:, 1:]], dim=1)
    x, tokens = net.norm_pre(x), []
    for number, block in enumerate(net.blocks):
        x = block(x)
        after = net.blocks[number + 1].norm1 if number + 1 < len(net.blocks) else net.norm
        tokens.append(after(x[:, 0]))
    return net.head(tokens[-1] + (0 if shift is None else shift)), tokens


def torchvision_pass(net, images, prompts, shift):
    """The same of torchvision's."""
    x = net._process_input(images)
    x = torch.cat([net.class_token.expand(len(x), -1, -1), x], dim=1) + net.encoder.pos_embedding
    if prompts is not None:
        x = torch.cat([x[:, :1], prompts.expand(len(x), -1, -1), x[:, 1:]], dim=1)
    layers, tokens = list(net.encoder.layers), []
    for number, layer in enumerate(layers):
        x = layer(x)
        after = layers[number + 1].ln_1 if number + 1 < len(layers) else net.encoder.ln
        tokens.append(after(x[:, 0]))
    return net.heads(tokens[-1] + (0 if shift is None else shift)), tokens


def statistics(tokens: list[torch.Tensor]) -> list[tuple[float, float | None]]:
    """Mean and standard deviation of each channel of each block."""
    found = []
    for values in torch.cat(tokens, dim=1).T.tolist():
        mean = math.fsum(values) / len(values)
        squares = math.fsum((value - mean) ** 2 for value in values)
        found.append((mean, math.sqrt(squares / (len(values) - 1)) if len(values) > 1 else None))
    return found


class Reference:
    def __init__(self, net, run) -> None:
        self.net, self.run, self.strategy = net, run, Strategy()
        generator = torch.Generator().manual_seed(derive_seed(SEED, "prompts"))
        limit = math.sqrt(6 / (3 * 4 * 4 + WIDTH))
        drawn = torch.rand(PROMPTS, WIDTH, generator=generator, dtype=torch.float64)
        self.best, self.history = -limit + 2 * limit * drawn, None
        self.of_source = statistics(self.run(net, source(), None, None)[1])

    def fitness(self, images, prompts) -> tuple[float, torch.Tensor]:
        logits, tokens = self.run(self.net, images, prompts, None)
        total = 0.0
        for row in logits.softmax(1).tolist():
            total -= math.fsum(p * math.log(p) for p in row)
        for (mean, std), (other_mean, other_std) in zip(statistics(tokens), self.of_source, strict=True):
            total += WEIGHT * len(images) / 64 * (mean - other_mean) ** 2
            if std is not None:
                total += WEIGHT * len(images) / 64 * (std - other_std) ** 2
        return total, tokens[-1].mean(0)

    def step(self, images, drawn) -> torch.Tensor:
        with torch.no_grad():
            shift = None if self.history is None else self.source_mean() - self.history
            least, means, values = math.inf, [], []
            candidates = torch.cat([drawn, self.best.flatten()[None]])
            for candidate in candidates:
                prompts = candidate.view(PROMPTS, WIDTH)
                value, mean = self.fitness(images, prompts)
                if value < least:
                    least, self.best = value, prompts
                    prediction = self.run(self.net, images, prompts, shift)[0]
                means.append(mean)
                values.append(value)
            self.strategy.tell(candidates, values)
            mean = sum(means) / len(means)
            self.history = mean if self.history is None else (1 - MOMENTUM) * self.history + MOMENTUM * mean
        return prediction

    def source_mean(self) -> torch.Tensor:
        return torch.tensor([mean for mean, _ in self.of_source[-WIDTH:]], dtype=torch.float64)


@pytest.fixture
def drawn(monkeypatch):
    """Keep what CMA-ES draws."""
    kept, draw = [], Evolution.draw

    def keep(self, noise):
        kept.append(draw(self, noise))
        return kept[-1]

    monkeypatch.setattr(Evolution, "draw", keep)
    return kept


@pytest.mark.parametrize(("make", "run"), [(timm_vit, timm_pass), (torchvision_vit, torchvision_pass)])
def test_against_loops_with_a_resume_in_the_middle(make, run, drawn):
    settings = {"prompts": PROMPTS, "population": POPULATION, "sigma": SIGMA, "reset": "never", "seed": SEED}
    net = make()
    reference = Reference(copy.deepcopy(net), run)
    adapted = FOA(source=[source()], **settings).wrap(net)
    for number, images in enumerate(batches()):
        if number == 2:
            state = adapted.state_dict()
            adapted = FOA(**settings).wrap(make())
            adapted.load_state_dict(state)
        predicted = adapted(images)
        check_draws(reference.strategy, drawn[-1], number)
        torch.testing.assert_close(predicted, reference.step(images, drawn[-1]), rtol=1e-8, atol=1e-9)
        check_state(reference, adapted.engine.method.method_state())


def check_draws(strategy, drawn, number):
    """Check that candidates are the numbers of the batch's generator with the strategy's mean and covariance."""
    generator = torch.Generator().manual_seed(derive_seed(SEED, "adapt", 0, number, 0))
    noise = torch.randn(POPULATION - 1, DIMENSION, generator=generator, dtype=torch.float64)
    steps = (drawn - strategy.mean) / strategy.sigma
    products = steps @ torch.linalg.inv(strategy.covariance) @ steps.T
    torch.testing.assert_close(products, noise @ noise.T, rtol=1e-8, atol=1e-8)


def check_state(reference, state):
    strategy = reference.strategy
    for name, expected in {
        "evolution.mean": strategy.mean,
        "evolution.sigma": torch.tensor(strategy.sigma).double(),
        "evolution.covariance": strategy.covariance,
        "evolution.path_sigma": strategy.path_sigma,
        "evolution.path_covariance": strategy.path,
        "best": reference.best,
        "mean": reference.history,
    }.items():
        torch.testing.assert_close(state[name], expected, rtol=1e-7, atol=1e-9)
    assert int(state["evolution.generation"]) == strategy.count
