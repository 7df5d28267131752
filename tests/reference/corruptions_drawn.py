"""Slow references of the random corruptions, one image at a time, given the numbers that were drawn.

Images are arrays (H, W, 3) of grey levels. Results are grey levels before truncation, clipped to 0..255.
"""

from __future__ import annotations

import math

import numpy as np
from corruptions_fixed import bilinear, clip, correlate, enlarge, gaussian, mirror, mirror_double


def truncate(levels):
    """Grey levels as stored; the hair keeps whole numbers whole."""
    return np.floor(np.clip(levels, 0, 255) + 1e-9)


def gaussian_noise(image, scale, *, noise):
    return clip(image + 255 * scale * noise)


def speckle_noise(image, scale, *, noise):
    return clip(image + image * scale * noise)


def impulse_noise(image, amount, *, uniform):
    result = image.astype(float)
    result[uniform < amount / 2] = 0
    result[uniform > 1 - amount / 2] = 255
    return result


def glass_blur(image, sigma, reach, rounds, *, offsets):
    """Copies one after the other, as an assignment of two views of one array does."""
    height, width = image.shape[:2]
    work = truncate(gaussian(image, sigma))
    for turn in range(rounds):
        for y in range(height - reach, reach, -1):
            for x in range(width - reach, reach, -1):
                dy, dx = offsets[turn, y - reach - 1, x - reach - 1]
                work[y, x], work[y + dy, x + dx] = work[y + dy, x + dx], work[y, x]
    return clip(gaussian(work, sigma))


def smear(plane, angle, radius, sigma):
    """Motion blur pixel by pixel: Gaussian weights along a ray, the edge repeated."""
    height, width = plane.shape[:2]
    steps = range(2 * radius + 1)
    weights = [math.exp(-(i**2) / (2 * sigma**2)) for i in steps]
    result = np.zeros(plane.shape)
    for i in steps:
        dx = math.ceil(i * math.cos(math.radians(angle)) - 0.5)
        dy = math.ceil(i * math.sin(math.radians(angle)) - 0.5)
        for y, x in np.ndindex(height, width):
            row, column = min(max(y + dy, 0), height - 1), min(max(x + dx, 0), width - 1)
            result[y, x] += weights[i] / sum(weights) * plane[row, column]
    return result


def motion_blur(image, radius, sigma, *, angle):
    return clip(smear(image, angle, radius, sigma))


def snow(image, mean, scale, zoom, threshold, radius, sigma, keep, *, noise, angle):
    flakes = enlarge(mean + scale * noise, zoom)
    flakes[flakes < threshold] = 0
    flakes = truncate(smear(truncate(255 * flakes), angle, radius, sigma))[..., None]
    grey = (image @ (0.299, 0.587, 0.114))[..., None]
    white = np.maximum(image, 1.5 * grey + 127.5)
    return clip(keep * image + (1 - keep) * white + flakes + flakes[::-1, ::-1])


def plasma(draws, side, decay):
    """Diamond-square point by point; the map is a torus."""
    height = np.zeros((side, side))
    numbers = iter(draws)
    step, wobble = side, 100.0
    while step >= 2:
        half = step // 2
        cells = [(y, x) for y in range(0, side, step) for x in range(0, side, step)]

        def raise_to_mean(points, neighbours, wobble=wobble):
            new = {
                (y, x): sum(height[(y + dy) % side, (x + dx) % side] for dy, dx in neighbours) / 4
                + wobble * (wobble * next(numbers))
                for y, x in points
            }
            for point, value in new.items():
                height[point] = value

        corners = [(-half, -half), (-half, half), (half, -half), (half, half)]
        cross = [(-half, 0), (half, 0), (0, -half), (0, half)]
        raise_to_mean([(y + half, x + half) for y, x in cells], corners)
        raise_to_mean([(y, x + half) for y, x in cells], cross)
        raise_to_mean([(y + half, x) for y, x in cells], cross)
        step, wobble = half, wobble / decay
    height -= height.min()
    return height / height.max()


def fog(image, thickness, decay, *, draws):
    rows, columns = image.shape[:2]
    side = 2
    while side < max(rows, columns):
        side *= 2
    cloud = plasma(draws, side, decay)[:rows, :columns, None]
    brightest = image.max() / 255
    return clip(255 * (image / 255 + thickness * cloud) * brightest / (brightest + thickness))


