"""Errors at the start for runs that cannot be divided."""

from __future__ import annotations

import pytest
import torch
from lightning import LightningModule
from lightning.pytorch.strategies import DDPStrategy, FSDPStrategy

import ttalight
from ttalight.adapters import EMABN, LAME, SAR, Tent, TestTimeTraining
from ttalight.adapters.sharding import check_sharding
from ttalight.callbacks.adaptation_files import write_checkpoint
from ttalight.data import DigitsDataModule

pytestmark = pytest.mark.filterwarnings("ignore")


class Several:
    """The parts of a trainer that the checks read."""

    def __init__(self, strategy=None, stream=True) -> None:
        self.world_size, self.strategy = 2, strategy or DDPStrategy()
        self.datamodule = DigitsDataModule(batch_size=8, limit=16) if stream else object()
        if stream:
            self.datamodule.setup("test")


def check(adapter, shard, **kwargs):
    check_sharding(Several(**kwargs), shard, adapter.reset)
    adapter.check_batch_shard(torch.nn.Linear(2, 2))


def refused(adapter, shard, match, error=ValueError, **kwargs):
    with pytest.raises(error, match=match):
        check(adapter, shard, **kwargs)


def test_how_to_divide_must_be_said():
    refused(Tent(), None, "must know how to divide them: shard='domain' or shard='batch'")


@pytest.mark.parametrize("reset", ["never", 3])
def test_domains_must_start_from_the_source(reset):
    refused(Tent(reset=reset), "domain", "starts every domain from the source, got reset=")


@pytest.mark.parametrize("adapter", [LAME, EMABN])
def test_methods_that_need_the_whole_batch(adapter):
    refused(adapter(), "batch", f"{adapter.__name__} cannot share a batch among processes")


def test_tasks_must_say_what_is_shared():
    refused(TestTimeTraining(), "batch", "it has no auxiliary_encoders", TypeError)


def test_data_without_a_stream():
    refused(SAR(), "domain", "divides the stream of a data module, and object has none", stream=False)


def test_pieces_of_parameters():
    with pytest.raises(ValueError, match="FSDPStrategy keeps pieces of the parameters"):
        check_sharding(Several(FSDPStrategy()), "batch", "domain")


def test_other_strategies():
    with pytest.raises(ValueError, match="2 processes runs under DDP, got str"):
        check_sharding(Several("dp"), "batch", "domain")


def test_resuming_a_run_of_divided_domains(tmp_path):
    def resume(folder):
        trainer = ttalight.Trainer(accelerator="cpu", devices=2, default_root_dir=str(tmp_path / "run"))
        trainer.adapt(LightningModule(), DigitsDataModule(), Tent(), resume=str(folder), shard="domain")

    with pytest.raises(ValueError, match=r"there is no run in .*run to resume"):
        resume(tmp_path / "run")
    with pytest.raises(ValueError, match=r"the run to resume is in .*elsewhere: use Trainer\(default_root_dir="):
        resume(tmp_path / "elsewhere")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stream.npz").touch()
    write_checkpoint(tmp_path / "run", 3, {})
    with pytest.raises(ValueError, match="processes that divide domains cannot resume from: use"):
        resume(tmp_path / "run")


def test_an_unknown_way_to_divide():
    with pytest.raises(ValueError, match="shard must be 'domain', 'batch' or None, got 'image'"):
        ttalight.Trainer(accelerator="cpu").adapt(LightningModule(), DigitsDataModule(), Tent(), shard="image")


def test_one_process_ignores_it(tmp_path, cases):
    results = cases.run(tmp_path, Tent(reset="never"), "domain", 1, domains=["clean"], limit=8)["results"]
    assert results["protocol"]["sharding"] is None
