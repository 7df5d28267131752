"""Watches, risk monitors and estimates of accuracy on corrupted CIFAR-10 with the public ResNet-20.

    python tools/benchmarks/monitoring.py record --root FOLDER --weights resnet20-12fca82f.th --out runs
    python tools/benchmarks/monitoring_tables.py watch --out runs

FOLDER has ``cifar-10-batches-py``. ``record`` runs every method over the corruptions (generated, severity 5, batches of
200, in float32) and keeps logits and signals; a case that is there already is not run again.
``monitoring_tables.py`` prints the tables.
"""

from __future__ import annotations

import argparse
import pickle
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import ttalight  # isort: skip # noqa: F401  (first: it makes torchvision importable)
import numpy as np
import torch
from torch import Tensor

from ttalight import adapters as A
from ttalight.data import Correlated
from ttalight.data.corruptions import COMMON, corrupt
from ttalight.data.streams import Domain
from ttalight.monitoring import Watch
from ttalight.monitoring.passes import adapted_outputs
from ttalight.tasks import SupervisedTask

#: Methods with their authors' settings for CIFAR.
METHODS = (
    "Source", "PTBN", "Tent", "AlphaBN", "EMABN", "FIND", "RPL", "ETA", "EATA", "RDumb", "SAR", "DeYO", "SHOT", "TIPI",
    "ROID", "CMF", "CoTTA", "RoTTA", "NOTE", "SANTA", "RMT", "AdaContrast", "NCTTA", "MoETTA",
)  # fmt: skip
#: Learning rates of Tent at which it fails, at once or in the course of a stream.
TOO_HIGH = (1.0, 0.1, 0.03, 0.01)
BATCH, CALIBRATION, EVERY = 200, 1000, 5
SIGNALS = ("commonest_share", "effective_classes", "low_entropy", "high_entropy", "drift", "step")


def task(weights: Path) -> SupervisedTask:
    return SupervisedTask(
        encoder="cifar_resnet20", num_classes=10, stem="cifar", weights=str(weights), mean=[0.485, 0.456, 0.406],
        std=[0.229, 0.224, 0.225], channels_last=True,
    ).eval()  # fmt: skip


def clean_images(root: Path) -> tuple[Tensor, Tensor]:
    with open(root / "cifar-10-batches-py" / "test_batch", "rb") as file:
        read = pickle.load(file, encoding="latin1")
    return torch.from_numpy(read["data"]).view(-1, 3, 32, 32), torch.tensor(read["labels"])


def domains(root: Path, out: Path, limit: int) -> tuple[dict[str, Tensor], Tensor]:
    """Return the corrupted images by corruption, and their labels."""
    images, labels = clean_images(root)
    path = out / f"images-{limit}.pt"
    if not path.exists():
        torch.save({name: corrupt(images[:limit], name, 5) for name in COMMON}, path)
    made: dict[str, Tensor] = torch.load(path)
    return made, labels[:limit]


Batches = list[tuple[str, Tensor, Tensor]]


def in_order(made: dict[str, Tensor], labels: Tensor) -> Batches:
    return [
        (name, images[i : i + BATCH], labels[i : i + BATCH])
        for name, images in made.items()
        for i in range(0, len(images), BATCH)
    ]


def correlated(made: dict[str, Tensor], labels: Tensor) -> Batches:
    """Return the batches of a stream whose classes come in runs, Dirichlet with gamma 0.1."""
    names = list(made)
    order = Correlated().build([Domain(name) for name in names], [labels.numpy()] * len(names), BATCH, 0)
    batches = []
    for start, stop in zip(order.offsets[:-1], order.offsets[1:], strict=True):
        which = [order.visits[visit].domain for visit in order.visit[start:stop]]
        sample = order.sample[start:stop]
        images = torch.stack([made[names[domain]][i] for domain, i in zip(which, sample, strict=True)])
        batches.append((names[which[0]], images, labels[torch.from_numpy(np.asarray(sample, dtype=np.int64))]))
    return batches


class Recording:
    """Keeps what a monitor could see beside the logits."""

    def __init__(self, calibration: Tensor | None, features: bool) -> None:
        self.calibration, self.features = calibration, features
        self.rows: list[dict[str, Any]] = []

    def observe(self, engine: Any, logits: Tensor) -> None:
        row: dict[str, Any] = {}
        if self.features:
            _ = engine.net.head
            row["features"] = adapted_outputs(engine, engine.net.images).features
        if self.calibration is not None and engine.batches % EVERY == 1:
            parts = self.calibration.split(BATCH)
            row["calibration"] = torch.cat([adapted_outputs(engine, part.float() / 255).logits for part in parts])
        self.rows.append(row)


