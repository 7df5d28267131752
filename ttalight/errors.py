"""Error messages of the commands: one line that a user can act on."""

from __future__ import annotations

import difflib
import dis
import errno
import inspect
import pkgutil
import re
import sys
import traceback
from abc import ABC
from collections.abc import Collection, Iterator
from pathlib import Path
from types import ModuleType, TracebackType

import lightning.pytorch.callbacks
import torch
from jsonargparse import ArgumentParser
from lightning import Callback, LightningDataModule, LightningModule
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.trainer.connectors import checkpoint_connector

import ttalight.adapters
import ttalight.data
import ttalight.tasks
from ttalight.reporting.text import printable

__all__ = ["expected_message", "parser_message", "without_parser"]

#: Arguments that take a class: where its siblings are found by their bare names, and what they derive from.
_CLASSES: dict[str, tuple[ModuleType, type]] = {
    "model": (ttalight.tasks, LightningModule),
    "data": (ttalight.data, LightningDataModule),
    "stream": (ttalight.data, ttalight.data.StreamOrder),
    "adapter": (ttalight.adapters, ttalight.adapters.Adapter),
    "terms": (ttalight.adapters, ttalight.adapters.Term),
    "optimizer": (torch.optim, torch.optim.Optimizer),
    "scheduler": (torch.optim.lr_scheduler, torch.optim.lr_scheduler.LRScheduler),
    "callbacks": (lightning.pytorch.callbacks, Callback),
}
_ADVICE = {
    errno.ENOSPC: "free some space, then run it again",
    errno.EROFS: "write to another folder: --trainer.default_root_dir names one for the run",
    errno.EDQUOT: "your quota is used up: free some space, then run it again",
    errno.EFBIG: "files may not be as large here: raise the limit, then run it again",
    errno.EACCES: "check the permissions, or choose another folder",
}


# -- errors while a command runs


def expected_message(error: BaseException) -> str | None:
    """Return what to say about an error that needs no traceback, or None where the traceback is what helps.

    Expected are the errors that this package raises itself, those of the file system, and Lightning's
    ``MisconfigurationException``; and memory that does not suffice.
    """
    if isinstance(error, OSError) and error.strerror and (error.filename is not None or error.errno in _ADVICE):
        place = "" if error.filename is None else f"{error.filename}: "
        advice = _ADVICE.get(error.errno or 0)
        return _one_line(f"{place}{error.strerror}" + (f": {advice}" if advice else ""))
    if isinstance(error, MisconfigurationException):
        return _one_line(str(error))
    if _raised_in(error) == "lightning" and _is_of_the_trainer(error):
        return _one_line(str(error))
    if _raised_in(error) != __package__ and _is_of_a_checkpoint(error):
        return _one_line(
            f"ckpt_path: the checkpoint cannot be gone on from ({type(error).__name__}: {str(error)[:300]}): name "
            "another one, or start from its weights with the task's own argument"
        )
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        return _one_line(
            f"out of memory ({str(error).strip().partition(chr(10))[0] or type(error).__name__}): free memory or use "
            "another device, then resume the run; a smaller --data.batch_size needs less, and is another run"
        )
    if not isinstance(error, (ValueError, TypeError, RuntimeError, OSError)):
        return None
    if _raised_in(error) == __package__:
        return _one_line(str(error))
    return _said_by_a_worker(error)


def _is_of_the_trainer(error: BaseException) -> bool:
    """Return whether an error arose while the seed was set or the trainer made: of what the user configured."""
    names = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
    return bool(names & {"_set_seed", "instantiate_trainer"})


