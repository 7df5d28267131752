"""Lightning's command line: its subcommands, and ``adapt``."""

from __future__ import annotations

import contextlib
import os
import sys
import warnings
from argparse import ArgumentError
from pathlib import Path
from typing import Any

import torch
from lightning import LightningDataModule, LightningModule
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

import ttalight.adapters
import ttalight.data
import ttalight.tasks  # noqa: F401  (imported classes can be named without their module)
from ttalight.callbacks import Recorder, ResumedCheckpoint
from ttalight.callbacks.adaptation_files import check_resumable, list_checkpoints
from ttalight.callbacks.run_results import source_of
from ttalight.callbacks.search import callbacks_of, find_callback
from ttalight.cli.commands import COMMANDS
from ttalight.cli.output import be_quiet
from ttalight.cli.parser_messages import parser_message
from ttalight.cli.preparsing import add_resumed_config, reset_adapter_arguments
from ttalight.cli.run_parser import RunParser
from ttalight.cli.run_setup import RunSetup
from ttalight.files.checkpoints import LAST, last_whole
from ttalight.files.run_folder import RUN_FILES, SIDE_FILES, find_files, hold_folder, is_run_name
from ttalight.reporting import domain_table, protocol_header
from ttalight.tasks.checkpoint import read_checkpoint
from ttalight.trainer import Trainer

__all__ = ["CLI"]

_RUNS = "runs"


