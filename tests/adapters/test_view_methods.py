"""SHOT, TIPI, ROID, CMF, MEMO: options, odd batches, pixel spaces, errors. The formulas are in tests/reference."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import timm
import torch
import torchvision
from torch import nn

from ttalight.adapters import (
    CMF,
    EMABN,
    MEMO,
    PTBN,
    RMT,
    ROID,
    SANTA,
    SHOT,
    TIPI,
    TPS,
    AdaContrast,
    CoTTA,
    PixelSpace,
    RoTTA,
)
from ttalight.adapters.components.pixel_space import pixel_space
from ttalight.adapters.methods.cmf import filter_gain
from ttalight.adapters.methods.roid import certainty_diversity_weights, smoothed_prior
from ttalight.models import Normalize
from ttalight.models.network import Network

WITH_PIXELS = [TIPI, ROID, CMF, MEMO, CoTTA, partial(RoTTA, memory=2), SANTA, RMT, AdaContrast, partial(TPS, views=3)]
MEAN, STD = (0.4, 0.5, 0.6), (0.2, 0.25, 0.3)


@pytest.fixture
def pixels(images) -> torch.Tensor:
    return ((images - 0.5) / 2)[:, :, :16, :16]


class DenseNet(nn.Module):
    """One prediction a pixel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.features = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
        self.classifier = nn.Conv2d(8, 4, 1)
        self.double().eval()

    def forward(self, images):
        return self.classifier(self.features(images))


