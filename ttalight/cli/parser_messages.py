"""Messages for the words of a command that the parser refuses: the reason alone, with the nearest names."""

from __future__ import annotations

import difflib
import inspect
import pkgutil
import re
import sys
from abc import ABC
from collections.abc import Collection, Iterator
from functools import cache
from types import ModuleType

from jsonargparse import ArgumentParser

from ttalight.cli.error_messages import one_line

__all__ = ["ASIDE", "WORDS", "parser_message", "unknown_command"]

#: What is read from the parser's own words, which a test holds against the installed version. A message of any other
#: form is printed as it is, on one line.
WORDS = {
    "no such command": r"argument subcommand: invalid choice: '(.+?)' \(choose from ([^)]+)\)",
    "no command": r'expected "subcommand" to be one of \{(.+)\}, but it was not provided',
    "no options": r"Unexpected config: (.{0,60})",
    "place": r'Parser key "([^"]+)"',
    "value": r"Given value: (?:NestedArg\(key='\w+', val='(.*)'\)|(.*))$",
    "class": r"Problem with given class_path '(.+)':",
    "no such class": r"Expected a dot import path string: (.+)",
    "no such argument": r"Option '(.+)' is not accepted(?:.*class_path='([\w.]+)')?",
    "no such name": r"module '(.+)' has no attribute '(\w+)'",
    "no such module": r"No module named '(.+)'",
    "no such option in a file": r"Subcommand '.+' does not accept option '(.+)'",
    "no such option": r"unrecognized arguments: .*?(--\S+)",
    "class is missing": r"Expected an instantiatable class",
}
#: Lines beside the reason, which are left out.
ASIDE = (
    "Does not validate against any of the Union subtypes",
    "Subtypes: ",
    "Errors:$",
    "Given value type: ",
    "Given value: ",
    "Expected a <class 'NoneType'>$",
    "Expected a path but ",
    "Not a valid subclass of ",
    "Subclass types expect one of:",
    r"a class path \(str\)$",
    "a dict with",
)


def parser_message(message: str, options: Collection[str], commands: Collection[str] = ()) -> str:
    """Return the reason in what the parser says, with the nearest names where one is unknown.

    Args:
        message: The parser's words, of many lines where a value may be of several types.
        options: Names of the command's options, for suggestions.
        commands: Names of the commands that the parser does not know.
    """
    if found := re.search(WORDS["no such command"], message):
        names = [*(name.strip(" '") for name in found[2].split(",")), *commands]
        return unknown_command(found[1], names)
    if found := re.search(WORDS["no options"], message):
        return one_line(f"config: expected a file of options, one 'name: value' a line; got {found[1]}")
    if found := re.match(WORDS["no command"], message):
        return f"name a command: {', '.join([*found[1].split(','), *commands])}"
    place = ".".join(dict.fromkeys(re.findall(WORDS["place"], message)))
    reasons = list(dict.fromkeys(_reasons(message, place, options)))
    if not reasons:
        return one_line(message)
    text = " or ".join([reasons[0], *(reason.removeprefix("expected ") for reason in reasons[1:])])
    given = re.search(WORDS["value"], message, re.MULTILINE)
    if given and text.startswith("expected ") and "; got " not in text:
        text += f"; got {given[1] or given[2]}"
    return one_line(f"{place}: {text}" if place else text)


def unknown_command(name: str, names: Collection[str]) -> str:
    """Return what to say about the name of a command that there is not."""
    return f"there is no command {name}{_nearest(name, names)}"


def _reasons(message: str, place: str, options: Collection[str]) -> Iterator[str]:
    owner, aside = "", re.compile("|".join(ASIDE))
    for line in message.splitlines():
        line = re.sub(rf"^(- )?({WORDS['place']}:? ?)?(- )?", "", line.strip())
        if found := re.match(WORDS["class"], line):
            owner = found[1]
        elif line and not aside.match(line):
            yield _reason(line, place, owner, options)


def _reason(line: str, place: str, owner: str, options: Collection[str]) -> str:
    key = place.rpartition(".")[2]
    if found := re.match(WORDS["no such class"], line):
        return _unknown_class(found[1], key)
    if found := re.search(WORDS["no such argument"], line):
        return _unknown_argument(found[1], found[2] or owner, place)
    if found := re.search(WORDS["no such name"], line):
        names = [name for name in dir(sys.modules.get(found[1])) if not name.startswith("_")]
        return f"there is no {found[2]} in the module {found[1]}{_nearest(found[2], names)}"
    if found := re.match(WORDS["no such module"], line):
        return (
            f"there is no module {found[1]}; one in the current folder is found by 'python -m ttalight' instead of "
            "'ttalight'"
        )
    if found := re.match(WORDS["no such option in a file"], line):
        return line + _nearest(found[1], options)
    if found := re.match(WORDS["no such option"], line):
        return line + _nearest_option(found[1].partition("=")[0], [f"--{option}" for option in options])
    if re.match(WORDS["class is missing"], line):
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


@cache
def _classes() -> dict[str, tuple[ModuleType, type]]:
    """Return the arguments that take a class: where its siblings are by their bare names, and what they derive from."""
    import lightning.pytorch.callbacks  # here, since commands that do not need them start faster
    import torch
    from lightning import Callback, LightningDataModule, LightningModule

    from ttalight import adapters, data, tasks

    return {
        "model": (tasks, LightningModule),
        "data": (data, LightningDataModule),
        "stream": (data, data.StreamOrder),
        "adapter": (adapters, adapters.Adapter),
        "terms": (adapters, adapters.Term),
        "optimizer": (torch.optim, torch.optim.Optimizer),
        "scheduler": (torch.optim.lr_scheduler, torch.optim.lr_scheduler.LRScheduler),
        "callbacks": (lightning.pytorch.callbacks, Callback),
    }


def _class_names(key: str) -> list[str]:
    """Return the bare names of the classes that an argument takes."""
    if key not in _classes():
        return []
    module, base = _classes()[key]
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
    if kind is None or (
        key in _classes() and kind is _classes()[key][1]
    ):  # none was named, and the base has no such thing
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