def _is_of_a_checkpoint(error: BaseException) -> bool:
    """Return whether an error arose while Lightning was taking a checkpoint over."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [
        frame.f_code.co_name for frame in frames if frame.f_globals.get("__name__") == checkpoint_connector.__name__
    ]
    return bool(names) and "dump_checkpoint" not in names


def without_parser(error: BaseException) -> BaseException:
    """Return the error of a constructor that the parser has wrapped in words of its own, or the error itself."""
    while _raised_in(error) == "jsonargparse" and (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error


def _raised_in(error: BaseException) -> str:
    """Return the top-level package whose ``raise`` statement the error comes from; empty if it was no statement."""
    last: TracebackType | None = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    if last is None or last.tb_frame.f_code.co_code[last.tb_lasti] != dis.opmap["RAISE_VARARGS"]:
        return ""
    return str(last.tb_frame.f_globals.get("__name__", "")).partition(".")[0]


def _said_by_a_worker(error: BaseException) -> str | None:
    """Return what this package said in a process that loads data: its traceback is the text of the error here."""
    lines = str(error).strip().splitlines()
    files = re.findall(r'^ *File "(.+)", line \d+, in ', str(error), re.MULTILINE)
    if not lines or not re.match(r"Caught \w+ in DataLoader worker process", lines[0]) or not files:
        return None
    return lines[-1].partition(": ")[2] if Path(__file__).parent in Path(files[-1]).parents else None


def _one_line(text: str) -> str:
    return printable(" ".join(text.split()))


# -- errors while the words of a command are parsed

# What the parser says beside the reason.
_FRAME = re.compile(
    r"Does not validate against any of the Union subtypes|Subtypes: |Errors:$|Given value type: |Given value: |"
    r"Expected a <class 'NoneType'>$|Expected a path but |Not a valid subclass of |Subclass types expect one of:|"
    r"a class path \(str\)$|a dict with"
)


def parser_message(message: str, options: Collection[str], commands: Collection[str] = ()) -> str:
    """Return the reason in what the parser says, with the nearest names where one is unknown.

    Args:
        message: The parser's words, of many lines where a value may be of several types.
        options: Names of the command's options, for suggestions.
        commands: Names of the commands that the parser does not know.
    """
    if found := re.search(r"argument subcommand: invalid choice: '(.+?)' \(choose from ([^)]+)\)", message):
        names = [*(name.strip(" '") for name in found[2].split(",")), *commands]
        return f"there is no command {found[1]}{_nearest(found[1], names)}"
    if found := re.search(r"Unexpected config: (.{0,60})", message):
        return _one_line(f"config: expected a file of options, one 'name: value' a line; got {found[1]}")
    if found := re.match(r'expected "subcommand" to be one of \{(.+)\}, but it was not provided', message):
        return f"name a command: {', '.join([*found[1].split(','), *commands])}"
    place = ".".join(dict.fromkeys(re.findall(r'Parser key "([^"]+)"', message)))
    reasons = list(dict.fromkeys(_reasons(message, place, options)))
    if not reasons:
        return _one_line(message)
    text = " or ".join([reasons[0], *(reason.removeprefix("expected ") for reason in reasons[1:])])
    given = re.search(r"Given value: (?:NestedArg\(key='\w+', val='(.*)'\)|(.*))$", message, re.MULTILINE)
    if given and text.startswith("expected ") and "; got " not in text:
        text += f"; got {given[1] or given[2]}"
    return _one_line(f"{place}: {text}" if place else text)


def _reasons(message: str, place: str, options: Collection[str]) -> Iterator[str]:
    owner = ""
    for line in message.splitlines():
        line = re.sub(r'^(- )?(Parser key "[^"]+":? ?)?(- )?', "", line.strip())
        if found := re.match(r"Problem with given class_path '(.+)':", line):
            owner = found[1]
        elif line and not _FRAME.match(line):
            yield _reason(line, place, owner, options)


def _reason(line: str, place: str, owner: str, options: Collection[str]) -> str:
    key = place.rpartition(".")[2]
    if found := re.match(r"Expected a dot import path string: (.+)", line):
        return _unknown_class(found[1], key)
    if found := re.search(r"Option '(.+)' is not accepted(?:.*class_path='([\w.]+)')?", line):
        return _unknown_argument(found[1], found[2] or owner, place)
    if found := re.search(r"module '(.+)' has no attribute '(\w+)'", line):
        names = [name for name in dir(sys.modules.get(found[1])) if not name.startswith("_")]
        return f"there is no {found[2]} in the module {found[1]}{_nearest(found[2], names)}"
    if found := re.match(r"No module named '(.+)'", line):
        return (
            f"there is no module {found[1]}; one in the current folder is found by 'python -m ttalight' instead of "
            "'ttalight'"
        )
    if found := re.match(r"Subcommand '.+' does not accept option '(.+)'", line):
        return line + _nearest(found[1], options)
    if line.startswith("unrecognized arguments: "):
        words = [word.partition("=")[0] for word in line.split() if word.startswith("--")]
        return line + "".join(_nearest_option(word, [f"--{option}" for option in options]) for word in words[:1])
    if line.startswith("Expected an instantiatable class"):
        return _name_the_class(place)
    line = re.sub(r"^Expected an? ", "expected ", line)
    line = re.sub(r"typing\.Literal\[(.+?)\]", r"one of \1", line)
    line = re.sub(r"<class '(?:[\w.]+\.)?(\w+)'>", r"\1", line).replace(". Got value: ", "; got ")
    return line.replace("expected Sequence", "expected a list such as '[a, b]'")


def _unknown_class(name: str, key: str) -> str:
    advice = (
        f"; a class of your own is named by its import path, for example mymodule.{name}" if "." not in name else ""
    )
    return f"there is no class {name}{_nearest(name, _class_names(key))}{advice}"


def _class_names(key: str) -> list[str]:
    """Return the bare names of the classes that an argument takes."""
    if key not in _CLASSES:
        return []
    module, base = _CLASSES[key]
    members = {
        name: value for name, value in vars(module).items() if inspect.isclass(value) and issubclass(value, base)
    }
    return [
        name
        for name, value in members.items()
        if not (inspect.isabstract(value) or ABC in value.__bases__ or value is base)
    ]


def _unknown_argument(name: str, owner: str, place: str) -> str:
    key = place.rpartition(".")[2]
    kind = pkgutil.resolve_name(owner) if owner else None
    if kind is None or (key in _CLASSES and kind is _CLASSES[key][1]):  # none was named, and the base has no such thing
        return f"there is no argument {name}: {_name_the_class(place)}"
    names = ArgumentParser(exit_on_error=False).add_class_arguments(kind, as_group=False)
    return f"{owner.rpartition('.')[2]} has no argument {name}{_nearest(name, names)}"


def _name_the_class(place: str) -> str:
    return f"name the class that has it by --{place}, one of {', '.join(_class_names(place.rpartition('.')[2]))}"


def _nearest_option(word: str, names: Collection[str]) -> str:
    if word in names:
        return "; options come after the command"
    return _nearest(word.lower().replace("-", "_").replace("__", "--", 1), names)


def _nearest(name: str, names: Collection[str]) -> str:
    near = difflib.get_close_matches(name, names, n=3)
    if near:
        return f"; nearest: {', '.join(near)}"
    return f"; choose from {', '.join(sorted(names))}" if 0 < len(names) < 40 else ""
