"""Type checks of what a method calls."""

from __future__ import annotations

import subprocess
import sys

import pytest

METHOD = """
from torch import Tensor
from ttalight.adapters import AdaptiveNetwork, GradientAdapter

class Mine(GradientAdapter):
    def configure(self, net: AdaptiveNetwork) -> None:
        net.set_trainable(net.norm_affines())

    def adapt(self, net: AdaptiveNetwork, images: Tensor) -> Tensor:
        outputs = net(images)
        weights = [1.0] * len(images)
        moved: bool = net.step({call})
        return outputs.logits
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("call", "error"),
    [
        ("outputs.entropies", ""),
        ("weights, outputs.entropies", 'Argument 1 to "step" of "AdaptiveNetwork" has incompatible type "list[float]"'),
        (
            "outputs.entropies, penalty=1",
            'Argument "penalty" to "step" of "AdaptiveNetwork" has incompatible type "int"',
        ),
    ],
)
def test_steps_are_checked(tmp_path, call, error):
    pytest.importorskip("mypy")
    path = tmp_path / "mine.py"
    path.write_text(METHOD.replace("{call}", call))
    run = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", str(path)], capture_output=True, text=True
    )
    assert error in run.stdout
    assert run.returncode == bool(error), run.stdout