class CLI(LightningCLI):
    """Lightning's command line with an ``adapt`` subcommand and one folder a run."""

    def __init__(self, args: ArgsType = None) -> None:
        self.folder: Path | None = None
        self._ckpt_path: str | None = None
        self._parsers: list[LightningArgumentParser] = []
        words = sys.argv[1:] if args is None else args
        #: The command, of which alone a parser is made. None where a parser of all of them is asked for.
        self._command = words[0] if isinstance(words, list) and words and words[0] in COMMANDS else None
        with contextlib.ExitStack() as self._held:
            super().__init__(
                LightningModule,
                LightningDataModule,
                trainer_class=Trainer,
                save_config_callback=RunSetup,
                save_config_kwargs={"overwrite": True},
                seed_everything_default=0,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,
                parser_class=RunParser,
                parser_kwargs={"prog": "ttalight", "exit_on_error": False},  # main has one form for all errors
                args=args,
            )

    def __getstate__(self) -> dict[str, Any]:
        """Return what processes that are spawned get: the lock stays with this one."""
        return {**vars(self), "_held": None}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Return a parser that takes no abbreviations: ``--trainer.max_epoch`` is a misspelt name."""
        return super().init_parser(allow_abbrev=False, **kwargs)

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # static in Lightning
        """Return the subcommands and the arguments that are not options."""
        every = {**LightningCLI.subcommands(), "adapt": {"model", "datamodule", "dataloaders", "overwrite"}}
        return {name: skipped for name, skipped in every.items() if self._command in (None, name)}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the options that say where a run leaves its files."""
        self._parsers.append(parser)
        assert isinstance(parser, RunParser)
        parser.add_trainer_help()
        parser.add_argument("--name", type=str, default="default", help=f"Name of the run: its folder is {_RUNS}/NAME.")
        parser.add_argument("--overwrite", action="store_true", help="Replace an existing run of that name.")
        parser.add_argument("--quiet", type=bool, default=False, help="Write progress, warnings and errors only.")
        parser.add_argument(
            "--predictions",
            type=bool,
            default=False,
            help="Write predictions.npz too: labels and logits of every image (adapt, test, validate).",
        )

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parse, and keep a checkpoint's hyper-parameters from replacing what the user configured."""
        words = sys.argv[1:] if args is None else args
        if isinstance(words, list) and words[:1] == ["adapt"] and any(w.split("=")[0] == "--ckpt_path" for w in words):
            parser.error(
                "adapt takes no --ckpt_path: name the weights with the task's own argument, --model.weights FILE for a "
                "SupervisedTask or --model.aligned FILE for CrossTaskTTT, or by --weights FILE for any module"
            )
        if isinstance(words, list) and words[:1] == ["adapt"]:
            words = add_resumed_config(words, parser.error)
        try:
            if isinstance(words, list):
                self.config = parser.parse_args(reset_adapter_arguments(words))
            else:
                super().parse_arguments(parser, args)
        except RecursionError:
            raise ArgumentError(None, "a configuration is nested too deeply, or contains itself") from None
        except ArgumentError as error:
            options = {option for parser in self._parsers for option in parser.get_defaults().keys()}
            beside = [name for name in COMMANDS if name not in self.subcommands()]
            message = parser_message(str(error), {*options, "config", "help"}, beside)
            raise ArgumentError(None, message) from error
        config = self.config[self.config.subcommand]
        resume = config.get("resume")
        if config.get("weights") and config.get("model.init_args.weights"):
            parser.error("--weights and --model.weights name weights both: give one of them")
        given = resume or config.trainer.default_root_dir
        if given is None and not is_run_name(config.name):
            parser.error(
                f"--name {config.name!r:.60} is no name of a folder in {_RUNS}: use letters, digits, '-' and '_', and "
                "--trainer.default_root_dir for a folder elsewhere"
            )
        if "\0" in (given or ""):
            parser.error(f"{given!r:.60} is no path of a folder: it has a null byte")
        self.folder = Path(given or Path(_RUNS) / config.name)
        if config.predictions and self.config.subcommand in ("fit", "predict"):
            parser.error(f"{self.config.subcommand} takes no --predictions: adapt, test and validate do")
        self._ckpt_path = self._find_checkpoint(parser, config.get("ckpt_path"))
        if self._ckpt_path is not None:
            config.ckpt_path = None  # set again in before_instantiate_classes
        overwrite = config.overwrite
        config.overwrite = False  # it holds for this command, and not for the saved configuration
        if resume is not None and "--overwrite" in words:
            parser.error("--resume continues a run and --overwrite replaces it: give one of them")
        first = self._claim(parser, overwrite=overwrite, resumes=self._ckpt_path is not None or resume is not None)
        self.save_config_kwargs["resumes"] = resume is not None
        if resume is not None and first:
            try:
                check_resumable(self.folder)  # before data are read
            except ValueError as error:
                parser.error(f"--resume: {error}")

    def _find_checkpoint(self, parser: LightningArgumentParser, path: str | None) -> str | None:
        if path is None:
            return None
        assert self.folder is not None
        if path == "last":
            path = str(last_whole(self.folder / "checkpoints") or self.folder / "checkpoints" / LAST)
        if not Path(path).is_file():
            parser.error(
                f"--ckpt_path: there is no checkpoint {path} to resume from; leave the option out to start a new run"
            )
        read_checkpoint(path, "ckpt_path")  # here its errors come before anything is made
        return path

    def _claim(self, parser: LightningArgumentParser, overwrite: bool, resumes: bool) -> bool:
        """Hold the run's folder until the command ends, and refuse to replace a run unasked.

        Returns:
            Whether this is the first process of the run.
        """
        assert self.folder is not None
        node = os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK", "0"))
        first: bool = node == "0" and rank_zero_only.rank == 0  # type: ignore[attr-defined]
        try:
            self._held.enter_context(hold_folder(self.folder, first))
        except ValueError as error:
            parser.error(str(error))
        if resumes or not first:
            return first
        existing = find_files(self.folder, RUN_FILES)
        if existing and not overwrite:
            stopped = f"--resume {self.folder}" if list_checkpoints(self.folder) else None
            advice = {"fit": "--ckpt_path last", "adapt": stopped}.get(self.config.subcommand)
            parser.error(
                f"there is a run in {self.folder} already: give another --name, replace it with --overwrite"
                + (f", or resume it: {advice}" if advice else "")
            )
        self.save_config_kwargs["replaced"] = [*existing, *find_files(self.folder, SIDE_FILES)]
        warnings.filterwarnings("ignore", "Checkpoint directory .* exists and is not empty")  # not for long
        return first

    def before_instantiate_classes(self) -> None:
        """Set the checkpoint to resume from again: its weights and loops, not its hyper-parameters."""
        config = self.config[self.subcommand]
        if self._ckpt_path is not None:
            config.ckpt_path = self._ckpt_path
        if config.trainer.get("deterministic"):
            torch.use_deterministic_algorithms(True)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Make the trainer, with the run's folder."""
        if self.config[self.subcommand].quiet:
            be_quiet()
            kwargs["enable_model_summary"] = False
        trainer = super().instantiate_trainer(default_root_dir=str(self.folder), **kwargs)
        assert isinstance(trainer, Trainer)
        callbacks = callbacks_of(trainer)
        first = (ResumedCheckpoint, RunSetup)  # before others write
        callbacks.sort(key=lambda callback: next((i for i, kind in enumerate(first) if isinstance(callback, kind)), 2))
        recorder = find_callback(trainer, Recorder)
        if recorder is not None and self.config[self.subcommand].predictions:
            recorder.predictions = True
        return trainer

    def before_adapt(self) -> None:
        """Warn of a user's module into which nothing was loaded, as far as its configuration tells."""
        config = self.config[self.subcommand]
        arguments = dict(config.model.get("init_args") or {})
        named = arguments.get("weights") or arguments.get("pretrained")
        files = [value for value in arguments.values() if isinstance(value, str) and Path(value).is_file()]
        known = config.weights or named or files or source_of(self.model)["file"]
        if not (known or hasattr(self.model, "has_random_weights")):  # tasks know by themselves
            name = type(self.model).__name__
            rank_zero_warn(
                f"no weights were named for this {name}: if it loads none by itself, they are random. Name the file of "
                "a trained one by --weights"
            )

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
        recorder = find_callback(self.trainer, Recorder)
        if recorder is not None and recorder.results is not None and not self.config[self.subcommand].quiet:
            sys.stdout.write(f"\n{protocol_header(recorder.results)}\n\n{domain_table(recorder.results)}\n\n")
            sys.stdout.write(f"Results: {self.folder}\nTensorBoard: tensorboard --logdir {self.folder}\n")
