"""Record what every adapter computes, and compare it with what another version of the package computes.

    python tools/benchmarks/golden.py record FILE [--only Tent,SAR] [--alone]
    python tools/benchmarks/golden.py compare FILE [OTHER] [--only Tent,SAR] [--alone] [--brief]

``record`` runs every adapter, in several configurations, on small networks with BatchNorm, GroupNorm and LayerNorm in
double precision, and saves {row name: value}. A name is ``configuration | network | scenario | value``. Scenarios are
plain streams through ``wrap`` (resets, saved states, copies, bad batches) and runs of ``Trainer.adapt`` (one process,
resumed in the middle, two processes). Values are logits, state tensors, the optimizer's state as one vector of a kind,
counters, results, and the type of an error. Only the public interface is used.

``compare`` records anew, or reads OTHER, and prints how many rows are equal bit for bit, every row that differs with
its largest absolute difference, and every row that is on one side only. It exits with 1 if there is any. ``--brief``
prints one line for each scenario instead. Run it with another checkout first on PYTHONPATH to record that one.
"""

from __future__ import annotations

import argparse
import copy
import faulthandler
import io
import json
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from cases import CONFIGURATIONS, NETWORKS, Images, Plain, batches, networks_of, ttalight  # isort: skip
import lightning
import torch
from torch import Tensor, nn

from ttalight.adapters import Adapter
from ttalight.callbacks import AdaptationCheckpoint, Recorder
from ttalight.data import Probed

Rows = dict[str, Any]
COUNTERS = ("updates", "skipped", "recoveries", "bad_batches", "batches", "forwards", "backwards")
#: What differs from run to run, or says nothing about an adapter.
UNMEASURED = ("seconds", "images_per_second", "peak_memory_bytes", "environment", "source", "schema")
RANKS = 2


def under(name: str, rows: Rows) -> Rows:
    return {f"{name} | {key}": value for key, value in rows.items()}


# -- what is read


def read_state(state: dict[str, Any]) -> Rows:
    """Return the tensors of an adaptation state by name, and the optimizer's as one vector of each kind."""
    rows = {f"tensor {name}": value.clone() for name, value in state.get("tensors", {}).items()}
    kinds: dict[str, list[Tensor]] = {}
    optimizer = state.get("optimizer") or {"state": {}}
    for index in sorted(optimizer["state"]):
        for kind, value in optimizer["state"][index].items():
            if value is not None:
                kinds.setdefault(kind, []).append(torch.as_tensor(value, dtype=torch.float64).flatten())
    for kind, values in kinds.items():
        whole = torch.cat(values)
        rows[f"optimizer {kind}"] = whole.max() if kind == "step" else whole
    return rows


def read_counters(engine: Any) -> Rows:
    """Return the counters of an engine, which may keep some of them at its network."""
    places = [engine, getattr(engine, "net", None)]
    found = {name: [getattr(place, name) for place in places if hasattr(place, name)] for name in COUNTERS}
    rows = {f"count {name}": float(values[0]) for name, values in found.items() if values}
    return rows | {f"last {name}": float(value) for name, value in (getattr(engine, "last", None) or {}).items()}


def read(adapted: Any) -> Rows:
    return read_state(adapted.state_dict()) | read_counters(adapted.engine)


def play(adapted: Any, stream: list[Tensor], begin: int = 0) -> Rows:
    """Return the logits of a stream's batches, or the type of the error that one ends with."""
    rows: Rows = {}
    for number, images in enumerate(stream, begin):
        name = f"{number}{'' if images.dtype == torch.float64 and images.isfinite().all() else ', bad'}"
        try:
            rows[f"logits {name}"] = adapted(images).clone()
        except Exception as error:
            rows[f"error {name}"] = type(error).__name__
    return rows


# -- through wrap


def scenarios(make: Any, net: Any) -> Iterator[tuple[str, Any]]:
    """Yield names of scenarios on a plain network, and functions that return their rows."""
    stream = batches()
    nan, byte = stream[2].clone(), (stream[3] * 255).to(torch.uint8)
    nan[1, 0, 0, 0], nan[2, 1] = float("nan"), float("inf")

    def wrap(**options: Any) -> Any:
        fixed = getattr(make, "keywords", {})
        return make(**{"seed": 0, **{name: value for name, value in options.items() if name not in fixed}}).wrap(net())

    def resets() -> Rows:
        adapted = wrap(reset="never")
        rows = play(adapted, stream) | read(adapted)
        adapted.reset()
        rows |= {f"{name}, after a reset": value for name, value in read_state(adapted.state_dict()).items()}
        rows |= play(adapted, stream[1:3], 6)
        net = adapted.release()
        return rows | {f"released {name}": value.double().sum() for name, value in net.state_dict().items()}

    def by_domain() -> Rows:
        adapted = wrap(reset="domain")
        rows = play(adapted, stream[:2])
        adapted.reset()
        return rows | play(adapted, stream[2:4], 2) | read(adapted)

    def by(reset: Any) -> Any:
        def run() -> Rows:
            adapted = wrap(reset=reset)
            return play(adapted, stream) | read(adapted)

        return run

    def saved() -> Rows:
        first, fresh, used = (wrap(reset="never") for _ in range(3))
        rows = play(first, stream[:2])
        file = io.BytesIO()
        torch.save(first.state_dict(), file)
        play(used, stream[3:5])
        for name, adapted in (("fresh", fresh), ("used", used)):
            file.seek(0)
            adapted.load_state_dict(torch.load(file, weights_only=True))
            rows |= under(name, play(adapted, stream[2:5], 2) | read(adapted))
        return rows

    def copied() -> Rows:
        adapted = wrap(reset="never")
        play(adapted, stream[:2])
        twin = copy.deepcopy(adapted)
        rows = under("copy", play(twin, stream[2:4], 2) | read(twin))
        return rows | under("moved", play(adapted.to("cpu"), stream[2:4], 2) | read(adapted))

    def bad(policy: str, reset: Any) -> Any:
        def run() -> Rows:
            adapted = wrap(reset=reset, on_bad_batch=policy)
            return play(adapted, [*stream[:2], nan, stream[3], byte, *stream[4:], nan]) | read(adapted)

        return run

    yield "never", resets
    yield "domain", by_domain
    yield "batch", by("batch")
    yield "2 updates", by(2)
    yield "saved", saved
    yield "copied", copied
    for policy in ("error", "skip", "source"):
        yield f"bad {policy}", bad(policy, "never")
    yield "bad skip 2 updates", bad("skip", 2)


