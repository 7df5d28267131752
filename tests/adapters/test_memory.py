"""Bounded memory: streams of single images leave no tensors behind, under any method."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

TOOL = Path(__file__).resolve().parents[2] / "tools" / "benchmarks" / "memory.py"


@pytest.fixture(scope="module")
def memory():
    spec = importlib.util.spec_from_file_location("memory", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore")
def test_single_images_leave_no_tensors_behind(memory):
    images = torch.rand(8, 1, 3, 12, 12)
    adapted = {name: make() for name, make in memory.methods().items()}
    assert {"Tent", "T3A", "TestTimeTraining", memory.WINDOW} <= adapted.keys()

    def run(batches: int) -> tuple[float, int]:
        for network in adapted.values():
            for index in range(batches):
                network(images[index % len(images)])
        return memory.held()

    run(10)  # until the window is full
    first, tensors = run(2)
    last, more = run(20)
    assert more == tensors
    assert last == first  # MB, in all methods together
