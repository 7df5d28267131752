"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

import ttalight  # noqa: F401  (imported first: it makes torchvision importable beside a CPU build of torch)
from ttalight.reporting.figures import can_plot


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_seed_of_another_test():
    os.environ.pop("PL_GLOBAL_SEED", None)
    yield
    os.environ.pop("PL_GLOBAL_SEED", None)


@pytest.fixture(autouse=True, scope="session")
def _no_figures():
    """Runs log no figures: one takes as long as all else of a short run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ttalight.callbacks.logs.can_plot", lambda: False)
        yield


@pytest.fixture
def figures(monkeypatch):
    """Let runs log figures."""
    monkeypatch.setattr("ttalight.callbacks.logs.can_plot", can_plot)


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder with real data sets and weights; the test is skipped where there is none."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("TTALIGHT_TEST_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no real data at {folder}: set TTALIGHT_TEST_DATA to the folder that has it")
    return folder
