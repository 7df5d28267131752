"""The centre of images."""

from __future__ import annotations

import pytest
import torch
from torchvision.transforms import CenterCrop as TorchvisionCrop

from ttalight.models import CenterCrop


class TestCenterCrop:
    def test_is_torchvision_s(self):
        images = torch.rand(2, 3, 37, 52)
        for size in (1, 20, 31):
            assert torch.equal(CenterCrop(size)(images), TorchvisionCrop(size)(images))

    def test_smaller_images_and_none_pass(self):
        images = torch.rand(2, 3, 20, 40)
        assert CenterCrop()(images) is images
        assert torch.equal(CenterCrop(32)(images), images[..., 4:36])

    def test_size_is_checked(self):
        with pytest.raises(ValueError, match="size must be at least 1 pixel, got 0"):
            CenterCrop(0)