class TestPixels:
    def test_there_and_back(self, pixels):
        space = PixelSpace(torch.tensor(MEAN).double().view(3, 1, 1), torch.tensor(STD).double().view(3, 1, 1))
        images = torchvision.transforms.functional.normalize(pixels, MEAN, STD)
        torch.testing.assert_close(space.to_pixels(images), pixels, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(space.from_pixels(space.to_pixels(images)), images, rtol=1e-12, atol=1e-12)
        assert PixelSpace().to_pixels(images) is images
        half = images.half()
        assert space.to_pixels(half).dtype == space.from_pixels(half).dtype == torch.float16

    def test_of_a_timm_network_are_its_own(self):
        vit = timm.create_model("test_vit", num_classes=4, img_size=32)
        space = pixel_space(Network(vit), None, None)
        assert space.protocol() == {"mean": [0.5] * 3, "std": [0.5] * 3}
        given = pixel_space(Network(vit), MEAN, STD).protocol()
        assert given["mean"] == pytest.approx(MEAN)
        assert given["std"] == pytest.approx(STD)

    def test_of_other_modules_are_the_images(self, net):
        vit = timm.create_model("test_vit", num_classes=4, img_size=32)
        for module in (net, nn.Sequential(Normalize((0.5,) * 3, (0.5,) * 3), vit)):
            assert pixel_space(Network(module), None, None).protocol() == {"mean": None, "std": None}

    @pytest.mark.parametrize("method", WITH_PIXELS)
    def test_normalising_outside_is_normalising_inside(self, method, make_net, pixels):
        """A network that expects normalised images, told so, does what one with the layer inside does on pixels."""
        inside = method(seed=0).wrap(nn.Sequential(Normalize(MEAN, STD), make_net()).double())
        outside = method(seed=0, mean=MEAN, std=STD).wrap(make_net())
        for batch in (pixels[:4], pixels[2:4] * 0.5):
            normalized = (batch - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
            torch.testing.assert_close(outside(normalized), inside(batch), rtol=1e-4, atol=1e-4)
        assert outside.engine.method.protocol()["mean"] == pytest.approx(MEAN)
        assert inside.engine.method.protocol()["mean"] is None

    @pytest.mark.parametrize("method", WITH_PIXELS)
    def test_moves_to_a_device_in_the_middle(self, method, net, pixels):
        adapted, moved = method(mean=MEAN, std=STD).wrap(copy.deepcopy(net)), method(mean=MEAN, std=STD).wrap(net)
        for wrapped in (adapted, moved):
            wrapped(pixels[2:4])
        moved.to("cpu")
        assert torch.equal(moved(pixels[:2]), adapted(pixels[:2]))


class TestSHOT:
    def test_leaves_the_classifier_and_the_statistics(self, net, pixels):
        before = copy.deepcopy(net.state_dict())
        adapted = SHOT(lr=0.1).wrap(net)
        adapted(pixels)
        changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
        assert {name for name in changed if name.startswith("9.") or "running" in name} == set()
        assert {"0.weight", "1.weight", "3.weight"} <= changed

    def test_no_sure_prediction_maximises_information(self, net, pixels):
        plain = SHOT(pseudo_weight=0.0).wrap(copy.deepcopy(net))
        unsure = SHOT(confidence=0.999999).wrap(net)
        assert torch.equal(unsure(pixels), plain(pixels))
        assert torch.isfinite(unsure(pixels)).all()
        assert unsure.engine.last["loss"] == pytest.approx((plain(pixels), plain.engine.last["loss"])[1])

    def test_of_one_image_has_no_information_to_gain(self, net, pixels):
        """The entropy of one prediction is that of its mean."""
        adapted = SHOT(pseudo_weight=0.0).wrap(net)
        adapted(pixels[:1])
        assert adapted.engine.last["loss"] == pytest.approx(0, abs=1e-12)

    def test_dense_predictions_count_one_by_one(self, pixels):
        dense = SHOT(confidence=0.3).wrap(DenseNet())
        logits = dense(pixels)
        p = logits.softmax(1).movedim(1, -1).flatten(0, 2)
        entropy = -(p * p.log()).sum(1).mean()
        mean = p.mean(0)
        sure = p.amax(1)[p.amax(1) > 0.3]
        assert 0 < len(sure) < len(p)
        expected = entropy + (mean * mean.log()).sum() - 0.3 * sure.log().mean()
        assert dense.engine.last["loss"] == pytest.approx(expected.item(), rel=1e-9)


class TestTIPI:
    @pytest.mark.parametrize("size", [2, 6])
    def test_only_the_clean_pass_moves_the_statistics(self, make_net, pixels, size):
        images = pixels[:size]
        still = TIPI(lr=0.0, large_batch=4).wrap(make_net())
        logits = still(images)
        moved = EMABN().wrap(make_net())
        expected = moved(images)
        for name, value in still.module.state_dict().items():
            torch.testing.assert_close(value, moved.module.state_dict()[name], rtol=1e-12, atol=1e-12)
        if size > 4:
            expected = PTBN().wrap(make_net())(images)
        torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)

    def test_never_uses_the_predicted_batch_if_told_so(self, make_net, pixels):
        still = TIPI(lr=0.0, large_batch=None).wrap(make_net())
        torch.testing.assert_close(still(pixels), EMABN().wrap(make_net())(pixels), rtol=1e-9, atol=1e-9)

    def test_adapts_all_batch_norm_layers_of_a_resnet50(self, pixels):
        network = torchvision.models.resnet50(num_classes=4)
        adapted = TIPI().wrap(network)
        adapted(pixels[:2].float())
        layers = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
        free = {id(parameter) for parameter in adapted.engine.net.parameters}
        assert len(layers) == 53
        assert free == {id(parameter) for layer in layers for parameter in layer.parameters()}
        assert all((layer.running_mean != 0).any() for layer in layers)

    def test_random_start_stays_in_the_perturbation(self, net, pixels):
        seen = []
        adapted = TIPI(epsilon=0.03).wrap(net)
        net[0].register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach()))
        adapted(pixels)
        clean, start, perturbed, predicted = seen
        assert torch.equal(clean, pixels)
        assert torch.equal(predicted, pixels)
        start, change = start - pixels, perturbed - pixels
        assert start.abs().max() <= 0.03
        along = change * start > 0  # from there no pixel moves further than epsilon, elsewhere it moves back by epsilon
        expected = torch.where(along, 0.03, 0.03 - start.abs())
        torch.testing.assert_close(change.abs(), expected, rtol=1e-6, atol=1e-9)
        assert 0.3 < along.double().mean() < 0.7

    def test_prediction_before_is_the_clean_pass(self, make_net, pixels):
        adapted = TIPI(prediction="before", lr=0.1).wrap(make_net())
        torch.testing.assert_close(adapted(pixels), PTBN().wrap(make_net())(pixels), rtol=1e-9, atol=1e-9)
        assert (adapted.engine.net.forwards, adapted.engine.backwards) == (3, 2)

    def test_dense_and_without_batch_norm(self, pixels, make_net):
        assert TIPI().wrap(DenseNet())(pixels).shape == (6, 4, 16, 16)
        group = make_net(lambda channels: nn.GroupNorm(2, channels))
        adapted = TIPI(lr=0.01).wrap(group)
        first = adapted(pixels)
        assert not torch.equal(adapted(pixels), first)


