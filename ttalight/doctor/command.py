"""Examines a network and unlabelled images before anything is adapted: ``ttalight doctor``."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from lightning import LightningModule
from lightning.pytorch.cli import LightningArgumentParser

from ttalight.data import ImageDataModule, UnlabelledFolderDataModule
from ttalight.doctor.examination import Examination
from ttalight.doctor.report import render_page, render_report
from ttalight.doctor.verdict import Findings, judge, summarize
from ttalight.errors import InputError
from ttalight.files.atomic import write_files
from ttalight.trainer import Trainer

__all__ = ["diagnose", "main"]

_ABOUT = (
    "Say, without labels, whether a shift is one that statistics repair, whether the batch is large enough, and which "
    "methods are safe. Writes doctor.html and doctor.json."
)


def diagnose(model: LightningModule, data: ImageDataModule, accelerator: str = "auto") -> Findings:
    """Examine a model on the stream of a data module; labels are not used, and nothing is changed.

    Args:
        model: The model, as ``Trainer.adapt`` takes it.
        data: Delivers the images.
        accelerator: See ``Trainer``.

    Returns:
        The measurements. ``conclude`` and ``advise`` interpret them.
    """
    examination = Examination()
    trainer = Trainer(
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator=accelerator,
        devices=1,
    )
    with _quiet():
        trainer.adapt(model, data, examination)
    return summarize(examination)


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: The words after ``ttalight doctor``; those of the process by default.

    Raises:
        ArgumentError: If the words are wrong.
        FileNotFoundError: If there are no images.
        ValueError: If the model and the images do not belong together.
    """
    words = list(sys.argv[1:] if args is None else args)
    parser = LightningArgumentParser(
        prog="ttalight doctor", description=_ABOUT, exit_on_error=False, allow_abbrev=False
    )
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    parser.add_argument("--data", type=str, required=True, metavar="FOLDER", help="Folder of images, at any depth.")
    parser.add_argument("--images", type=int, default=512, help="Number of images, the first by name.")
    parser.add_argument("--batch_size", type=int, default=64, help="Size of the batches that are planned.")
    parser.add_argument("--resize", type=int, default=None, help="Side of the images; see UnlabelledFolderDataModule.")
    parser.add_argument("--output", type=str, default="doctor", help="Folder for doctor.html and doctor.json.")
    parser.add_argument("--accelerator", type=str, default="auto", help="As of the Trainer.")
    options = parser.parse_args(_with_model(words))
    # Renamed in jsonargparse 4.49; the old name goes away in 5.0.
    instantiate = parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes
    model: Any = instantiate(options).model
    data = UnlabelledFolderDataModule(
        root=options.data, resize=options.resize, batch_size=options.batch_size, limit=options.images
    )
    findings = diagnose(model, data, options.accelerator)
    title = f"{getattr(model, 'hparams', {}).get('encoder', type(model).__name__)} on {Path(options.data).name}"
    report = json.dumps({"verdict": judge(findings), **asdict(findings)}, indent=2) + "\n"
    write_files(options.output, {"doctor.html": render_page(findings, title), "doctor.json": report})
    sys.stdout.write(f"{render_report(findings)}\n\nReport: {Path(options.output) / 'doctor.html'}\n")


def _with_model(words: list[str]) -> list[str]:
    """Replace ``--config FILE`` by the model that the file of another command names."""
    for position, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option != "--config":
            continue
        rest = words[position + 1 :]
        value, rest = (value, rest) if equals else ("".join(rest[:1]), rest[1:])
        content = yaml.safe_load(Path(value).read_text(encoding="utf-8"))
        model = content.get("model") if isinstance(content, dict) else None
        if model is None:
            raise InputError(f"--config: {value} names no model")
        return [*words[:position], "--model", json.dumps(model), *rest]
    return words


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's lines about devices away from the report."""
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(before)
