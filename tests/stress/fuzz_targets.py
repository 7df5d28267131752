"""Readers of this package, each with whole files to start from, for ``fuzz.py``."""

from __future__ import annotations

import io
import json
import random
import sys
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import ttalight  # noqa: F401  (first: it makes torchvision importable beside a CPU build of torch)
from ttalight.adapters import EMABN, Source, Tent
from ttalight.callbacks.adaptation_files import read_last, write_checkpoint
from ttalight.data.digit_files import read_idx, read_libsvm, read_mat
from ttalight.data.image_files import read_image
from ttalight.data.layout import read_npy
from ttalight.data.streams import Domain, PerDomain, Stream
from ttalight.models import create_encoder
from ttalight.reporting import read_predictions, read_results
from ttalight.reporting.compare import compare
from ttalight.tasks.checkpoint import read_checkpoint

#: What a reader may raise; the command line shows these as one line.
ALLOWED = (ValueError, TypeError, OSError)
TARGETS = (
    "checkpoint", "weights", "resume", "npy", "npz", "results", "stream", "config", "image", "digits", "batch",
)  # fmt: skip


@dataclass
class Target:
    """Readers of inputs, and whole files to start from."""

    read: Callable[[bytes], Any]
    whole: list[bytes]


def saved(content: Any, legacy: bool = False) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def archived(compressed: bool = False, **arrays: Any) -> bytes:
    file = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(file, **arrays)
    return file.getvalue()


def array(values: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, values, allow_pickle=True)
    return file.getvalue()


def claiming(shape: str, kind: str = "|u1") -> bytes:
    """Return a .npy file whose header claims a shape."""
    header = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64)


def bomb(name: str, size: int = 1 << 26) -> bytes:
    """Return an archive whose member unpacks to a thousand times its size."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr(name, bytes(size))
    return file.getvalue()


def in_file(folder: Path, name: str, read: Callable[[Path], Any]) -> Callable[[bytes], Any]:
    path = folder / name

    def reads(data: bytes) -> Any:
        path.write_bytes(data)
        return read(path)

    return reads


def make(name: str, folder: Path) -> Target:
    """Return a target that works in a folder."""
    return globals()[f"make_{name}"](folder)


def state() -> dict[str, Any]:
    return {"state_dict": {"conv.weight": torch.rand(4, 3), "n": torch.tensor(3)}, "hyper_parameters": {"lr": 0.1}}


def make_checkpoint(folder: Path) -> Target:
    read = in_file(folder, "a.ckpt", lambda path: read_checkpoint(str(path), "weights"))
    whole = [saved(state()), saved(state(), legacy=True), bomb("archive/data.pkl"), bomb("archive/data/0")]
    return Target(read, [*whole, saved({"a": torch.zeros(1).expand(1 << 40)})])


def make_weights(folder: Path) -> Target:
    encoder = create_encoder("cifar_resnet8")
    plain = {name: value.half() for name, value in encoder.state_dict().items()}
    read = in_file(folder, "a.pt", lambda path: create_encoder("cifar_resnet8", pretrained=str(path)))
    return Target(read, [saved(plain), bomb("archive/data.pkl")])


def make_resume(folder: Path) -> Target:
    content = {"identity": "{}", "batches": 3, "adapter": {}, "recorder": {}, "events": {}, "random": {}}

    def read(data: bytes) -> Any:
        import hashlib

        for old in (folder / "adaptation").glob("*"):
            old.unlink()
        digest = hashlib.sha256(data).hexdigest()[:16]  # whoever changes a file can change its name
        (folder / "adaptation" / f"batch-3-{digest}.ckpt").write_bytes(data)
        return read_last(folder)

    write_checkpoint(folder, 3, content)
    return Target(read, [next((folder / "adaptation").glob("*.ckpt")).read_bytes(), saved([1]), saved({"format": 1})])


def make_npy(folder: Path) -> Target:
    def read(path: Path) -> Any:
        return read_npy(path).sum()

    whole = [array(np.arange(24, dtype=np.uint8).reshape(2, 3, 4)), array(np.array([{}], dtype=object))]
    claims = ["(9223372036854775807,)", "(4611686018427387904, 8)", "(-1,)", "(True,)", "(10**12,)", "()", "(0, 3)"]
    return Target(in_file(folder, "a.npy", read), whole + [claiming(claim) for claim in claims])


def make_npz(folder: Path) -> Target:
    columns = {name: np.zeros(4, np.int32) for name in ("position", "visit", "domain", "sample", "label", "prediction")}
    whole = [archived(domains=np.array(["a"]), **columns), archived(compressed=True, **columns), bomb("position.npy")]
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as claims:
        claims.writestr("position.npy", claiming("(4000000000000,)"))
    return Target(in_file(folder, "predictions.npz", read_predictions), [*whole, file.getvalue()])


def make_results(folder: Path) -> Target:
    averages = dict.fromkeys(("accuracy", "error", "nll", "ece"), 0.5)
    row = {**averages, "name": "fog", "severity": 5, "visit": 0, "samples": 9, "top5": None, "seconds": 1.0}
    protocol = dict.fromkeys(
        ("stream", "stream_hash", "severity", "samples", "reset", "prediction", "batch_size", "steps", "optimizer",
         "lr", "norm", "sharding")
    )  # fmt: skip
    cost = ("forwards_per_batch", "backwards_per_batch", "peak_memory_bytes", "images_per_second", "adapted_parameters")
    results = {
        "schema": 1, "complete": True, "method": "Tent", "seed": 0, "protocol": protocol, "mean": averages,
        "domains": [{**row, "images_per_second": 2.0}], "weighted_mean": averages, "cost": dict.fromkeys(cost),
        "source": {"file": None, "sha256": None}, "environment": {},
    }  # fmt: skip

    def read(path: Path) -> Any:
        read_results(path)
        return compare([str(folder)])

    deep = b"[" * 100_000
    return Target(in_file(folder, "results.json", read), [json.dumps(results).encode(), deep, b'{"schema": 1e999}'])


def make_stream(folder: Path) -> Target:
    stream = PerDomain().build([Domain("fog", 3), Domain("clean")], [np.zeros(5, int), np.zeros(7, int)], 3, 0)
    stream.save(folder / "whole.npz")
    whole = (folder / "whole.npz").read_bytes()
    return Target(in_file(folder, "a.npz", lambda path: Stream.load(path).batch(0)), [whole, bomb("header.npy")])


def make_config(folder: Path) -> Target:
    """Run the command on damaged configurations; those that are whole only print themselves."""
    from ttalight.cli import main

    text = b"""\
