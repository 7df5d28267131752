"""Scripts that run in several processes of one process group."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import ttalight

__all__ = ["free_port", "launch"]


def free_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def launch(script: Path, ranks: int, *words: object) -> list[subprocess.CompletedProcess]:
    """Run ``script RANK PORT WORDS`` once for each rank, and return how the processes ended."""
    package = str(Path(ttalight.__file__).parents[1])
    path = os.pathsep.join((package, os.environ.get("PYTHONPATH", "")))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, script, str(rank), port, *words],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(ranks)
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