def affine(image, shifts):
    """Solve for the map that takes three points to the moved ones, and read each pixel where it came from."""
    height, width = image.shape[:2]
    arm = min(height, width) // 3
    middle = np.array((width // 2, height // 2))
    points = np.array((middle + arm, (middle[0] + arm, middle[1] - arm), middle - arm), dtype=float)
    forward = np.linalg.solve(np.column_stack((points, np.ones(3))), points + shifts).T
    backward = np.linalg.inv(np.vstack((forward, (0, 0, 1))))
    result = np.empty(image.shape)
    for y, x in np.ndindex(height, width):
        from_x, from_y, _ = backward @ (x, y, 1)
        result[y, x] = bilinear(image, from_y, from_x, mirror)
    return result


def elastic_transform(image, alpha, sigma, shift, *, shifts, field):
    height, width = image.shape[:2]
    side = min(height, width)
    result = affine(image.astype(float), shift * side * shifts)
    if alpha:
        dx, dy = (alpha * side * gaussian(plane, sigma * side, truncate=3, outside=mirror_double) for plane in field)
        result = np.array(
            [[bilinear(result, y + dy[y, x], x + dx[y, x], mirror_double) for x in range(width)] for y in range(height)]
        )
    return clip(result)


def spatter(image, mean, scale, sigma, threshold, strength, mud, *, noise):
    liquid = gaussian(mean + scale * noise, sigma)
    liquid[liquid < threshold] = 0
    if mud:
        cover = gaussian(liquid > threshold, strength)[..., None]
        cover[cover < 0.8] = 0
        return clip((1 - cover) * image + cover * (63, 42, 20))
    drops = np.floor(255 * liquid) % 256
    shine = drops * shading(drops)
    if shine.max() > 0:
        shine = shine / shine.max() * strength
    return clip(image + shine[..., None] * (175, 238, 238))


def shading(drops):
    box = np.full((3, 3), 1 / 9)
    near = np.minimum(distances(outlines(drops, 50, 150)), 20)
    relief = equalise(np.floor(correlate(near, box, mirror) + 1e-6))
    emboss = np.array(((-2, -1, 0), (-1, 1, 1), (0, 1, 2)))
    return np.rint(correlate(clip(correlate(relief, emboss, mirror)), box, mirror))


def outlines(levels, low, high):
    """Canny's detector pixel by pixel; strong edges spread to weak ones by a search."""
    height, width = levels.shape
    sobel = np.array(((-1, 0, 1), (-2, 0, 2), (-1, 0, 1)))
    edge = lambda index, size: min(max(index, 0), size - 1)  # noqa: E731
    gx, gy = correlate(levels, sobel, edge), correlate(levels, sobel.T, edge)
    size = np.pad(np.abs(gx) + np.abs(gy), 1)
    peaks = set()
    for y, x in np.ndindex(height, width):
        here = size[y + 1, x + 1]
        angle = math.degrees(math.atan2(abs(gy[y, x]), abs(gx[y, x])))
        if angle < 22.5:
            peak = here > size[y + 1, x] and here >= size[y + 1, x + 2]
        elif angle > 67.5:
            peak = here > size[y, x + 1] and here >= size[y + 2, x + 1]
        else:
            side = -1 if gx[y, x] * gy[y, x] < 0 else 1
            peak = here > size[y, x + 1 - side] and here > size[y + 2, x + 1 + side]
        if peak and here > low:
            peaks.add((y, x))
    found = {(y, x) for y, x in peaks if size[y + 1, x + 1] > high}
    border = list(found)
    while border:
        y, x = border.pop()
        for step in np.ndindex(3, 3):
            neighbour = (y + step[0] - 1, x + step[1] - 1)
            if neighbour in peaks and neighbour not in found:
                found.add(neighbour)
                border.append(neighbour)
    result = np.zeros((height, width), dtype=bool)
    for point in found:
        result[point] = True
    return result


def distances(targets):
    """Shortest way over straight, diagonal and knight's moves, from the closed form for a free plane."""
    result = np.full(targets.shape, np.inf)
    for y, x in np.ndindex(targets.shape):
        for row, column in np.argwhere(targets):
            short, long = sorted((abs(y - row), abs(x - column)))
            if long >= 2 * short:
                way = (long - 2 * short) + 2.1969 * short
            else:
                way = (2 * short - long) * 1.4 + (long - short) * 2.1969
            result[y, x] = min(result[y, x], way)
    return result


def equalise(field):
    """Histogram equalisation level by level; the lowest level that occurs becomes 0."""
    lowest = field.min()
    others = (field > lowest).sum()
    if not others:
        return field
    result = np.empty(field.shape)
    for y, x in np.ndindex(field.shape):
        result[y, x] = np.rint(((field > lowest) & (field <= field[y, x])).sum() * (255 / others))
    return result
