"""Measure how much faster several processes adapt to domains than one.

    python tools/benchmarks/sharding.py [--processes 2] [--method Tent] [--network resnet20] [--domains 4]
                                        [--images 1000] [--batch-size 100] [--rounds 3] [--accelerator cpu]

Prints one line: the median over rounds of the time of one process over that of several, with all ratios. In each round
one process and several go through the same stream right after each other, in processes that are there already, one
thread each: what a round compares is as busy a machine. The domains are corruptions of random images on random weights;
time runs from the call of Trainer.adapt until the merged results are written. While one process works, the others wait
for it without computing. On a machine with fewer free cores than processes the ratio shows it.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time

import ttalight  # isort: skip  (first: it makes torchvision importable)
import torch
from lightning.pytorch.strategies import DDPStrategy
from measuring import quiet
from random_images import RandomImages

from ttalight import adapters
from ttalight.tasks import SupervisedTask

NETWORKS = {"resnet8": "cifar_resnet8", "resnet20": "cifar_resnet20"}
CORRUPTIONS = ("gaussian_noise", "contrast", "brightness", "shot_noise", "impulse_noise", "pixelate")


def seconds(arguments: argparse.Namespace, task: SupervisedTask, data: RandomImages, shard: str | None) -> float:
    """Return the time of a run."""
    with tempfile.TemporaryDirectory() as folder:
        folder = os.environ.get("BENCH_FOLDER", folder) if shard else folder
        trainer = ttalight.Trainer(
            default_root_dir=folder,
            accelerator=arguments.accelerator,
            devices=arguments.processes if shard else 1,
            strategy=DDPStrategy() if shard else "auto",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        began = time.perf_counter()
        trainer.adapt(task, data, getattr(adapters, arguments.method)(), shard=shard)  # type: ignore[arg-type]
        return time.perf_counter() - began


def work(arguments: argparse.Namespace, rank: int) -> None:
    """Take part in all rounds, and print on the first process."""
    quiet(threads=1)
    task = SupervisedTask(encoder=NETWORKS[arguments.network])
    domains = [CORRUPTIONS[index % len(CORRUPTIONS)] for index in range(arguments.domains)]
    data = RandomImages(arguments.images, batch_size=arguments.batch_size, domains=domains)
    data.setup("test")
    seconds(arguments, task, data, "domain")  # begins the process group
    ratios = []
    for _ in range(arguments.rounds):
        torch.distributed.barrier()
        alone = seconds(arguments, task, data, None) if rank == 0 else 0.0
        torch.distributed.barrier()
        ratios.append(alone / seconds(arguments, task, data, "domain"))
    if rank == 0:
        listed = ", ".join(f"{ratio:.2f}" for ratio in ratios)
        sys.stdout.write(
            f"{arguments.processes} processes, {arguments.domains} domains of {arguments.images} images, "
            f"{arguments.method}, {arguments.network}: {statistics.median(ratios):.2f} times as fast as one "
            f"({listed}); {os.cpu_count()} cores\n"
        )
        sys.stdout.flush()
    torch.distributed.barrier()
    os._exit(0)  # tearing down gloo can deadlock


def main() -> None:
    """Start the processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--method", default="Tent")
    parser.add_argument("--network", choices=NETWORKS, default="resnet20")
    parser.add_argument("--domains", type=int, default=4)
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--accelerator", default="cpu")
    arguments = parser.parse_args()
    if "LOCAL_RANK" in os.environ:
        work(arguments, int(os.environ["LOCAL_RANK"]))
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
    with tempfile.TemporaryDirectory() as folder:
        shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "BENCH_FOLDER": folder}
        shared["OMP_NUM_THREADS"] = "1"
        started = [
            subprocess.Popen([sys.executable, *sys.argv], env={**shared, "LOCAL_RANK": str(rank)})
            for rank in range(arguments.processes)
        ]
        codes = [process.wait() for process in started]
    sys.exit(max(codes, key=abs))


if __name__ == "__main__":
    main()
