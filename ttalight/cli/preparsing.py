"""The words of a command, completed before they are parsed."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import yaml

__all__ = ["add_resumed_config", "reset_adapter_arguments"]


def add_resumed_config(words: list[str], refuse: Callable[[str], NoReturn]) -> list[str]:
    """Insert the configuration of the run that is resumed by ``--resume``, unless one is given.

    Args:
        words: The words of ``adapt``.
        refuse: Ends the command with a message.
    """
    options = ArgumentParser(add_help=False, allow_abbrev=False)
    options.add_argument("--resume")
    options.add_argument("--config", action="append")
    found = options.parse_known_args(words)[0]
    if found.resume is None or found.config is not None:
        return words
    own = Path(found.resume) / "config.yaml"
    if not own.is_file():
        refuse(f"--resume: there is no run in {found.resume} to resume: {own} is missing")
    return [words[0], "--config", str(own), *words[1:]]


def reset_adapter_arguments(words: Sequence[str]) -> list[str]:
    """Let an adapter named after another one start from its own defaults.

    The parser would hand down every argument that both have: Tent, named over a file for test-time training, would
    keep the 20 steps and the learning rate of that file.
    """
    kept: list[str] = []
    before: str | None = None
    for position, word in enumerate(words):
        option, equals, value = word.partition("=")
        if option in ("--config", "--adapter", "--adapter.class_path"):
            named = _named_adapter(option, value if equals else "".join(words[position + 1 : position + 2]))
            if before is not None and named not in (None, before):
                kept += ["--adapter", "null"]
            before = named or before
        kept.append(word)
    return kept


def _named_adapter(option: str, value: str) -> str | None:
    """Return the name of the adapter's class in an option's value, without its module."""
    try:
        if option == "--config" or value.endswith((".yaml", ".yml")):
            value = Path(value).read_text(encoding="utf-8")
        content = yaml.safe_load(value)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None  # the parser says what is wrong with it
    if option == "--config":
        content = content.get("adapter") if isinstance(content, dict) else None
    if isinstance(content, dict):
        content = content.get("class_path")
    return content.rpartition(".")[2] if isinstance(content, str) else None
