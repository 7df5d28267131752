"""Strength of the corruptions on made images."""

from __future__ import annotations

import pytest

from ttalight.data.corruptions import corrupt

# Distance to the clean image (root mean square, grey levels) and mean grey level for severities 1 to 5 on 200 made
# images, mean of six seeds, from the arithmetic that was compared pixel by pixel with OpenCV 5.0, scikit-image 0.26,
# SciPy 1.17, Pillow 13.0 and ImageMagick 6.9.11 given the same draws.
MADE = {
    "gaussian_noise": ((10.12, 114.6), (15.14, 114.6), (20.15, 114.6), (22.62, 114.7), (25.09, 114.7)),
    "shot_noise": ((7.62, 114.5), (10.76, 114.5), (16.96, 114.4), (19.55, 114.5), (23.85, 114.3)),
    "impulse_noise": ((13.68, 115.2), (19.33, 115.3), (23.75, 115.4), (30.67, 115.7), (36.25, 115.9)),
    "defocus_blur": ((1.56, 114.6), (3.80, 114.6), (5.80, 114.6), (7.28, 114.7), (11.16, 114.6)),
    "glass_blur": ((17.37, 115.1), (17.11, 114.1), (15.80, 114.1), (24.76, 114.1), (23.22, 114.1)),
    "motion_blur": ((8.92, 114.6), (12.92, 114.5), (16.02, 114.5), (16.02, 114.5), (18.34, 114.5)),
    "zoom_blur": ((11.48, 114.6), (13.02, 114.6), (15.24, 114.6), (17.36, 114.6), (19.48, 114.7)),
    "snow": ((13.60, 125.6), (27.33, 139.0), (31.57, 140.8), (43.62, 153.3), (59.10, 169.4)),
    "frost": ((32.97, 146.3), (49.64, 162.2), (55.88, 166.7), (51.33, 161.6), (50.63, 158.8)),
    "fog": ((11.42, 114.2), (22.52, 114.2), (28.82, 113.9), (33.73, 113.9), (40.84, 114.2)),
    "brightness": ((9.92, 124.4), (20.55, 134.5), (31.14, 144.5), (41.56, 154.3), (60.68, 172.1)),
    "contrast": ((9.67, 114.6), (19.32, 114.6), (23.18, 114.6), (27.04, 114.6), (32.83, 114.6)),
    "elastic_transform": ((25.60, 114.6), (24.06, 114.5), (21.64, 114.6), (19.63, 114.6), (16.52, 114.6)),
    "pixelate": ((6.69, 115.1), (8.31, 115.2), (8.04, 115.2), (7.26, 115.3), (10.85, 115.4)),
    "jpeg_compression": ((7.56, 115.1), (9.23, 115.1), (9.75, 115.1), (10.22, 115.1), (10.87, 115.1)),
    "speckle_noise": ((7.40, 114.5), (12.29, 114.4), (14.71, 114.4), (19.52, 114.3), (24.26, 114.2)),
    "gaussian_blur": ((1.54, 114.6), (5.79, 114.6), (7.36, 114.6), (8.60, 114.6), (10.55, 114.6)),
    "spatter": ((8.35, 116.2), (13.51, 118.0), (19.63, 122.1), (15.55, 112.5), (20.06, 110.8)),
    "saturate": ((35.77, 137.1), (46.06, 143.4), (21.91, 101.2), (38.97, 88.8), (46.30, 83.2)),
}
# Few draws an image, so that another stream of random numbers moves the averages.
COARSE = {"snow", "frost", "fog", "motion_blur", "elastic_transform", "spatter"}


@pytest.fixture(scope="module")
def made(pictures):
    return pictures(200, 32, 32)


@pytest.mark.parametrize("corruption", MADE)
def test_strength_on_made_images(corruption, made):
    for severity, (strength, mean) in enumerate(MADE[corruption], start=1):
        result = corrupt(made, corruption, severity)
        strength_here = (result.float() - made.float()).square().mean().sqrt().item()
        assert strength_here == pytest.approx(strength, rel=0.04 if corruption in COARSE else 0.02)
        assert result.float().mean().item() == pytest.approx(mean, abs=2.5 if corruption in COARSE else 0.3)
