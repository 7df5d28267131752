"""The language of the repository: plain docstrings, no private vocabulary."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
#: Words that open a noun clause. A docstring names a thing by its noun, or begins with a verb.
OPENINGS = {"What", "Which", "How", "Where", "Who", "Whatever", "Whoever"}
THIRD_PERSON = set(
    "Adds Checks Closes Computes Decides Draws Gives Holds Keeps Lets Locks Makes Notes Plans Puts Reads Refuses "
    "Removes Replaces Returns Runs Says Sets Takes Waits Writes".split()
)
#: Words of a private vocabulary, as patterns.
BANNED = (
    r"\banew\b",
    r"\bstrangers?\b",
    r"\bputs? back\b",
    r"\btakes? back\b",
    r"\bdescends?\b",
    r"\bunclaimed\b",
    r"\b(go|goes|going) on\b",
    r"\bsays? so\b",
    r"\bbrings? along\b",
    r"\bfree the (parameters|affines)\b",
    r"\bfor a while\b",
)


def python_files():
    return [path for folder in ("ttalight", "tests", "tools") for path in sorted((ROOT / folder).rglob("*.py"))]


def pages():
    return [*sorted((ROOT / "docs").rglob("*.md")), ROOT / "README.md"]


def test_docstrings_open_with_a_noun_or_a_verb():
    found = []
    for path in python_files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node) or "."
                if text.split()[0] in OPENINGS:
                    found.append(f"{path.relative_to(ROOT)}: {text.splitlines()[0]}")
    assert found == []


def test_docstrings_of_functions_are_imperative():
    """``Return the logits``, as in most of them, and not ``Returns the logits``; properties and classes are nouns."""
    found = []
    for path in sorted((ROOT / "ttalight").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                first = (ast.get_docstring(node) or ".").split()[0]
                if first in THIRD_PERSON:
                    found.append(f"{path.relative_to(ROOT)}:{node.lineno}: {first}")
    assert found == []


@pytest.mark.parametrize("pattern", BANNED)
def test_no_private_vocabulary(pattern):
    texts = {path: path.read_text() for path in [*python_files(), *pages()] if path != Path(__file__)}
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for path, text in texts.items()
        for line in text.splitlines()
        if re.search(pattern, line, re.IGNORECASE)
    ]
    assert found == []
