"""Runs the command that the first word names. Nothing that takes long is imported before it is needed."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import sys
from argparse import ArgumentError
from collections.abc import Mapping
from pkgutil import resolve_name
from typing import TYPE_CHECKING, NoReturn

from jsonargparse import set_parsing_settings

from ttalight.cli.commands import COMMANDS, Command
from ttalight.cli.error_messages import expected_message, without_parser
from ttalight.cli.output import drop_remarks
from ttalight.cli.parser_messages import parser_message, unknown_command
from ttalight.reporting.text import printable
from ttalight.version import __version__

if TYPE_CHECKING:
    from lightning.pytorch.cli import ArgsType

__all__ = ["TRACEBACK", "main"]

#: Environment variable that shows the traceback of every error.
TRACEBACK = "TTALIGHT_TRACEBACK"


def main(args: ArgsType = None) -> None:
    """Run the command line.

    Errors that a user can act on are one line on stderr; the environment variable TTALIGHT_TRACEBACK=1 shows their
    traceback as well.

    Args:
        args: The words after ``ttalight``; those of the process by default.

    Raises:
        SystemExit: With code 2 if the words are wrong, 1 if the command fails, 143 if SIGTERM stopped it.
    """
    set_parsing_settings(add_print_completion_argument=True)
    atexit.register(gc.freeze)  # a last collection takes seconds on a busy machine, and schedulers soon kill
    drop_remarks()
    try:
        _run(args)
    except SystemExit as error:
        if type(error) is SystemExit:
            raise
        raise SystemExit(128 + signal.SIGTERM) from None  # that of Lightning has the code 0
    except ArgumentError as error:
        _fail(error, str(error), code=2)
    except Exception as error:
        cause = without_parser(error)
        message = expected_message(cause)
        if message is not None:
            _fail(error, message, code=1)
        if cause is error:
            raise
        raise cause from None


def _run(args: ArgsType) -> None:
    words = sys.argv[1:] if args is None else args
    if isinstance(words, list) and _run_without_lightning(words):
        return
    resolve_name("ttalight.cli.command:CLI")(args)  # by its name: it knows the list of commands


def _run_without_lightning(words: list[str]) -> bool:
    """Run what is not of Lightning's command line, and return whether it was such a command."""
    first = words[0] if words else None
    if first is None:
        raise ArgumentError(None, f"name a command: {', '.join(COMMANDS)}")
    if first in ("-h", "--help", "--version"):
        sys.stdout.write(f"ttalight {__version__}\n" if first == "--version" else _help(COMMANDS))
        raise SystemExit(0)
    if first.startswith("-"):
        return False
    if first not in COMMANDS:
        raise ArgumentError(None, unknown_command(first, COMMANDS))
    function = COMMANDS[first].main
    if function is None:
        return False
    try:
        resolve_name(function)(words[1:])
    except ArgumentError as error:
        raise ArgumentError(None, parser_message(str(error), ())) from error
    return True


def _help(commands: Mapping[str, Command]) -> str:
    width = max(map(len, commands))
    listing = "".join(f"  {name:<{width}}  {command.about}\n" for name, command in commands.items())
    return (
        "usage: ttalight COMMAND [options]\n\n"
        "Train image classifiers so that they can adapt, and adapt them at test time.\n\n"
        f"commands:\n{listing}\n"
        "options:\n"
        "  -h, --help                Show this help and exit; after a command, its options.\n"
        "  --version                 Show the version and exit.\n"
        "  --print_completion SHELL  Print a completion script: shtab-bash, shtab-zsh, shtab-fish or shtab-tcsh.\n\n"
        f"With {TRACEBACK}=1 in the environment, errors show where they arose.\n"
    )


def _fail(error: Exception, message: str, code: int) -> NoReturn:
    if os.environ.get(TRACEBACK, "0") not in ("", "0"):
        raise error
    sys.stderr.write(f"ttalight: error: {printable(message)}\n")
    raise SystemExit(code) from None
