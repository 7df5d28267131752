"""Measure how much faster episodes of one image are side by side than one after the other.

    python tools/bench_episodes.py [--networks resnet20 vit] [--parameters norm all] [--episodes 32] [--steps 1]
                                   [--memory 512] [--threads 1] [--seconds 10] [--rounds 5] [--device cpu]

Prints a Markdown table: images per second of Tent with ``reset='batch'`` on batches of one image, and with
``episode='image'`` on one batch of the same images, the ratio of their speeds, and how far the logits are apart, as a
share of the largest one. Both take turns in one process, so that a busy neighbour slows both alike; ratios are medians
over the rounds, with the range of the middle half. With one thread of the CPU, times are those that the process was
running. The first batch, which finds how many episodes fit into the memory, is not counted. Networks and their random
weights are those of ``bench_adapters.py``.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import platform
import statistics
import time
import warnings

import torch
from bench_adapters import NETWORKS, Setting, make_network, now
from bench_corruptions import processor

from ttalight.adapters import Tent
from ttalight.adapters.wrapper import AdaptedNetwork

LR = 1e-5


def one_by_one(adapted: AdaptedNetwork, images: torch.Tensor) -> torch.Tensor:
    return torch.cat([adapted(image) for image in images.split(1)])


def row(setting: Setting, parameters: str, steps: int, memory: int) -> str:
    """Measure a row of the table."""
    network = make_network(setting)
    size = NETWORKS[setting.network][0]
    images = torch.rand(setting.batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(setting.device)
    settings = {"lr": LR, "reset": "batch", "parameters": parameters, "steps": steps}
    loop = Tent(**settings).wrap(copy.deepcopy(network))  # type: ignore[arg-type]
    episodes = Tent(**settings, episode="image", episode_memory=memory).wrap(network)  # type: ignore[arg-type]
    head = f"| {setting.network} | {parameters} | {steps} | {setting.batch} |"
    try:
        apart = (episodes(images) - (expected := one_by_one(loop, images))).abs().max() / expected.abs().max()
    except ValueError as error:
        return f"{head} {str(error).split(':')[0]} | | | | | |"
    times: list[tuple[float, float]] = []
    begin = time.perf_counter()
    while len(times) < setting.rounds or time.perf_counter() - begin < setting.seconds:
        start = now(setting)
        one_by_one(loop, images)
        middle = now(setting)
        episodes(images)
        times.append((middle - start, now(setting) - middle))
    low, median, high = statistics.quantiles([alone / together for alone, together in times], n=4)
    rates = [setting.batch / statistics.median(column) for column in zip(*times, strict=True)]
    assert episodes.engine.episodes is not None
    room = episodes.engine.episodes.at_once(images)
    return (
        f"{head} {room} | {rates[0]:,.0f} | {rates[1]:,.0f} | {median:.2f} ({low:.2f} to {high:.2f}) | {len(times)} | "
        f"{float(apart):.0e} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=NETWORKS, help="networks")
    parser.add_argument("--parameters", nargs="+", default=["norm", "all"], help="what adapts")
    parser.add_argument("--episodes", nargs="+", type=int, default=[32], help="images a batch")
    parser.add_argument("--steps", nargs="+", type=int, default=[1], help="steps of an episode")
    parser.add_argument("--memory", type=int, default=512, help="MiB, the adapters' episode_memory")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on the CPU")
    parser.add_argument("--seconds", type=float, default=10, help="least time for the rounds of a row")
    parser.add_argument("--rounds", type=int, default=5, help="least number of rounds of a row")
    parser.add_argument("--device", default="cpu", help="where the networks are, cpu or cuda")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.filterwarnings("ignore")

    print(f"{processor()}, {platform.system()} {platform.machine()}, Python {platform.python_version()}")
    print(f"torch {torch.__version__}, {arguments.device}, {arguments.threads} thread(s)\n")
    columns = (
        "network",
        "parameters",
        "steps",
        "episodes",
        "at a time",
        "images/s one by one",
        "images/s side by side",
    )
    columns += ("speed (middle half)", "n", "apart")
    print(f"| {' | '.join(columns)} |")
    print("|" + "---|" * len(columns), flush=True)
    for network, episodes, parameters, steps in itertools.product(
        arguments.networks, arguments.episodes, arguments.parameters, arguments.steps
    ):
        rest = (arguments.threads, arguments.seconds, arguments.rounds, arguments.device)
        setting = Setting("Tent", network, episodes, "wrap", "no", "no", *rest)
        print(row(setting, parameters, steps, arguments.memory), flush=True)


if __name__ == "__main__":
    main()
