"""ActMAD: the source's statistics, their file, errors. The formulas are in tests/reference."""

from __future__ import annotations

import pytest
import torch
from support.networks import small_net
from torch import nn

from ttalight import Trainer
from ttalight.adapters import ActMAD
from ttalight.callbacks import ActivationStatistics
from ttalight.data import DigitsDataModule
from ttalight.tasks import SupervisedTask


def pictures(count: int, size: int = 10) -> torch.Tensor:
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(count), dtype=torch.float64)


class TestFile:
    def forwards(self, **arguments):
        adapted = ActMAD(**arguments).wrap(small_net())
        logits = adapted(pictures(4))
        return adapted.engine.net.forwards, logits

    def test_is_written_once_and_read(self, tmp_path):
        path, source = tmp_path / "new" / "statistics.pt", [pictures(5), pictures(3)]
        measured, logits = self.forwards(source=source, statistics=str(path))
        content = path.read_bytes()
        read, again = self.forwards(source=source, statistics=str(path))
        without, third = self.forwards(statistics=str(path))
        assert (measured, read, without) == (4, 2, 2)
        assert torch.equal(logits, again)
        assert torch.equal(logits, third)
        assert path.read_bytes() == content
        assert self.forwards(source=[pictures(6)], statistics=str(path))[0] == 3  # other images
        assert path.read_bytes() != content

    def test_other_weights(self, tmp_path):
        path = str(tmp_path / "statistics.pt")
        self.forwards(source=[pictures(5)], statistics=path)
        other = small_net()
        with torch.no_grad():
            other[8].bias += 1
        with pytest.raises(ValueError, match=r"missing or of other weights.*give source="):
            ActMAD(statistics=path).wrap(other)(pictures(4))

    @pytest.mark.parametrize("content", [b"", b"something else", "dictionary"])
    def test_damage(self, tmp_path, content):
        path = tmp_path / "statistics.pt"
        if content == "dictionary":
            torch.save({"moments": [(1, 2)]}, path)
        else:
            path.write_bytes(content)
        with pytest.raises(ValueError, match=r"is not a file of activation statistics.*delete it"):
            self.forwards(statistics=str(path))

    def test_fit_leaves_one(self, tmp_path):
        torch.manual_seed(0)
        task, data = (
            SupervisedTask(encoder="cifar_resnet8"),
            DigitsDataModule(batch_size=50, domains=["contrast"], limit=100),
        )
        callback, options = ActivationStatistics(samples=60), {"max_epochs": 1, "limit_train_batches": 2}
        trainer = Trainer(default_root_dir=str(tmp_path / "fit"), accelerator="cpu", callbacks=callback, **options)
        trainer.fit(task, datamodule=data)
        path = tmp_path / "fit" / "activation_statistics.pt"
        adapter = ActMAD(statistics=str(path))
        results = Trainer(default_root_dir=str(tmp_path / "adapt"), accelerator="cpu").adapt(task, data, adapter)
        assert results["protocol"]["moments"] == "positions"


def test_images_of_another_size():
    adapted = ActMAD(source=[pictures(5, 12)]).wrap(small_net())
    with pytest.raises(ValueError, match=r"activations of shapes 6x8x8, 6x3x3, and those of the source have 6x10x10"):
        adapted(pictures(4))
    with pytest.raises(ValueError, match="the source images have several sizes"):
        ActMAD(source=[pictures(5, 12), pictures(4)]).wrap(small_net())(pictures(4))


def test_networks_without_batch_norm():
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.GroupNorm(2, 6), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 4))
    images = pictures(4).float()
    with pytest.raises(ValueError, match=r"no BatchNorm layer with running statistics, .*: give source="):
        ActMAD().wrap(net)
    adapted = ActMAD(source=[images + 0.1]).wrap(net)
    adapted(images)
    assert adapted.engine.updates == 1
    with pytest.raises(ValueError, match="has no BatchNorm, GroupNorm or LayerNorm"):
        ActMAD().wrap(nn.Sequential(nn.Flatten(), nn.Linear(300, 4)))
