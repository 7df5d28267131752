"""Ends a run on SIGTERM: in all its processes, at the same batch."""

from __future__ import annotations

import contextlib
import multiprocessing.util
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.multiprocessing.spawn import ProcessExitedException

from ttalight.adapters import Adapter
from ttalight.callbacks.recorder import Recorder
from ttalight.callbacks.search import find_callback, get_callback
from ttalight.distributed.deco import DeCoHook

__all__ = ["TERMINATED", "Termination", "spawned"]

#: Exit code of a process that SIGTERM has ended, as a shell reports it; that of Lightning's exception is 0.
TERMINATED = 128 + signal.SIGTERM
#: Seconds that other processes have to end before they are killed.
_GRACE = 5.0
#: Priority of what a spawned process does last.
_LAST = -1000


class Termination(Callback):
    """Ends a run on SIGTERM with exit code 143, once the batch is done. ``Trainer`` adds it.

    Lightning's handler runs a collective wherever the process is, which waits for ever where another process is in
    another collective. In a run of several processes this handler replaces it, and only notes the signal. At the end of
    each batch of training, and of an adaptation with ``shard="batch"``, the processes reduce what they have noted: a
    signal to any of them ends all of them at the same batch. With ``shard="domain"`` a process that got the signal
    leaves a file for the others. Elsewhere each process ends by itself, and ends those that it has launched.
    """

    def __init__(self) -> None:
        #: Whether this process has got the signal.
        self.received = False
        #: Whether the run ends with this batch.
        self.ends = False
        #: Whether the run has begun: all callbacks have started.
        self.begun = False
        self._earlier: Any = None
        self._launched: list[subprocess.Popen[bytes]] = []

    # -- around a run

    @contextlib.contextmanager
    def around(self, trainer: Trainer) -> Iterator[None]:
        """Cover a run from before processes are launched until all of them have ended.

        Raises:
            SIGTERMException: If the signal has ended the run, also where another process ended first.
        """
        self.received = self.ends = self.begun = False
        passes_on = _PassOn(trainer) if _launches(trainer) else None
        before = signal.signal(signal.SIGTERM, passes_on) if passes_on is not None else None
        try:
            yield
        except Exception as error:
            ended = isinstance(error, ProcessExitedException) and error.exit_code in (TERMINATED, -signal.SIGTERM)
            if ended or self.received or (passes_on is not None and passes_on.received):
                raise SIGTERMException(TERMINATED) from error
            raise
        finally:
            if passes_on is not None:
                signal.signal(signal.SIGTERM, before)
            self._wait()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Note the handler that comes before Lightning's."""
        earlier = signal.getsignal(signal.SIGTERM)
        self._earlier = earlier if callable(earlier) and not isinstance(earlier, _PassOn) else None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Replace Lightning's handler where there are several processes; Lightning restores the one before."""
        earlier, self._earlier = self._earlier, None
        if trainer.world_size > 1 and threading.current_thread() is threading.main_thread():

            def handler(number: int, frame: Any) -> None:
                self._receive(trainer)
                if earlier is not None:
                    earlier(number, frame)

            signal.signal(signal.SIGTERM, handler)

    on_sanity_check_start = on_train_start = on_validation_start = on_predict_start = on_test_start

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that the run has begun."""
        self.begun = True

    on_train_epoch_start = on_validation_epoch_start = on_predict_epoch_start = on_test_epoch_start

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give Lightning's exception the exit code."""
        if isinstance(exception, SIGTERMException):
            exception.code = TERMINATED

    # -- which batch is the last one

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Decide together with the other processes; over slow links what they noted some batches ago."""
        self._decide(trainer, find_callback(trainer, DeCoHook))

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Decide together with the other processes, where all of them have the same batches."""
        shard = _shard(trainer)
        if shard == "batch":
            self._decide(trainer)
        elif shard == "domain":
            recorder = get_callback(trainer, Recorder)
            self.ends = recorder.ends_everywhere(self.received)
            self._take_over(trainer)

    def _receive(self, trainer: Trainer) -> None:
        first, self.received = not self.received, True
        if trainer.state.fn == TrainerFn.FITTING or _shard(trainer) == "batch":
            return
        self.ends = True
        self._take_over(trainer)
        for process in self._launched if first else ():
            process.send_signal(signal.SIGTERM)

    def _decide(self, trainer: Trainer, hook: DeCoHook | None = None) -> None:
        if trainer.world_size > 1:
            if hook is not None:
                self.ends = hook.any_process(self.received)
            else:
                self.ends = trainer.strategy.reduce_boolean_decision(self.received, all=False)
            self._take_over(trainer)

    # -- processes that this one has launched

    def _take_over(self, trainer: Trainer) -> None:
        """Take launched processes from Lightning's observer, if the run ends.

        The observer kills this process when one of them ends with a code that is not 0, and this one may still be
        writing a checkpoint.
        """
        if not self.ends:
            return
        if multiprocessing.parent_process() is not None:
            # Lightning's exception would end a spawned process with code 0, and its launcher wait for a result.
            multiprocessing.util.Finalize(None, _exit, exitpriority=_LAST)
        processes = _processes(trainer)
        if all(isinstance(process, subprocess.Popen) for process in processes):
            self._launched += processes
            processes.clear()

    def _wait(self) -> None:
        for process in self._launched:
            try:
                process.wait(_GRACE)
            except subprocess.TimeoutExpired:
                process.kill()
        self._launched = []


def _exit() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(TERMINATED)


class _PassOn:
    """Handler of SIGTERM while the loops do not run in this process: launched processes get the signal.

    Where this process is one of those that run the loops they have not started yet, and it ends as without a handler.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.received = False

    def __call__(self, number: int, frame: Any) -> None:
        self.received = True
        assert self.trainer.strategy.launcher is not None
        self.trainer.strategy.launcher.kill(signal.SIGTERM)
        if not spawned(self.trainer):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            signal.raise_signal(signal.SIGTERM)


def spawned(trainer: Trainer) -> bool:
    """Return whether this process has spawned those that run the loops, and only waits for them."""
    return any(not isinstance(process, subprocess.Popen) for process in _processes(trainer))


def _launches(trainer: Trainer) -> bool:
    environment = getattr(trainer.strategy, "cluster_environment", None)
    external = environment is not None and environment.creates_processes_externally
    return (
        trainer.strategy.launcher is not None and not external and threading.current_thread() is threading.main_thread()
    )


def _processes(trainer: Trainer) -> list[Any]:
    """Return the launcher's list of the processes that it has launched."""
    processes: list[Any] = getattr(trainer.strategy.launcher, "procs", [])
    return processes


def _shard(trainer: Trainer) -> str | None:
    """Return how the processes divide the run, None where they do not."""
    adapter = find_callback(trainer, Adapter)
    return adapter.shard if adapter is not None and trainer.world_size > 1 else None
