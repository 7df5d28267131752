"""Tiny twins of all configurations: each is run as it is, but for data, network and length."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from ttalight.cli import main

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
NAMES = sorted(path.relative_to(CONFIGS).with_suffix("").as_posix() for path in CONFIGS.rglob("*.yaml"))


def twin(config: dict[str, Any]) -> dict[str, Any]:
    """Put digits and a ResNet-8 into a configuration, and two batches in place of all."""
    model, trainer = config["model"]["init_args"], config["trainer"]
    if config["model"]["class_path"] in ("MaskedAutoencoderTask", "MaskedTTT"):
        model["encoder"] = "cifar_vit4"
    elif config["model"]["class_path"] != "EmbeddingTask":
        model["encoder"] = "cifar_resnet8"
    if config["model"]["class_path"] == "VisionLanguageTask":
        model["stem"] = "cifar"
    if model.get("pretrained"):
        model["pretrained"] = False
    if "num_classes" in model:
        model["num_classes"] = 10
    if config["model"]["class_path"] == "ReCTTT":
        model["decoder_blocks"] = [1, 1, 1]
    data: dict[str, Any] = {"batch_size": 16}
    trainer |= {"accelerator": "cpu", "enable_progress_bar": False}
    if "adapter" in config:
        data |= {"domains": ["clean", "contrast"], "limit": 16, "stream": config["data"]["init_args"]["stream"]}
        adapter = config["adapter"].get("init_args", {})
        if "steps" in adapter:
            adapter["steps"] = min(adapter["steps"], 2)
        if "masks" in adapter:
            adapter["masks"] = 2
        if "read_at" in adapter:
            adapter["read_at"] = [step for step in adapter["read_at"] if step < adapter["steps"]]
    else:
        trainer |= {"max_epochs": 1, "limit_train_batches": 2, "limit_val_batches": 0, "enable_model_summary": False}
    if config["data"]["class_path"] == "EmbeddingsDataModule":
        return config | {
            "data": {"class_path": "EmbeddingsDataModule", "init_args": config["data"]["init_args"] | data}
        }
    return config | {"data": {"class_path": "DigitsDataModule", "init_args": data}}


def write_vision_language(folder: Path) -> None:
    """Write embeddings, text features and a projection for ten classes and the features of a ResNet-8."""
    folder.mkdir()
    torch.manual_seed(0)
    texts, names = torch.randn(10, 6), list("abcdefghij")
    content = {"image_features": torch.randn(40, 64), "labels": torch.arange(40) % 10}
    torch.save(content | {"text_features": texts, "names": names}, folder / "train.pt")
    torch.save({"features": texts, "names": names}, folder / "unseen.pt")
    torch.save({"weight": torch.randn(6, 64), "bias": torch.randn(6)}, folder / "start.pt")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs the twin of a configuration, and before it those whose weights it reads, each once; returns its folder."""
    folder = tmp_path_factory.mktemp("twins")
    write_vision_language(folder / "small")

    def run_once(name: str) -> Path:
        place = folder / "runs" / name
        if place.is_dir():
            return place
        text = (CONFIGS / f"{name}.yaml").read_text()
        config = yaml.safe_load(text)
        assert config["name"] == name
        for other in re.findall(r"runs/(\S+)/checkpoints", yaml.safe_dump(config)):
            run_once(other)
        path = folder / f"{name.replace('/', '_')}.yaml"
        path.write_text(yaml.safe_dump(twin(config)))
        main(["adapt" if "adapter" in config else "fit", "--config", str(path)])
        return place

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("PL_GLOBAL_SEED", "0")
        yield run_once


def different() -> list[str]:
    """Return the names of configurations with twins of their own, but for the folders of runs.

    ``tests/test_cli.py`` runs those of the digits, and reads all files.
    """
    seen: dict[str, str] = {}
    for name in NAMES:
        config = twin(yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())) | {"name": None}
        seen.setdefault(re.sub(r"runs/\w+/", "runs/", yaml.safe_dump(config)), name)
    return [name for name in seen.values() if not name.startswith("digits/")]


@pytest.mark.slow
@pytest.mark.parametrize("name", different())
def test_a_tiny_twin_of_every_configuration_runs(name, run):
    place = run(name)
    config = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())
    if "adapter" not in config:
        checkpoint = torch.load(place / "checkpoints" / "last.ckpt", weights_only=True)
        assert checkpoint["ttalight"]["task"] == config["model"]["class_path"]
        assert checkpoint["global_step"] == 2
        return
    results = json.loads((place / "results.json").read_text())
    assert results["complete"] is True
    assert results["method"] == config["adapter"]["class_path"]
    assert results["model"] == config["model"]["class_path"]
    assert [row["name"] for row in results["domains"]] == ["clean", "contrast"]
    for setting in ("lr", "reset"):
        if setting in config["adapter"].get("init_args", {}):
            assert results["protocol"][setting] == config["adapter"]["init_args"][setting]
