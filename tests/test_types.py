"""Type checks of what a method calls."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
METHOD = """
from torch import Tensor
from ttalight.adapters import AdaptiveNetwork, GradientAdapter

class Mine(GradientAdapter):
    def configure(self, net: AdaptiveNetwork) -> None:
        net.set_trainable(net.norm_affines())

    def adapt(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        outputs = net(images)
        weights = [1.0] * len(images)
        moved: bool = net.step(outputs.entropies)
        net.step(weights, outputs.entropies)
        net.step(outputs.entropies, penalty=1)
        return outputs.logits
"""
ERRORS = {
    13: 'Argument 1 to "step" of "AdaptiveNetwork" has incompatible type "list[float]"',
    14: 'Argument "penalty" to "step" of "AdaptiveNetwork" has incompatible type "int"',
}


@pytest.mark.slow
def test_steps_are_checked(tmp_path):
    pytest.importorskip("mypy")
    path = tmp_path / "mine.py"
    path.write_text(METHOD)
    run = subprocess.run(  # in the clone, whose cache saves most of the time
        [sys.executable, "-m", "mypy", "--strict", str(path)], capture_output=True, text=True, cwd=ROOT
    )
    found = [line for line in run.stdout.splitlines() if ": error: " in line]
    assert len(found) == len(ERRORS), run.stdout
    for line, (number, message) in zip(found, ERRORS.items(), strict=True):
        assert f"mine.py:{number}: " in line
        assert message in line
