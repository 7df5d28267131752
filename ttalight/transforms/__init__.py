"""Batched augmentations on the images' device, with parameters of its own for every image."""

from ttalight.transforms.blur import blur_kernel_size, draw_sigmas, gaussian_blur
from ttalight.transforms.color import (
    JitterParameters,
    adjust_hue,
    color_jitter,
    draw_color_jitter,
    grayscale,
    random_grayscale,
)
from ttalight.transforms.crop import draw_boxes, draw_offsets, padded_crop, random_crop, resized_crop
from ttalight.transforms.draws import draw_mask
from ttalight.transforms.flip import horizontal_flip, random_horizontal_flip
from ttalight.transforms.simclr import SimCLRViews, ViewParameters
from ttalight.transforms.supervised import RandomCropFlip, RandomResizedCropFlip

__all__ = [
    "RandomCropFlip",
    "RandomResizedCropFlip",
    "SimCLRViews",
    "JitterParameters",
    "ViewParameters",
    "adjust_hue",
    "blur_kernel_size",
    "color_jitter",
    "draw_boxes",
    "draw_color_jitter",
    "draw_mask",
    "draw_offsets",
    "draw_sigmas",
    "gaussian_blur",
    "grayscale",
    "horizontal_flip",
    "padded_crop",
    "random_crop",
    "random_grayscale",
    "random_horizontal_flip",
    "resized_crop",
]
