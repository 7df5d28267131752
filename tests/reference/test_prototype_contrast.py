"""SANTA and RMT against plain loops over their formulas, in float64 over several batches."""

from __future__ import annotations

import copy
import math
from functools import partial

import pytest
import torch
from support.networks import small_net
from torch import nn

from ttalight.adapters import RMT, SANTA
from ttalight.seeding import derive_seed
from ttalight.transforms import RandomJitterAffineFlip

CLASSES, TEMPERATURE, WEIGHT = 5, 0.3, 0.7
CLOSE = {"rtol": 1e-7, "atol": 1e-8}
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
make_net = partial(small_net, CLASSES, scale=3.0)


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    base = torch.rand(8, 3, 12, 12, generator=generator, dtype=torch.float64)
    base[:3] *= 0.3
    return [base, 1 - base.flip(0), base[2:5], base[6:7]]


def source() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Labelled batches in which no image is of the last class."""
    generator = torch.Generator().manual_seed(6)
    images = torch.rand(2, 9, 3, 12, 12, generator=generator, dtype=torch.float64)
    return [(batch, torch.arange(9) % (CLASSES - 1)) for batch in images]


def projector() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(6, 128), nn.ReLU(), nn.Linear(128, 128))
    draws = torch.Generator().manual_seed(derive_seed(0, "projector"))
    with torch.no_grad():
        for parameter, inputs in zip(net.parameters(), (6, 6, 128, 128), strict=True):
            nn.init.uniform_(parameter, -1 / math.sqrt(inputs), 1 / math.sqrt(inputs), generator=draws)
    return net.double()


def cosine(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    return first @ second / (first.norm() * second.norm())


def contrast(views: list[list[torch.Tensor]]) -> torch.Tensor:
    """The mean over anchors and their positives of minus the logarithm of a softmax, for the views of each image."""
    everything = [(number, view) for number, own in enumerate(views) for view in own]
    terms = []
    for place, (number, anchor) in enumerate(everything):
        others = [each for index, each in enumerate(everything) if index != place]
        total = sum((cosine(anchor, view) / TEMPERATURE).exp() for _, view in others)
        logs = [(cosine(anchor, view) / TEMPERATURE).exp() / total for other, view in others if other == number]
        terms.append(-sum(value.log() for value in logs) / len(logs))
    return sum(terms) / len(terms)


class ReferenceSANTA:
    """Student and anchor as two networks in training mode, whose statistics are the batch's."""

    def __init__(self, labels: str) -> None:
        self.student, self.projector, self.batch = make_net().train(), projector(), 0
        self.anchor = copy.deepcopy(self.student)
        affines = [value for layer in (1, 4) for value in self.student[layer].parameters()]
        self.optimizer = SGD([*affines, *self.projector.parameters()])
        self.prototypes = list(self.anchor[8].weight.detach()) if labels == "classifier" else self.means(labels)

    @torch.no_grad()
    def means(self, labels: str) -> list[torch.Tensor | None]:
        of_class: list[list[torch.Tensor]] = [[] for _ in range(CLASSES)]
        for images, given in source():
            for feature, label in zip(self.anchor[:8](images), given, strict=True):
                of_class[label if labels == "given" else self.anchor[8](feature).argmax()].append(feature)
        return [sum(features) / len(features) if features else None for features in of_class]

    def views(self, features: torch.Tensor, augmented: torch.Tensor) -> list[list[torch.Tensor]]:
        made, known = [], [prototype for prototype in self.prototypes if prototype is not None]
        for feature, other in zip(features, augmented, strict=True):
            similarities = [cosine(prototype, feature).item() for prototype in known]
            nearest = known[similarities.index(max(similarities))]
            made.append([self.projector(view) for view in (nearest, feature, other)])
        return made

    def step(self, images: torch.Tensor) -> torch.Tensor:
        draws = torch.Generator().manual_seed(derive_seed(0, "adapt", 0, self.batch, 0))
        copies = RandomJitterAffineFlip(outside="border", blur=(0.001, 0.5), noise=0.005)(images, draws)
        with torch.no_grad():
            anchors = self.anchor(images).softmax(1)
        features, augmented = self.student[:8](images), self.student[:8](copies)
        logits = self.student[8](features)
        loss = 0
        for p, q, other in zip(logits.softmax(1), anchors, self.student[8](augmented).softmax(1), strict=True):
            loss = loss - (p * q.log()).sum() / 2 - (other * q.log()).sum() / 2
        self.loss = loss / len(images) + WEIGHT * contrast(self.views(features, augmented))
        self.optimizer.zero_grad()
        self.loss.backward()
        self.optimizer.step()
        self.batch += 1
        return logits.detach()


@pytest.mark.filterwarnings("ignore:SANTA found no source images")
@pytest.mark.parametrize("labels", ["given", "predicted", "classifier"])
def test_santa(labels, monkeypatch):
    given = {"given": source(), "predicted": [images for images, _ in source()], "classifier": None}[labels]
    monkeypatch.setattr(SANTA, "contrast_weight", WEIGHT)
    monkeypatch.setattr(SANTA, "temperature", TEMPERATURE)
    method = SANTA(source=given, seed=0, reset="never", optimizer=SGD)
    adapted, reference = method.wrap(make_net()), ReferenceSANTA(labels)
    for images in batches():
        torch.testing.assert_close(adapted(images), reference.step(images), **CLOSE)
        assert adapted.engine.last["loss"] == pytest.approx(reference.loss.item(), rel=1e-6)
    for value, other in zip(adapted.module.parameters(), reference.student.parameters(), strict=True):
        torch.testing.assert_close(value, other, **CLOSE)
    for value, other in zip(adapted.engine.net.own.values(), reference.projector.parameters(), strict=True):
        torch.testing.assert_close(value, other, **CLOSE)
    sources = 0 if given is None else len(given)
    assert (adapted.engine.net.forwards, adapted.engine.backwards) == (4 * 3 + sources, 4 * 2)
    assert method.protocol()["prototypes"] == ("classifier" if given is None else "source")


