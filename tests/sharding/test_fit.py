"""Training in two processes is training in one with the batch of both."""

from __future__ import annotations

import pytest
import torch

from ttalight.distributed.batch_norm_sync import BatchNormSync

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def together(run_group):
    return run_group("fit")[0]


@pytest.fixture(scope="module")
def alone(cases, tmp_path_factory):
    torch.set_num_threads(1)
    return cases.fits(tmp_path_factory.mktemp("alone"), 1)


@pytest.mark.parametrize("name", ["supervised", "alignment", "flow"])
def test_fit_equals_one_process(name, together, alone):
    for rank in together:
        torch.testing.assert_close(rank[name], alone[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["local negatives", "own statistics"])
def test_what_is_kept_local_is_another_training(name, together, alone):
    """Otherwise the comparison above would compare nothing."""
    first, one = together[0][name], alone["alignment"]
    assert max((first[key] - one[key]).abs().max() for key in one if "weight" in key) > 1e-4


def test_stand_ins_are_taken_back():
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
    keys = list(net.state_dict())
    sync = BatchNormSync()
    assert "forward" in vars(sync.apply(net)[1])
    assert list(net.state_dict()) == keys
    x = torch.randn(4, 3, 5, 5)
    with_sync = net(x)
    sync.revert(net)
    assert "forward" not in vars(net[1])
    assert torch.equal(net(x), with_sync)
