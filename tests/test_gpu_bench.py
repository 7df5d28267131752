"""The bench for a GPU: tables that can be continued, and all steps on the CPU at the smallest sizes."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[1] / "tools" / "benchmarks"


def load(name):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def step_tables():
    return load("step_tables")


def test_rows_are_measured_once(step_tables, tmp_path):
    calls, failed = [], []

    def measured(value):
        calls.append(value)
        return {"value": value}

    def fails():
        raise RuntimeError("no | device\nand more")

    for _ in range(2):  # the second one continues
        tables = step_tables.Tables(tmp_path / "out", 60, "a machine", lambda: failed.append(1))
        tables.measure("table", {"method": "Tent"}, lambda: measured(0.5))
        tables.measure("table", {"method": "SAR"}, fails)
    assert (calls, failed) == ([0.5], [1])
    text = (tmp_path / "out" / "table.md").read_text()
    assert "| Tent | 0.5 |" in text
    assert "RuntimeError: no \\| device |" in text
    assert "a machine" in text
    assert "Not finished." in text
    tables.finish("table")
    assert tables.is_finished("table")
    assert "Not finished." not in (tmp_path / "out" / "table.md").read_text()


def test_no_row_begins_when_time_is_up(step_tables, tmp_path):
    tables = step_tables.Tables(tmp_path, 0, "", lambda: None)
    with pytest.raises(step_tables.TimeIsUpError, match="run the same command again"):
        tables.measure("table", {"method": "Tent"}, dict)
    assert not tables.is_finished("table")


def test_reads_of_the_host_are_counted():
    count = load("host_reads").count_host_reads
    numbers = torch.arange(4.0)
    assert count(lambda: numbers.mul(2).sum(), "cpu") == {}
    assert count(lambda: (numbers.sum().item(), numbers.tolist(), numbers[numbers > 1], numbers[[1]]), "cpu") == {
        "_local_scalar_dense": 1,
        "tolist": 1,
        "index": 1,
    }


def test_all_steps_run_on_the_cpu(tmp_path):
    tests, out = tmp_path / "tests", tmp_path / "out"
    tests.mkdir()
    (tests / "test_one.py").write_text("import pytest\n@pytest.mark.gpu\ndef test_one(): pass\n")
    command = [str(TOOLS / "gpu.sh"), str(out), "--tiny", "--tests", str(tests)]
    environment = {**os.environ, "PYTHON": sys.executable, "LIMIT": "600", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert run.returncode == 0, run.stderr
    assert "all is measured" in run.stdout
    tables = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    assert set(tables) == {"tests", "synchronisations", "compiled", "precision", "training", "methods-resnet20-2"}
    assert all(table["finished"] for table in tables.values())
    errors = [row["error"] for table in tables.values() for row in table["rows"] if "error" in row]
    assert errors == ["ValueError: CUDA graphs need a CUDA device"]
    assert [row["outcome"] for row in tables["tests"]["rows"]] == ["exit 0", "passed"]
    assert [row["host waits"] for row in tables["synchronisations"]["rows"]] == [1, 1]
    assert all(row["recipe in h"] > 0 for row in tables["training"]["rows"])
    for path in out.glob("*.json"):
        assert path.with_suffix(".md").is_file()