# -- through the Trainer


class Watch(lightning.Callback):
    """Keeps logits and the adapted state of a run, which it stops after a batch if asked."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop, self.logits, self.state = stop, [], {}

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        self.handle = pl_module.register_forward_hook(lambda module, _, logits: self.logits.append(logits.clone()))

    def on_test_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, *_: Any):
        adapter = next(callback for callback in trainer.callbacks if isinstance(callback, Adapter))
        self.state = read_state(adapter.state_dict()) | read_counters(adapter.engine)
        if batch_idx == self.stop:
            raise KeyError("stopped")

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        self.handle.remove()

    def rows(self) -> Rows:
        return {f"logits {number}": logits for number, logits in enumerate(self.logits)} | self.state


def adapt(adapter: Adapter, net: nn.Module, folder: str, watch: Watch, order: Any = None, **options: Any) -> Rows:
    """Return the rows of one run of ``Trainer.adapt``."""
    devices = options.pop("devices", 1)
    trainer = ttalight.Trainer(
        default_root_dir=folder, accelerator="cpu", devices=devices, precision="64-true", logger=False,
        strategy="ddp" if devices > 1 else "auto", enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[Recorder(), watch, AdaptationCheckpoint(every=1)],
    )  # fmt: skip
    module = net if isinstance(net, lightning.LightningModule) else Plain(net)
    results = trainer.adapt(module, Images(batch_size=4, stream=order), adapter, **options)
    return watch.rows() | {f"result {key}": value for key, value in flattened(results).items()}


def flattened(results: Any) -> Rows:
    """Return numbers of each section of results as one vector, and texts as one text."""
    rows: Rows = {}
    for section, value in results.items():
        leaves = list(leaves_of(value)) if section not in UNMEASURED else []
        numbers = [float("nan") if leaf is None else float(leaf) for leaf in leaves if not isinstance(leaf, str)]
        texts = [leaf for leaf in leaves if isinstance(leaf, str)]
        rows |= {section: torch.tensor(numbers, dtype=torch.float64)} if numbers else {}
        rows |= {f"{section} texts": json.dumps(texts)} if texts else {}
    return rows


def leaves_of(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        for key in sorted(value):
            if key not in UNMEASURED:
                yield from leaves_of(value[key])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from leaves_of(item)
    else:
        yield value


def runs(make: Any, net: Any) -> Iterator[tuple[str, Any]]:
    """Yield names of runs in one process, and functions that return their rows."""
    fixed = getattr(make, "keywords", {})

    def run(folder: str, watch: Watch, reset: str = "domain", order: Any = None, **options: Any) -> Rows:
        adapter = make(seed=0, **({} if "reset" in fixed else {"reset": reset}))
        return adapt(adapter, net(), folder, watch, order, **options)

    def whole(**options: Any) -> Rows:
        with tempfile.TemporaryDirectory() as folder:
            return run(folder, Watch(), **options)

    def resumed(stop: int, reset: str) -> Rows:
        with tempfile.TemporaryDirectory() as folder:
            try:
                run(folder, Watch(stop), reset)
            except KeyError:
                return run(folder, Watch(), reset, resume=folder)
        raise AssertionError("the run was to stop")

    yield "trainer domain", whole
    yield "trainer resumed never", lambda: resumed(3, "never")
    yield "trainer resumed domain", lambda: resumed(2, "domain")
    yield "trainer probed", lambda: whole(reset="never", order=Probed(every=6, samples=5))


# -- two processes


def rank_rows(only: list[str], folder: Path) -> Rows:
    """Return the rows of one of two processes, which share a folder."""
    rows: Rows = {}
    for name, make in chosen(only):
        network = networks_of(name)[0]
        for shard, reset in (("domain", "domain"), ("batch", "never")):
            fixed = getattr(make, "keywords", {})
            adapter = make(seed=0, **({} if "reset" in fixed else {"reset": reset}))
            run = partial(adapt, adapter, NETWORKS[network](), str(folder / name / shard), Watch())
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
    distance = (first.double() - second.double()).abs()
    return f"{distance.nan_to_num(nan=float('inf')).max().item():.1e}"


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
    """Return a line for each scenario and kind of difference, numbers by their power of ten."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, text in found.items():
        scenario, value = name.rsplit(" | ", 1)
        groups.setdefault((scenario, text[3:] if text[1:2] == "." else text), []).append(value)
    return [f"{scenario}: {text}: {len(names)} rows, first {names[0]}" for (scenario, text), names in groups.items()]


def select(rows: Rows, only: list[str], alone: bool) -> Rows:
    return {
        name: value for name, value in rows.items() if wanted(name, only) and not (alone and " | two processes" in name)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["record", "compare", "rank"], help="what to do; rank is for internal use")
    parser.add_argument("file", type=Path, help="file of rows, written by record and read by compare")
    parser.add_argument("other", type=Path, nargs="?", help="second file of rows; by default rows are recorded anew")
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
