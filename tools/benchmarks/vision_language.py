r"""Every method for vision-language models on a small real one: accuracy, calibration and cost.

    python tools/benchmarks/vision_language.py --text MINILM --image efficientnet_lite0.pth --small small \
        --projection runs/vision_language/projection/checkpoints/last.ckpt --root FOLDER --set unseen

``small`` is what tools/benchmarks/small_towers.py writes, and the projection what the configuration
configs/vision_language/projection.yaml trains. Sets: ``unseen`` (the five classes of CIFAR-10 that were not trained on,
under the fifteen corruptions at severity 5), ``photographs`` (250 classes under five corruptions at severity 3) and
``cifar100`` (clean). The source is restored for every corruption. Methods that read features alone run on saved
embeddings. A run that is there already is not made again, and the table is of all runs in ``--out``.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import warnings
from pathlib import Path
from typing import Any

import ttalight  # isort: skip # noqa: F401  (first: it makes torchvision importable)
import torch
from lightning import LightningModule, seed_everything
from small_towers import CIFAR10, SEEN, SIZE, TEMPLATES, SmallModel

from ttalight import Trainer
from ttalight import adapters as A
from ttalight.adapters.feature import FeatureAdapter
from ttalight.adapters.views import ViewAdapter
from ttalight.data import (
    CorruptedDataModule,
    EmbeddingsDataModule,
    ImageDataModule,
    ImageFolderDataModule,
    save_embeddings,
)
from ttalight.tasks import EmbeddingTask, VisionLanguageTask

SCALE, BATCH = 30.0, 50
PHOTO_DOMAINS = ["gaussian_noise", "motion_blur", "fog", "contrast", "jpeg_compression"]


def make_data(given: argparse.Namespace, seed: int) -> ImageDataModule:
    """Return the data of a set, in an order of its own for each seed."""
    arguments: dict[str, Any] = {"batch_size": BATCH, "seed": seed, "limit": given.limit}
    if given.set == "unseen":
        classes = list(range(SEEN, len(CIFAR10)))
        if given.domains:
            arguments["domains"] = given.domains.split(",")
        return CorruptedDataModule(
            root=str(given.root), classes=classes, resize=SIZE, severity=5, generate=True, **arguments
        )
    size, domains = (224, PHOTO_DOMAINS) if given.set == "photographs" else (SIZE, ["clean"])
    return ImageFolderDataModule(
        root=str(given.small / given.set),
        resize=size,
        interpolation="bicubic",
        domains=given.domains.split(",") if given.domains else domains,
        severity=3,
        **arguments,
    )


def make_task(given: argparse.Namespace, templates: tuple[str, ...] = TEMPLATES) -> VisionLanguageTask:
    """Return the model as a task for the names of a set."""
    names = torch.load(given.small / f"{given.set}.pt", weights_only=True)["names"]
    model = SmallModel(str(given.text), str(given.image), given.small, str(given.projection))
    return VisionLanguageTask(
        image_tower=model, class_names=_distinct(names), templates=list(templates), tokenizer=model.text.tokenize,
        scale=SCALE, mean=[0.5] * 3, std=[0.5] * 3, channels_last=True,
    )  # fmt: skip


def _distinct(names: list[str]) -> list[str]:
    """Return names of which none is there twice, as two classes of ImageNet have the same."""
    return [name if names.index(name) == place else f"{name} {place}" for place, name in enumerate(names)]


def make_method(name: str, images: int, folder: Path) -> A.Adapter:
    """Return a method by name, with its defaults, or else with what is published for ImageNet.

    Args:
        name: Name of the method.
        images: Images of a corruption, which OnZeta needs to know.
        folder: Where embeddings of views are kept.
    """
    arguments: dict[str, Any] = {}
    cls: Any = getattr(A, name)
    if name == "OnZeta":
        arguments["images"] = images
    if issubclass(cls, ViewAdapter):
        arguments["cache"] = str(folder)
    return cls(seed=0, **arguments)


def run(given: argparse.Namespace, name: str, seed: int, task: LightningModule, data: ImageDataModule) -> None:
    """Run one method, unless there are its results."""
    folder = given.out / given.set / f"{name}-{seed}"
    if (folder / "results.json").is_file():
        return
    method = name.removesuffix("-images").removesuffix("-template")
    images = 200 if given.set == "unseen" else 250
    seed_everything(0, verbose=False)
    trainer = Trainer(default_root_dir=str(folder), accelerator="cpu", enable_progress_bar=False)
    trainer.adapt(task, data, make_method(method, images, given.out / given.set / "views"), overwrite=True)
    mean = json.loads((folder / "results.json").read_text())["mean"]["accuracy"]
    print(f"{name} {seed}: {100 * mean:.2f}", flush=True)


def run_seed(given: argparse.Namespace, seed: int) -> None:
    """Run all methods on one order of the images."""
    task = make_task(given)
    saved = given.out / given.set / f"embeddings-{seed}.pt"
    features = [name for name in given.methods if _reads_features(name)]
    if features and not saved.is_file():
        saved.parent.mkdir(parents=True, exist_ok=True)
        save_embeddings(task, make_data(given, seed), saved)
    for name in features:
        data = EmbeddingsDataModule(str(saved), batch_size=BATCH, seed=seed)
        run(given, name, seed, EmbeddingTask(str(saved), scale=SCALE), data)
    for name in given.methods:
        if name.endswith("-template"):
            run(given, name, seed, make_task(given, TEMPLATES[:1]), make_data(given, seed))
        elif name not in features:
            run(given, name, seed, task, make_data(given, seed))


def _reads_features(name: str) -> bool:
    cls = getattr(A, name, type(None))
    is_of_images = issubclass(cls, ViewAdapter) or name == "CALIP"
    return name == "Source" or (issubclass(cls, (FeatureAdapter, A.LAME, A.T3A)) and not is_of_images)


def print_table(folder: Path) -> None:
    """Print a row for each method: accuracy with its standard deviation over the orders, calibration and cost."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(folder.glob("*/results.json")):
        found.setdefault(path.parent.name.rpartition("-")[0], []).append(json.loads(path.read_text()))
    print("| method | accuracy % | ECE % | forwards | backwards | ms an image |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    pass_time = _time(found["Source-images"]) if "Source-images" in found else float("nan")
    for name, runs in sorted(found.items(), key=lambda item: -_mean(item[1], "accuracy")):
        accuracies = [100 * each["mean"]["accuracy"] for each in runs]
        spread = f" ± {statistics.stdev(accuracies):.2f}" if len(runs) > 1 else ""
        cost = runs[0]["cost"]
        time = _time(runs) + (pass_time if runs[0]["model"] == "EmbeddingTask" else 0)
        print(
            f"| {name} | {statistics.mean(accuracies):.2f}{spread} | {100 * _mean(runs, 'ece'):.1f} | "
            f"{cost['forwards_per_batch']:.3g} | {cost['backwards_per_batch']:.3g} | {time:.3g} |"
        )


def _mean(runs: list[dict[str, Any]], key: str) -> float:
    return statistics.mean(each["mean"][key] for each in runs)


def _time(runs: list[dict[str, Any]]) -> float:
    return statistics.mean(1000 / each["cost"]["images_per_second"] for each in runs)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("text", "image", "small", "projection", "root"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--set", choices=("unseen", "photographs", "cifar100"), default="unseen")
    parser.add_argument("--out", type=Path, default=Path("runs/vision_language/methods"))
    parser.add_argument("--limit", type=int)
    parser.add_argument("--domains", help="other domains than those of the set, such as clean")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--methods", default="Source,T3A,LAME,TDA,DoTA,OnZeta,ECALP,BCA,OGA,DMN,StatA")
    given = parser.parse_args()
    given.methods = given.methods.split(",")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    for seed in map(int, given.seeds.split(",")):
        run_seed(given, seed)
    print_table(given.out / given.set)


if __name__ == "__main__":
    main()
