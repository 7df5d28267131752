"""Errors that a command prints on one line, and the words of the parser that are read for it."""

from __future__ import annotations

import ast
import re
from abc import ABC, abstractmethod
from argparse import ArgumentError
from pathlib import Path

import pytest
import torch
from jsonargparse import ArgumentParser

import ttalight.errors
from ttalight.cli.error_messages import expected_message
from ttalight.cli.parser_messages import ASIDE, WORDS
from ttalight.errors import InputError, TTALightError
from ttalight.models import Normalize

PACKAGE = Path(ttalight.errors.__file__).parent
CLASSES = [getattr(ttalight.errors, name) for name in ttalight.errors.__all__ if name != "TTALightError"]
BUILTIN = {kind.__bases__[1].__name__ for kind in CLASSES}


def raised(function):
    try:
        function()
    except Exception as error:
        return error


def test_own_errors_are_built_in_ones():
    assert all(issubclass(kind, TTALightError) for kind in CLASSES)
    assert {"ValueError", "TypeError", "RuntimeError", "FileNotFoundError"} <= BUILTIN


def test_package_makes_errors_of_its_own():
    """A plain ``ValueError`` would have a traceback; ``ttalight.errors`` has the class for it."""
    found = [
        f"{path.relative_to(PACKAGE)}:{node.lineno}: {node.func.id}"
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in BUILTIN
    ]
    assert found == []


class TestExpectedMessage:
    def test_own_error_is_one_line(self):
        assert expected_message(raised(lambda: Normalize()(torch.zeros(2, 3, 4, 4, dtype=torch.int)))).count("\n") == 0
        assert expected_message(InputError("seen,\nexpected\x1b[31m")) == "seen, expected\\x1b[31m"

    @pytest.mark.parametrize("kind", [ValueError, TypeError, RuntimeError, FileNotFoundError, KeyError])
    def test_fault_of_the_code_has_a_traceback(self, kind):
        assert expected_message(kind("of another package or of the user's code")) is None

    def test_fault_inside_the_package_has_a_traceback(self):
        """As well as one that the package's own line leads to, without a ``raise`` of its own."""
        assert expected_message(raised(lambda: Normalize()(None))) is None

    def test_error_of_a_worker(self):
        """PyTorch makes an error of the same class, whose message is the traceback."""
        text = "Caught InputError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n  ..."
        error = InputError(f"{text}\nttalight.errors.InputError: a.png: cut short\n")
        assert expected_message(error) == "a.png: cut short"

    def test_file_system(self):
        error = raised(lambda: Path("nowhere/at/all").read_text())
        assert expected_message(error) == "nowhere/at/all: No such file or directory"


class Base(ABC):
    def __init__(self, size: int = 1) -> None:
        self.size = size

    @abstractmethod
    def run(self) -> None: ...


class Child(Base):
    def run(self) -> None: ...


def parser():
    options = ArgumentParser(exit_on_error=False)
    options.add_argument("--config", action="config")
    options.add_subclass_arguments(Base, "thing")
    options.add_argument("--number", type=int | None)
    root = ArgumentParser(exit_on_error=False)
    root.add_subcommands(required=True).add_subcommand("run", options)
    return root


@pytest.fixture(scope="module")
def said(tmp_path_factory):
    """The parser's own messages for wrong words of every kind."""
    folder = tmp_path_factory.mktemp("files")
    (folder / "unknown.yaml").write_text("nonsense: 1")
    (folder / "words.yaml").write_text("some words")
    wrong = [
        ["rnu"],
        [],
        ["run", "--config", str(folder / "unknown.yaml")],
        ["run", "--config", str(folder / "words.yaml")],
        ["run", "--thing", "Chidl"],
        ["run", "--thing", "[1]"],
        ["run", "--thing", "no_module.Child"],
        ["run", "--thing", "torch.optim.Nothing"],
        ["run", "--thing", f"{__name__}.Child", "--thing.colour", "red"],
        ["run", "--thing.size", "1"],
        ["run", "--number", "many"],
        ["run", "--nmuber", "1"],
    ]
    messages = []
    for words in wrong:
        with pytest.raises(ArgumentError) as refused:
            parser().parse_args(words)
        messages.append(str(refused.value))
    return messages


@pytest.mark.parametrize("pattern", [*WORDS.values(), *(f"^ *(?:- )?{line}" for line in ASIDE)])
def test_parser_says_the_words_that_are_read(pattern, said):
    found = [re.search(pattern, message, re.MULTILINE) for message in said]
    assert any(found), "no message of the installed jsonargparse has this form"
