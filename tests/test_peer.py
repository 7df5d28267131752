"""The bench beside another framework, on a stand-in for its checkout."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

TOOLS = Path(__file__).resolve().parents[1] / "tools" / "benchmarks"
#: The peer's names and signatures, and a method of our own.
CHECKOUT = {
    "conf": """
from types import SimpleNamespace as N
cfg = N(OPTIM=N(LR=1.0), TEST=N(BATCH_SIZE=1), SOURCE=N(NUM_SAMPLES=0), EATA=N(D_MARGIN=0.0, FISHER_ALPHA=2.0))
""",
    "methods/__init__": "import a_package_that_is_missing",
    "methods/base": """
import torch
from models.model import ResNetDomainNet126
from utils.losses import entropies

class Method(torch.nn.Module):
    def __init__(self, cfg, model, num_classes):
        super().__init__()
        self.cfg, self.model, self.seen = cfg, model, [torch.ones(num_classes).cuda()]

    def forward(self, images):
        self.seen.append(entropies(self.model(images)))
        return self.model(images)
""",
    "utils/losses": """
def entropies(logits):
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)
""",
    "methods/eata": """
from datasets.data_loading import get_source_loader
from methods.base import Method

class EATA(Method):
    def __init__(self, cfg, model, num_classes):
        super().__init__(cfg, model, num_classes)
        self.source = [batch[0] for batch in get_source_loader(preprocess=model.model_preprocess)[1]]
""",
}


@pytest.fixture
def checkout(tmp_path):
    for name, text in CHECKOUT.items():
        path = tmp_path / "classification" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


@pytest.fixture
def peer(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    spec = importlib.util.spec_from_file_location("peer", TOOLS / "peer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_sides_take_turns(peer, checkout):
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] in peer.NAMES}
    setting = peer.Setting("EATA", "resnet20", 4, "bf16", "no", checkout, 1, 0.0, 3, "cpu")
    cells = peer.row(setting, peer.compare(setting))
    assert cells["n"] == "3"
    assert cells["forwards, ours and theirs"] == "1.00 and 2.00"
    assert float(cells["ours over theirs (middle half)"].split()[0]) > 0
    assert {name: module for name, module in sys.modules.items() if name.split(".")[0] in peer.NAMES} == before


def test_the_peer_has_our_network_images_and_settings(peer, checkout):
    setting = peer.Setting("EATA", "resnet20", 2, "32", "no", checkout, 1, 0.0, 2, "cpu")
    images = [torch.full((2, 3, 32, 32), float(number)) for number in range(6)]
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3072, 7))
    theirs = peer.make_theirs(setting, network, images)
    assert theirs.model is network
    assert tuple(network.model_preprocess.transforms[0].size) == (32, 32)
    assert len(theirs.seen[0]) == 7
    assert [float(batch.mean()) for batch in theirs.source] == [0, 1, 2, 3]
    assert (theirs.cfg.OPTIM.LR, theirs.cfg.TEST.BATCH_SIZE, theirs.cfg.EATA.FISHER_ALPHA) == (peer.RATE, 2, 1.0)


def test_a_folder_that_is_no_checkout_is_refused(peer, checkout, tmp_path):
    assert peer.check_checkout(checkout) is None
    for folder in (None, tmp_path / "elsewhere"):
        fault = peer.check_checkout(folder)
        assert f"got {folder}" in fault
        assert "git clone https://github.com/mariodoebler/test-time-adaptation" in fault
        assert "\n" not in fault
