"""TTT++ against a slow reference with the authors' constants: loss factor, three passes a step, running statistics."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from ttalight.adapters import TestTimeTraining
from ttalight.losses import MomentSummary
from ttalight.seeding import derive_seed
from ttalight.tasks import TTTPlusPlus


def make_task() -> TTTPlusPlus:
    torch.manual_seed(0)
    task = TTTPlusPlus(encoder="cifar_resnet8", projection=6).double().eval()
    generator = torch.Generator().manual_seed(2)
    for alignment in (task.encoder_alignment, task.head_alignment):
        summary = MomentSummary()
        for _ in range(3):
            summary.add(torch.randn(20, len(alignment.mean), generator=generator, dtype=torch.float64))
        alignment.summarize(summary)
    return task


def contrast(first: torch.Tensor, second: torch.Tensor, temperature: float = 0.5, base: float = 0.07) -> torch.Tensor:
    """The authors' loss: every view is an anchor, the mean over anchors times temperature / base temperature."""
    views = [vector / vector.norm() for vector in (*first, *second)]
    losses = []
    for i, anchor in enumerate(views):
        partner = (i + len(first)) % len(views)
        others = sum((anchor @ other / temperature).exp() for j, other in enumerate(views) if j != i)
        losses.append(-(temperature / base) * (anchor @ views[partner] / temperature - others.log()))
    return sum(losses) / len(losses)


def align(alignment: nn.Module, features: torch.Tensor, weight: float) -> torch.Tensor:
    """Squared distances of covariance and mean, each over the source's own; the mean's counts half."""
    mean = sum(features) / len(features)
    covariance = sum(torch.outer(row - mean, row - mean) for row in features) / (len(features) - 1)
    apart = ((covariance - alignment.covariance) ** 2).sum() / (4 * len(mean) ** 2)
    return weight * (apart / alignment.spread[0] + 0.5 * ((mean - alignment.mean) ** 2).mean() / alignment.spread[1])


@pytest.mark.parametrize("reset", ["never", "batch"])
def test_adaptation(reset):
    task = make_task()
    reference, source = copy.deepcopy(task), copy.deepcopy(task)
    optimizer = torch.optim.SGD
    adapter = TestTimeTraining(
        steps=2, reset=reset, seed=0, optimizer=lambda parameters: optimizer(parameters, lr=0.01, momentum=0.9)
    )
    adapted = adapter.wrap(task)
    batches = [torch.rand(5, 3, 32, 32, generator=torch.Generator().manual_seed(n)).double() for n in range(2)]
    for number, images in enumerate(batches):
        if number == 0 or reset == "batch":
            reference = copy.deepcopy(source)
            descent = optimizer(reference.encoder.parameters(), lr=0.01, momentum=0.9)
        for step in range(2):
            reference.encoder.train()  # PyTorch's own running statistics, at its momentum of 0.1
            generator = torch.Generator().manual_seed(derive_seed(0, "adapt", 0, number, step))
            first, second = reference.projector(reference.encode(reference.views(images, generator))).chunk(2)
            loss = contrast(first, second)
            loss = loss + align(reference.encoder_alignment, reference.encode(images), 0.05)
            loss = loss + align(reference.head_alignment, reference.projector(reference.encode(images)), 0.2)
            descent.zero_grad()
            loss.backward()
            descent.step()
        reference.encoder.eval()
        torch.testing.assert_close(adapted(images), reference(images).detach(), rtol=1e-7, atol=1e-8)
        assert adapted.engine.last["loss"] == pytest.approx(loss.item(), rel=1e-8)
    for (name, value), expected in zip(
        task.encoder.state_dict().items(), reference.encoder.state_dict().values(), strict=True
    ):
        if "num_batches" not in name:
            torch.testing.assert_close(value, expected, rtol=1e-7, atol=1e-9, msg=name)


def test_factor_of_the_contrastive_loss():
    """The mean over anchors alone is 7.14 times smaller at the authors' temperature."""
    task = make_task()
    first, second = torch.randn(2, 4, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = contrast(first, second).item()
    assert task.compare(first, second).item() == pytest.approx(expected, rel=1e-10)
    assert contrast(first, second, base=0.5).item() * 7.14 == pytest.approx(expected, rel=1e-3)