def play(adapted: Any, batches: Batches, domain_resets: bool) -> Iterator[tuple[str, Tensor, Tensor]]:
    last = None
    for name, images, labels in batches:
        if domain_resets and last not in (None, name):
            adapted.reset()
        last = name
        yield name, adapted(images.float() / 255), labels


def record_case(path: Path, adapted: Any, batches: Batches, recording: Recording, domain_resets: bool) -> None:
    watch = Watch(action=lambda engine, trip: None)
    adapted.watch(watch)
    adapted.engine.observers.append(recording)
    found: dict[str, list[Any]] = {"domain": [], "logits": [], "labels": [], "signals": []}
    for name, logits, labels in play(adapted, batches, domain_resets):
        for key, value in (("domain", name), ("logits", logits.clone()), ("labels", labels)):
            found[key].append(value)
        found["signals"].append(dict(watch.signals))
    trips = [(trip.batch, trip.signal, trip.value, trip.limit) for trip in watch.trips]
    reference = watch._reference
    kept = {"entropy": reference.entropy, "effective_classes": reference.effective_classes} if reference else {}
    torch.save(found | {"rows": recording.rows, "trips": trips, "reference": kept}, path)
    wrong = torch.cat([a.argmax(1) != b for a, b in zip(found["logits"], found["labels"], strict=True)])
    print(f"{path.stem}: {100 * wrong.double().mean():.2f} {trips[:3]}", flush=True)


def make(name: str, source: Tensor, **more: Any) -> Any:
    options: dict[str, Any] = {"seed": 0} | ({} if name == "RDumb" else {"reset": "never"}) | more
    if name in ("EATA", "SANTA", "RMT"):
        options["source"] = [source[:BATCH]]
    return getattr(A, name)(**options)


def record(arguments: argparse.Namespace) -> None:
    made, labels = domains(arguments.root, arguments.out, arguments.limit)
    images, clean_labels = clean_images(arguments.root)
    calibration, source = images[-CALIBRATION:], images[-2 * CALIBRATION : -CALIBRATION].float() / 255
    torch.save(clean_labels[-CALIBRATION:].clone(), arguments.out / "calibration-labels.pt")
    batches, brief = in_order(made, labels), in_order({n: x[: 2 * BATCH] for n, x in made.items()}, labels)
    runs_of_classes = correlated({name: x[: 2 * BATCH] for name, x in made.items()}, labels[: 2 * BATCH])
    clean = in_order({"clean": images[: 5 * arguments.limit]}, clean_labels)
    cases: dict[str, tuple[Callable[[], Any], Batches, bool]] = {}
    for lr in TOO_HIGH:
        cases[f"lr={lr}"] = (partial(A.Tent, lr=lr, reset="never"), batches[:10] if lr == 1.0 else batches, False)
    cases["lr=1.0-clean"] = (partial(A.Tent, lr=1.0, reset="never"), clean, False)
    for name in METHODS:
        cases[name] = (partial(make, name, source), batches, False)
    for name in ("Source", "PTBN", "Tent"):
        cases[f"{name}-clean"] = (partial(make, name, source), clean, False)
        cases[f"{name}-correlated"] = (partial(make, name, source), runs_of_classes, False)
    for name in METHODS:
        cases[f"{name}-resets"] = (partial(make, name, source, reset="domain"), brief, True)
    for name, (method, stream, domain_resets) in cases.items():
        if arguments.cases and name not in arguments.cases:
            continue
        path = arguments.out / f"case-{name}.pt"
        if not path.exists():
            followed = name.split("-")[0] in ("Source", "PTBN", "Tent") and not name.endswith("-resets")
            recording = Recording(calibration if followed or "lr=" in name else None, followed)
            with method().wrap(task(arguments.weights)) as adapted:
                record_case(path, adapted, stream, recording, domain_resets)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["record"])
    parser.add_argument("--root", type=Path, help="folder with cifar-10-batches-py")
    parser.add_argument("--weights", type=Path, help="resnet20-12fca82f.th")
    parser.add_argument("--out", type=Path, required=True, help="folder of the recorded cases")
    parser.add_argument("--limit", type=int, default=1000, help="images of each corruption")
    parser.add_argument("--cases", nargs="*", help="names of the cases to record; all by default")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    arguments.out.mkdir(parents=True, exist_ok=True)
    record(arguments)


if __name__ == "__main__":
    main()
