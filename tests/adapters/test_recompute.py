"""``RecomputedBlocks``: the same numbers from passes that keep less."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from support.methods import methods
from torch import nn

from ttalight.adapters import GradientAdapter, RDumb, Tent, TestTimeTraining
from ttalight.models.passes.recompute import RecomputedBlocks

#: Margins that let methods step on random weights; few views.
WEIGHTED = {"weight_margin": 1.0, "threshold": -0.9}
METHODS = methods(EATA={"fisher": "source"}, DeYO=WEIGHTED, MEMO={"views": 3})

pytestmark = pytest.mark.filterwarnings("ignore:.*runs with its settings for CIFAR", "ignore:.*source")


class Block(nn.Module):
    """A residual block, with a draw from the global generator."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)

    def forward(self, x, scale=1.0):
        inner = self.bn1(self.conv1(x)).relu() + 0.1 * torch.rand_like(x)
        return scale * x + self.bn2(self.conv2(inner)).relu()


class Classifier(nn.Module):
    """Four blocks, and what test-time training asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=4)
        self.blocks = nn.Sequential(*[Block() for _ in range(4)])
        self.head = nn.Linear(8, 4)

    def forward(self, images):
        return self.head(self.blocks(self.stem(images)).mean((2, 3)))

    def auxiliary_loss(self, images, generator):
        noise = torch.rand(images.shape, generator=generator, dtype=images.dtype)
        return self(images + noise).square().mean(1)

    def adaptable_parameters(self):
        return list(self.blocks.parameters())


@pytest.fixture
def make():
    def classifier():
        torch.manual_seed(0)
        return Classifier().double()

    return classifier


def run(method, net, batches):
    """Everything that a run shows and leaves behind."""
    adapted = method.wrap(net)
    torch.manual_seed(1)
    logits = [adapted(batch) for batch in batches]
    engine = adapted.engine
    counts = (engine.updates, engine.net.forwards, engine.backwards, engine.last)
    return [*logits, *(value.clone() for value in net.state_dict().values())], counts


def assert_same(method, net, batches):
    own, own_counts = run(method(), copy.deepcopy(net), batches)
    again, counts = run(method(passes=RecomputedBlocks()), net, batches)
    assert all(map(torch.equal, again, own))
    assert counts == own_counts
    return counts


@pytest.mark.parametrize("name", METHODS)
def test_every_method_gives_the_same_bit_for_bit(name, make, images):
    images = (images - 0.5) / 2
    updates, *_ = assert_same(METHODS[name], make(), [images, images[:3] * 0.5, images[:1]])
    assert updates > 0 or not isinstance(METHODS[name](), GradientAdapter)


@pytest.mark.parametrize("norm", ["ema", "batch", "source"])
def test_test_time_training_moves_statistics_once(norm, make, images):
    updates, *_ = assert_same(lambda **kw: TestTimeTraining(steps=3, lr=0.01, norm=norm, **kw), make(), [images] * 2)
    assert updates == 6


@pytest.mark.parametrize("name", ["resnet10t", "tf_efficientnet_lite0", "test_vit", "test_convnext"])
def test_networks_of_every_kind(name, images):
    net = timm.create_model(name, num_classes=4, **({"img_size": 32} if "vit" in name else {})).double()
    assert_same(lambda **kw: Tent(lr=0.01, **kw), net, [images, images * 0.5])


def test_mixed_precision_is_that_of_the_first_pass(make, images):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(lambda **kw: Tent(lr=0.01, **kw), make().float(), [images.float()] * 2)


def test_keeps_less(make, images):
    def kept(recompute):
        sizes = []

        def pack(tensor):
            sizes.append(tensor.numel())
            return tensor

        adapted = Tent(passes=RecomputedBlocks() if recompute else None).wrap(make())
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            adapted(images)
        return sum(sizes)

    assert kept(True) < 0.5 * kept(False)


def test_copies_are_independent_and_release_restores(make, images, state_of, same_state):
    net = make()
    before = state_of(net)
    adapted = RDumb(margin=1.0, passes=RecomputedBlocks()).wrap(net)
    torch.manual_seed(1)
    adapted(images)
    copies = [copy.deepcopy(adapted), pickle.loads(pickle.dumps(adapted))]
    torch.manual_seed(2)
    expected = adapted(images)
    for other in copies:
        torch.manual_seed(2)
        assert torch.equal(other(images), expected)
        part = other.module.blocks[0]
        assert part.forward.__self__.module is part  # not the block of the network that was copied
    adapted.release()
    same_state(net, before)


def test_says_where_there_are_no_blocks(make_net):
    with pytest.raises(ValueError, match="RecomputedBlocks passes a network's blocks again, and Sequential has 0"):
        Tent(passes=RecomputedBlocks()).wrap(make_net())
