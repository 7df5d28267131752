"""Every method on a network that predicts pixels: it adapts, or says in one line why not. CoTTA's scaled views."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from support.methods import EVERY_CLASS, TEXT_ONLY, TRANSFORMER_ONLY, methods
from torch import nn

from ttalight.adapters import STAG, CoTTA, Tent
from ttalight.adapters.components.scaled_views import mean_over_scales, scaled_size
from ttalight.models.classifier import find_classifier

DENSE = {
    *("Source", "PTBN", "AlphaBN", "EMABN", "FIND", "Tent", "RPL", "ETA", "EATA", "RDumb", "SAR", "SHOT", "TIPI"),
    *("CoTTA", "MoETTA", "ActMAD", "Tent with STAG", "ETA decoupled"),
}
REFUSALS = (
    r"for dense outputs use a method without|Use Tent or SAR for dense|got dense logits|text tower|tokens|patches"
)


class Net(nn.Module):
    """Logits at half the resolution, scaled up; an attribute hides ``nn.Module.modules``."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Conv2d(8, 4, 1)
        self.modules = [self.body, self.head]

    def forward(self, images):
        return F.interpolate(self.head(self.body(images)), size=images.shape[2:], mode="bilinear")


@pytest.fixture
def net():
    return Net().double().eval()


@pytest.fixture
def images():
    return torch.rand(3, 3, 16, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


MAKERS = methods() | {name: EVERY_CLASS[name] for name in (*TEXT_ONLY, *TRANSFORMER_ONLY)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(MAKERS))
def test_adapts_or_says_why_not(name, net, images):
    if name not in DENSE:
        with pytest.raises(ValueError, match=REFUSALS) as caught:
            MAKERS[name]().wrap(net)(images)
        assert "\n" not in str(caught.value)
        return
    adapted = MAKERS[name]().wrap(net)
    assert adapted(images).shape == adapted(images).shape == (3, 4, 16, 24)
    assert adapted.release() is net


def test_the_head_of_scaled_logits_is_found(net, images):
    assert find_classifier(net, lambda: net(images)).name == "head"
    adapted = Tent(terms=[STAG()], clip_norm=1.0).wrap(net)
    adapted(images)
    assert adapted.engine.net.head.weight.shape == (4, 8)


class TestScaledViews:
    def test_means_of_probabilities(self, net, images):
        """One image and one view after the other."""
        expected = torch.zeros(3, 4, 16, 24, dtype=torch.float64)
        for index in range(3):
            for size in ((8, 12), (16, 24), (32, 48)):
                for flipped in (False, True):
                    view = F.interpolate(images[index : index + 1], size=size, mode="bilinear")
                    p = net(view.flip(3) if flipped else view).softmax(1)
                    p = F.interpolate(p.flip(3) if flipped else p, size=(16, 24), mode="bilinear")
                    expected[index] += p[0] / 6
        shares = []

        def predict(views, share):
            shares.append(share)
            return net(views)

        found = mean_over_scales(predict, images, (0.5, 1.0, 2.0))
        torch.testing.assert_close(found, expected.log().detach(), rtol=1e-9, atol=1e-9)
        assert shares == pytest.approx([1 / 4, 1 / 4, 1, 1, 4, 4])

    def test_sides_stay_multiples_of_powers_of_two(self):
        assert scaled_size((360, 480), 0.75) == (272, 352)
        assert scaled_size((360, 480), 1.0) == (360, 480)
        assert scaled_size((8, 7), 0.1) == (1, 1)


class TestCoTTA:
    def test_unsure_pixels_follow_the_views(self, net, images):
        method = CoTTA(confidence=0.3, scales=(0.5, 1.0), restore=0.0)
        batch = copy.deepcopy(net).train()
        plain, source = batch(images).detach(), batch(images).detach().softmax(1).amax(1)
        views = mean_over_scales(lambda scaled, _: batch(scaled), images, (0.5, 1.0))
        adapted = method.wrap(net)
        found = adapted(images)
        sure = source[:, None] >= 0.3
        assert 0 < sure.double().mean() < 1
        torch.testing.assert_close(found, torch.where(sure, plain.log_softmax(1), views))
        assert adapted.engine.net.forwards == pytest.approx(1 + 1 + 2 * (1 / 4 + 1) + 1)

    def test_no_scales(self):
        with pytest.raises(ValueError, match=r"scales must be positive numbers, at least one, got \[\]"):
            CoTTA(scales=())
