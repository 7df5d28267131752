"""Feeds damaged and hostile files to everything that reads one.

    python tests/stress/fuzz.py --inputs 100000 [--targets checkpoint npy ...] [--seed 0]

An input is refused with an error of the kinds in ``ALLOWED``, or accepted. Anything else is a finding: another
exception, an input that takes longer than ``--limit`` seconds, more than ``--memory`` MiB, or the end of the
interpreter (each target runs in a process of its own, and the input that it died of stays in ``--keep``). Half of the
inputs are drawn by hypothesis; the other half are whole files with a few bytes changed, cut out or repeated.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import resource
import signal
import tempfile
import time
import traceback
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from fuzz_targets import ALLOWED, TARGETS, Target, make
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st


def changed(draw: random.Random, whole: list[bytes]) -> bytes:
    """Return a whole file with a few faults."""
    data = bytearray(draw.choice(whole))
    for _ in range(draw.randint(1, 4)):
        where = draw.randrange(len(data) + 1)
        length = draw.choice([1, 1, 1, 2, 4, 8, 64])
        fault = draw.randrange(6)
        if fault == 0:
            data[where : where + length] = draw.randbytes(length)
        elif fault == 1:
            data[where : where + 1] = bytes([draw.choice([0, 0xFF, 0x7F, 0x80, 0x31, 0x2D])])
        elif fault == 2:
            del data[where : where + length]
        elif fault == 3:
            data[where:where] = data[where : where + length]
        elif fault == 4 and where < len(data):
            data[where] ^= 1 << draw.randrange(8)
        elif fault == 5 and draw.random() < 0.3:
            del data[where:]
    return bytes(data)


class Slow(Exception):
    """An input took too long."""


def attempt(target: Target, data: bytes, limit: float) -> str:
    """Return what became of an input.

    Raises:
        Exception: Whatever is not allowed.
    """

    def stop(number: int, frame: Any) -> None:
        raise Slow(f"more than {limit} s")

    previous = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, limit)
    try:
        target.read(data)
    except ALLOWED as error:
        signal.setitimer(signal.ITIMER_REAL, 0)
        if not str(error):
            raise AssertionError("an error without words") from error
        return "refused"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    return "accepted"


def fuzz(name: str, inputs: int, first: int, limit: float, keep: Path) -> dict[str, Any]:
    """Run one target; the input in progress is in ``keep`` until it is done."""
    warnings.simplefilter("ignore")
    keep.mkdir(parents=True, exist_ok=True)
    current = keep / f"{name}.input"
    counts = {"refused": 0, "accepted": 0}
    findings: list[str] = []
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        target = make(name, Path(folder))

        def one(data: bytes) -> None:
            current.write_bytes(data)
            try:
                counts[attempt(target, data, limit)] += 1
            except Exception as error:
                kind = f"{type(error).__name__}: {str(error)[:120]}"
                if not any(kind.split(":")[0] == found.split(":")[0] for found in findings):
                    (keep / f"{name}-{len(findings)}.input").write_bytes(data)
                    findings.append(f"{kind}\n{traceback.format_exc(limit=-6)}")

        draw = random.Random(f"{name} {first}")
        for data in target.whole[: max(1, inputs)]:
            one(data)
        left = max(0, inputs - len(target.whole))
        for _ in range(left - left // 2):
            one(changed(draw, target.whole))
        if left // 2:
            starts = [b"", b"PK\x03\x04", b"\x93NUMPY", b"\x80\x02", b"{", *(data[:40] for data in target.whole)]
            any_bytes = st.builds(lambda start, rest: start + rest, st.sampled_from(starts), st.binary(max_size=200))
            relaxed = settings(
                max_examples=left // 2, deadline=None, database=None, phases=[Phase.generate],
                suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            seed(first)(relaxed(given(any_bytes)(one)))()
        os.chdir(before)
    current.unlink(missing_ok=True)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    return {"target": name, **counts, "findings": findings, "memory": memory}


def _child(queue: Any, *arguments: Any) -> None:
    torch.set_num_threads(1)
    queue.put(fuzz(*arguments))


def in_process(name: str, inputs: int, first: int, limit: float, keep: Path) -> dict[str, Any]:
    """Run one target in a process of its own, which may die."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_child, args=(queue, name, inputs, first, limit, keep))
    process.start()
    while process.is_alive() and queue.empty():
        time.sleep(0.05)
    if process.exitcode not in (None, 0):
        died = f"the interpreter ended with {process.exitcode}, of the input {keep / f'{name}.input'}"
        return {"target": name, "refused": 0, "accepted": 0, "findings": [died], "memory": 0}
    outcome: dict[str, Any] = queue.get()
    process.join()
    return outcome


def divided(inputs: int, targets: Sequence[str]) -> dict[str, int]:
    """Return how many inputs each target gets, together at least ``inputs``; a configuration is a whole command."""
    slow = {name: max(1, inputs // (50 * len(targets))) for name in targets if name == "config"}
    others = len(targets) - len(slow)
    if others == 0:
        return dict.fromkeys(slow, inputs)
    return {name: slow.get(name, -(-(inputs - sum(slow.values())) // others)) for name in targets}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000, help="inputs over all targets")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=float, default=20.0, help="seconds that an input may take")
    parser.add_argument("--memory", type=int, default=2500, help="MiB that a target may take, this package included")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"), help="folder for inputs that were findings")
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep = options.keep.resolve()
    failed = False
    shares = divided(options.inputs, options.targets)
    began, total = time.perf_counter(), 0
    for name in options.targets:
        start = time.perf_counter()
        outcome = in_process(name, shares[name], options.seed, options.limit, keep)
        seconds = time.perf_counter() - start
        done = outcome["refused"] + outcome["accepted"] + len(outcome["findings"])
        total += done
        print(
            f"{name:10} {done:8,} inputs, {outcome['refused']:,} refused, {len(outcome['findings'])} findings, "
            f"{done / seconds:,.0f} a second, {outcome['memory']} MiB",
            flush=True,
        )
        for finding in outcome["findings"]:
            print(finding)
        failed |= bool(outcome["findings"]) or outcome["memory"] > options.memory
    print(f"{total:,} inputs in {time.perf_counter() - began:.0f} s")
    raise SystemExit(failed)


if __name__ == "__main__":
    main()
