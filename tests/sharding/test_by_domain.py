"""shard='domain': two processes with domains of their own give what one gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ttalight.data import Continual, DigitsDataModule, Domain, Mixed, PerDomain, Probed
from ttalight.data.streams.partition import batch_positions, partition
from ttalight.reporting import read_predictions, read_results

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = (
    "Tent", "FIND", "DeYO", "EATA", "probes", "one by one", "episodes", "episodes with probes",
    "fewer domains than ranks", "limited",
)  # fmt: skip
COLUMNS = ("position", "visit", "domain", "sample", "label", "prediction", "logits", "domains")


@pytest.fixture(scope="module")
def together(run_group):
    return run_group("domain")


@pytest.fixture(scope="module")
def alone(cases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    torch.set_num_threads(1)
    return cases.by_domain(folder, 1), folder


def plain(results):
    """The results without times, and what tells a run of several processes."""
    results = {**results, "domains": [dict(row) for row in results["domains"]]}
    results["cost"] = {**results["cost"], "images_per_second": None, "peak_memory_bytes": None}
    results["protocol"] = {**results["protocol"], "sharding": None}
    results["environment"] = {**results["environment"], "processes": None}
    for row in results["domains"]:
        row["seconds"] = row["images_per_second"] = None
    return results


@pytest.mark.parametrize("name", NAMES)
def test_results_equal_one_process(name, together, alone):
    (first, second), folder = together
    expected, one = alone
    ours, theirs = (plain(result[name]["results"]) for result in (first, expected))
    if name == "EATA":  # each process measures on source images what matters
        assert ours.pop("cost")["forwards_per_batch"] > theirs.pop("cost")["forwards_per_batch"]
    assert ours == theirs
    assert second[name]["results"] == first[name]["results"]
    assert first[name]["results"]["complete"] == (name != "limited")
    ours, theirs = (read_predictions(path / name, *COLUMNS) for path in (folder, one))
    for column in COLUMNS:
        np.testing.assert_array_equal(ours[column], theirs[column], err_msg=column)


def test_results_name_sharding_and_are_written_once(together):
    (first, _), folder = together
    written = read_results(folder / "Tent")
    assert written["protocol"]["sharding"] == "domain"
    assert written["environment"]["processes"] == 2
    assert written["domains"] == first["Tent"]["results"]["domains"]
    assert not (folder / "Tent" / "ranks").exists()
    assert not list((folder / "Tent").glob(".*"))


def test_every_case_is_compared(cases):
    assert set(NAMES) == set(cases.BY_DOMAIN)


# -- who gets what


def stream(order, sizes=(50, 10, 30, 20), batch_size=8, clean=0):
    domains = [Domain(f"d{index}") for index in range(len(sizes))] + ([Domain("clean")] if clean else [])
    labels = [np.arange(size) % 3 for size in (*sizes, *([clean] if clean else []))]
    return order.build(domains, labels, batch_size, 0)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("each_batch", [False, True])
def test_every_batch_has_one_owner(ranks, each_batch):
    given = stream(PerDomain())
    shares = partition(given, ranks, each_batch)
    assert sorted(np.concatenate(shares).tolist()) == list(range(given.batches))
    assert all((np.diff(share) > 0).all() for share in shares)
    if not each_batch:
        visits = [set(np.concatenate([given.visit[given.batch(i)] for i in share] or [[]])) for share in shares]
        assert sum(map(len, visits)) == len(given.visits)


def test_shares_are_balanced_by_size():
    given = stream(PerDomain())
    images = [sum(np.diff(given.offsets)[share]) for share in partition(given, 2)]
    assert images == [60, 50]  # 50 + 10 and 30 + 20
    given = stream(Mixed())
    images = [sum(np.diff(given.offsets)[share]) for share in partition(given, 2, each_batch=True)]
    assert max(images) - min(images) <= 16
    assert sum(images) == 110


def test_probes_stay_with_what_they_look_at():
    given = stream(Probed(), sizes=(16, 16, 16), clean=8)
    for share in partition(given, 3):
        kinds = [given.is_probe(int(index)) for index in share]
        assert kinds == [False, False, True]


def test_domains_need_boundaries():
    with pytest.raises(ValueError, match="does not announce where one begins"):
        partition(stream(Continual()), 2)


@pytest.mark.parametrize("order", [PerDomain(), Continual(), Probed(every=20), Probed()])
def test_places_equal_an_undivided_engine(order):
    from ttalight.adapters import Tent

    given = stream(order, clean=12 if isinstance(order, Probed) else 0)
    wrapped = Tent().wrap(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 4)))
    engine, seen = wrapped._engine, []
    for index in range(given.batches):
        engine.probe(given.is_probe(index))
        if given.begins_visit(index) and not given.is_probe(index):
            engine.announce()
        seen.append((engine.net.counters.visit, engine.net.counters.batch))
        engine(torch.randn(4, 3, 1, 1))
    assert list(zip(*(part.tolist() for part in batch_positions(given)), strict=True)) == seen


def test_share_loader_keeps_batch_numbers():
    data = DigitsDataModule(batch_size=8, domains=["clean", "contrast"], limit=20)
    data.setup("test")
    data.share = np.array([1, 4, 5])
    loader = data.test_dataloader()
    assert [number for _, number, _ in loader] == [1, 4, 5]
    loader.limits = 5
    assert [number for _, number, _ in loader] == [1, 4]
    loader.limits = 1
    assert list(loader) == []
