"""The command line: Lightning's subcommands, and ``adapt`` and ``compare``."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse import set_parsing_settings
from lightning import Callback, LightningDataModule, LightningModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only

import ttalight.adapters
import ttalight.data
import ttalight.tasks  # noqa: F401  (imported classes can be named without their module)
from ttalight.callbacks import Recorder
from ttalight.data.corrupt_command import main as corrupt
from ttalight.reporting import domain_table, protocol_header
from ttalight.reporting.compare import main as compare
from ttalight.trainer import Trainer

__all__ = ["CLI", "main"]

#: What a run writes, and what --overwrite takes away.
_WRITTEN = ("config.yaml", "checkpoints", "results.json", "domains.csv", "predictions.npz")
_RUNS = "runs"

_OTHER: dict[str, tuple[Callable[[Sequence[str]], None], str]] = {
    "compare": (compare, "Set the results of several runs side by side."),
    "corrupt": (corrupt, "Write a corrupted copy of a labelled image set."),
}


class CLI(LightningCLI):
    """Lightning's command line with an ``adapt`` subcommand and one folder a run."""

    def __init__(self, args: ArgsType = None) -> None:
        self.folder: Path | None = None
        self._ckpt_path: str | None = None
        super().__init__(
            LightningModule,
            LightningDataModule,
            trainer_class=Trainer,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            subclass_mode_model=True,
            subclass_mode_data=True,
            auto_configure_optimizers=False,
            parser_kwargs={
                "description": "Train image classifiers so that they can adapt, and adapt them at test time. "
                "Beside the subcommands below: " + "; ".join(f"'{name}': {text}" for name, (_, text) in _OTHER.items()),
            },
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Return the subcommands and the arguments that are not options."""
        return {**LightningCLI.subcommands(), "adapt": {"model", "datamodule"}}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options that say where a run leaves its files."""
        parser.add_argument("--name", type=str, default="default", help=f"Name of the run: its folder is {_RUNS}/NAME.")
        parser.add_argument("--overwrite", action="store_true", help="Replace an existing run of that name.")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and keep a checkpoint's hyper-parameters from replacing what the user configured."""
        words = sys.argv[1:] if args is None else args
        if isinstance(words, list) and words[:1] == ["adapt"] and any(w.split("=")[0] == "--ckpt_path" for w in words):
            parser.error(
                "adapt takes no --ckpt_path: name the weights with the task's own argument, --model.weights FILE for a "
                "SupervisedTask or --model.aligned FILE for CrossTaskTTT"
            )
        super().parse_arguments(parser, args)
        config = self.config[self.config.subcommand]
        self.folder = Path(config.trainer.default_root_dir or Path(_RUNS) / config.name)
        self._ckpt_path = self._find_checkpoint(parser, config.get("ckpt_path"))
        if self._ckpt_path is not None:
            config.ckpt_path = None  # given back in before_instantiate_classes
        self._claim(parser, overwrite=config.overwrite, resumes=self._ckpt_path is not None)

    def _find_checkpoint(self, parser: LightningArgumentParser, path: str | None) -> str | None:
        if path is None:
            return None
        assert self.folder is not None
        if path == "last":
            path = str(self.folder / "checkpoints" / "last.ckpt")
        if not Path(path).is_file():
            parser.error(
                f"--ckpt_path: there is no checkpoint {path} to resume from; leave the option out to start anew"
            )
        return path

    @rank_zero_only
    def _claim(self, parser: LightningArgumentParser, overwrite: bool, resumes: bool) -> None:
        assert self.folder is not None
        existing = [self.folder / name for name in _WRITTEN if (self.folder / name).exists()]
        if resumes:
            return
        if existing and not overwrite:
            parser.error(
                f"there is a run in {self.folder} already: give another --name, replace it with --overwrite"
                + (", or go on with it: --ckpt_path last" if self.config.subcommand == "fit" else "")
            )
        for path in (*existing, *self.folder.glob("events.out.tfevents.*"), self.folder / "hparams.yaml"):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)

    def before_instantiate_classes(self) -> None:
        """Give back the checkpoint to resume from: its weights and loops, not its hyper-parameters."""
        config = self.config[self.subcommand]
        if self._ckpt_path is not None:
            config.ckpt_path = self._ckpt_path
        if config.trainer.get("deterministic"):
            torch.use_deterministic_algorithms(True)

    def instantiate_classes(self) -> None:
        """Make model, data and trainer; what a constructor has to say is not buried in the parser's words."""
        try:
            super().instantiate_classes()
        except ValueError as error:
            first: BaseException = error
            while first.__cause__ is not None or first.__context__ is not None:
                first = first.__cause__ or first.__context__  # type: ignore[assignment]
            raise first from None

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer, with the run's folder."""
        trainer = super().instantiate_trainer(default_root_dir=str(self.folder), **kwargs)
        assert isinstance(trainer, Trainer)
        return trainer

    def after_adapt(self) -> None:
        """Print the run's table."""
        self._print_results()

    def after_test(self) -> None:
        """Print the run's table."""
        self._print_results()

    def after_validate(self) -> None:
        """Print the run's table."""
        self._print_results()

    @rank_zero_only
    def _print_results(self) -> None:
        callbacks: list[Callback] = self.trainer.callbacks  # type: ignore[attr-defined]
        recorder = next(callback for callback in callbacks if isinstance(callback, Recorder))
        if recorder.results is not None:
            sys.stdout.write(f"\n{protocol_header(recorder.results)}\n\n{domain_table(recorder.results)}\n\n")
            sys.stdout.write(f"Results: {self.folder}\nTensorBoard: tensorboard --logdir {self.folder}\n")


def main(args: ArgsType = None) -> None:
    """Run the command line.

    Args:
        args: The words after ``ttalight``; those of the process by default.
    """
    set_parsing_settings(add_print_completion_argument=True)
    words = sys.argv[1:] if args is None else args
    if isinstance(words, list) and words and words[0] in _OTHER:
        _OTHER[words[0]][0](words[1:])
    else:
        CLI(args)


if __name__ == "__main__":
    main()
