"""ESPNet with its public weights on frames of CamVid: the statistics of a batch undo fog."""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

import pytest

from ttalight import Trainer
from ttalight.adapters import PTBN, Source
from ttalight.data import CamVidDataModule, PerDomain
from ttalight.tasks import SegmentationTask

TOOL = Path(__file__).resolve().parents[2] / "tools" / "benchmarks" / "espnet.py"


@pytest.fixture(scope="module")
def espnet():
    spec = importlib.util.spec_from_file_location("espnet", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.espnet


def test_fog_on_real_frames(espnet, shared_data, tmp_path):
    shutil.unpack_archive(shared_data / "camvid-test-59.tar", tmp_path)
    network = espnet(shared_data / "espnet_p2q8_camvid12.pth", (96.11, 94.18, 90.61), (71.49, 71.59, 70.84))
    task = SegmentationTask(network, 12, mean=(0, 0, 0), std=(1, 1, 1))
    found = {}
    for method in (Source(), PTBN()):
        data = CamVidDataModule(
            root=str(tmp_path / "camvid"), images="images", maps="labels", domains=("clean", "fog"), limit=2,
            batch_size=2, num_workers=0, stream=PerDomain(shuffle=False),
        )  # fmt: skip
        trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
        rows = trainer.adapt(task, data, method)["domains"]
        found[type(method).__name__] = [row["miou"] for row in rows]
    (clean, fog), (_, adapted) = found["Source"], found["PTBN"]
    assert clean > 0.35
    assert adapted > 1.5 * fog
