"""The step of gpu.py that measures the stages of CTA at the recipe of its paper."""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import Any

import ttalight  # noqa: F401  # isort: skip  (first: it makes torchvision importable)
import torch
import training
import yaml
from lightning import LightningModule
from measuring import now, spread
from random_images import RandomImages
from step_tables import Row
from training_rivals import SIDE, Bare, Setting

from ttalight import tasks
from ttalight.adapters import TestTimeTraining

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "cifar10"
#: Stage -> its configuration, and what its bare step is called in ``training_rivals``.
STAGES = {
    "supervised": ("source", "supervised"),
    "self-supervised": ("simclr", "simclr"),
    "alignment": ("align", "alignment"),
    "test time": ("cta", ""),
}
#: Training images of CIFAR-10, and the domains and images of CIFAR-10-C at one severity.
IMAGES, DOMAINS, DOMAIN_IMAGES = 50_000, 15, 10_000
#: Steps that are timed.
STEPS = 8


def stage_row(stage: str, sizes: Any, device: str) -> Row:
    """Measure steps of a stage and return what the recipe takes.

    Args:
        stage: One of ``STAGES``.
        sizes: Has ``encoder``, ``training_batch`` and ``test_steps``, None for those of the recipe.
        device: cpu or cuda.
    """
    name, bare = STAGES[stage]
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text(encoding="utf-8"))
    if sizes.encoder is not None:
        config["model"]["init_args"]["encoder"] = sizes.encoder
    if sizes.training_batch is not None:
        config["data"]["init_args"]["batch_size"] = sizes.training_batch
    if sizes.test_steps is not None and "adapter" in config:
        config["adapter"]["init_args"]["steps"] = sizes.test_steps
    return test_time(config, device) if stage == "test time" else fit_time(config, bare, device)


def make_task(config: dict[str, Any], folder: str) -> LightningModule:
    """Return the task of a configuration with random weights."""
    arguments = dict(config["model"]["init_args"])
    for name in ("pretrained", "self_supervised", "aligned"):
        arguments.pop(name, None)
    if "supervised" in arguments:
        teacher = tasks.SupervisedTask(**{name: arguments[name] for name in ("encoder", "num_classes", "stem")})
        arguments["supervised"] = f"{folder}/teacher.pt"
        place = getattr(teacher.encoder, "pretrained_cfg", {}).get("classifier", "fc")
        head = {f"{place}.{name}": value for name, value in teacher.classifier.state_dict().items()}
        torch.save(teacher.encoder.state_dict() | head, arguments["supervised"])  # as public networks are saved
    torch.manual_seed(0)
    task: LightningModule = getattr(tasks, config["model"]["class_path"])(**arguments)
    return task


def fit_time(config: dict[str, Any], bare: str, device: str) -> Row:
    """Measure training steps through our Trainer, beside bare steps of the network."""
    batch, epochs = config["data"]["init_args"]["batch_size"], config["trainer"]["max_epochs"]
    precision = config["trainer"]["precision"]
    steps = training.WARM_UP + STEPS
    images = batch * steps
    encoder = config["model"]["init_args"]["encoder"]
    setting = Setting(bare, encoder, batch, precision, "yes", "no", STEPS, 1, 0, 1, images, None, device)
    with tempfile.TemporaryDirectory() as folder:
        task = make_task(config, folder)
    data = RandomImages(images, batch_size=batch)
    data.setup("fit")
    turns = training.Turns(setting, {"bare": Bare(setting, task)}, {})
    training.fit(setting, task, steps, turns, datamodule=data)
    ours, bare_times = turns.times["ours"], turns.times["bare"]
    seconds = statistics.median(ours) * (IMAGES // batch)
    return {
        "batch": batch, "precision": precision, "images/s": round(batch / statistics.median(ours)),
        "bare images/s": round(batch / statistics.median(bare_times)),
        "speed against bare (middle half)": spread([b / own for b, own in zip(bare_times, ours, strict=True)]),
        "epoch or domain in min": seconds / 60, "recipe": f"{epochs} epochs", "recipe in h": seconds * epochs / 3600,
    }  # fmt: skip


def test_time(config: dict[str, Any], device: str) -> Row:
    """Measure batches of test-time training."""
    batch, arguments = config["data"]["init_args"]["batch_size"], config["adapter"]["init_args"]
    task = make_task(config, "").to(device).eval()
    adapted = TestTimeTraining(**arguments).wrap(task)
    setting = Setting("", "", batch, "32-true", "yes", "no", 0, 0, 0, 1, 0, None, device)
    times = []
    for number in range(training.WARM_UP + 3):
        images = torch.rand(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(number)).to(device)
        start = now(setting)
        adapted(images)
        times.append(now(setting) - start)
    seconds = statistics.median(times[training.WARM_UP :]) * -(-DOMAIN_IMAGES // batch)
    return {
        "batch": batch, "precision": "32-true", "images/s": round(batch / statistics.median(times[training.WARM_UP :])),
        "epoch or domain in min": seconds / 60, "recipe": f"{DOMAINS} domains, {arguments['steps']} steps a batch",
        "recipe in h": seconds * DOMAINS / 3600,
    }  # fmt: skip
