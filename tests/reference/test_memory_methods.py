"""RoTTA and NOTE against plain loops over their formulas, in float64 over several batches."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from support.networks import small_net
from torch import nn

from ttalight.adapters import NOTE, RoTTA
from ttalight.seeding import derive_seed
from ttalight.transforms import RandomJitterAffineFlip

CLASSES, SIZE = 5, 7
make_net = partial(small_net, CLASSES, scale=3.0)
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9)
close = partial(torch.testing.assert_close, rtol=1e-6, atol=1e-7)


def batches() -> list[torch.Tensor]:
    """Batches with one update, none, three and none within them."""
    generator = torch.Generator().manual_seed(5)
    base = torch.rand(17, 3, 12, 12, generator=generator, dtype=torch.float64)
    base[:6] *= 0.3
    return [base[:8], base[8:9], 1 - base, base[2:5] * 0.5]


def draws(batch, step):
    return torch.Generator().manual_seed(derive_seed(0, "adapt", 0, batch, step))


def entropy_of(logits):
    return -sum(p * math.log(p) for p in logits.softmax(0).tolist())


class Memory:
    """Images with class, value and age in a list, inserted some at a time."""

    def __init__(self, score, limit):
        self.items, self.score, self.limit = [], score, limit

    def insert(self, new):
        self.items = [item | {"age": item["age"] + len(new)} for item in self.items]
        self.items += [item | {"age": len(new) - place} for place, item in enumerate(new)]
        for item in self.items:
            item["score"] = self.score(item["value"], item["age"] - 1)
        for item in self.items:
            own = [other["score"] for other in self.items if other["label"] == item["label"]]
            item["rank"] = sum(score < item["score"] for score in own)
        allowed = [item for item in self.items if item["rank"] < self.limit]
        self.items = sorted(allowed, key=lambda item: (item["rank"], item["score"]))[:SIZE]

    def images(self):
        return torch.stack([item["image"] for item in self.items])


class Reference:
    """Fills the memory with a batch, at most as far as the next update at a time."""

    memory: Memory

    def __init__(self) -> None:
        self.pending = self.batch = self.updates = 0
        self.passes = 0.0

    def step(self, images):
        with torch.no_grad():
            logits = self.predict(images)
        values, new, step = self.values(logits), [], 0
        for image, own, value in zip(images, logits, values, strict=True):
            new.append({"image": image, "label": int(own.argmax()), "value": value})
            self.pending = (self.pending + 1) % SIZE
            if self.pending == 0:
                self.memory.insert(new)
                self.update(step)
                self.passes += len(self.memory.items) / len(images)
                self.updates, new, step = self.updates + 1, [], step + 1
        self.memory.insert(new)
        self.batch += 1
        return logits

    def check(self, adapted):
        """Compare the memory and the number of updates with those of a method."""
        tensors = adapted.state_dict()["tensors"]
        count = len(self.memory.items)
        entries = [[item["label"], item["value"], item["age"]] for item in self.memory.items]
        close(tensors["method.memory.entries"][:count], torch.tensor(entries, dtype=torch.float64))
        assert not tensors["method.memory.entries"][count:].any()
        assert torch.equal(tensors["method.memory.images"][:count], self.memory.images())
        assert tensors["method.memory.pending"] == self.pending
        assert adapted.engine.updates == self.updates


# -- RoTTA

ALPHA, MOMENTUM, TIMELINESS, UNCERTAINTY = 0.3, 0.9, 0.8, 1.7


def robust(net, images, learns):
    """Run a network whose BatchNorm layers normalise by running statistics, and move these before if it learns."""
    x = images
    for layer in net:
        if not isinstance(layer, nn.BatchNorm2d):
            x = layer(x)
            continue
        mean, var = layer.running_mean, layer.running_var
        if learns:
            mean = (1 - ALPHA) * mean + ALPHA * x.mean((0, 2, 3))
            var = (1 - ALPHA) * var + ALPHA * x.var((0, 2, 3), unbiased=False)
            layer.running_mean, layer.running_var = mean.detach(), var.detach()
        x = (x - mean[:, None, None]) / (var[:, None, None] + layer.eps).sqrt()
        x = x * layer.weight[:, None, None] + layer.bias[:, None, None]
    return x


class ReferenceRoTTA(Reference):
    def __init__(self) -> None:
        super().__init__()
        self.student, self.teacher = make_net(), make_net()
        affines = [value for layer in self.student if isinstance(layer, nn.BatchNorm2d) for value in layer.parameters()]
        self.optimizer = SGD(affines)
        self.memory = Memory(self.score, math.ceil(SIZE / CLASSES))

    @staticmethod
    def score(value, age):
        return TIMELINESS / (1 + math.exp(-age / SIZE)) + UNCERTAINTY * value / math.log(CLASSES)

    def predict(self, images):
        return robust(self.teacher, images, learns=False)

    def values(self, logits):
        return map(entropy_of, logits)

    def update(self, step):
        images = self.memory.images()
        views = RandomJitterAffineFlip(outside="border", blur=(0.001, 0.5), noise=0.005)(
            images, draws(self.batch, step)
        )
        with torch.no_grad():
            targets = robust(self.teacher, images, learns=True).softmax(1)
        loss = 0
        for item, target, own in zip(self.memory.items, targets, robust(self.student, views, True), strict=True):
            decay = math.exp(-item["age"] / SIZE)
            loss = loss - (target * own.log_softmax(0)).sum() * decay / (1 + decay)
        self.loss = loss / len(images)
        self.optimizer.zero_grad()
        self.loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            for teacher, student in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
                teacher.copy_(MOMENTUM * teacher + (1 - MOMENTUM) * student)


def test_rotta():
    method = RoTTA(
        memory=SIZE, alpha=ALPHA, teacher_momentum=MOMENTUM, timeliness=TIMELINESS, uncertainty=UNCERTAINTY, seed=0,
        reset="never", optimizer=SGD,
    )  # fmt: skip
    adapted, reference = method.wrap(make_net()), ReferenceRoTTA()
    for images in batches():
        close(adapted(images), reference.step(images))
        if "loss" in adapted.engine.last:
            assert adapted.engine.last["loss"] == pytest.approx(reference.loss.item(), rel=1e-6)
        reference.check(adapted)
    assert reference.updates == 4
    forwards = adapted.engine.net.forwards
    assert (forwards, adapted.engine.backwards) == pytest.approx((4 + 2 * reference.passes, reference.passes))
    student, teacher = adapted.module.state_dict(), adapted.export().state_dict()
    for name, value in reference.student.state_dict().items():
        close(student[name], value)
    for name, value in reference.teacher.state_dict().items():
        close(teacher[name], value)
    expected = reference.predict(batches()[0]).detach()
    close(adapted(batches()[0], adapt=False), expected)
    close(adapted.export()(batches()[0]), expected)


# -- NOTE

K, SHARE = 1.5, 0.2


def shrunk(value, limit):
    return torch.sign(value) * max(abs(value) - limit, torch.zeros(()))


def instance_aware(net, images, learns):
    """Run a network whose BatchNorm layers correct the statistics of all by those of an image, one channel at a time.

    The statistics of all are those of the batch if it learns, which also move the running ones.
    """
    x = images
    for layer in net:
        if not isinstance(layer, nn.BatchNorm2d):
            x = layer(x)
            continue
        means, variances = layer.running_mean, layer.running_var
        if learns:
            means, variances = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=True)
            layer.running_mean = (1 - SHARE) * layer.running_mean + SHARE * means.detach()
            layer.running_var = (1 - SHARE) * layer.running_var + SHARE * variances.detach()
        pixels, rows = x[0, 0].numel(), []
        for image in x:
            channels = []
            for channel, mean, var, weight, bias in zip(image, means, variances, layer.weight, layer.bias, strict=True):
                error = ((var + layer.eps) / pixels).sqrt()
                spread = (var + layer.eps) * math.sqrt(2 / (pixels - 1))
                own = mean + shrunk(channel.mean() - mean, K * error)
                around = torch.relu(var + shrunk(channel.var(unbiased=True) - var, K * spread))
                channels.append((channel - own) / (around + layer.eps).sqrt() * weight + bias)
            rows.append(torch.stack(channels))
        x = torch.stack(rows)
    return x


class ReferenceNOTE(Reference):
    def __init__(self) -> None:
        super().__init__()
        self.net = make_net()
        affines = [value for layer in self.net if isinstance(layer, nn.BatchNorm2d) for value in layer.parameters()]
        self.optimizer = SGD(affines)
        self.memory = Memory(lambda value, age: value, SIZE)

    def predict(self, images):
        return instance_aware(self.net, images, learns=False)

    def values(self, logits):
        return torch.rand(len(logits), generator=draws(self.batch, 0)).tolist()

    def update(self, step):
        p = instance_aware(self.net, self.memory.images(), learns=True).softmax(1)
        self.loss = -(p * p.log()).sum() / len(p)
        self.optimizer.zero_grad()
        self.loss.backward()
        self.optimizer.step()


def test_note():
    method = NOTE(memory=SIZE, k=K, momentum=SHARE, seed=0, reset="never", optimizer=SGD)
    adapted, reference = method.wrap(make_net()), ReferenceNOTE()
    for images in batches():
        close(adapted(images), reference.step(images))
        if "loss" in adapted.engine.last:
            assert adapted.engine.last["loss"] == pytest.approx(reference.loss.item(), rel=1e-6)
        reference.check(adapted)
    assert reference.updates == 4
    forwards = adapted.engine.net.forwards
    assert (forwards, adapted.engine.backwards) == pytest.approx((4 + reference.passes, reference.passes))
    tensors = adapted.module.state_dict()
    for name, value in reference.net.state_dict().items():
        close(tensors[name], value)
    expected = reference.predict(batches()[0]).detach()
    close(adapted(batches()[0], adapt=False), expected)
    close(adapted.export()(batches()[0]), expected)


@pytest.mark.parametrize("k", [0.0, 1e9])
def test_note_ends_at_statistics_of_the_image_and_at_running_ones(k):
    net, images = make_net(), batches()[0]
    first = net[1]
    x = net[0](images)
    var, mean = torch.var_mean(x, (2, 3), keepdim=True, correction=1)
    if k:
        mean, var = first.running_mean[:, None, None], first.running_var[:, None, None]
    expected = (x - mean) / (var + first.eps).sqrt() * first.weight[:, None, None] + first.bias[:, None, None]
    seen = []
    net[2].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    NOTE(k=k).wrap(net)(images)
    close(seen[-1], expected.detach())
