"""Tools that measure: they run, on the smallest settings."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).resolve().parents[1] / "tools"


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    """The table of the adapters' bench, a dict for each row."""
    command = [sys.executable, str(TOOLS / "bench_adapters.py"), "--seconds", "0", "--rounds", "2", "--batches", "2"]
    command += ["--networks", "vit", "--methods", "SAR", "PTBN", "MEMO"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert run.returncode == 0, run.stderr
    lines = [line for line in run.stdout.splitlines() if line.startswith("|")]
    head, _, *cells = [[cell.strip() for cell in line[1:-1].split("|")] for line in lines]
    assert all(len(row) == len(head) for row in cells)
    return [dict(zip(head, row, strict=True)) for row in cells]


def test_a_row_for_each_method_and_way(rows):
    assert [(row["method"], row["through"]) for row in rows] == [
        (method, through) for through in ("wrap", "trainer") for method in ("SAR", "PTBN", "MEMO")
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
