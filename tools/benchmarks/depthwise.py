"""Training steps of a network with DepthwiseConv2d beside the same network with torch's layers.

python tools/benchmarks/depthwise.py --sides 32 48 64
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from torch import nn

from ttalight.models.depthwise import with_fast_depthwise


def seconds_of_a_step(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the time of the process of one forward and backward."""
    begin = time.process_time()
    F.cross_entropy(network(images), labels).backward()
    network.zero_grad()
    return time.process_time() - begin


def main() -> None:
    """Print images a second of both, and the ratio of steps that take turns."""
    import timm  # behind ttalight, which mends a torchvision without its compiled part

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", default="tf_efficientnet_lite0", help="name of a timm network")
    parser.add_argument("--sides", type=int, nargs="+", default=[64], help="sides of the images in pixels")
    parser.add_argument("--batch", type=int, default=128, help="images a batch")
    parser.add_argument("--rounds", type=int, default=5, help="pairs of steps")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    networks = [timm.create_model(arguments.network, num_classes=10) for _ in range(2)]
    with_fast_depthwise(networks[1])
    for network in networks:
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    print("side  torch's images/s  ours  ratio (least to most)")
    for side in arguments.sides:
        images = torch.randn(arguments.batch, 3, side, side).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(0, 10, (arguments.batch,))
        times = [[seconds_of_a_step(network, images, labels) for network in networks]
                 for _ in range(arguments.rounds + 1)][1:]  # fmt: skip
        own, fast = (arguments.batch / statistics.median(column) for column in zip(*times, strict=True))
        ratios = sorted(first / second for first, second in times)
        print(f"{side:4}  {own:16.0f}  {fast:4.0f}  {statistics.median(ratios):.2f} "
              f"({ratios[0]:.2f} to {ratios[-1]:.2f})", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
