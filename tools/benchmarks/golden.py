"""Record what every adapter computes, and compare it with what another version of the package computes.

    python tools/benchmarks/golden.py record FILE [--only Tent,SAR] [--alone]
    python tools/benchmarks/golden.py compare FILE [OTHER] [--only Tent,SAR] [--alone] [--brief]

``record`` runs every adapter, in several configurations, on small networks with BatchNorm, GroupNorm and LayerNorm in
double precision, and saves {row name: value}. A name is ``configuration | network | scenario | value``. Scenarios are
plain streams through ``wrap`` (resets, saved states, copies, bad batches) and runs of ``Trainer.adapt`` (one process,
resumed in the middle, two processes). Values are logits, state tensors, the optimizer's state as one vector of a kind,
counters, results, and the type of an error. Only the public interface is used.

``compare`` records again, or reads OTHER, and prints how many rows are equal bit for bit, every row that differs with
its largest absolute difference, and every row that is on one side only. It exits with 1 if there is any. ``--brief``
prints one line for each scenario instead. Run it with another checkout first on PYTHONPATH to record that one.
"""

from __future__ import annotations

import argparse
import faulthandler
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from cases import CONFIGURATIONS, NETWORKS, networks_of, ttalight  # isort: skip
import torch
from scenarios import Rows, Watch, adapt, make_adapter, runs, scenarios, under

RANKS = 2


# -- two processes


def rank_rows(only: list[str], folder: Path) -> Rows:
    """Return the rows of one of two processes, which share a folder."""
    rows: Rows = {}
    for name, make in chosen(only):
        network = networks_of(name)[0]
        for shard, reset in (("domain", "domain"), ("batch", "never")):
            run = partial(
                adapt, make_adapter(make, reset=reset), NETWORKS[network](), str(folder / name / shard), Watch()
            )
            found = tried(partial(run, devices=RANKS, shard=shard))
            rows |= under(f"{name} | {network} | two processes {shard}", found)
    return rows


