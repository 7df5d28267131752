"""Methods on frames of a street under made weather, and on frames of another camera than the network was trained with.

    python tools/benchmarks/segmentation.py --frames camvid --camvid espnet_p2q8_camvid12.pth \
        --cityscapes espnet_p2q8_cityscapes20.pth --output runs/segmentation [--every 3] [--rounds 2]

``--frames`` has images and labels of CamVid's test set, in ``images`` and ``labels``; the weights are those that S.
Mehta et al. have published of ESPNet. Corrupted frames are written to the output folder once. Runs that are there
already are not repeated, so that a stopped measurement continues. Prints two tables in Markdown, mean intersection over
union in percent, and writes a picture of one frame.

Weather: one continual stream, all conditions in turn in each round, nothing is announced and nothing is reset.
Camera: the network was trained on Cityscapes, and its nineteen classes are joined to those of CamVid. The control
normalises with mean and deviation of CamVid's frames in the place of those of Cityscapes.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ttalight  # isort: skip  (first: it makes torchvision importable)
import numpy as np
import torch
from espnet import espnet
from measuring import print_head, quiet
from PIL import Image
from torch import Tensor, nn

from ttalight.adapters import EATA, PTBN, STAG, Adapter, AlphaBN, CoTTA, Source, Tent
from ttalight.data import CamVidDataModule, Continual, PerDomain, SegmentationDataModule
from ttalight.data.corruptions import corrupt
from ttalight.data.label_maps import CAMVID_CLASSES, CITYSCAPES_CLASSES
from ttalight.reporting import Results, read_results
from ttalight.tasks import SegmentationTask

#: Mean and deviation of the pixels of the two cameras, B, G, R.
CAMVID = ((96.11, 94.18, 90.61), (71.49, 71.59, 70.84))
CITYSCAPES = ((72.39, 82.91, 73.16), (45.32, 46.15, 44.91))
CONDITIONS = ("clean", "fog", "frost", "snow", "brightness", "gaussian_noise")
#: Classes of Cityscapes that are one class of CamVid.
JOINED = {
    "sky": ("sky",), "building": ("building", "wall"), "pole": ("pole",), "road": ("road",),
    "pavement": ("sidewalk",), "tree": ("vegetation", "terrain"), "sign": ("traffic sign", "traffic light"),
    "fence": ("fence",), "car": ("car", "truck", "bus", "train"), "pedestrian": ("person",),
    "bicyclist": ("rider", "motorcycle", "bicycle"),
}  # fmt: skip
#: The last 1x1 convolution, behind which the network only scales up.
HEAD = "encoder.classifier.conv"
COLORS = (
    (128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (60, 40, 222), (128, 128, 0), (192, 128, 128),
    (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192), (0, 0, 0),
)  # fmt: skip


class JoinedClasses(nn.Module):
    """A network for Cityscapes whose classes are joined to CamVid's: the probabilities of a group are added.

    Args:
        network: Returns logits of Cityscapes' nineteen classes, and of what is none of them.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.groups = [[CITYSCAPES_CLASSES.index(name) for name in JOINED[own]] for own in CAMVID_CLASSES]

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return torch.stack([logits[:, group].logsumexp(1) for group in self.groups], 1)


def make_methods(head: str, source: Callable[[], Adapter] = Source) -> dict[str, Callable[[], Adapter]]:
    """Return what is compared, by name.

    Args:
        head: Name of the classifier in the task.
        source: The row of the unadapted network.
    """
    return {
        "Source": source,
        "PTBN": PTBN,
        "AlphaBN": AlphaBN,
        "Tent": Tent,
        "EATA": lambda: EATA(fisher="stream", fisher_samples=8),
        "Tent + STAG": lambda: Tent(terms=[STAG()], clip_norm=1.0, classifier=head),
        "CoTTA": lambda: CoTTA.preset("cityscapes", scales=(0.5, 1.0), reset="never"),
    }


def task(network: nn.Module) -> SegmentationTask:
    """Return the task of a network that normalises images itself."""
    return SegmentationTask(network, 12, mean=(0, 0, 0), std=(1, 1, 1))


def write_conditions(frames: Path, folder: Path, every: int) -> None:
    """Write each so many-th frame under all conditions, with its labels, in one folder a condition."""
    files = sorted((frames / "images").glob("*.png"))[::every]
    clean = torch.stack(
        [torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) for path in files]
    )
    for name in CONDITIONS:
        if (folder / "images" / name).is_dir():
            continue
        images = clean if name == "clean" else corrupt(clean, name, 5, table="imagenet", chunk_size=10)
        (folder / "labels" / name).mkdir(parents=True, exist_ok=True)
        part = folder / "images" / f".{name}"
        part.mkdir(parents=True, exist_ok=True)
        for path, image in zip(files, images, strict=True):
            shutil.copy(frames / "labels" / path.name, folder / "labels" / name / path.name)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(part / path.name)
        part.rename(folder / "images" / name)


def weather(folder: Path, batch_size: int, rounds: int) -> SegmentationDataModule:
    """Return the continual stream of all conditions."""
    return CamVidDataModule(
        root=str(folder), images="images/{domain}", maps="labels/{domain}", domains=CONDITIONS, num_workers=0,
        stream=Continual(rounds, shuffle=False), batch_size=batch_size,
    )  # fmt: skip


