"""The layer that gives the logits, and its rows."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ttalight.models.classifier import find_classifier


class Net(nn.Module):
    """A hidden layer, a classifier and something behind it."""

    def __init__(self, behind=lambda logits: logits, classes: int = 10) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.hidden = nn.Linear(6, classes)
        self.fc = nn.Linear(classes, classes)
        self.behind = behind

    def forward(self, x):
        return self.behind(self.fc(self.hidden(x)))


def masked(logits):
    return logits + torch.tensor([0.0] * 5 + [-torch.inf] * 5)


def masked_in_place(logits):
    logits[:, 5:] = -torch.inf
    return logits


CHOSEN = [7, 2, 9, 0]
#: What is behind the classifier, and the rows that are seen; None for all of them.
BEHIND = {
    "all": (lambda logits: logits, None),
    "flattened": (lambda logits: logits[:, :, None, None].flatten(1), None),
    "masked": (masked, None),
    "masked in place": (masked_in_place, None),
    "first five": (lambda logits: logits[:, :5], [0, 1, 2, 3, 4]),
    "every second": (lambda logits: logits[:, 1::2], [1, 3, 5, 7, 9]),
    "list": (lambda logits: logits[:, CHOSEN], CHOSEN),
    "order": (lambda logits: logits.flip(1), [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]),
    "masked and restricted": (lambda logits: masked(logits)[:, [1, 4, 3]], [1, 4, 3]),
}


def found(net, name=None, images=None):
    images = torch.rand(2, 6) if images is None else images
    with torch.no_grad():
        return find_classifier(net, lambda: net(images), name)


@pytest.mark.parametrize("behind", BEHIND)
@pytest.mark.parametrize("name", [None, "fc"])
def test_rows_are_those_of_the_logits(behind, name):
    function, rows = BEHIND[behind]
    net = Net(function)
    classifier = found(net, name)
    assert (classifier.name, classifier.module) == ("fc", net.fc)
    assert (classifier.rows is None) == (rows is None)
    assert rows is None or classifier.rows.tolist() == rows
    weight, bias = classifier.weights(10 if rows is None else len(rows))
    chosen = range(10) if rows is None else rows
    assert torch.equal(weight, net.fc.weight[list(chosen)])
    assert torch.equal(bias, net.fc.bias[list(chosen)])
    assert not any(module._forward_hooks for module in net.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_of_a_thousand_equal_classes(dtype):
    chosen = torch.randperm(1000, generator=torch.Generator().manual_seed(0))[:200]
    net = Net(lambda logits: logits[:, chosen], classes=1000).to(dtype)
    nn.init.zeros_(net.fc.weight)
    nn.init.zeros_(net.fc.bias)
    classifier = found(net, images=torch.rand(2, 6, dtype=dtype))
    assert classifier.name == "fc"
    assert torch.equal(classifier.rows, chosen)


def test_a_dense_classifier():
    class Dense(nn.Module):
        def __init__(self):
            super().__init__()
            self.reduce, self.classify = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1, bias=False)

        def forward(self, x):
            return self.classify(self.reduce(x))[:, [1, 6, 2]]

    net = Dense()
    classifier = found(net, images=torch.rand(2, 3, 5, 5))
    assert (classifier.name, classifier.rows.tolist()) == ("classify", [1, 6, 2])
    weight, bias = classifier.weights(3)
    assert torch.equal(weight, net.classify.weight.flatten(1)[[1, 6, 2]])
    assert bias is None


@pytest.mark.parametrize(
    "behind",
    [
        lambda logits: logits[:, :5] + logits[:, 5:],
        lambda logits: logits[:, :5] / 2,
        lambda logits: logits.view(-1, 5, 2).amax(2),
        lambda logits: logits[:, [0, 0, 1]],
    ],
)
def test_other_logits_are_no_rows(behind):
    with pytest.raises(ValueError, match=r"cannot be found: 0 layers give the logits \(none\).*candidates: hidden, fc"):
        found(Net(behind))
    net = Net(behind)
    named, classes = found(net, "fc"), net(torch.rand(1, 6)).shape[1]
    assert named.module is net.fc
    with pytest.raises(ValueError, match=rf"'fc' has 10 outputs and the model returns {classes} logits .* classifier="):
        named.weights(classes)


def test_two_layers_give_the_logits():
    net = Net()
    nn.init.eye_(net.fc.weight)
    nn.init.zeros_(net.fc.bias)
    with pytest.raises(ValueError, match=r"2 layers give the logits \(hidden, fc\). Name one with classifier="):
        found(net)


def test_a_name_that_does_not_exist():
    with pytest.raises(ValueError, match=r"classifier='head' is not a Linear layer .* of Net; it has hidden, fc"):
        found(Net(), "head")


def test_hooks_are_gone_after_an_exception():
    def fail(logits):
        raise RuntimeError("broken")

    net = Net(fail)
    with pytest.raises(RuntimeError, match="broken"):
        found(net)
    assert not any(module._forward_hooks for module in net.modules())
