"""DeYO: how objects are destroyed, and what of it the method keeps."""

from __future__ import annotations

import pytest
import torch

from ttalight.adapters import PTBN, DeYO
from ttalight.adapters.methods.deyo import occlude, shuffle_patches, shuffle_pixels

OPEN = {"margin": 1.0, "threshold": -1.0, "lr": 0.05}  # every sample counts


@pytest.fixture
def pictures():
    return torch.arange(2 * 3 * 12 * 8, dtype=torch.float64).reshape(2, 3, 12, 8)


def seeded(seed: int = 0):
    return torch.Generator().manual_seed(seed)


def patches_of(image):
    """The 3 x 2 patches of an image, as a set of their pixels."""
    return {tuple(image[:, y : y + 3, x : x + 2].flatten().tolist()) for y in range(0, 12, 3) for x in range(0, 8, 2)}


class TestShufflePatches:
    def test_moves_whole_patches(self, pictures):
        shuffled = shuffle_patches(pictures, 4, seeded())
        for image, result in zip(pictures, shuffled, strict=True):
            assert not torch.equal(image, result)
            assert patches_of(result) == patches_of(image)

    def test_every_image_has_its_own_order(self, pictures):
        shuffled = shuffle_patches(pictures[:1].repeat(50, 1, 1, 1), 4, seeded())
        assert len({tuple(image.flatten().tolist()) for image in shuffled}) == 50
        assert torch.equal(shuffled, shuffle_patches(pictures[:1].repeat(50, 1, 1, 1), 4, seeded()))

    def test_every_place_is_as_likely(self):
        images = torch.arange(4.0).reshape(1, 1, 2, 2).repeat(4000, 1, 1, 1)
        shuffled = shuffle_patches(images, 2, seeded()).flatten(1)
        for place in range(4):
            counts = torch.bincount(shuffled[:, place].long(), minlength=4)
            assert (counts - 1000).abs().max() < 150  # 5.5 standard deviations

    @pytest.mark.parametrize("size", [(13, 10), (12, 9), (30, 31)])
    def test_sides_that_patches_do_not_divide(self, size):
        images = torch.rand(2, 3, *size, generator=seeded(1))
        shuffled = shuffle_patches(images, 4, seeded())
        assert shuffled.shape == images.shape
        assert not torch.allclose(shuffled, images)
        torch.testing.assert_close(shuffled.mean((2, 3)), images.mean((2, 3)), rtol=0, atol=0.06)
        constant = torch.full((1, 3, *size), 0.3)
        torch.testing.assert_close(shuffle_patches(constant, 4, seeded()), constant)

    def test_says_that_images_are_too_small(self):
        with pytest.raises(
            ValueError, match=r"4 x 4 patches need images of at least as many pixels a side, got \[3, 8\]"
        ):
            shuffle_patches(torch.rand(1, 3, 3, 8), 4, seeded())


def test_shuffled_pixels_stay_whole(pictures):
    shuffled = shuffle_pixels(pictures, seeded())
    for image, result in zip(pictures, shuffled, strict=True):
        pixels = [sorted(map(tuple, each.flatten(1).T.tolist())) for each in (image, result)]
        assert pixels[0] == pixels[1]
    orders = (shuffled - pictures[:, :, :1, :1])[:, 0]
    assert not torch.equal(orders[0], orders[1])  # each image has its own order
    assert shuffled[0, 0].flatten().tolist() != sorted(shuffled[0, 0].flatten().tolist())


@pytest.mark.parametrize(
    ("size", "share", "rows", "columns"),
    [((224, 224), 0.5, (56, 168), (56, 168)), ((12, 8), 0.25, (4, 7), (3, 5)), ((5, 4), 1.0, (0, 5), (0, 4))],
)
def test_the_middle_is_occluded_by_the_mean(size, share, rows, columns):
    images = torch.rand(2, 3, *size, generator=seeded(1))
    hidden = occlude(images, share)
    middle = torch.zeros(size, dtype=torch.bool)
    middle[slice(*rows), slice(*columns)] = True
    assert torch.equal(hidden[:, :, ~middle], images[:, :, ~middle])
    means = torch.tensor([[sum(channel.flatten().tolist()) / middle.numel() for channel in image] for image in images])
    torch.testing.assert_close(hidden[:, :, middle], means[:, :, None].expand(-1, -1, int(middle.sum())))