@pytest.mark.parametrize("method", [ROID, CMF])
class TestROIDAndCMF:
    @pytest.mark.parametrize("kind", ["one", "constant", "usual"])
    def test_odd_batches_stay_finite(self, method, kind, net, pixels):
        batch = {"one": pixels[:1], "constant": pixels[:1].expand(5, -1, -1, -1), "usual": pixels}[kind]
        adapted = method(lr=0.01).wrap(net)
        for _ in range(3):
            assert torch.isfinite(adapted(batch)).all()
            assert adapted.engine.last["selected"] > 0
            assert adapted.engine.last["loss"] == adapted.engine.last["loss"]
        assert adapted.engine.updates == 3
        assert all(torch.isfinite(value).all() for value in net.state_dict().values())

    def test_a_broken_batch_leaves_no_trace_in_the_state(self, method, net, pixels, breaks):
        adapted = method().wrap(breaks(net))
        adapted(pixels)
        before = adapted.state_dict()["tensors"]["method.mean_prediction"]
        adapted(pixels + 1e6)
        assert torch.equal(adapted.state_dict()["tensors"]["method.mean_prediction"], before)
        assert torch.isfinite(adapted(pixels)).all()
        assert adapted.engine.skipped == 1

    def test_a_reset_restores_all_that_is_remembered(self, method, net, pixels):
        noisy = {"process_variance": 50.0} if method is CMF else {}  # on 32 parameters it is small otherwise
        adapted = method(lr=0.05, reset="never", **noisy).wrap(net)
        adapted(pixels)
        adapted.reset()
        fresh = {name: value.clone() for name, value in adapted.state_dict()["tensors"].items()}
        assert torch.equal(fresh["method.mean_prediction"], torch.full((4,), 0.25).double())
        for batch in (pixels, pixels[:4] * 0.5):
            adapted(batch)
        moved = adapted.state_dict()["tensors"]
        assert not any(torch.equal(moved[name], fresh[name]) for name in fresh)
        adapted.reset()
        after = adapted.state_dict()["tensors"]
        assert all(torch.equal(after[name], fresh[name]) for name in fresh)

    def test_a_term_counts_for_kept_samples_alike(self, method, net, pixels):
        from ttalight.adapters import Term

        class Constant(Term):
            def __call__(self, outputs, head, selected):
                return torch.full((len(outputs.logits),), 2.0).double()

        plain, termed = method().wrap(copy.deepcopy(net)), method(terms=[Constant(3.0)]).wrap(net)
        assert torch.equal(plain(pixels), termed(pixels))
        assert termed.engine.last["loss"] == pytest.approx(plain.engine.last["loss"] + 6)

    def test_refuses_dense_predictions(self, method, pixels):
        with pytest.raises(ValueError, match=r"got logits of shape \(6, 4, 16, 16\): for dense outputs"):
            method().wrap(DenseNet())(pixels)


