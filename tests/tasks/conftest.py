"""A tiny data module and the checkpoints of the three stages."""

from __future__ import annotations

import pytest

from ttalight import Trainer
from ttalight.data import DigitsDataModule
from ttalight.tasks import AlignmentTask, ContrastiveTask, SupervisedTask

SMALL = {"encoder": "cifar_resnet8", "lr": 1e-3}


@pytest.fixture(scope="session")
def make_data():
    def make(**kwargs) -> DigitsDataModule:
        return DigitsDataModule(**({"batch_size": 20, "limit": 24} | kwargs))

    return make


@pytest.fixture(scope="session")
def make_trainer():
    def make(folder, **kwargs) -> Trainer:
        return Trainer(
            **{
                "default_root_dir": str(folder), "accelerator": "cpu", "max_epochs": 1, "limit_train_batches": 3,
                "limit_val_batches": 1, "enable_progress_bar": False, "enable_model_summary": False,
                "log_every_n_steps": 1,
            } | kwargs
        )  # fmt: skip

    return make


@pytest.fixture(scope="session")
def stages(tmp_path_factory, make_data, make_trainer) -> dict[str, str]:
    """Checkpoint files of source, simclr and align, written by three tiny runs."""
    root = tmp_path_factory.mktemp("stages")

    def fit(name, task):
        make_trainer(root / name).fit(task, datamodule=make_data())
        return str(root / name / "checkpoints" / "last.ckpt")

    files = {"source": fit("source", SupervisedTask(**SMALL)), "simclr": fit("simclr", ContrastiveTask(**SMALL))}
    task = AlignmentTask(supervised=files["source"], self_supervised=files["simclr"], **SMALL)
    return files | {"align": fit("align", task)}
