"""Tables of a long measurement, written row by row, so that it can be continued."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Row = dict[str, Any]


class TimeIsUpError(Exception):
    """Raised in front of a row that there is no time left for."""


class Tables:
    """Measures rows of tables and writes each table as ``NAME.json`` and ``NAME.md`` after every row.

    A row that the folder has already, an error included, is not measured again.

    Args:
        folder: Where the tables are; made if missing.
        seconds: Time until no further row is begun.
        caption: Written above each table.
        after_error: Called after a row that failed; what it raises ends the measurement.
    """

    def __init__(self, folder: Path, seconds: float, caption: str, after_error: Callable[[], None]) -> None:
        self.folder, self.caption, self.after_error = folder, caption, after_error
        self.end = time.monotonic() + seconds
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def seconds_left(self) -> float:
        return self.end - time.monotonic()

    def is_finished(self, name: str) -> bool:
        """Return whether all rows of a table were measured."""
        return self._read(name)["finished"]

    def finish(self, name: str) -> None:
        """Note that a table has all of its rows."""
        self._write(name, self._read(name) | {"finished": True})

    def measure(self, name: str, key: Row, function: Callable[[], Row]) -> None:
        """Measure a row, or write down the error that ends it.

        Args:
            name: The table's name.
            key: The first cells by column, which are what a row is known by.
            function: Returns the other cells.

        Raises:
            TimeIsUpError: If there is no time left. The table stays unfinished.
        """
        table = self._read(name)
        if any(row.items() >= key.items() for row in table["rows"]):
            return
        if self.seconds_left <= 0:
            raise TimeIsUpError(f"time is up before {name}, {key}: run the same command again to continue")
        began, failed = time.monotonic(), False
        try:
            cells = function()
        except Exception as error:  # whatever fails, the other rows are measured
            lines = str(error).strip().splitlines() or [""]
            cells, failed = {"error": f"{type(error).__name__}: {lines[0][:300]}"}, True
        table["rows"].append(key | cells | {"seconds": round(time.monotonic() - began, 1)})
        self._write(name, table)
        if failed:
            self.after_error()

    def _read(self, name: str) -> dict[str, Any]:
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text()) if path.is_file() else {"finished": False, "rows": []}

    def _write(self, name: str, table: dict[str, Any]) -> None:
        columns = list(dict.fromkeys(column for row in table["rows"] for column in row))
        lines = [f"# {name}", "", self.caption, ""]
        if columns:
            lines += [f"| {' | '.join(columns)} |", "|" + " --- |" * len(columns)]
        for row in table["rows"]:
            lines.append(f"| {' | '.join(_cell(row.get(column, '')) for column in columns)} |")
        if not table["finished"]:
            lines += ["", "Not finished."]
        for suffix, text in ((".json", json.dumps(table, indent=1)), (".md", "\n".join(lines))):
            part = self.folder / f"{name}{suffix}.part"  # a table is whole whenever the process is ended
            part.write_text(text + "\n")
            part.replace(self.folder / f"{name}{suffix}")


def _cell(value: Any) -> str:
    return (f"{value:.4g}" if isinstance(value, float) else str(value)).replace("|", "\\|")