class TestROIDMathematics:
    def test_some_sample_is_always_kept(self):
        generator = torch.Generator().manual_seed(0)
        for _ in range(50):
            logits = torch.randn(7, 3, generator=generator) * 4
            weights = certainty_diversity_weights(logits.softmax(1), torch.full((3,), 1 / 3), 1 / 3)
            assert 0 < (weights > 0).sum() <= 7
            assert ((weights == 0) | ((weights >= 1) & (weights <= 20.1))).all()  # exp(3) at most

    def test_equals_weigh_alike(self):
        generator, mean = torch.Generator().manual_seed(0), torch.full((5,), 0.2)
        for _ in range(50):  # the rounding of a row depends on its place
            equal = torch.randn(1, 5, generator=generator).expand(6, -1).softmax(1)
            assert torch.equal(certainty_diversity_weights(equal, mean, 1 / 3), torch.ones(6))

    def test_log_prior_is_bayes_rule(self):
        """Two classes with logits (-1, -1.2) under a prior of (0.52, 0.48): the likelier class must gain."""
        logits, prior = torch.tensor([-1.0, -1.2]).double(), torch.tensor([0.52, 0.48]).double()
        odds = logits.softmax(0) * prior / (logits.softmax(0) * prior).sum()
        torch.testing.assert_close((logits + prior.log()).softmax(0), odds)
        assert (logits * prior).softmax(0)[0] < logits.softmax(0)[0] < odds[0]

    def test_smoothed_prior_is_nearer_to_uniform(self):
        logits = torch.randn(20, 6, generator=torch.Generator().manual_seed(0)).double() * 3
        prior, smoothed = logits.softmax(1).mean(0), smoothed_prior(logits)
        assert smoothed.sum().item() == pytest.approx(1)
        assert torch.equal(smoothed.argsort(), prior.argsort())
        assert ((smoothed - 1 / 6).abs() < (prior - 1 / 6).abs()).all()
        one = smoothed_prior(logits[:1])
        assert (one.amax() - one.amin()) < (smoothed.amax() - smoothed.amin())

    def test_the_source_holds_the_weights(self, net, pixels):
        source = net[1].weight.detach().clone()
        held = ROID(lr=0.1, source_share=1.0).wrap(net)
        held(pixels)
        assert torch.equal(net[1].weight, source)


class TestCMF:
    def test_the_gain_is_that_of_a_scalar_filter(self):
        variance = torch.zeros(()).double()
        expected, betas = 0.0, []
        for _ in range(200):
            beta, variance = filter_gain(variance, 0.005, 0.99)
            grown = 0.99**2 * expected + 0.005
            expected = grown * 0.995 / (grown + 0.995)  # the posterior of two Gaussians
            assert variance.item() == pytest.approx(expected)
            betas.append(beta.item())
        assert betas[0] == pytest.approx(0.995)
        assert 0.89 < betas[-1] < betas[0]
        assert betas[-1] == pytest.approx(betas[-2])

    def test_the_gain_is_bounded(self):
        assert filter_gain(torch.tensor(9.0), 0.5, 0.99)[0] == pytest.approx(0.89)
        assert filter_gain(torch.tensor(0.0), 5e-5, 0.99)[0] == 1

    def test_counts_parameters(self, net, pixels):
        with pytest.raises(ValueError, match=r"is 4\.17 for the 32 trainable ones: choose a smaller process_variance"):
            CMF(process_variance=5000.0).wrap(net)(pixels)


