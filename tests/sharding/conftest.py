"""Groups of cases that two processes run together, and one process alone."""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ttalight

SCRIPT = Path(__file__).with_name("processes.py")
_spec = importlib.util.spec_from_file_location("sharding_processes", SCRIPT)
processes = importlib.util.module_from_spec(_spec)
sys.modules["sharding_processes"] = processes
_spec.loader.exec_module(processes)


def free_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def launch(folder: Path, group: str) -> list[subprocess.CompletedProcess]:
    """Run a group in two processes, and return how they ended."""
    package = str(Path(ttalight.__file__).parents[1])
    path = os.pathsep.join((package, os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, SCRIPT, str(rank), port, folder, group],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(processes.RANKS)
    ]  # fmt: skip
    try:
        logs = [process.communicate(timeout=700)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.wait()
    return [
        subprocess.CompletedProcess([], process.returncode, log) for process, log in zip(started, logs, strict=True)
    ]


@pytest.fixture(scope="session")
def run_group(tmp_path_factory):
    """Return what each of two processes saved, and the folder of their runs."""

    def run(group: str) -> tuple[list[dict], Path]:
        folder = tmp_path_factory.mktemp(group)
        for ended in launch(folder, group):
            assert ended.returncode == 0, ended.stdout
        saved = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(processes.RANKS)]
        return saved, folder / "together"

    return run


@pytest.fixture
def launch_group(tmp_path):
    """Return how two processes ended, and the folder of their runs."""
    return lambda group: (launch(tmp_path, group), tmp_path / "together")


@pytest.fixture(scope="session")
def cases():
    """The module that both sides take their cases from."""
    return processes
