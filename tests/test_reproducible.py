"""The same seed gives the same bits, whatever the workers, loggers or other runs; a run's configuration repeats it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stress.kill_harness import check_same

from ttalight.cli import main

ROOT = Path(__file__).resolve().parents[1]
QUIET = "--trainer.accelerator cpu --trainer.enable_progress_bar false --trainer.enable_model_summary false".split()
MODEL = "--model SupervisedTask --model.encoder cifar_resnet8 --model.num_classes 2 --seed_everything 7".split()
PHOTOS = "--data ImageFolderDataModule --data.root photos --data.resize 32 --data.batch_size 4".split()
FIT = ["fit", *MODEL, *PHOTOS, *QUIET, *"--trainer.max_epochs 1 --trainer.deterministic true".split()]
ADAPT = [
    "adapt", *MODEL, *PHOTOS, *QUIET,
    *"--adapter MEMO --adapter.views 3 --predictions true --trainer.deterministic true".split(),
]  # fmt: skip
#: What must change nothing.
OTHERWISE = {
    "again": [],
    "workers, no logger": ["--data.num_workers", "2", "--trainer.logger", "false"],
    "other logger": ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs"],
}


@pytest.fixture(scope="module")
def same():
    return check_same


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with photographs and one run of each kind."""
    folder = tmp_path_factory.mktemp("work")
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("cat", "dog"):
            (folder / "photos" / split / name).mkdir(parents=True)
            for index in range(8):
                image = Image.fromarray(draw.integers(0, 255, (40, 40, 3), dtype=np.uint8))
                image.save(folder / "photos" / split / name / f"{index}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main([*FIT, "--name", "fit"])
        main([*ADAPT, "--name", "adapt"])
    return folder


@pytest.fixture(autouse=True)
def _work(folder, monkeypatch):
    monkeypatch.chdir(folder)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("otherwise", OTHERWISE)
@pytest.mark.parametrize("stage", ["fit", "adapt"])
def test_bit_for_bit(stage, otherwise, same):
    torch.rand(3), np.random.rand(3)  # noqa: NPY002  (what another run may have drawn)
    name = f"{stage}-{otherwise.replace(' ', '-').replace(',', '')}"
    main([*(FIT if stage == "fit" else ADAPT), *OTHERWISE[otherwise], "--name", name])
    same(stage, Path("runs") / name, Path("runs") / stage, logged="logger" not in name)


def test_another_seed_gives_other_bits(same):
    main([*FIT, "--seed_everything", "8", "--name", "other"])
    with pytest.raises(AssertionError, match="other weights"):
        same("fit", Path("runs/other"), Path("runs/fit"))


@pytest.mark.parametrize("stage", ["fit", "adapt"])
def test_the_configuration_of_a_run_repeats_it(stage, same):
    main([stage, "--config", f"runs/{stage}/config.yaml", "--name", f"{stage}-repeated"])
    same(stage, Path(f"runs/{stage}-repeated"), Path("runs") / stage)
