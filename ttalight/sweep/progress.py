"""Progress of a sweep: one bar for all runs on a terminal, one line for each run in a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from tqdm import tqdm  # type: ignore[import-untyped]

from ttalight.reporting import read_results
from ttalight.reporting.text import number
from ttalight.sweep.runs import Job

__all__ = ["SweepProgress"]


class SweepProgress:
    """The runs that have ended, and the time left by the share of all runs that is done.

    Args:
        name: Name of the sweep.
        runs: Number of runs that are to be done.
    """

    def __init__(self, name: str, runs: int) -> None:
        self.name, self.runs, self.ended, self.failed = name, runs, 0, 0
        self._begun, self._shown = time.monotonic(), 0.0
        self._writes_lines = not sys.stdout.isatty()
        self._bar = tqdm(
            desc=f"{name}: 0/{runs} runs",
            total=runs,
            bar_format="{desc} |{bar}| {percentage:.0f}% {elapsed}<{remaining}",
            smoothing=0,
            disable=self._writes_lines,
            file=sys.stdout,
        )

    def show(self, shares: Sequence[float]) -> None:
        """Show the bar, at most a few times a second.

        Args:
            shares: The share of each run that is done, 0 to 1.
        """
        now = time.monotonic()
        if self._writes_lines or now - self._shown < 0.2:
            return
        self._shown = now
        failed = f", {self.failed} failed" if self.failed else ""
        self._bar.set_description_str(f"{self.name}: {self.ended}/{self.runs} runs{failed}", refresh=False)
        self._bar.n = sum(shares)
        self._bar.refresh()

    def end_run(self, job: Job, fault: str | None, shares: Sequence[float]) -> None:
        """Count a run that has ended.

        Args:
            job: The run.
            fault: Why it failed, if it did.
            shares: The share of each run that is done, 0 to 1.
        """
        self.ended += 1
        self.failed += fault is not None
        if self._writes_lines:
            seconds = time.monotonic() - self._begun
            left = seconds / max(sum(shares), 1e-9) * (self.runs - sum(shares))
            parts = [f"{self.name}: {self.ended}/{self.runs} {job.name}", "failed" if fault else _accuracy(job)]
            times = [_clock(seconds), f"{_clock(left)} left"]
            sys.stdout.write(", ".join([*filter(None, parts), *times]) + "\n")
            sys.stdout.flush()
        self._shown = 0.0
        self.show(shares)

    def close(self) -> None:
        """Leave the bar."""
        self._bar.close()


def _accuracy(job: Job) -> str:
    accuracy = read_results(job.folder)["mean"]["accuracy"]
    return "" if accuracy is None else f"accuracy {number(100 * accuracy)} %"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
