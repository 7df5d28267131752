"""AdaContrast against plain loops over its formulas, in float64 over several batches."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from support.networks import small_net

from ttalight.adapters import AdaContrast
from ttalight.adapters.components.moco_view import moco_view
from ttalight.seeding import derive_seed
from ttalight.transforms import random_horizontal_flip

CLASSES, QUEUE, NEIGHBORS, AFTER, TEMPERATURE, MOMENTUM = 5, 12, 3, 10, 0.3, 0.9
CLOSE = {"rtol": 1e-7, "atol": 1e-8}
make_net = partial(small_net, CLASSES, scale=6.0)


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    base = torch.rand(8, 3, 12, 12, generator=generator, dtype=torch.float64)
    base[:3] *= 0.3
    return [base, 1 - base.flip(0), base[2:5], base[3:8] * 0.5, base[6:7]]


def cosine(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return first @ second / (first.norm() * second.norm())


class ReferenceAdaContrast:
    """The network and the second set of weights as two networks in training mode; predictions are in eval mode."""

    def __init__(self) -> None:
        self.net, self.batch, self.seen = make_net(), 0, 0
        self.second = copy.deepcopy(self.net).train()
        self.optimizer = torch.optim.SGD(
            self.net.parameters(), lr=0.02, momentum=0.9, nesterov=True, weight_decay=1e-4
        )  # fmt: skip
        draws = torch.Generator().manual_seed(derive_seed(0, "queue"))
        keys = torch.randn(QUEUE, 6, generator=draws).double()
        self.queue = list(zip(keys, torch.randint(CLASSES, (QUEUE,), generator=draws).tolist(), strict=True))
        self.bank: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.refined = 0

    def label(self, feature: torch.Tensor, logits: torch.Tensor) -> int:
        if self.seen < AFTER:
            return int(logits.argmax())
        nearest = sorted(self.bank, key=lambda entry: -cosine(entry[0], feature).item())[:NEIGHBORS]
        label = int((sum(p for _, p in nearest) / NEIGHBORS).argmax())
        self.refined += label != int(logits.argmax())
        return label

    def step(self, images: torch.Tensor) -> torch.Tensor:
        draws = torch.Generator().manual_seed(derive_seed(0, "adapt", 0, self.batch, 0))
        weak, queries, keys = (
            random_horizontal_flip(images, 0.5, draws),
            moco_view(images, draws),
            moco_view(images, draws),
        )
        self.net.train()
        with torch.no_grad():
            features = self.net[:8](weak)
            labels = [self.label(*pair) for pair in zip(features, self.net[8](features), strict=True)]
            for mean, weight in zip(self.second.parameters(), self.net.parameters(), strict=True):
                mean.copy_(MOMENTUM * mean + (1 - MOMENTUM) * weight)
            positives = self.second[:8](keys)
        features = self.net[:8](queries)
        logits = self.net[8](features)
        mean = logits.softmax(1).mean(0)
        loss = (mean * mean.log()).sum()
        for query, key, row, label in zip(features, positives, logits, labels, strict=True):
            own = (cosine(query, key) / TEMPERATURE).exp()
            others = [(cosine(query, other) / TEMPERATURE).exp() for other, kind in self.queue if kind != label]
            loss = loss - (row.log_softmax(0)[label] + (own / (own + sum(others))).log()) / len(images)
        self.loss = loss
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            slow = self.second[:8](weak)
            probabilities = self.second[8](slow).softmax(1)
        self.put(self.queue, list(zip(positives, labels, strict=True)))
        self.put(self.bank, list(zip(slow, probabilities, strict=True)))
        self.seen += len(images)
        self.batch += 1
        with torch.no_grad():
            return self.net.eval()(images)

    def put(self, store: list, entries: list) -> None:
        for number, entry in enumerate(entries, self.seen):
            store[number % QUEUE : number % QUEUE + 1] = [entry]


def test_adacontrast():
    method = AdaContrast(
        neighbors=NEIGHBORS, queue=QUEUE, refine_after=AFTER, temperature=TEMPERATURE, key_momentum=MOMENTUM, lr=0.02,
        seed=0, reset="never",
    )  # fmt: skip
    adapted, reference = method.wrap(make_net()), ReferenceAdaContrast()
    for images in batches():
        torch.testing.assert_close(adapted(images), reference.step(images), **CLOSE)
        assert adapted.engine.last["loss"] == pytest.approx(reference.loss.item(), rel=1e-7)
    assert reference.refined > 0
    assert reference.seen > QUEUE
    for (name, value), other in zip(
        adapted.module.state_dict().items(), reference.net.state_dict().values(), strict=True
    ):
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(value, other, **CLOSE)
    state = adapted.state_dict()["tensors"]
    for number, weight in enumerate(reference.second.parameters()):
        torch.testing.assert_close(state[f"method.key.{number}"], weight.detach(), **CLOSE)
    torch.testing.assert_close(
        state["method.queue.features"], torch.stack([key for key, _ in reference.queue]), **CLOSE
    )
    torch.testing.assert_close(state["method.bank.values"], torch.stack([p for _, p in reference.bank]), **CLOSE)
    assert (adapted.engine.net.forwards, adapted.engine.backwards) == (5 * 5, 5)