class TestDeYO:
    @pytest.mark.parametrize("destroy", ["patch", "pixel", "occlusion"])
    def test_destroys_as_told(self, make_net, images, destroy):
        def destroyed(net):
            generator = adapted.engine.net.draws(0)
            return {
                "patch": lambda: shuffle_patches(images, 4, generator),
                "pixel": lambda: shuffle_pixels(images, generator),
                "occlusion": lambda: occlude(images, 0.5),
            }[destroy]()

        adapted = DeYO(**OPEN, destroy=destroy, seed=3).wrap(make_net())
        logits = adapted(images)
        adapted.engine.net.counters.batch = 0
        changed = PTBN().wrap(make_net())(destroyed(adapted))
        likely = logits.argmax(1, keepdim=True)
        drops = (logits.softmax(1) - changed.softmax(1)).gather(1, likely)[:, 0]
        p = logits.softmax(1)
        entropies = -(p * p.log()).sum(1)
        weights = torch.exp(0.4 * torch.log(torch.tensor(4.0, dtype=torch.float64)) - entropies) + drops.exp()
        assert adapted.engine.last["loss"] == pytest.approx((weights * entropies).mean().item())

    def test_shape_independent_predictions_are_left_out(self, make_net, images):
        """Shuffled patches of a constant image are the image."""
        group = lambda channels: torch.nn.GroupNorm(2, channels)  # noqa: E731
        flat = images.mean((2, 3), keepdim=True).expand_as(images).clone()
        adapted = DeYO(margin=1.0, threshold=0.0).wrap(make_net(group))
        adapted(flat)
        assert adapted.engine.last["selected"] == 0
        adapted = DeYO(margin=1.0, threshold=-1e-6).wrap(make_net(group))
        adapted(flat)
        assert adapted.engine.last["selected"] == 1

    def test_nothing_confident_costs_no_second_forward(self, make_net, images):
        adapted, still = DeYO(margin=1e-3, lr=0.1).wrap(make_net()), PTBN().wrap(make_net())
        for batch in (images, images[:1]):
            assert torch.equal(adapted(batch), still(batch))
        assert (adapted.engine.net.forwards, adapted.engine.skipped) == (2, 2)

    def test_a_structure_is_given_back_whole(self, images):
        """The second forward, of fewer images, leaves no trace in what the network returns besides logits."""

        class Both(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = torch.nn.BatchNorm2d(3)
                self.last = torch.nn.Linear(3, 4)

            def forward(self, images):
                pooled = self.norm(images).flatten(2).amax(2)
                return {"logits": self.last(pooled), "pooled": pooled}

        torch.manual_seed(0)
        adapted = DeYO(margin=0.99, parameters="norm").wrap(Both().double())
        output = adapted(images)
        assert output["logits"].shape == (6, 4)
        assert output["pooled"].shape == (6, 3)

    def test_draws_are_keyed(self, make_net, images):
        def run(seed, steps=1):
            adapted = DeYO(**OPEN, seed=seed, steps=steps).wrap(make_net())
            adapted(images)
            return [parameter.detach().clone() for parameter in adapted.engine.net.parameters], adapted.engine.last

        assert all(map(torch.equal, run(1)[0], run(1)[0]))
        assert run(1)[1]["loss"] != run(2)[1]["loss"]

    def test_every_step_shuffles_anew(self, make_net, images):
        drawn = []

        class Watched(DeYO):
            def _destroyed(self, images, generator):
                drawn.append(super()._destroyed(images, generator))
                return drawn[-1]

        Watched(**OPEN, steps=2).wrap(make_net())(images)
        assert not torch.equal(*drawn)

    def test_says_that_it_needs_one_prediction_an_image(self, images):
        net = torch.nn.Sequential(torch.nn.BatchNorm2d(3), torch.nn.Conv2d(3, 4, 1)).double()
        with pytest.raises(ValueError, match=r"DeYO needs one prediction an image.*got \(6, 4, 32, 32\)"):
            DeYO(parameters="norm").wrap(net)(images)

    def test_warns_of_the_threshold_for_imagenet(self, make_net, images):
        with pytest.warns(
            UserWarning, match=r"DeYO runs with its settings for CIFAR on 200 classes.*'threshold': 0\.3"
        ):
            DeYO().wrap(make_net(classes=200))(images)