class TestMEMO:
    @pytest.mark.parametrize("network", ["net", "group"])
    def test_the_batch_weighs_one_of_n_plus_one(self, network, make_net, pixels):
        net = make_net() if network == "net" else make_net(lambda channels: nn.GroupNorm(2, channels))
        adapted = MEMO(lr=0.0, views=2, prior=16.0).wrap(copy.deepcopy(net))
        for module in net.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 1 / 17
                module.register_forward_pre_hook(mix_statistics)
        torch.testing.assert_close(adapted(pixels[:1]), net(pixels[:1]), rtol=1e-10, atol=1e-10)

    def test_an_image_does_not_see_the_others_of_its_batch(self, make_net, pixels):
        """With views that are not drawn, a batch is its images alone, momentum and all."""

        def adapter():
            memo = MEMO(optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), views=3, steps=2)
            memo._augmentation = lambda pixels, generator, views: torch.cat([pixels * k for k in (1.0, 0.8, 0.6)])
            return memo

        together = adapter().wrap(make_net())(pixels[:3])
        alone = [adapter().wrap(make_net())(image) for image in pixels[:3].split(1)]
        assert torch.equal(together, torch.cat(alone))
        assert not torch.equal(together[:1], alone[1])

    def test_lowers_the_entropy_of_the_views(self, net, pixels):
        adapted = MEMO(lr=0.05, steps=1, views=8, seed=0).wrap(net)
        adapted(pixels[:1])
        first = adapted.engine.last["loss"]
        adapter = MEMO(lr=0.05, steps=20, views=8, seed=0)
        adapted.release()
        many = adapter.wrap(net)
        many(pixels[:1])
        assert many.engine.last["loss"] < first

    def test_is_episodic_unless_told_otherwise(self, make_net, pixels):
        keeps, forgets = MEMO(lr=0.1, views=2, reset="never").wrap(make_net()), MEMO(lr=0.1, views=2).wrap(make_net())
        for wrapped in (keeps, forgets):
            wrapped(pixels[:2])
        state = forgets.state_dict()["tensors"]
        single = MEMO(lr=0.1, views=2).wrap(make_net())
        single(pixels[:1])
        assert state.keys() == single.state_dict()["tensors"].keys()
        assert not torch.equal(keeps.state_dict()["tensors"]["0.weight"], state["0.weight"])

    def test_refuses_dense_predictions(self, pixels):
        with pytest.raises(ValueError, match=r"MEMO averages .* got logits of shape \(32, 4, 16, 16\)"):
            MEMO().wrap(DenseNet())(pixels)


def mix_statistics(layer: nn.BatchNorm2d, inputs: tuple[torch.Tensor]) -> None:
    """Move the running statistics by 1/17 of the way to those of the batch, biased variance and all."""
    x = inputs[0]
    with torch.no_grad():
        layer.running_mean.lerp_(x.mean((0, 2, 3)), 1 / 17)
        layer.running_var.lerp_(x.var((0, 2, 3), correction=0), 1 / 17)


@pytest.mark.parametrize("method", [SHOT, TIPI, ROID, CMF, MEMO, CoTTA, SANTA, RMT, AdaContrast])
def test_what_a_result_says(method, net, pixels):
    adapter = method()
    assert adapter.wrap(net)(pixels).shape == (6, 4)
    protocol = adapter.protocol()
    assert protocol["prediction"] == ("after" if method in (TIPI, MEMO, AdaContrast) else "before")
    assert protocol["optimizer"] == ("SGD" if method in (SHOT, MEMO, AdaContrast) else "Adam")
    expected = {
        SHOT: {"pseudo_weight": 0.3, "confidence": 0.9, "lr": 1e-3},
        TIPI: {"epsilon": 2 / 255, "entropy_weight": 0.0, "reverse": True, "large_batch": 64, "norm": "ema"},
        ROID: {"source_share": 0.01, "temperature": 1 / 3, "prior_correction": "log"},
        CMF: {"process_variance": 0.005, "hidden_share": 0.01},
        CoTTA: {"confidence": 0.92, "views": 32, "restore": 0.01},
        SANTA: {"source_samples": 100_000, "contrast_weight": 1.0, "temperature": 0.1, "prototypes": "classifier"},
        RMT: {"teacher_momentum": 0.999, "replay_weight": 1.0, "warm_up": 50_000, "source_samples": 5000},
        AdaContrast: {"neighbors": 10, "queue": 16384, "refine_after": 1024, "temperature": 0.07, "lr": 2e-4},
        MEMO: {"views": 32, "prior": 16.0, "joint": False, "crop": "padded", "reset": "batch", "lr": 0.005},
    }[method]
    assert {name: protocol[name] for name in expected} == expected
