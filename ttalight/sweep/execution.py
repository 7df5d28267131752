"""Runs the jobs of a sweep: in this process, or in several."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, MutableSequence, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NoReturn

import torch
from tqdm import tqdm  # type: ignore[import-untyped]

from ttalight.callbacks.termination import TERMINATED
from ttalight.cli.output import be_quiet, drop_remarks, quiet
from ttalight.errors import UsageError
from ttalight.sweep.progress import SweepProgress
from ttalight.sweep.runs import Job, attempt

__all__ = ["execute"]

#: Seconds between two looks at what the processes have done.
_INTERVAL = 0.5

#: The share of each run that is done, which a process of several gets when it begins.
_shares: MutableSequence[float]


def execute(jobs: Sequence[Job], processes: int, progress: SweepProgress) -> dict[str, list[Job]]:
    """Run jobs, and continue with the others where one fails.

    Args:
        jobs: The jobs.
        processes: Number of processes that share them; 1 is this one.
        progress: Shows how far they are.

    Returns:
        The jobs that failed, by the reason.

    Raises:
        KeyboardInterrupt: If it was interrupted. What has begun can be resumed.
        RuntimeError: If one of several processes was killed.
        SystemExit: With code 143 if SIGTERM stopped it.
    """
    failed: dict[str, list[Job]] = {}
    run = _run_here if min(processes, len(jobs)) <= 1 else _run_in_processes
    with contextlib.closing(progress), quiet():
        for job, fault in run(jobs, min(processes, len(jobs)), progress):
            if fault is not None:
                failed.setdefault(fault, []).append(job)
    return failed


def _run_here(jobs: Sequence[Job], processes: int, progress: SweepProgress) -> Iterator[tuple[Job, str | None]]:
    shares = [0.0] * len(jobs)

    for index, job in enumerate(jobs):

        def show(share: float, index: int = index) -> None:
            shares[index] = share
            progress.show(shares)

        show(0.0)
        fault = attempt(job, show)
        shares[index] = 1.0
        progress.end_run(job, fault, shares)
        yield job, fault


def _run_in_processes(jobs: Sequence[Job], processes: int, progress: SweepProgress) -> Iterator[tuple[Job, str | None]]:
    context = multiprocessing.get_context("spawn")
    shares: Any = context.Array("d", len(jobs), lock=False)
    threads = max(1, torch.get_num_threads() // processes)
    others = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(processes, context, _begin, (threads, shares))
    with _stoppable():
        try:
            with _without_interrupts():  # Ctrl-C is for this process, which then stops those that it starts here
                futures = {pool.submit(_attempt, index, job): (index, job) for index, job in enumerate(jobs)}
            waiting: set[Future[str | None]] = set(futures)
            while waiting:
                done, waiting = wait(waiting, _INTERVAL, FIRST_COMPLETED)
                for future in done:
                    index, job = futures[future]
                    fault, shares[index] = future.result(), 1.0
                    progress.end_run(job, fault, shares)
                    yield job, fault
                progress.show(shares)
        except BrokenProcessPool as error:
            raise UsageError(
                "one of the processes was killed, perhaps for want of memory: the same command continues, with a "
                "smaller --jobs if need be"
            ) from error
        except BaseException:
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()  # in the middle of a run it writes a checkpoint first
            raise
        finally:
            pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """Let SIGTERM end this process by an exception, so that it stops the others."""

    def stop(number: int, frame: object) -> NoReturn:
        raise SystemExit(TERMINATED)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


# -- in a process of several


def _begin(threads: int, shares: MutableSequence[float]) -> None:
    global _shares
    _shares = shares
    torch.set_num_threads(threads)
    tqdm.set_lock(threading.RLock())  # its own one is shared between processes, and outlives one that is ended
    drop_remarks()
    be_quiet()
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _attempt(index: int, job: Job) -> str | None:
    def show(share: float) -> None:
        _shares[index] = share

    try:
        return attempt(job, show)
    except (KeyboardInterrupt, SystemExit):
        os._exit(TERMINATED)  # the pool would keep a process that only raises
