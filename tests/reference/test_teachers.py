"""CoTTA against plain loops over its formulas, in float64 over several batches."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from support.networks import small_net

from ttalight.adapters import CoTTA
from ttalight.seeding import derive_seed
from ttalight.transforms import RandomJitterAffineFlip

CLASSES, VIEWS, RESTORE, MOMENTUM = 5, 3, 0.2, 0.9
make_net = partial(small_net, CLASSES, scale=3.0)


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    base = torch.rand(8, 3, 12, 12, generator=generator, dtype=torch.float64)
    base[:3] *= 0.3
    return [base, 1 - base.flip(0), base[2:5], base[3:7] * 0.5]


class ReferenceCoTTA:
    """The student, the teacher and the source as three networks in training mode, whose statistics are the batch's."""

    def __init__(self, confidence: float, symmetric: bool) -> None:
        self.student, self.teacher, self.source = (make_net().train() for _ in range(3))
        self.confidence, self.symmetric, self.batch = confidence, symmetric, 0
        self.optimizer = torch.optim.SGD(self.student.parameters(), lr=0.05, momentum=0.9)
        self.sure: list[bool] = []

    def step(self, images: torch.Tensor) -> torch.Tensor:
        draws = torch.Generator().manual_seed(derive_seed(0, "adapt", 0, self.batch, 0))
        with torch.no_grad():
            confidences = [row.max().item() for row in self.source(images).softmax(1)]
            self.sure.append(sum(confidences) / len(images) >= self.confidence)
            if self.sure[-1]:
                target = self.teacher(images)
            else:
                augment = RandomJitterAffineFlip(outside="border", blur=(0.001, 0.5), noise=0.005)
                target = sum(self.teacher(augment(images, draws)) for _ in range(VIEWS)) / VIEWS
        loss = 0
        for given, own in zip(target.softmax(1), self.student(images).softmax(1), strict=True):
            forth, back = -(given * own.log()).sum(), -(own * given.log()).sum()
            loss = loss + ((forth + back) / 2 if self.symmetric else forth)
        self.loss = loss / len(images)
        self.optimizer.zero_grad()
        self.loss.backward()
        self.optimizer.step()
        weights = [list(net.parameters()) for net in (self.student, self.teacher, self.source)]
        with torch.no_grad():
            drawn = torch.rand(sum(weight.numel() for weight in weights[0]), generator=draws).tolist()
            for student, teacher, source in zip(*weights, strict=True):
                teacher.copy_(MOMENTUM * teacher + (1 - MOMENTUM) * student)
                for number in range(student.numel()):
                    if drawn.pop(0) < RESTORE:
                        student.view(-1)[number] = source.view(-1)[number]
        self.batch += 1
        return target


@pytest.mark.parametrize(("confidence", "symmetric"), [(0.0, False), (0.95, True), (1.0, False)])
def test_cotta(confidence, symmetric):
    method = CoTTA(
        confidence=confidence, symmetric=symmetric, views=VIEWS, restore=RESTORE, teacher_momentum=MOMENTUM, seed=0,
        reset="never", optimizer=partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    )  # fmt: skip
    adapted, reference = method.wrap(make_net()), ReferenceCoTTA(confidence, symmetric)
    for images in batches():
        torch.testing.assert_close(adapted(images), reference.step(images), rtol=1e-6, atol=1e-7)
        assert adapted.engine.last["loss"] == pytest.approx(reference.loss.item(), rel=1e-6)
    assert set(reference.sure) == {0.0: {True}, 0.95: {True, False}, 1.0: {False}}[confidence]
    state = adapted.state_dict()["tensors"]
    for number, teacher in enumerate(reference.teacher.parameters()):
        torch.testing.assert_close(state[f"method.teacher.{number}"], teacher.detach(), rtol=1e-6, atol=1e-7)
    for value, other in zip(adapted.module.parameters(), reference.student.parameters(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-6, atol=1e-7)
    sources, passes = 4 * (confidence > 0), sum(1 if sure else VIEWS for sure in reference.sure)
    assert (adapted.engine.net.forwards, adapted.engine.backwards) == (4 + sources + passes, 4)
    with torch.no_grad():
        expected = reference.teacher(batches()[0])
    torch.testing.assert_close(adapted(batches()[0], adapt=False), expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(adapted.export()(batches()[0]), expected, rtol=1e-6, atol=1e-7)
