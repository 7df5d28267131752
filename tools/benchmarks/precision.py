"""Predictions and accuracy in bfloat16 beside float32, for every method, on corrupted CIFAR-10.

    python tools/benchmarks/precision.py --data FOLDER --weights cifar_resnet20=resnet20-12fca82f.th
                                         [--methods Tent EATA] [--domains gaussian_noise fog] [--limit 600]
                                         [--precisions 32 bf16-mixed auto] [--batch-size 200]

FOLDER has ``cifar-10-batches-py``. Corruptions are generated, severity 5. A file of weights follows the name of its
network: ``cifar_resnet20``, ``cifar_resnet26_gn``, or ``tf_efficientnet_lite0``, whose ImageNet features of images of
64 pixels get a ridge classifier of 2,000 training images.

The method adapts to the stream twice, in float32 and by ``FastPass(precision=..., compile=False)``, and is reset where
a domain begins. Equal is the share of images that both predict alike, of all and of the worst domain, in %. Speed is
images a second over those in float32, by CPU time, without the first batch, in which the trial is.
"""

from __future__ import annotations

import argparse
import time
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import ttalight  # isort: skip # noqa: F401  (first: it makes torchvision importable)
import torch
from ensemble import source_images
from measuring import print_head, print_machine
from torch import Tensor, nn

from ttalight import adapters
from ttalight.adapters import FastPass
from ttalight.adapters.source_data import SourceDataAdapter
from ttalight.data import CorruptedDataModule, ImageDataModule
from ttalight.tasks import SupervisedTask

METHODS = ("Source", "PTBN", "Tent", "RPL", "ETA", "EATA", "SAR", "DeYO", "ROID", "CMF", "SHOT", "RoTTA", "CoTTA")
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
NETWORKS: dict[str, dict[str, Any]] = {
    "cifar_resnet20": IMAGENET,
    "cifar_resnet26_gn": HALF,
    "tf_efficientnet_lite0": HALF | {"stem": "imagenet"},
}
#: Side of the images that a network of ImageNet sees, and number of those that its classifier is made of.
SIDE, FITTED = 64, 2000


class Seen(NamedTuple):
    """Predictions of a stream, a tensor for each domain, the time after the first batch, and the ways of passes."""

    predictions: list[Tensor]
    seconds: float
    ways: str


def make_network(name: str, weights: str, data: ImageDataModule) -> nn.Module:
    """Return a network with the weights of a file."""
    if NETWORKS[name].get("stem") != "imagenet":
        return SupervisedTask(encoder=name, weights=weights, **NETWORKS[name]).eval()
    task = SupervisedTask(encoder=name, pretrained=weights, **NETWORKS[name]).eval()
    train = data.load("train")
    places = torch.arange(0, len(train.labels), len(train.labels) // FITTED)
    features, targets = [], torch.nn.functional.one_hot(torch.as_tensor(train.labels)[places], 10) - 0.1
    with torch.no_grad():
        for part in places.split(100):
            images = torch.as_tensor(train.images)[part], torch.zeros(len(part))
            features.append(task.encode(data.on_after_batch_transfer(images, 0)[0]))
        x = torch.cat(features).double()
        mean, count = x.mean(0), x.shape[1]
        x -= mean
        weight = torch.linalg.solve(x.T @ x + len(x) * 0.1 * torch.eye(count), x.T @ targets.double()).T * 10
        task.classifier.weight.copy_(weight)
        task.classifier.bias.copy_(-weight @ mean)
    return task


def stream(data: ImageDataModule) -> list[list[tuple[Tensor, Tensor]]]:
    """Return the batches of images and labels of each domain."""
    domains: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for number, batch in enumerate(data.test_dataloader()):
        domain = int(data.stream.domain_of(data.stream.batch(number))[0])
        domains.setdefault(domain, []).append(tuple(data.on_after_batch_transfer(batch, 0)[:2]))
    return list(domains.values())


def adapt(method: str, network: nn.Module, batches: list[list[tuple[Tensor, Tensor]]], **options: Any) -> Seen:
    """Let a method adapt to a stream, and release the network."""
    adapted = getattr(adapters, method)(seed=0, **options).wrap(network)
    predictions, seconds = [], 0.0
    for domain in batches:
        adapted.reset()
        found = []
        for images, _ in domain:
            start = time.process_time()
            found.append(adapted(images).argmax(1))
            seconds += time.process_time() - start if adapted.engine.batches > 1 else 0.0
        predictions.append(torch.cat(found))
    ways = adapted.report().passes or ""
    adapted.release()
    return Seen(predictions, seconds, ways)


def row(own: Seen, other: Seen, labels: list[Tensor]) -> list[str]:
    """Return the cells of a comparison."""
    equal = [(mine == theirs).double().mean() for mine, theirs in zip(own.predictions, other.predictions, strict=True)]
    right = [100 * (torch.cat(seen.predictions) == torch.cat(labels)).double().mean() for seen in (own, other)]
    shares = [f"{100 * sum(equal) / len(equal):.2f}", f"{100 * min(equal):.2f}"]
    accuracies = [*(f"{accuracy:.2f}" for accuracy in right), f"{right[1] - right[0]:+.2f}"]
    return [*shares, *accuracies, f"{own.seconds / other.seconds:.2f}", other.ways]


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with cifar-10-batches-py")
    parser.add_argument("--weights", nargs="+", required=True, metavar="NETWORK=FILE")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--domains", nargs="+", default=["gaussian_noise", "fog", "jpeg_compression"])
    parser.add_argument("--precisions", nargs="+", choices=["32", "bf16-mixed", "auto"], default=["bf16-mixed"])
    parser.add_argument("--limit", type=int, default=600, help="images of each corruption")
    parser.add_argument("--batch-size", type=int, default=200)
    given = parser.parse_args(words)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    print_machine("cpu", 1)
    accuracies = ("accuracy in float32", "here", "difference")
    print_head(["network", "method", "precision", "equal", "worst domain", *accuracies, "speed", "ways"])
    for name, _, file in (words.partition("=") for words in given.weights):
        side = SIDE if NETWORKS[name].get("stem") == "imagenet" else None
        options = {"domains": given.domains, "limit": given.limit, "batch_size": given.batch_size, "resize": side}
        data = CorruptedDataModule(root=given.data, generate=True, **options)
        data.setup("test")
        network, batches, source = make_network(name, file, data), stream(data), source_images(data)
        labels = [torch.cat([labels for _, labels in domain]) for domain in batches]
        for method in given.methods:
            needs_source = issubclass(getattr(adapters, method), SourceDataAdapter)
            more = {"source": source} if needs_source else {}
            try:
                own = adapt(method, network, batches, **more)
            except ValueError as error:  # the network has no layer of the kind that the method adapts
                print(f"{method} on {name}: {error}")
                continue
            for precision in given.precisions:
                passes = FastPass(precision=precision, compile=False)
                cells = row(own, adapt(method, network, batches, passes=passes, **more), labels)
                print(f"| {' | '.join([name, method, precision, *cells])} |", flush=True)


if __name__ == "__main__":
    main()
