"""Steps of gpu.py: other ways to make the same passes, and bare passes."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import ttalight  # noqa: F401  # isort: skip  (first: it makes torchvision importable)
import adapters
import torch
from bare_passes import mean_entropy
from measuring import now, spread
from networks import make_network
from step_tables import Row
from torch import Tensor, nn

from ttalight.adapters import Tent
from ttalight.models.passes.fast_pass import FastPass

BARE = ("bare forward", "bare forward and backward")
WAYS = ("reduce-overhead", "CUDA graph", "Tent, FastPass", "Tent, reduce-overhead")
#: Name of the way -> what a batch gives: logits, and gradients where there are any.
Pass = Callable[[Tensor], list[Tensor]]


def network_and_affines(setting: adapters.Setting) -> tuple[nn.Module, list[nn.Parameter]]:
    """Return the network of a setting on statistics of the batch, and its affines, which alone need gradients."""
    network = make_network(setting.method, setting.network, setting.device).requires_grad_(False)
    affines = []
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.track_running_stats, module.running_mean, module.running_var = False, None, None
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            affines += [parameter.requires_grad_() for parameter in module.parameters()]
    return network, affines


def passes_of(network: Callable[[Tensor], Any], affines: list[nn.Parameter]) -> Pass:
    """Return a forward and a backward through the mean entropy."""

    def run(images: Tensor) -> list[Tensor]:
        logits = network(images)
        gradients = torch.autograd.grad(mean_entropy(logits), affines)
        return [logits.detach().clone(), *(gradient.clone() for gradient in gradients)]

    return run


def sides_of(setting: adapters.Setting, way: str, images: Tensor) -> tuple[Pass, Pass]:
    """Return the network's own passes, or Tent's batches, and the same in another way."""
    if way.startswith("Tent"):
        own, other = (make_network("Tent", setting.network, setting.device) for _ in range(2))
        arguments: dict[str, Any] = {"lr": 1e-3}
        policy = FastPass() if way == "Tent, FastPass" else None
        if policy is None:
            other = torch.compile(other, mode="reduce-overhead")
        sides = Tent(**arguments).wrap(own), Tent(**arguments, passes=policy).wrap(other)
        return tuple((lambda batch, side=side: [side(batch)]) for side in sides)  # type: ignore[return-value]
    (network, affines), (other, others) = (network_and_affines(setting) for _ in range(2))
    if way == "CUDA graph":
        if setting.device == "cpu":
            raise ValueError("CUDA graphs need a CUDA device")
        other = torch.cuda.make_graphed_callables(other, (images,))
    else:
        other = torch.compile(other, mode="reduce-overhead")
    return passes_of(network, affines), passes_of(other, others)


def compare(setting: adapters.Setting, way: str) -> Row:
    """Compare passes in another way with the network's own, in turns."""
    batches, began = adapters.batches(setting), time.perf_counter()
    own, other = sides_of(setting, way, batches[0])
    apart, times = [], []
    for number in range(adapters.WARM_UP + max(2, setting.rounds)):
        batch, taken, made = batches[number % len(batches)], [], []
        for side in (own, other):
            start = now(setting)
            made.append(side(batch))
            taken.append(now(setting) - start)
        apart.append(differences(*made))
        times.append(taken)
        if number == 0:
            first = time.perf_counter() - began
    logits, gradients = (max(values) for values in zip(*apart, strict=True))
    measured = times[adapters.WARM_UP :]
    return {
        "largest difference of logits": logits,
        "difference of gradients": gradients,
        "speed (middle half)": spread([mine / theirs for mine, theirs in measured]),
        "first batch in s": round(first, 1),
    }


def differences(own: list[Tensor], other: list[Tensor]) -> tuple[float, float]:
    """Return the largest difference of logits, as a share of the largest one, and that of gradients, of their norm."""
    logits = float((own[0] - other[0]).abs().max() / own[0].abs().max())
    if len(own) == 1:
        return logits, 0.0
    mine, theirs = (torch.cat([gradient.flatten() for gradient in side[1:]]) for side in (own, other))
    return logits, float((mine - theirs).norm() / mine.norm())


def bare(setting: adapters.Setting, passes: str) -> Row:
    """Measure passes of the network alone."""
    network, affines = network_and_affines(setting)
    run = passes_of(network, affines)
    times: list[float] = []
    begin = time.perf_counter()
    batches = adapters.batches(setting)
    while len(times) < adapters.WARM_UP + setting.rounds or time.perf_counter() - begin < setting.seconds:
        batch, start = batches[len(times) % len(batches)], now(setting)
        if passes == BARE[0]:
            with torch.no_grad():
                network(batch)
        else:
            run(batch)
        times.append(now(setting) - start)
    rates = [setting.batch / taken for taken in times[adapters.WARM_UP :]]
    return {"bare images/s": round(sorted(rates)[len(rates) // 2]), "n": len(rates)}