def camera(folder: Path, batch_size: int) -> SegmentationDataModule:
    """Return the clean frames at the size of the network for Cityscapes."""
    return CamVidDataModule(
        root=str(folder), images="images/clean", maps="labels/clean", num_workers=0, size=(768, 1024),
        stream=PerDomain(shuffle=False), batch_size=batch_size,
    )  # fmt: skip


def measure(run: Path, network: nn.Module, data: SegmentationDataModule, method: Adapter) -> Results:
    """Return the results of a run, which is made if it is not there."""
    if (run / "results.json").is_file() and (found := read_results(run))["complete"]:
        return found
    trainer = ttalight.Trainer(default_root_dir=str(run), accelerator="cpu", enable_progress_bar=False, logger=False)
    return trainer.adapt(task(network), data, method, overwrite=True)


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def weather_table(
    folder: Path, network: Callable[[], nn.Module], names: Sequence[str], batch_size: int, rounds: int
) -> None:
    """Measure and print the first table: a line a method and round, a column a condition."""
    print_head(["method", "round", *CONDITIONS, "mean", "pixel accuracy"])
    for name, make in make_methods(f"network.network.{HEAD}").items():
        if name not in names:
            continue
        results = measure(folder / "weather" / name, network(), weather(folder, batch_size, rounds), make())
        for visit in range(rounds):
            rows = [row for row in results["domains"] if row["visit"] == visit]
            values = [row["miou"] or 0.0 for row in rows]
            accuracy = sum(row["accuracy"] or 0.0 for row in rows) / len(rows)
            cells = [name, str(visit + 1), *map(percent, [*values, sum(values) / len(values), accuracy])]
            print(f"| {' | '.join(cells)} |", flush=True)


def camera_table(folder: Path, weights: str, names: Sequence[str], batch_size: int) -> None:
    """Measure and print the second table: a line a method."""
    print_head(["method", "mIoU", "pixel accuracy"])
    rows: list[tuple[str, Any, Callable[[], Adapter]]] = []
    for name, make in make_methods(f"network.network.network.{HEAD}").items():
        rows.append((name, CITYSCAPES, make))
        if name in ("Source", "PTBN"):
            rows.append((f"{name}, input statistics of the target", CAMVID, make))
    for name, statistics, make in rows:
        if name.split(",")[0] not in names or name in ("EATA", "CoTTA"):
            continue
        network = JoinedClasses(espnet(weights, *statistics))
        (row,) = measure(folder / "camera" / name, network, camera(folder, batch_size), make())["domains"]
        print(f"| {name} | {percent(row['miou'])} | {percent(row['accuracy'])} |", flush=True)


@torch.no_grad()
def picture(folder: Path, network: nn.Module, path: Path, condition: str = "fog", batch_size: int = 4) -> None:
    """Draw a frame under a condition, its labels, and predictions of the source and of PTBN."""
    data = CamVidDataModule(
        root=str(folder), images=f"images/{condition}", maps=f"labels/{condition}", num_workers=0,
        stream=PerDomain(shuffle=False), batch_size=batch_size,
    )  # fmt: skip
    data.setup("test")
    images, labels = data.on_after_batch_transfer(data.first_batch(), 0)
    source = network(images)[0].argmax(0)
    adapted = PTBN().wrap(network)(images)[0].argmax(0)
    colors = torch.tensor(COLORS, dtype=torch.uint8)
    truth = colors[labels[0].where(labels[0] < 11, 11)]
    parts = [(255 * images[0]).byte().permute(1, 2, 0), truth, colors[source], colors[adapted]]
    top, bottom = torch.cat(parts[:2], 1), torch.cat(parts[2:], 1)
    drawn = Image.fromarray(torch.cat([top, bottom]).numpy())
    drawn.resize((720, 540), Image.Resampling.LANCZOS).save(path, quality=85)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=Path, required=True, help="folder with images and labels")
    parser.add_argument("--camvid", help="weights of ESPNet for CamVid")
    parser.add_argument("--cityscapes", help="weights of ESPNet for Cityscapes")
    parser.add_argument("--output", type=Path, default=Path("runs/segmentation"))
    parser.add_argument("--every", type=int, default=1, help="take each so many-th frame")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--methods", default=",".join(make_methods("")))
    parser.add_argument("--picture", type=Path, help="draw a frame, its labels and predictions to this file")
    arguments = parser.parse_args(words)
    quiet(1)
    write_conditions(arguments.frames, arguments.output, arguments.every)
    names = arguments.methods.split(",")
    if arguments.camvid and arguments.picture:
        picture(arguments.output, espnet(arguments.camvid, *CAMVID), arguments.picture)
    if arguments.camvid:
        weather_table(
            arguments.output, lambda: espnet(arguments.camvid, *CAMVID), names, arguments.batch_size, arguments.rounds
        )
    if arguments.cityscapes:
        camera_table(arguments.output, arguments.cityscapes, names, arguments.batch_size)


if __name__ == "__main__":
    main()
