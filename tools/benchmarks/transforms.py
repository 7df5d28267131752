"""Measure SimCLRViews against torchvision v2, image by image, in one run.

    python tools/benchmarks/transforms.py [--batch 256] [--size 32] [--threads 1] [--repeats 15] [--device cpu]

Prints views per second of both and their ratio. The two take turns, so that a busy neighbour slows both; the median of
the turns counts. torchvision works on float images as SimCLRViews does, one view at a time, as a data loader would.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

import ttalight  # noqa: F401  (makes torchvision importable beside a CPU build of torch)
from ttalight.transforms import SimCLRViews, blur_kernel_size


def torchvision_views(size: int, blur: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Build the same pipeline from torchvision's transforms, applied view by view."""
    from torchvision.transforms import v2

    kernel = blur_kernel_size(size)
    steps = [
        v2.RandomResizedCrop(size, scale=(0.2, 1.0), antialias=True),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
        v2.RandomGrayscale(0.2),
    ]
    if blur:
        steps.append(v2.RandomApply([v2.GaussianBlur(kernel, (0.1, 2.0))], p=blur))
    pipeline = v2.Compose(steps)
    return lambda images: torch.stack([pipeline(image) for _ in range(2) for image in images])


def seconds(make: Callable[[torch.Tensor], torch.Tensor], images: torch.Tensor) -> float:
    """Time one call, waiting for the device."""
    start = time.perf_counter()
    make(images)
    if images.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description="SimCLRViews against torchvision v2 image by image")
    parser.add_argument("--batch", type=int, default=256, help="images a batch; two views of each are made")
    parser.add_argument("--size", type=int, default=32, help="side of the images and of the views in pixels")
    parser.add_argument("--blur", type=float, default=0.0, help="chance of a Gaussian blur")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on the CPU")
    parser.add_argument("--repeats", type=int, default=15, help="timed calls of each")
    parser.add_argument("--device", default="cpu", help="where the images are")
    arguments = parser.parse_args()

    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    images = torch.rand(arguments.batch, 3, arguments.size, arguments.size, device=arguments.device)
    ways = {
        "ttalight SimCLRViews": SimCLRViews(blur=arguments.blur),
        "torchvision v2, per image": torchvision_views(arguments.size, arguments.blur),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for repeat in range(-2, arguments.repeats):
        for name, make in ways.items():
            taken = seconds(make, images)
            if repeat >= 0:
                times[name].append(taken)

    views = 2 * arguments.batch
    print(
        f"torch {torch.__version__}, {arguments.device}, {arguments.threads} thread(s), batch {arguments.batch}, "
        f"{arguments.size} pixels, {arguments.repeats} repeats"
    )
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    for name, taken in times.items():
        print(
            f"{name:26s} {views / medians[name]:10,.0f} views/s   median {1e3 * medians[name]:8.1f} ms a batch "
            f"({1e3 * min(taken):.1f} to {1e3 * max(taken):.1f})"
        )
    ours, theirs = medians.values()
    print(f"ratio {theirs / ours:.1f}")


if __name__ == "__main__":
    main()
