"""The step of gpu.py that runs the tests marked gpu."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

from step_tables import Row, Tables

#: Seconds that the tests may take.
LONGEST = 120


def marked_tests(tables: Tables, folder: Path) -> None:
    """Run the tests marked gpu and write down how each ends."""
    files = [path for path in sorted(folder.rglob("test_*.py")) if "mark.gpu" in path.read_text(encoding="utf-8")]
    report = tables.folder / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", f"--junitxml={report}"]

    def run() -> Row:
        limit = max(1.0, min(LONGEST, tables.seconds_left))
        done = subprocess.run([*command, *map(str, files)], capture_output=True, text=True, timeout=limit, check=False)
        lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines()
        return {"outcome": f"exit {done.returncode}", "message": lines[-1] if lines else ""}

    tables.measure("tests", {"test": f"all of {len(files)} files"}, run)
    for case in ElementTree.parse(report).iter("testcase") if report.is_file() else ():
        tables.measure("tests", {"test": f"{case.get('classname')}.{case.get('name')}"}, lambda case=case: ended(case))


def ended(case: ElementTree.Element) -> Row:
    """Return how a test ended."""
    for outcome in ("failure", "error", "skipped"):
        found = case.find(outcome)
        if found is not None:
            return {"outcome": outcome, "message": (found.get("message") or "").splitlines()[0][:300]}
    return {"outcome": "passed", "message": ""}
