"""Imports at start-up: the first commands of a newcomer do not wait for torch and Lightning."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ttalight.cli import main
from ttalight.reporting import summarize, write_results
from ttalight.version import __version__

HEAVY = {"torch", "torchvision", "torchvision.models", "torch._dynamo", "lightning", "timm", "scipy", "tensorboard"}
#: The code of each step, in one process, and what it needs of that.
STEPS = {
    "import ttalight": set(),
    "import ttalight.reporting": set(),
    "from ttalight.cli import main": set(),
    "end(main, ['--version'])": set(),
    "end(main, ['--help'])": set(),
    "end(main, ['compare', '--help'])": set(),
    "main(['compare', sys.argv[1]])": set(),
    "end(main, ['adpt'])": set(),
    "ttalight.losses.entropy": {"torch"},
    "import torchvision": {"torch", "torchvision", "torchvision.models", "torch._dynamo"},
}
PROGRAM = """
import json, sys

def end(function, words):
    try:
        function(words)
    except SystemExit:
        return
    raise AssertionError(words)

steps, heavy, found = json.loads(sys.argv[2]), json.loads(sys.argv[3]), {}
for step in steps:
    exec(step)
    found[step] = [name for name in heavy if name in sys.modules]
print("\\n" + json.dumps(found))
"""


def write_run(folder: Path) -> None:
    """Write the results of a run that never took place."""
    row: Any = dict(name="fog", severity=5, visit=0, samples=10, accuracy=0.5, error=0.5, top5=None, nll=1.0, ece=0.1)
    rows = [row | {"seconds": 1.0, "images_per_second": 10.0}]
    mean, weighted_mean = summarize(rows)
    protocol = dict.fromkeys(("lr", "norm", "optimizer", "sharding", "steps"))
    protocol |= dict(stream="PerDomain", stream_hash="1", severity=5, samples=10, batch_size=5)
    cost = dict(forwards_per_batch=1.0, backwards_per_batch=1.0, images_per_second=5.0, adapted_parameters=1)
    results: Any = dict(
        schema=1, complete=True, method="Tent", seed=0, domains=rows, mean=mean, weighted_mean=weighted_mean,
        protocol=protocol | {"reset": "domain", "prediction": "before"}, cost=cost | {"peak_memory_bytes": None},
        source={"file": None, "sha256": None}, environment={},
    )  # fmt: skip
    write_results(folder, results)


def test_what_is_imported_at_each_step(tmp_path):
    write_run(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path), json.dumps(list(STEPS)), json.dumps(sorted(HEAVY))],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found = {step: set(names) for step, names in json.loads(done.stdout.splitlines()[-1]).items()}
    assert {step: found[step] - needed for step, needed in STEPS.items()} == {step: set() for step in STEPS}


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert (stop.value.code, capsys.readouterr().out) == (0, f"ttalight {__version__}\n")


def test_lazy_names():
    import ttalight
    import ttalight.cli

    assert ttalight.adapters.Tent.__name__ == "Tent"
    assert ttalight.cli.CLI.__name__ == "CLI"
    for module in (ttalight, ttalight.cli):
        with pytest.raises(AttributeError, match=f"module '{module.__name__}' has no attribute 'nothing'"):
            _ = module.nothing


def test_help_of_adapt_begins_with_own_options(capsys):
    with pytest.raises(SystemExit):
        main(["adapt", "--help"])
    own = capsys.readouterr().out
    places = [own.index(f"\n  {option} ") for option in ("--name", "--model", "--data", "--adapter", "--weights")]
    assert own.startswith("usage: ttalight adapt [options]\n")
    assert places == sorted(places)
    assert "--trainer.help " in own
    assert "--trainer.max_epochs MAX_EPOCHS" not in own
    with pytest.raises(SystemExit) as stop:
        main(["adapt", "--trainer.help"])
    out = capsys.readouterr().out
    assert "--trainer.max_epochs MAX_EPOCHS" in out
    assert "--adapter " not in out
    assert stop.value.code == 0
