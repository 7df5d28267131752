"""Estimated times of the jobs of a plan."""

from __future__ import annotations

import time

import torch

from ttalight.models import create_encoder
from ttalight.reproduce.plan import Plan
from ttalight.reproduce.recipes import DATA


def probe(plan: Plan, seconds: float = 3.0) -> float:
    """Return how many images a second the plan's network takes forward and backward, here and now."""
    config = next(job.config for job in plan.jobs if job.verb == "fit")
    arguments, trainer = config["model"]["init_args"], config["trainer"]
    device = "cuda" if torch.cuda.is_available() and trainer.get("accelerator") != "cpu" else "cpu"
    encoder = create_encoder(arguments["encoder"], stem=arguments.get("stem", "cifar")).to(device)
    size = 256 if device == "cuda" else 32
    images = torch.rand(size, 3, DATA[plan.data][2], DATA[plan.data][2], device=device)
    if arguments.get("channels_last"):
        encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.contiguous(memory_format=torch.channels_last)
    mixed = "bf16" in str(trainer.get("precision"))

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=mixed):
            features = encoder(images)
        features.float().square().mean().backward()
        if device == "cuda":
            torch.cuda.synchronize()

    step()
    began, steps = time.perf_counter(), 0
    while steps < 2 or time.perf_counter() - began < seconds:
        step()
        steps += 1
    return size * steps / (time.perf_counter() - began)


def _duration(seconds: float) -> str:
    minutes = seconds / 60
    return f"{minutes / 60:.1f} h" if minutes >= 90 else f"{minutes:.1f} min" if minutes >= 1 else f"{seconds:.0f} s"


def plan_text(plan: Plan, states: dict[str, str], rate: float, how: str) -> str:
    """Return a line for each job with its state, its time and what it reads, and a line for all of them.

    Args:
        plan: The plan.
        states: Name of a job -> its state.
        rate: Images a second through forward and backward.
        how: How that is known.
    """
    lines, total, states = [], 0.0, dict(states)
    for job in plan.jobs:
        if states[job.name] != "to do" and any(states[other] != "done" for other in job.reads):
            states[job.name] = "outdated"  # unless the same file comes out
        seconds = 0.0 if states[job.name] == "done" else job.passes / 3 / rate
        total += seconds
        reads = f"  reads {', '.join(job.reads)}" if job.reads else ""
        lines.append(f"{states[job.name]:10} {job.verb:6} {job.name:32} {_duration(seconds):>9}{reads}\n")
    lines.append(
        f"{len(plan.jobs)} runs, about {_duration(total)} at {rate:,.0f} images/s forward and backward ({how}), "
        "without reading and making images\n"
    )
    return "".join(lines)
