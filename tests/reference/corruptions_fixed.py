"""Slow references of the corruptions that draw nothing: one image at a time, in float64, from the definitions.

Images are arrays (H, W, 3) of grey levels. Results are grey levels before truncation, clipped to 0..255.
"""

from __future__ import annotations

import colorsys
import io
import math

import numpy as np
from PIL import Image


def clip(levels):
    return np.clip(levels, 0, 255)


def mirror(index, size):
    """Continue a line by its mirror image, the edge sample once: d c b | a b c d | c b a."""
    while not 0 <= index < size:
        index = -index if index < 0 else 2 * (size - 1) - index
    return index


def mirror_double(index, size):
    """Continue a line by its mirror image, the edge sample twice: c b a | a b c d | d c b."""
    while not 0 <= index < size:
        index = -1 - index if index < 0 else 2 * size - 1 - index
    return index


def correlate(plane, kernel, outside):
    """Weighted sum around every pixel of an array (H, W, ...); ``outside`` maps an index into the image."""
    height, width = plane.shape[:2]
    reach_y, reach_x = kernel.shape[0] // 2, kernel.shape[1] // 2
    result = np.zeros(plane.shape)
    for dy in range(-reach_y, reach_y + 1):
        rows = [outside(y + dy, height) for y in range(height)]
        for dx in range(-reach_x, reach_x + 1):
            columns = [outside(x + dx, width) for x in range(width)]
            result += kernel[dy + reach_y, dx + reach_x] * plane[rows][:, columns]
    return result


def gaussian(plane, sigma, truncate=4.0, outside=lambda index, size: min(max(index, 0), size - 1)):
    """Gaussian blur with one two-dimensional kernel, cut off at ``truncate`` standard deviations along each axis."""
    reach = int(truncate * sigma + 0.5)
    if not reach:
        return plane.astype(float)
    offsets = np.arange(-reach, reach + 1)
    kernel = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * sigma**2))
    return correlate(plane, kernel / kernel.sum(), outside)


def gaussian_blur(image, sigma):
    return clip(gaussian(image.astype(float), sigma))


def defocus_blur(image, radius, alias_blur):
    reach, soft = (8, 1) if radius <= 8 else (radius, 2)
    offsets = np.arange(-reach, reach + 1)
    kernel = np.array([[float(math.hypot(y, x) <= radius) for x in offsets] for y in offsets])
    offsets = np.arange(-soft, soft + 1)
    soften = np.exp(-(offsets[:, None] ** 2 + offsets**2) / (2 * alias_blur**2))
    kernel = correlate(kernel / kernel.sum(), soften / soften.sum(), mirror)
    return clip(correlate(image.astype(float), kernel, mirror))


def bilinear(plane, y, x, outside):
    """Value of an array (H, W, ...) at a real position."""
    height, width = plane.shape[:2]
    top, left = math.floor(y), math.floor(x)
    value = 0.0
    for row, weight_y in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, weight_x in ((left, 1 - (x - left)), (left + 1, x - left)):
            if weight_y * weight_x:
                value = value + weight_y * weight_x * plane[outside(row, height), outside(column, width)]
    return value


def enlarge(plane, factor):
    """Cut out the middle, enlarge it with its corner pixels kept in the corners, and cut to the old size."""
    height, width = plane.shape[:2]
    axes = []
    for size in (height, width):
        crop = math.ceil(size / factor)
        large = round(crop * factor)
        first = (large - size) // 2
        axes.append([(size - crop) // 2 + i * (crop - 1) / (large - 1) for i in range(first, first + size)])
    inside = lambda index, size: min(index, size - 1)  # noqa: E731
    return np.array([[bilinear(plane, y, x, inside) for x in axes[1]] for y in axes[0]])


def zoom_blur(image, stop, step):
    image = image.astype(float)
    layers = [enlarge(image, factor) for factor in np.arange(1, stop, step)]
    return clip(sum(layers, image) / (len(layers) + 1))


def recolour(image, change):
    """Apply a change to (h, s, v) of every pixel through the standard library's colour conversions."""
    result = np.empty(image.shape)
    for y, x in np.ndindex(image.shape[:2]):
        result[y, x] = colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*(image[y, x] / 255))))
    return clip(255 * result)


def brightness(image, amount):
    return recolour(image, lambda h, s, v: (h, s, min(v + amount, 1)))


def saturate(image, factor, offset):
    return recolour(image, lambda h, s, v: (h, min(max(s * factor + offset, 0), 1), v))


def contrast(image, factor):
    mean = image.mean(axis=(0, 1))
    return clip((image - mean) * factor + mean)


def pixelate(image, factor):
    height, width = image.shape[:2]
    small = Image.fromarray(image).resize((int(width * factor), int(height * factor)), Image.Resampling.BOX)
    return np.asarray(small.resize((width, height), Image.Resampling.BOX)).astype(float)


def jpeg_compression(image, quality):
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)).astype(float)
