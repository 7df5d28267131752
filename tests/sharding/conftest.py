"""Groups of cases that two processes run together, and one process alone."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from support.processes import launch

SCRIPT = Path(__file__).with_name("processes.py")
_spec = importlib.util.spec_from_file_location("sharding_processes", SCRIPT)
processes = importlib.util.module_from_spec(_spec)
sys.modules["sharding_processes"] = processes
_spec.loader.exec_module(processes)


@pytest.fixture(scope="session")
def run_group(tmp_path_factory):
    """Return what each of two processes saved, and the folder of their runs."""

    def run(group: str) -> tuple[list[dict], Path]:
        folder = tmp_path_factory.mktemp(group)
        for ended in launch(SCRIPT, processes.RANKS, folder, group):
            assert ended.returncode == 0, ended.stdout
        saved = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(processes.RANKS)]
        return saved, folder / "together"

    return run


@pytest.fixture
def launch_group(tmp_path):
    """Return how two processes ended, and the folder of their runs."""
    return lambda group: (launch(SCRIPT, processes.RANKS, tmp_path, group), tmp_path / "together")


@pytest.fixture(scope="session")
def cases():
    """The module that both sides take their cases from."""
    return processes
