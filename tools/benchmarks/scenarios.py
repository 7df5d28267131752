"""Scenarios that ``golden.py`` records: streams through ``wrap``, and runs of ``Trainer.adapt``."""

from __future__ import annotations

import copy
import io
import json
import tempfile
from collections.abc import Iterator
from typing import Any

from cases import Images, Plain, batches, ttalight  # isort: skip
import lightning
import torch
from torch import Tensor, nn

from ttalight.adapters import Adapter
from ttalight.callbacks import AdaptationCheckpoint, Recorder
from ttalight.data import Probed

__all__ = ["Rows", "Watch", "adapt", "make_adapter", "runs", "scenarios", "under"]

Rows = dict[str, Any]
COUNTERS = ("updates", "skipped", "recoveries", "bad_batches", "batches", "forwards", "backwards")
#: What differs from run to run, or says nothing about an adapter.
UNMEASURED = ("seconds", "images_per_second", "peak_memory_bytes", "environment", "source", "schema")


def under(name: str, rows: Rows) -> Rows:
    return {f"{name} | {key}": value for key, value in rows.items()}


# -- what is read


def make_adapter(make: Any, **options: Any) -> Adapter:
    """Return an adapter with options that its configuration does not fix."""
    fixed = getattr(make, "keywords", {})
    adapter: Adapter = make(**{"seed": 0, **{name: value for name, value in options.items() if name not in fixed}})
    return adapter


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


def saved(wrap: Any, stream: list[Tensor]) -> Rows:
    """Return the rows of adapted networks that take the state of another one, from a file."""
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


def scenarios(make: Any, net: Any) -> Iterator[tuple[str, Any]]:
    """Yield names of scenarios on a plain network, and functions that return their rows."""
    stream = batches()
    nan, byte = stream[2].clone(), (stream[3] * 255).to(torch.uint8)
    nan[1, 0, 0, 0], nan[2, 1] = float("nan"), float("inf")

    def wrap(**options: Any) -> Any:
        return make_adapter(make, **options).wrap(net())

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
    yield "saved", lambda: saved(wrap, stream)
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

    def run(folder: str, watch: Watch, reset: str = "domain", order: Any = None, **options: Any) -> Rows:
        return adapt(make_adapter(make, reset=reset), net(), folder, watch, order, **options)

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
