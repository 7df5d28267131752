"""DeCoHook in two processes, through Lightning."""

from __future__ import annotations

import importlib.util
import itertools
from pathlib import Path

import pytest
import torch
from support.processes import launch

import ttalight
from ttalight.distributed.deco import DeCoHook

SCRIPT = Path(__file__).with_name("deco_processes.py")
_spec = importlib.util.spec_from_file_location("deco_processes", SCRIPT)
processes = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(processes)


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """The cases of one rank, which are those of the other."""
    folder = tmp_path_factory.mktemp("deco")
    for ended in launch(SCRIPT, processes.RANKS, folder):
        assert ended.returncode == 0, ended.stdout
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(processes.RANKS))
    assert first["steps until signal"] == second["steps until signal"]
    weights = [name for name, value in first.items() if isinstance(value, torch.Tensor)]
    assert all(torch.equal(first[name], second[name]) for name in weights)
    return first


def reference(ratio, delay):
    """Weights of the fit by the published recursion, in one process and with a sort for the largest values."""
    module = processes.Module()
    unsent = [torch.zeros_like(processes.weights_of(module)) for _ in range(processes.RANKS)]
    sums = []
    for step in range(processes.STEPS):
        total = 0
        for rank, kept in enumerate(unsent):
            vector = kept + processes.gradient(module, rank, step)
            largest = sorted(range(len(vector)), key=lambda i: -abs(vector[i].item()))[: round(ratio * len(vector))]
            sent = torch.zeros_like(vector)
            sent[largest] = vector[largest]
            unsent[rank] = vector - sent
            total = total + sent
        sums.append(total / processes.RANKS)
        if step >= delay:
            moved = processes.weights_of(module) - processes.LR * sums[step - delay]
            torch.nn.utils.vector_to_parameters(moved, module.parameters())
    return processes.weights_of(module)


def test_whole_gradients_without_delay_are_plain_ddp_bit_for_bit(done):
    assert torch.equal(done["whole"], done["plain"])


def test_compressed_and_delayed_gradients_follow_the_recursion(done):
    torch.testing.assert_close(done["plain"], reference(1, 0))
    torch.testing.assert_close(done["compressed"], reference(0.3, 2))
    torch.testing.assert_close(done["delayed"], reference(1, 2))


def test_resumed_fit_gives_the_weights_of_an_uninterrupted_one(done):
    assert torch.equal(done["resumed"], done["uninterrupted"])


def test_no_gradient_is_lost_when_the_setting_changes(done):
    module = processes.Module(linear=True)
    start = processes.weights_of(module)
    cases = itertools.product(range(processes.RANKS), range(processes.STEPS))
    total = sum(processes.gradient(module, *case) for case in cases)
    left = done["changed"]["left"]
    missing = left["unsent"]
    for message in left["in_flight"]:
        for values, indices in zip(message["values"], message["indices"], strict=True):
            missing = missing.index_add(0, indices, values)
    assert (left["ratio"], left["delay"], len(left["in_flight"])) == (0.1, 2, 1)
    applied = 3 * total / processes.RANKS - missing
    torch.testing.assert_close(done["changed"]["weights"], start - processes.LR * applied)


def test_signal_ends_all_processes_when_it_has_arrived(done):
    assert done["steps until signal"] == 4 + 2  # in the fourth batch, with a delay of 2


def test_refusals(done, tmp_path):
    assert "in_flight has indices beyond 74 values" in done["other model"]
    assert "saves nothing from 1/2 on" in done["ratio"]
    with pytest.raises(ValueError, match="give ratio and delay, or neither"):
        DeCoHook(ratio=0.1)
    with pytest.raises(ValueError, match="ratio must be in"):
        DeCoHook(ratio=0.0, delay=1)
    with pytest.raises(ValueError, match="every above"):
        DeCoHook(every=1)
    with pytest.raises(ValueError, match="state of DeCoHook is damaged"):
        DeCoHook().load_state_dict({"ratio": 2.0, "delay": 0, "unsent": None, "in_flight": []})
    trainer = ttalight.Trainer(default_root_dir=tmp_path, accelerator="cpu", logger=False, callbacks=DeCoHook())
    with pytest.raises(ValueError, match="got SingleDeviceStrategy: leave it out"):
        trainer.fit(processes.Module(), processes.loader())
