"""Processes of one process group. They are forked: they have the imports of the test, which take seconds."""

from __future__ import annotations

import logging
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TextIO

from lightning.pytorch.utilities import rank_zero_only

__all__ = ["fork", "free_port", "launch"]


def free_port() -> str:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return str(sock.getsockname()[1])


def launch(script: Path, ranks: int, *words: object) -> list[subprocess.CompletedProcess]:
    """Run ``script RANK PORT WORDS`` once for each rank, and return how the processes ended."""
    port = free_port()
    commands = [[str(script), str(rank), port, *map(str, words)] for rank in range(ranks)]
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"{rank}.log") for rank in range(ranks)]
        started = [
            fork(_run_script, command, log=log, rank=rank)
            for rank, (command, log) in enumerate(zip(commands, logs, strict=True))
        ]
        try:
            for process in started:
                process.join(timeout=700)
        finally:
            for process in started:
                process.kill()
                process.join()
        return [
            subprocess.CompletedProcess(command, process.exitcode, log.read_text())
            for command, process, log in zip(commands, started, logs, strict=True)
        ]


def fork(
    function: Callable[..., Any],
    *args: Any,
    log: Path,
    rank: int = 0,
    environment: dict[str, str] | None = None,
    folder: Path | None = None,
) -> BaseProcess:
    """Call a function in a process of its own, whose exit code is that of a SystemExit that the function raises.

    Args:
        function: The function.
        args: Its arguments.
        log: File for all that the process writes.
        rank: Rank of the process, as Lightning reads it where it is imported.
        environment: Environment variables besides those of the test.
        folder: The working folder, whose modules can be imported; that of the test by default.
    """

    def run() -> None:
        _write_to(log.open("w", buffering=1))
        os.environ.update(environment or {})
        rank_zero_only.rank = rank
        if folder is not None:
            os.chdir(folder)
            sys.path.insert(0, str(folder))
        function(*args)

    process = get_context("fork").Process(target=run)
    process.start()
    return process


def _run_script(words: list[str]) -> None:
    sys.argv = words
    runpy.run_path(words[0], run_name="__main__")


def _write_to(file: TextIO) -> None:
    """Write all output of this process to a file, also what pytest records and what has kept a stream of the test."""
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = file
    for name in [None, *logging.root.manager.loggerDict]:
        for handler in logging.getLogger(name).handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.stream = file
    warnings.resetwarnings()
    warnings.showwarning = lambda message, category, path, line, *_: print(
        warnings.formatwarning(message, category, path, line), file=file
    )
