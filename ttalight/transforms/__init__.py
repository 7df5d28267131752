"""Batched augmentations on the images' device, with parameters of its own for every image."""

from ttalight.transforms.affine import affine_matrices, warp
from ttalight.transforms.augmix import AugMixViews
from ttalight.transforms.blur import blur_kernel_size, draw_sigmas, gaussian_blur
from ttalight.transforms.color import (
    JitterParameters,
    adjust_gamma,
    adjust_hue,
    color_jitter,
    draw_color_jitter,
    grayscale,
    random_grayscale,
)
from ttalight.transforms.crop import draw_boxes, draw_offsets, padded_crop, random_crop, resized_crop
from ttalight.transforms.draws import draw_mask
from ttalight.transforms.flip import horizontal_flip, random_horizontal_flip
from ttalight.transforms.jitter_affine import RandomJitterAffineFlip
from ttalight.transforms.label_maps import RandomResizedCropFlipMaps, resized_crop_maps
from ttalight.transforms.rotation import rotate_quarters, rotation_views
from ttalight.transforms.simclr import SimCLRViews, ViewParameters
from ttalight.transforms.supervised import RandomCropFlip, RandomResizedCropFlip, ResizedCropFlip
from ttalight.transforms.tones import (
    autocontrast_tables,
    equalize_tables,
    look_up,
    posterize_tables,
    solarize_tables,
    to_tones,
)

__all__ = [
    "AugMixViews",
    "RandomCropFlip",
    "RandomJitterAffineFlip",
    "RandomResizedCropFlip",
    "RandomResizedCropFlipMaps",
    "ResizedCropFlip",
    "SimCLRViews",
    "JitterParameters",
    "ViewParameters",
    "adjust_gamma",
    "adjust_hue",
    "affine_matrices",
    "autocontrast_tables",
    "blur_kernel_size",
    "color_jitter",
    "draw_boxes",
    "draw_color_jitter",
    "draw_mask",
    "draw_offsets",
    "draw_sigmas",
    "equalize_tables",
    "gaussian_blur",
    "grayscale",
    "horizontal_flip",
    "look_up",
    "padded_crop",
    "posterize_tables",
    "random_crop",
    "random_grayscale",
    "random_horizontal_flip",
    "resized_crop",
    "resized_crop_maps",
    "rotate_quarters",
    "rotation_views",
    "solarize_tables",
    "to_tones",
    "warp",
]