name: a
seed_everything: 3
model: {class_path: SupervisedTask, init_args: {encoder: cifar_resnet8}}
data: {class_path: DigitsDataModule, init_args: {limit: 10, domains: [clean, fog]}}
adapter:
  class_path: Tent
  init_args:
    lr: 1.0e-3
trainer: {accelerator: cpu}
"""

    def read(path: Path) -> Any:
        silent = io.StringIO()
        before = sys.stdout, sys.stderr
        sys.stdout = sys.stderr = silent
        try:
            main(["adapt", "--config", str(path), "--trainer.default_root_dir", str(folder), "--print_config"])
        except SystemExit as stop:
            if stop.code not in (0, 1, 2) or "Traceback" in silent.getvalue():
                raise RuntimeError(f"exit code {stop.code}") from None
        finally:
            sys.stdout, sys.stderr = before

    return Target(in_file(folder, "a.yaml", read), [text, b"[" * 3000, b"a: &a [*a]"])


def make_image(folder: Path) -> Target:
    from PIL import Image

    picture = Image.fromarray(np.arange(20 * 30 * 3, dtype=np.uint8).reshape(20, 30, 3))
    whole = []
    for kind in ("PNG", "JPEG", "BMP", "TIFF", "WEBP", "PPM", "GIF", "EPS"):
        file = io.BytesIO()
        picture.save(file, kind)
        whole.append(file.getvalue())
    return Target(in_file(folder, "a.png", lambda path: read_image(path, 16)), whole)


def make_digits(folder: Path) -> Target:
    import bz2
    import gzip
    import struct
    import zlib

    idx = struct.pack(">HBBII", 0, 8, 2, 2, 3) + bytes(6)
    text = b"1 1:0.5 3:-1\n2 2:1\n"
    element = struct.pack("<IIII", 6, 8, 6, 0) + struct.pack("<IIii", 5, 8, 1, 2) + b"\x01\x00\x01\x00a\0\0\0"
    matrix = element + struct.pack("<II", 9, 16) + bytes(16)
    packed = zlib.compress(struct.pack("<II", 14, len(matrix)) + matrix)
    mat = bytes(126) + b"IM" + struct.pack("<II", 15, len(packed)) + packed
    readers = {
        "a-idx": read_idx, "a-idx.gz": read_idx, "a.mat": read_mat,
        "a.txt": lambda path: read_libsvm(path, 3), "a.bz2": lambda path: read_libsvm(path, 3),
    }  # fmt: skip

    def read(data: bytes) -> Any:
        outcome: list[Exception | None] = []
        for name, reader in readers.items():
            (folder / name).write_bytes(data)
            try:
                reader(folder / name)
                outcome.append(None)
            except ALLOWED as error:
                outcome.append(error)
        if all(outcome):
            raise outcome[0]  # type: ignore[misc]

    return Target(read, [idx, gzip.compress(idx), text, bz2.compress(text), mat, gzip.compress(bytes(1 << 22))])


def make_batch(folder: Path) -> Target:
    """Adapt to batches of arbitrary values; whatever came, the model is finite and adapts to the next good one."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(), torch.nn.Linear(4, 3),
    )  # fmt: skip
    good = torch.rand(4, 3, 8, 8)

    def read(data: bytes) -> None:
        draw = random.Random(data)
        kind = draw.choice([torch.float32, torch.float32, torch.float32, torch.float64, torch.uint8, torch.int64])
        shape = [draw.choice([0, 1, 2, 5]), draw.choice([3, 3, 3, 1]), draw.choice([8, 8, 5, 2]), draw.choice([8, 3])]
        size = 4 * int(np.prod(shape))
        bits = np.frombuffer(((data or b"?") * (size + 1))[:size], "<f4")
        with np.errstate(all="ignore"):
            images = torch.from_numpy(bits.copy()).reshape(shape).to(kind)
        adapter = draw.choice([Tent, EMABN, Source])(
            reset="never", on_bad_batch=draw.choice(["error", "skip", "source"])
        )
        adapted = adapter.wrap(net)
        try:
            adapted(good)
            adapted(images)
        except RuntimeError as error:
            if (
                "but got" not in str(error)
                and "should be the same" not in str(error)
                and "Kernel size" not in str(error)
            ):
                raise  # not the network's own words on channels, type and size
        finally:
            logits = adapted(good)
            finite = all(torch.isfinite(value).all() for value in adapted.state_dict()["tensors"].values())
            adapted.release()
            if not finite or not torch.isfinite(logits).all():
                raise AssertionError("the model is not finite any more")

    return Target(read, [np.float32([value]).tobytes() for value in (0.5, np.nan, np.inf, 1e38, -1e-40, 0)])
