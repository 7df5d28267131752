from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from support.processes import launch

from ttalight.distributed import gather_with_gradients

SCRIPT = Path(__file__).with_name("two_processes.py")
_spec = importlib.util.spec_from_file_location("two_processes", SCRIPT)
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)
RANKS = worker.RANKS


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> list[dict]:
    """Values that each rank saved."""
    folder = tmp_path_factory.mktemp("ranks")
    for ended in launch(SCRIPT, RANKS, folder):
        assert ended.returncode == 0, ended.stdout
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(RANKS)]


@pytest.mark.parametrize("size", [worker.SIZE, RANKS])
@pytest.mark.parametrize("name", worker.LOSSES)
def test_two_ranks_equal_one_process(results, name, size):
    encoders = worker.Encoders()
    expected = worker.LOSSES[name](*encoders(worker.batch(size)), False)
    expected.backward()
    losses = [result[name, size][0] for result in results]
    torch.testing.assert_close(torch.stack(losses).mean(), expected.detach(), rtol=1e-10, atol=0)
    for result in results:
        torch.testing.assert_close(result[name, size][1], worker.gradients(encoders), rtol=1e-10, atol=1e-14)


def test_rank_losses_are_of_own_anchors(results):
    first, second = (result["contrastive", worker.SIZE][0] for result in results)
    assert not torch.isclose(first, second)


def test_gather_order_and_summed_gradients(results):
    for rank, result in enumerate(results):
        gathered, gradient = result["gather"]
        assert torch.equal(gathered, torch.tensor([0.0, 0.0, 1.0, 1.0])[:, None].expand(4, 3))
        weights = torch.arange(12.0).view(4, 3)
        assert torch.equal(gradient, (1 + 2) * weights[2 * rank : 2 * rank + 2])


def test_gather_alone_is_the_identity():
    tensor = torch.ones(2, 3)
    assert gather_with_gradients(tensor) is tensor
