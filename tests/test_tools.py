"""The benches run, on the smallest settings; the check of versions names a missing interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[1] / "tools" / "benchmarks"


def table(tool: str, *arguments: str) -> list[dict[str, str]]:
    """The table that a tool prints, a dict for each row."""
    command = [sys.executable, str(TOOLS / tool), *arguments]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stdout.splitlines() if line.startswith("|")]
    head, _, *cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    assert all(len(row) == len(head) for row in cells)
    return [dict(zip(head, row, strict=True)) for row in cells]


def adapters(*arguments: str) -> list[dict[str, str]]:
    return table("adapters.py", "--seconds", "0", "--rounds", "2", "--batches", "2", *arguments)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return adapters("--networks", "vit", "--methods", "SAR", "PTBN", "MEMO", "TestTimeTraining")


def test_a_row_for_each_method_and_way(rows):
    assert [(row["method"], row["through"]) for row in rows] == [
        (method, through) for through in ("wrap", "trainer") for method in ("SAR", "PTBN", "MEMO", "TestTimeTraining")
    ]


def test_the_bare_passes_are_those_of_the_method(rows):
    for row in rows:
        if row["method"] == "SAR":
            assert row["forwards / backwards"] == "2.00 / 2.00"
            assert float(row["ratio (middle half)"].split()[0]) > 0
            assert float(row["images/s"].replace(",", "")) > 0
            assert (row["reset ms (of a batch)"] == "") == (row["through"] == "trainer")


def test_says_what_cannot_be_measured(rows):
    notes = {row["method"]: row["forwards / backwards"] for row in rows if row["images/s"] == ""}
    assert "has no BatchNorm" in notes["PTBN"]
    assert "batches of one" in notes["MEMO"]
    assert "no task" in notes["TestTimeTraining"]


@pytest.mark.slow
def test_test_time_training_counts_passes():
    (row,) = adapters("--networks", "resnet20", "--methods", "TestTimeTraining", "--through", "wrap")
    assert row["forwards / backwards"] == "41.00 / 40.00"
    assert float(row["ratio (middle half)"].split()[0]) > 0


def test_growth_has_a_row_for_each_point(tmp_path):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "growth.png"
    seen = table(
        "growth.py", "--images", "256", "--rounds", "1", "--axes", "length", "domains", "--figure", str(picture)
    )
    assert [(row["axis"], row["value"]) for row in seen] == [("length", "256"), ("domains", "1"), ("domains", "4")]
    for row in seen:
        assert float(row["ms an image (lowest to highest)"].split()[0]) > 0
        assert int(row["MiB"]) > 0
        assert row["adapted parameters"] == "480"  # weight and bias of 16 + 2 (16 + 32 + 64) channels
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_versions_name_a_missing_interpreter(tmp_path):
    (tmp_path / "uv").write_text("#!/bin/sh\n")
    (tmp_path / "uv").chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    command = [str(TOOLS.parent / "check_versions.sh"), "3.99-newest"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 1
    assert "Python 3.99 is missing" in run.stderr
    assert run.stdout.splitlines()[-1] == "| 3.99 | newest | | | | | | | | missing |"
