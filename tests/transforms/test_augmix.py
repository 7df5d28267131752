from __future__ import annotations

import pytest
import torch

from ttalight.transforms import AugMixViews, RandomCropFlip, RandomJitterAffineFlip, color_jitter, draw_color_jitter
from ttalight.transforms.augmix import OPERATIONS, augment
from ttalight.transforms.jitter_affine import split_jitter


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestAugMixViews:
    def test_views_are_in_range_differ_and_repeat(self):
        images = torch.rand(3, 3, 16, 16, generator=seeded())
        views = AugMixViews()(images, seeded(1), views=5)
        assert views.shape == (15, 3, 16, 16)
        assert views.dtype == images.dtype
        assert 0 <= views.min()
        assert views.max() <= 1
        assert torch.equal(AugMixViews()(images, seeded(1), views=5), views)
        assert not torch.equal(AugMixViews()(images, seeded(2), views=5), views)
        assert len({view.sum().item() for view in views}) == 15

    def test_a_constant_image_stays_constant_inside(self):
        """No operation makes contrast: a view of grey is grey of one tone, but for zeros and grey that move in."""
        grey = torch.full((1, 3, 32, 32), 0.25)
        views = AugMixViews()(grey, seeded(), views=16)[:, :, 12:20, 12:20]
        assert (views.amax((2, 3)) - views.amin((2, 3))).max() < 1e-6

    def test_every_image_does_its_own_operation(self):
        images = torch.rand(18, 3, 12, 12, generator=seeded())
        operation = torch.arange(9).repeat(2)
        level = torch.full((18,), 5.0)
        negative = torch.arange(18) >= 9
        made = augment(images, operation, level, negative)
        for n in range(18):
            alone = augment(images[n : n + 1], operation[n : n + 1], level[:1], negative[n : n + 1])
            torch.testing.assert_close(made[n : n + 1], alone)
            assert not torch.equal(made[n], images[n]), OPERATIONS[operation[n]]

    def test_is_the_mixture_of_a_slow_loop(self):
        """The draws in their documented order, then one view at a time."""
        images, views, chains, depth = torch.rand(2, 3, 12, 12, generator=seeded()), 3, 2, 2
        made = AugMixViews(chains=chains, depth=depth)(images, seeded(5), views)
        generator = seeded(5)
        cropped = RandomCropFlip(4)(images.repeat(views, 1, 1, 1), generator)
        draws = torch.rand(chains * 6, 2 + 3 * depth, generator=generator)
        share = torch.rand(6, 1, generator=generator)
        for n in range(6):
            mixture, total = 0, 0
            for chain in range(chains):
                row = draws[chain * 6 + n].tolist()
                image = cropped[n : n + 1]
                for step in range(int(row[1] * depth) + 1):
                    kind, level, sign = row[2 + 3 * step : 5 + 3 * step]
                    image = augment(
                        image, torch.tensor([int(kind * 9)]), torch.tensor([0.1 + 0.9 * level]),
                        torch.tensor([sign < 0.5]),
                    )  # fmt: skip
                weight = -torch.log1p(-torch.tensor(row[0]))
                mixture, total = mixture + weight * image, total + weight
            expected = share[n] * cropped[n] + (1 - share[n]) * mixture[0] / total
            torch.testing.assert_close(made[n], expected, rtol=0, atol=1e-5)

    def test_resized_crops(self):
        views = AugMixViews(crop="resized")(torch.rand(2, 3, 12, 16, generator=seeded()), seeded(1), views=2)
        assert views.shape == (4, 3, 12, 12)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [({"crop": "none"}, "crop must be 'padded' or 'resized', got 'none'"), ({"depth": 0}, "depth must be")],
    )
    def test_says_what_is_wrong(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            AugMixViews(**arguments)


class TestRandomJitterAffineFlip:
    def test_views_are_in_range_and_differ(self):
        images = torch.rand(1, 3, 16, 16, generator=seeded()).expand(6, -1, -1, -1)
        augmentation = RandomJitterAffineFlip(blur=(0.001, 0.5), noise=0.005, outside="border")
        made = augmentation(images, seeded(1))
        assert torch.equal(augmentation(images, seeded(1)), made)
        assert 0 <= made.min()
        assert made.max() <= 1
        assert len({image.sum().item() for image in made}) == 6

    def test_without_strength_is_the_clipped_image(self):
        images = torch.rand(4, 3, 9, 9, generator=seeded()) * 1.4 - 0.2
        still = RandomJitterAffineFlip((0, 0, 0, 0), 0.0, 0.0, 0.0, (1.0, 1.0), 0.0)
        torch.testing.assert_close(still(images, seeded()), images.clamp(0, 1), rtol=0, atol=1e-5)

    def test_shifts_are_whole_pixels_up_to_the_share(self):
        images = torch.zeros(200, 3, 16, 16)
        images[:, :, 8, 8] = 1
        moves = RandomJitterAffineFlip((0, 0, 0, 0), 0.0, 0.0, 1 / 8, (1.0, 1.0), 0.0)(images, seeded())
        where = moves[:, 0].flatten(1).argmax(1)
        seen = {(int(place) // 16 - 8, int(place) % 16 - 8) for place in where}
        assert seen == {(down, right) for down in range(-2, 3) for right in range(-2, 3)}
        torch.testing.assert_close(moves.amax((1, 2, 3)), torch.ones(200), rtol=0, atol=1e-5)

    def test_the_parts_of_a_split_jitter_make_the_whole(self):
        images = torch.rand(20, 3, 6, 6, dtype=torch.float64, generator=seeded())
        whole = draw_color_jitter(20, (0.4, 0.3, 0.5, 0.06), generator=seeded(1))
        first, second = split_jitter(whole, torch.arange(20) % 5)
        made = color_jitter(color_jitter(images, first), second)
        torch.testing.assert_close(made, color_jitter(images, whole), rtol=0, atol=1e-10)
        rest = torch.arange(20) % 5 == 0
        torch.testing.assert_close(color_jitter(images, first)[rest], images[rest], rtol=0, atol=1e-10)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"gamma": 1.0}, r"gamma must lie in \[0, 1\), got 1"),
            ({"degrees": -1.0}, "degrees, translate and noise must be at least 0, got -1"),
            ({"outside": "zeros"}, "outside must be 'reflection' or 'border', got 'zeros'"),
            ({"blur": (0.0, 0.5)}, "blur must be two finite numbers"),
        ],
    )
    def test_says_what_is_wrong(self, arguments, message):
        with pytest.raises(ValueError, match=message):
            RandomJitterAffineFlip(**arguments)
