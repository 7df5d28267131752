"""Tiny tasks with random weights on the embedded digits."""

from __future__ import annotations

import pytest
import torch

from ttalight import Trainer
from ttalight.data import DigitsDataModule
from ttalight.tasks import BaseTask, CrossTaskTTT, JointTask

KINDS = {"cta": CrossTaskTTT, "joint": JointTask}


@pytest.fixture
def make_task():
    def make(kind: str = "cta") -> BaseTask:
        torch.manual_seed(0)
        return KINDS[kind](encoder="cifar_resnet8", crop_scale=[0.5, 1.0], flip=0.0)

    return make


@pytest.fixture
def make_data():
    def make(**kwargs) -> DigitsDataModule:
        return DigitsDataModule(**({"batch_size": 20, "limit": 40, "domains": ["clean", "contrast"]} | kwargs))

    return make


@pytest.fixture
def make_trainer(tmp_path):
    def make(*callbacks, name: str = "run", **kwargs) -> Trainer:
        return Trainer(
            **{
                "default_root_dir": str(tmp_path / name), "accelerator": "cpu", "callbacks": list(callbacks),
                "enable_progress_bar": False, "enable_model_summary": False,
            } | kwargs
        )  # fmt: skip

    return make
