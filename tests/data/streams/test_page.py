"""The table of streams in the documentation: complete, and its examples are accepted."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml
from jsonargparse import ArgumentParser

from ttalight.data import StreamOrder, streams

PAGE = (Path(__file__).resolve().parents[3] / "docs" / "streams.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"\| `(stream: [^`]+)` \|$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_makes_its_stream(example):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--stream", type=StreamOrder)
    made = parser.instantiate(parser.parse_object(yaml.safe_load(example))).stream
    assert type(made).__name__ in example
    row = next(line for line in PAGE.splitlines() if example in line)
    assert row.startswith(f"| `{type(made).__name__}` |")


def test_every_stream_is_on_the_page():
    orders = {name for name in streams.__all__ if issubclass(getattr(streams, name), StreamOrder)} - {"StreamOrder"}
    assert orders == {line.split("`")[1] for line in PAGE.splitlines() if re.match(r"\| `\w+` \| .*`stream: ", line)}
