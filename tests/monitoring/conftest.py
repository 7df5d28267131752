"""Streams and runs for the tests of monitoring."""

from __future__ import annotations

import lightning
import pytest
import torch
from lightning.pytorch.loggers import Logger
from support.networks import small_net
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Module(lightning.LightningModule):
    """A classifier that knows nothing of this package."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, images):
        return self.net(images)

    def test_step(self, batch, batch_idx):
        self(batch[0])


class Rows(Logger):
    """Keeps what is logged."""

    name = version = "rows"

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[dict[str, float]] = []

    def log_hyperparams(self, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows.append({**metrics, "step": step})


@pytest.fixture
def stream():
    """Batches of 32 images, which a spread classifier predicts as several classes."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.rand(12, 32, 3, 1, 1, generator=generator, dtype=torch.float64) * 4
    return list(scale * torch.rand(12, 32, 3, 12, 12, generator=generator, dtype=torch.float64))


@pytest.fixture
def make_net(stream):
    """Make a network whose predictions of the stream are spread over its four classes, sure ones among them."""

    def make():
        net, images = small_net(scale=4.0), torch.cat(stream)
        with torch.no_grad():
            for layer in (net[1], net[4]):
                layer.momentum = 1.0
            net.train()(images)
            net.eval()
            for layer in (net[1], net[4]):
                layer.momentum = 0.1
                layer.running_mean.mul_(0.9)
            features = net[:8](images)
            net[8].weight.div_(features.std(0))
            net[8].bias.copy_(-net[8].weight @ features.mean(0))
        return net

    return make


@pytest.fixture
def net(make_net):
    return make_net()


@pytest.fixture
def run(tmp_path, stream):
    """Test a network on the stream with callbacks, and return the logged rows."""

    def go(network, *callbacks):
        labels = torch.zeros(len(stream) * 32, dtype=torch.int64)
        loader = DataLoader(TensorDataset(torch.cat(stream), labels), batch_size=32)
        logger = Rows()
        trainer = lightning.Trainer(
            accelerator="cpu", callbacks=list(callbacks), logger=logger, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        )  # fmt: skip
        trainer.test(Module(network), loader, verbose=False)
        return logger.rows

    return go
