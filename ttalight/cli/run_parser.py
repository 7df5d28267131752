"""The parser of a command that runs a model: its help begins with this package's own options."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

__all__ = ["RunParser"]

_TRAINER = "trainer"
#: Titles of groups of options, instead of the first lines of Lightning's docstrings.
_TITLES = {"model": "Model", "data": "Data", _TRAINER: "Options of Lightning's Trainer"}


class RunParser(LightningArgumentParser):
    """Lightning's parser, whose help shows the options of the Trainer where they are asked for.

    They are most of all options, and would stand before those of this package: ``--trainer.help`` shows them.
    """

    def add_trainer_help(self) -> None:
        """Add the option that shows the options of the Trainer."""
        self.add_argument(
            f"--{_TRAINER}.help",
            action=_ShowTrainer,
            help="Show the options of Lightning's Trainer (--trainer.max_epochs, --trainer.devices, ...) and exit.",
        )
        for name, title in _TITLES.items():
            self._group(name).title = title

    def format_help(self, *args: Any, **kwargs: Any) -> str:
        """Return the help without the options of the Trainer."""
        trainer = self._group(_TRAINER)
        return self._format(lambda group: group is not trainer, *args, **kwargs)

    def format_trainer_help(self) -> str:
        """Return the help of the options of the Trainer."""
        trainer = self._group(_TRAINER)
        return self._format(lambda group: group is trainer)

    def _group(self, name: str) -> Any:
        return (self.groups or {}).get(name)

    def _format(self, shown: Callable[[Any], bool], *args: Any, **kwargs: Any) -> str:
        groups, usage = self._action_groups, self.usage
        self._action_groups = [group for group in groups if shown(group)]
        self.usage = " ".join([*self.prog.replace("[options]", "").split(), "[options]"])  # it would list all of them
        try:
            return super().format_help(*args, **kwargs)
        finally:
            self._action_groups, self.usage = groups, usage


class _ShowTrainer(argparse.Action):
    """Shows the options of the Trainer and ends the command, as ``--help`` does it with the others."""

    def __init__(self, option_strings: list[str], dest: str, help: str) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        """Show them."""
        assert isinstance(parser, RunParser)
        sys.stdout.write(f"{parser.format_trainer_help()}\n")
        parser.exit()
