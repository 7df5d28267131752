"""The pages: they build without a warning, and what they tell the reader to run, runs."""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
from abc import ABC
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from ttalight import adapters
from ttalight.adapters import Adapter, Term
from ttalight.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts)]
FENCED = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TINY = {
    "fit": [
        "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "2",
        "--data.batch_size", "16", "--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false",
    ],
    "adapt": ["--data.limit", "10", "--trainer.enable_progress_bar", "false"],
    "corrupt": ["--data.limit", "30"],
    "reproduce": ["--dry-run", "--images-per-second", "1000"],
}  # fmt: skip
#: Commands that many pages begin with, and the runs that they make. Each is run once, and its run is copied.
STAGES = {
    ("fit", "--config", f"configs/digits/{name}.yaml"): f"runs/digits/{name}" for name in ("source", "simclr", "align")
}


class Block(NamedTuple):
    language: str
    text: str
    line: int


def blocks(page: Path) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    return [Block(found[1], found[2], text.count("\n", 0, found.start()) + 1) for found in FENCED.finditer(text)]


def save_named(block: Block) -> None:
    """Save a block that begins with its file's name, ``# name.py`` or ``# name.yaml``."""
    name = re.match(r"# ([\w-]+\.(?:py|yaml))\n", block.text)
    if name is not None:
        Path(name[1]).write_text(block.text)


def run_python(page: Path, block: Block, namespace: dict[str, object]) -> None:
    """Run a block, with the page's line numbers in tracebacks."""
    exec(compile("\n" * block.line + block.text, str(page), "exec", dont_inherit=True), namespace)


def run_console(block: Block, made: Path) -> None:
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for word in words:
            if word.startswith(("tools/", "configs/")):
                assert (ROOT / word).exists(), f"{line}: there is no {word}"
        if words[:3] == ["python", "-m", "ttalight"]:
            words = words[2:]
        stage = STAGES.get(tuple(words[1:]))
        if stage and (made / stage).exists():
            shutil.copytree(made / stage, stage)
        elif words[:1] == ["ttalight"]:
            run_command(words[1:])
            if stage:
                shutil.copytree(stage, made / stage)


def run_command(words: list[str]) -> None:
    target = os.devnull
    if ">" in words:
        *words, _, target = words
    with open(target, "w") as file, contextlib.redirect_stdout(file), pytest.MonkeyPatch.context() as patch:
        # Without the options of every class that can be named: a walk through all of them takes more than a minute.
        walk = "jsonargparse._completions.add_subactions_and_get_subclass_choices"
        patch.setattr(walk, lambda *args, **kwargs: [], raising=False)
        try:
            main([*words, *TINY.get(words[0], [])])
        except SystemExit as stop:  # --print_config stops with code 0
            if stop.code:
                pytest.fail(f"ttalight {shlex.join(words)} stopped with code {stop.code}")
    if "--print_completion" in words:
        assert "adapt" in Path(target).read_text()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Folder with the runs of stages."""
    return tmp_path_factory.mktemp("made")


def has_something_to_run(page: Path) -> bool:
    return any(block.language in ("python", "bash", "console") for block in blocks(page))


@pytest.mark.parametrize(
    "page", list(filter(has_something_to_run, PAGES)), ids=lambda page: page.relative_to(ROOT).as_posix()
)
def test_blocks_run_from_top_to_bottom(page, made, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    monkeypatch.setattr(sys, "argv", ["ttalight"])
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "page"}
    for block in blocks(page):
        save_named(block)
        if block.language == "python":
            run_python(page, block, namespace)
        elif block.language in ("bash", "console"):
            run_console(block, made)


def test_relative_links_of_the_readme_lead_somewhere():
    links = re.findall(r"\]\((?!https?:|#)([^)#]+)", (ROOT / "README.md").read_text(encoding="utf-8"))
    assert not [link for link in links if not (ROOT / link).exists()]


def test_readme_numbers_are_results():
    readme = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    measured = [line for line in readme if line.startswith("|") and "±" in line]
    results = (ROOT / "docs" / "results" / "digits.md").read_text(encoding="utf-8").splitlines()
    assert len(measured) == 6
    assert not [line for line in measured if line not in results]


def test_readme_names_every_method():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    kinds = {name: kind for name in adapters.__all__ if inspect.isclass(kind := getattr(adapters, name))}
    methods = [name for name, kind in kinds.items() if issubclass(kind, (Adapter, Term)) and not is_base(kind)]
    assert len(methods) > 4
    assert not [name for name in methods if f"`{name}`" not in readme]


def is_base(kind: type) -> bool:
    return inspect.isabstract(kind) or ABC in kind.__bases__


def messages_of_the_package() -> str:
    """All texts in the code, one after the other; a value that is put in stands as a zero byte."""
    texts = []
    for path in (ROOT / "ttalight").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "\0" for part in node.values)
                texts.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_messages_that_troubleshooting_explains_exist():
    page = " ".join((ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").split())
    quoted = re.findall(r'\*\*"([^*]+)"\*\*', page)
    known = messages_of_the_package()
    pieces = [piece.strip() for message in quoted for piece in message.split("...") if piece.strip()]
    assert len(quoted) > 15
    assert not [piece for piece in pieces if piece not in known]


def test_pages_build_without_warnings(tmp_path):
    missing = [name for name in ("sphinx", "furo", "myst_parser") if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"{', '.join(missing)} not installed: pip install '.[docs]'")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    done = subprocess.run(
        [*command, "-d", str(tmp_path / "trees"), str(ROOT / "docs"), str(tmp_path / "html")],
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    pages = {page.stem for page in (tmp_path / "html" / "api" / "generated").iterdir()}
    for name in {page.rpartition(".")[0] for page in pages}:  # packages of which each class has a page of its own
        package = importlib.import_module(name)
        classes = {f"{name}.{key}" for key in package.__all__ if inspect.isclass(getattr(package, key))}
        assert classes - pages <= {"ttalight.engine.AdaptiveNetwork"}  # it stands on the page of the adapters
