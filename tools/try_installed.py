"""Tries an installed ttalight: the first lines of the README, the command, and the configurations of digits.

``BIN/python -I tools/try_installed.py``, where BIN is the folder of an environment with the package. Runs in an empty
folder, on a few batches of each configuration in the package. Used by check_package.sh and check_versions.sh.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"
QUIET = ["--trainer.enable_progress_bar", "false", "--trainer.accelerator", "cpu"]
FIT = [
    "--data.batch_size", "16", "--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2",
    "--trainer.limit_val_batches", "1", "--trainer.enable_model_summary", "false", *QUIET,
]  # fmt: skip
ADAPT = ["--data.limit", "10", *QUIET]


def first_lines() -> None:
    """Run the first block of Python in the README."""
    block = re.search(r"^```python\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert block is not None
    exec(block[1], {})


def configurations() -> None:
    """Run every configuration of digits, and the table of two runs."""
    import ttalight
    from ttalight.cli import main

    package = Path(ttalight.__file__).parent
    if package.parent.name != "site-packages":
        sys.exit(f"ttalight is imported from {package}, expected an installed one")
    configs = {path.stem: str(path) for path in (package / "configs" / "digits").glob("*.yaml")}
    stages = ["source", "simclr", "align"]
    for name in stages:
        main(["fit", "--config", configs[name], *FIT])
    for name in configs.keys() - set(stages):
        main(["adapt", "--config", configs[name], *ADAPT])
    main(
        [
            "adapt",
            "--config",
            configs["unadapted"],
            "--adapter",
            "Tent",
            "--adapter.lr",
            "5e-4",
            "--name",
            "mine",
            *ADAPT,
        ]
    )
    main(["compare", "runs/digits/cta", "runs/mine"])


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        first_lines()
        subprocess.run([str(Path(sys.executable).with_name("ttalight")), "--version"], check=True)
        configurations()
