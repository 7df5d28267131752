"""A short version of ``fuzz.py``, in this process."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture(scope="module")
def fuzz():
    """The script as a module."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        import fuzz

        yield fuzz
    for name in ("fuzz", "fuzz_targets"):
        sys.modules.pop(name)


@pytest.mark.parametrize(
    "name", ["checkpoint", "resume", "npy", "npz", "results", "stream", "image", "digits", "batch"]
)
def test_readers_refuse_or_accept(fuzz, name, tmp_path):
    outcome = fuzz.fuzz(name, 60, 1, 20.0, tmp_path)
    assert outcome["findings"] == []
    assert outcome["refused"] >= 20 or name == "batch"
    assert np.isfinite(outcome["memory"])