def two_processes(only: list[str]) -> Rows:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = str(sock.getsockname()[1])
    rows: Rows = {}
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(
                [sys.executable, __file__, "rank", f"{folder}/{rank}.pt", "--only", ",".join(only)],
                env={**os.environ, "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            )
            for rank in range(RANKS)
        ]
        try:
            codes = [process.wait(timeout=1000) for process in processes]
        finally:
            for process in processes:
                process.kill()
        if any(codes):
            raise RuntimeError(f"the two processes ended with {codes}")
        for rank in range(RANKS):
            found = torch.load(f"{folder}/{rank}.pt", weights_only=True)
            rows |= {f"{name}, rank {rank}": value for name, value in found.items()}
    return rows


# -- recording and comparing


def wanted(name: str, only: list[str]) -> bool:
    return not only or adapter_of(name) in only


def adapter_of(name: str) -> str:
    return name.split(" | ")[0].split(",")[0]


def chosen(only: list[str]) -> list[tuple[str, Any]]:
    found = [(name, make) for name, make in CONFIGURATIONS.items() if wanted(name, only)]
    if not found:
        raise SystemExit(f"--only takes names among {', '.join(sorted(set(map(adapter_of, CONFIGURATIONS))))}")
    return found


def tried(run: Any) -> Rows:
    try:
        rows: Rows = run()
        return rows
    except Exception as error:
        return {"error": type(error).__name__}


def record(only: list[str], alone: bool) -> Rows:
    """Return all rows, and print how long each configuration took."""
    rows: Rows = {}
    for name, make in chosen(only):
        began = time.perf_counter()
        for network in networks_of(name):
            for scenario, run in (*scenarios(make, NETWORKS[network]), *runs(make, NETWORKS[network])):
                rows |= under(f"{name} | {network} | {scenario}", tried(run))
        print(f"{name}: {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
    return rows if alone else rows | two_processes(only)


def difference(one: Any, other: Any) -> str | None:
    """Return in words how two values differ; None if they are equal bit for bit."""
    if isinstance(one, str) or isinstance(other, str):
        return None if one == other else f"{one} | {other}"
    first, second = torch.as_tensor(one), torch.as_tensor(other)
    if first.shape != second.shape or first.dtype != second.dtype:
        return f"{first.dtype} {tuple(first.shape)} | {second.dtype} {tuple(second.shape)}"
    if torch.equal(first.nan_to_num(nan=1e300), second.nan_to_num(nan=1e300)):
        return None
    distance = (first.double() - second.double()).abs().nan_to_num(nan=float("inf"))
    distance[(first == second) | (first.isnan() & second.isnan())] = 0  # infinite on both sides, or neither a number
    return f"{distance.max().item():.1e}"


def compare(before: Rows, now: Rows, brief: bool) -> int:
    """Print how rows differ, adapter by adapter, and return how many do."""
    names = list(dict.fromkeys((*before, *now)))
    wrong = 0
    for adapter in dict.fromkeys(map(adapter_of, names)):
        mine = [name for name in names if adapter_of(name) == adapter]
        found = {name: text for name in mine if (text := compared(before, now, name)) is not None}
        print(f"{adapter}: {len(mine) - len(found)} of {len(mine)} rows are equal bit for bit")
        for line in by_scenario(found) if brief else [f"{name}: {text}" for name, text in found.items()]:
            print(f"    {line}")
        wrong += len(found)
    print(f"{len(names) - wrong} of {len(names)} rows are equal bit for bit, {wrong} are not")
    return wrong


def compared(before: Rows, now: Rows, name: str) -> str | None:
    if name in before and name in now:
        return difference(before[name], now[name])
    return "only in the first" if name in before else "only in the second"


def by_scenario(found: dict[str, str]) -> list[str]:
    """Return a line for each scenario and kind of difference; all numbers are one kind, of which the largest stands."""
    groups: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for name, text in found.items():
        scenario, value = name.rsplit(" | ", 1)
        try:
            size, kind = float(text), "differ by at most"
        except ValueError:
            size, kind = 0.0, text
        groups.setdefault((scenario, kind), []).append((size, value))
    lines = []
    for (scenario, kind), rows in groups.items():
        size, value = max(rows, key=lambda row: row[0])
        lines.append(f"{scenario}: {len(rows)} rows {kind}{f' {size:.1e}' if size else ''} ({value})")
    return lines


def select(rows: Rows, only: list[str], alone: bool) -> Rows:
    return {
        name: value for name, value in rows.items() if wanted(name, only) and not (alone and " | two processes" in name)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["record", "compare", "rank"], help="what to do; rank is for internal use")
    parser.add_argument("file", type=Path, help="file of rows, written by record and read by compare")
    parser.add_argument("other", type=Path, nargs="?", help="second file of rows; by default rows are recorded again")
    parser.add_argument("--only", default="", help="names of adapters, separated by commas; all by default")
    parser.add_argument("--alone", action="store_true", help="leave the runs in two processes out")
    parser.add_argument("--brief", action="store_true", help="print a line for each scenario, not for each row")
    arguments = parser.parse_args()
    only = [name for name in arguments.only.split(",") if name]
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    if arguments.verb == "rank":
        faulthandler.dump_traceback_later(900, exit=True)  # a hang shows where
        torch.save(rank_rows(only, arguments.file.parent / "runs"), arguments.file)
        torch.distributed.barrier()
        sys.stderr.flush()
        os._exit(0)  # tearing gloo down can hang
    if arguments.verb == "record":
        rows = record(only, arguments.alone)
        torch.save(rows, arguments.file)
        print(f"{len(rows)} rows of {Path(ttalight.__file__).parent}")
        return
    before = select(torch.load(arguments.file, weights_only=True), only, arguments.alone)
    if arguments.other is None:
        now = record(only, arguments.alone)
    else:
        now = select(torch.load(arguments.other, weights_only=True), only, arguments.alone)
    sys.exit(compare(before, now, arguments.brief) > 0)


if __name__ == "__main__":
    main()