MOMENTUM, REPLAY, WARM_UP = 0.9, 0.6, 26


class ReferenceRMT(ReferenceSANTA):
    """Student and teacher as two networks in training mode; source images have labels where ``labels`` is given."""

    def __init__(self, labels: str) -> None:
        super().__init__(labels)
        self.teacher = copy.deepcopy(self.student)
        self.images, self.labels = (torch.cat(parts) for parts in zip(*source(), strict=True))
        self.replays = labels == "given"
        self.optimizer = SGD([*self.student.parameters(), *self.projector.parameters()])
        if labels != "classifier":
            self.warm_up(8)
        self.warm = copy.deepcopy((self.student.state_dict(), self.teacher.state_dict()))
        self.optimizer = SGD([*self.student.parameters(), *self.projector.parameters()])

    def warm_up(self, size: int) -> None:
        for step in range(WARM_UP // size):
            self.optimizer.param_groups[0]["lr"] = 0.05 * (step + 1) / (WARM_UP // size)
            images = self.images[self.drawn(size, "warm-up", step)]
            self.learn(self.both_ways(self.student(images), self.teach(images)) / size)

    def drawn(self, size: int, *place: object) -> torch.Tensor:
        return torch.randperm(len(self.images), generator=torch.Generator().manual_seed(derive_seed(0, *place)))[:size]

    @torch.no_grad()
    def teach(self, images: torch.Tensor) -> torch.Tensor:
        return self.teacher(images)

    def both_ways(self, logits: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        loss = torch.zeros((), dtype=torch.float64)
        for p, q in zip(logits.softmax(1), reference.softmax(1), strict=True):
            loss = loss - (q * p.log()).sum() / 2 - (p * q.log()).sum() / 2
        return loss

    def learn(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for mean, weight in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                mean.copy_(MOMENTUM * mean + (1 - MOMENTUM) * weight)

    def step(self, images: torch.Tensor) -> torch.Tensor:
        draws = torch.Generator().manual_seed(derive_seed(0, "adapt", 0, self.batch, 0))
        copies = RandomJitterAffineFlip(outside="border", blur=(0.001, 0.5), noise=0.005)(images, draws)
        reference = self.teach(images)
        features, augmented = self.student[:8](images), self.student[:8](copies)
        logits, others = self.student[8](features), self.student[8](augmented)
        agreement = self.both_ways(logits, reference) / 2 + self.both_ways(others, reference) / 2
        self.loss = agreement / len(images) + WEIGHT * contrast(self.views(features, augmented))
        if self.replays:
            chosen = self.drawn(len(images), "replay", 0, self.batch, 0)
            rows = self.student(self.images[chosen]).log_softmax(1)
            picked = [row[label] for row, label in zip(rows, self.labels[chosen], strict=True)]
            self.loss = self.loss - REPLAY * sum(picked) / len(picked)
        self.learn(self.loss)
        self.batch += 1
        return (logits + reference).detach()


@pytest.mark.filterwarnings("ignore:RMT found no source images")
@pytest.mark.parametrize("labels", ["given", "predicted", "classifier"])
def test_rmt(labels, monkeypatch):
    given = {"given": source(), "predicted": [images for images, _ in source()], "classifier": None}[labels]
    monkeypatch.setattr(RMT, "contrast_weight", WEIGHT)
    monkeypatch.setattr(RMT, "temperature", TEMPERATURE)
    method = RMT(
        source=given,
        seed=0,
        reset="never",
        optimizer=SGD,
        teacher_momentum=MOMENTUM,
        replay_weight=REPLAY,
        warm_up=WARM_UP,
    )
    adapted, reference = method.wrap(make_net()), ReferenceRMT(labels)
    for images in batches():
        torch.testing.assert_close(adapted(images), reference.step(images), **CLOSE)
        assert adapted.engine.last["loss"] == pytest.approx(reference.loss.item(), rel=1e-6)
    state = adapted.state_dict()["tensors"]
    for number, (value, student, teacher) in enumerate(
        zip(adapted.module.parameters(), reference.student.parameters(), reference.teacher.parameters(), strict=True)
    ):
        torch.testing.assert_close(value, student, **CLOSE)
        torch.testing.assert_close(state[f"method.teacher.{number}"], teacher.detach(), **CLOSE)
    before = 0 if given is None else len(given) + 2 * (WARM_UP // 8)
    assert adapted.engine.net.forwards == 4 * (4 if labels == "given" else 3) + before
    with torch.no_grad():
        expected = reference.student(batches()[0]) + reference.teacher(batches()[0])
    torch.testing.assert_close(adapted(batches()[0], adapt=False), expected, **CLOSE)
    torch.testing.assert_close(adapted.export()(batches()[0]), expected, **CLOSE)
    adapted.reset()
    with torch.no_grad():
        for net, warm in zip((reference.student, reference.teacher), reference.warm, strict=True):
            net.load_state_dict(warm)
        expected = reference.student(batches()[1]) + reference.teacher(batches()[1])
    for logits in (adapted(batches()[1], adapt=False), adapted.export()(batches()[1]), adapted(batches()[1])):
        torch.testing.assert_close(logits, expected, **CLOSE)
