"""Ensembles of adapted networks and single networks at equal compute, on corrupted CIFAR-10.

    python tools/benchmarks/ensemble.py --data FOLDER --weights resnet20-12fca82f.th --methods Tent,EATA

FOLDER has ``cifar-10-batches-py``. Corruptions are generated. A file of another network than ``--encoder`` is named
with it: ``--weights resnet20-12fca82f.th cifar_resnet26_gn=resnet26_gn.pth``.

The columns of the table are the unadapted network, each method alone, an ensemble with a member for each method, for
several files of weights also one with a member for each file, and the first method with as many steps as an ensemble
has members. Networks start from the first file where the column names no other. Each column ends with its mean and with
the forwards and backwards a batch that it took.
"""

from __future__ import annotations

import argparse
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import ttalight  # isort: skip # noqa: F401  (first: it makes torchvision importable)
import torch
from torch import Tensor, nn

from ttalight import adapters
from ttalight.adapters import AdaptedEnsemble, Adapter, SelfTrainingAdapter
from ttalight.adapters.source_data import SourceDataAdapter
from ttalight.data import CorruptedDataModule, ImageDataModule
from ttalight.data.corruptions import COMMON
from ttalight.errors import MissingFileError
from ttalight.tasks import SupervisedTask

MakeNetwork = Callable[[], nn.Module]
#: Images that methods with source images get.
SOURCE_IMAGES = 500


def configurations(
    methods: Sequence[str], networks: Sequence[MakeNetwork], steps: int, source: list[Tensor] | None, merge: str
) -> dict[str, AdaptedEnsemble]:
    """Return what is compared, by the name of its column. A single network is an ensemble of one."""

    def adapted(name: str, network: int, **options: Any) -> Any:
        cls = getattr(adapters, name)
        if source is not None and issubclass(cls, SourceDataAdapter):
            options["source"] = source
        made: Adapter = cls(seed=network, **options)
        return made.wrap(networks[network % len(networks)]())

    first = methods[0]
    rows = {"Source": [adapted("Source", 0)]} | {name: [adapted(name, 0)] for name in methods}
    rows |= {f"{first}, network {number + 1}": [adapted(first, number)] for number in range(1, len(networks))}
    size = max(len(methods), len(networks))
    if len(methods) > 1:
        rows[" + ".join(methods)] = [adapted(name, 0) for name in methods]
    if len(networks) > 1:
        rows[f"{first}, {len(networks)} networks"] = [adapted(first, number) for number in range(len(networks))]
    if len(methods) > 1 and len(networks) > 1:
        pairs = [adapted(methods[number % len(methods)], number) for number in range(size)]
        rows[f"{' + '.join(methods)}, {len(networks)} networks"] = pairs
    steps = steps or size
    if steps > 1 and issubclass(getattr(adapters, first), SelfTrainingAdapter):
        rows[f"{first}, {steps} steps"] = [adapted(first, 0, steps=steps)]
    return {name: AdaptedEnsemble(members, merge) for name, members in rows.items()}


def accuracies(ensemble: AdaptedEnsemble, data: ImageDataModule) -> dict[str, float]:
    """Return the accuracy in each domain of a stream, in %, of an ensemble that is reset where a domain begins."""
    right: dict[str, list[Tensor]] = {}
    for number, batch in enumerate(data.test_dataloader()):
        images, labels = data.on_after_batch_transfer(batch, 0)
        domain = data.stream.domains[data.stream.domain_of(data.stream.batch(number))[0]].name
        if domain not in right:
            ensemble.reset()
        right.setdefault(domain, []).append(ensemble(images).argmax(1) == labels)
    return {domain: 100 * torch.cat(hits).double().mean().item() for domain, hits in right.items()}


def source_images(data: ImageDataModule) -> list[Tensor] | None:
    """Return validation images, None where there are none."""
    try:
        images = data.load("validation").images[:SOURCE_IMAGES]
    except MissingFileError:
        return None
    return list((images.float() / 255).split(data.batch_size))


def compare(ensembles: dict[str, AdaptedEnsemble], data: ImageDataModule) -> list[list[str]]:
    """Return the rows of the table: the heads, the domains, their means, forwards and backwards."""
    found, costs = {}, {}
    for name, ensemble in ensembles.items():
        found[name] = accuracies(ensemble, data)
        count = data.stream.batches
        costs[name] = ensemble.forwards / count, ensemble.backwards / count
        ensemble.release()
    domains = [domain.name for domain in data.stream.domains]
    rows = [["", *found]]
    rows += [[domain, *(f"{own[domain]:.2f}" for own in found.values())] for domain in domains]
    rows.append(["mean", *(f"{sum(own.values()) / len(own):.2f}" for own in found.values())])
    for place, name in enumerate(("forwards", "backwards")):
        rows.append([name, *(f"{cost[place]:.2f}" for cost in costs.values())])
    return rows


def show(rows: Iterable[list[str]]) -> str:
    """Return a table in Markdown."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "| --- |" + " ---: |" * (lines[0].count("|") - 2), *lines[1:]])


def network(weights: str, encoder: str) -> nn.Module:
    """Return a network with the weights of a file, whose name may begin with that of its encoder."""
    named, _, file = weights.rpartition("=")
    return SupervisedTask(encoder=named or encoder, weights=file).eval()


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder with cifar-10-batches-py")
    parser.add_argument("--weights", nargs="+", required=True, metavar="[ENCODER=]FILE", help="weights of a network")
    parser.add_argument("--encoder", default="cifar_resnet20", help="network of files without one")
    parser.add_argument("--methods", default="Tent,EATA", help="methods of the members, separated by commas")
    parser.add_argument("--steps", type=int, default=0, help="steps of the single network; as many as members")
    parser.add_argument("--merge", choices=["probabilities", "logits"], default="probabilities")
    parser.add_argument("--domains", nargs="+", default=list(COMMON), help="corruptions")
    parser.add_argument("--limit", type=int, default=1000, help="images of each corruption")
    parser.add_argument("--batch-size", type=int, default=200)
    given = parser.parse_args(words)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    data = CorruptedDataModule(
        root=given.data, generate=True, domains=given.domains, limit=given.limit, batch_size=given.batch_size
    )
    data.setup("test")
    makers = [partial(network, weights, given.encoder) for weights in given.weights]
    source = source_images(data)
    ensembles = configurations(given.methods.split(","), makers, given.steps, source, given.merge)
    print(show(compare(ensembles, data)))


if __name__ == "__main__":
    main()
