"""The doctor: its criteria against closed forms, its conclusions, and the command."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributions import Normal, kl_divergence

from ttalight.cli import main
from ttalight.data import CIFARDataModule, Correlated, DigitsDataModule
from ttalight.doctor import Findings, advise, conclude, diagnose, judge
from ttalight.doctor.criteria import mean_entropy, prediction_diversity, statistics_distance, stream_correlation
from ttalight.tasks import SupervisedTask

pytestmark = pytest.mark.filterwarnings("ignore:.*")


def test_distance_is_the_divergence_of_gaussians():
    torch.manual_seed(0)
    mean, seen = torch.randn(2, 5).double()
    var, seen_var = torch.rand(2, 5).double() + 0.1
    expected = kl_divergence(Normal(seen, seen_var.sqrt()), Normal(mean, var.sqrt())).mean()
    assert statistics_distance(mean, var, seen, seen_var, eps=0.0) == pytest.approx(expected.item())
    assert statistics_distance(mean, var, mean, var) == 0


def test_distance_does_not_depend_on_the_scale():
    torch.manual_seed(0)
    mean, seen = torch.randn(2, 5)
    var, seen_var = torch.rand(2, 5) + 0.1
    scaled = statistics_distance(3 * mean, 9 * var, 3 * seen, 9 * seen_var, eps=0.0)
    assert scaled == pytest.approx(statistics_distance(mean, var, seen, seen_var, eps=0.0).item(), rel=1e-5)


def test_entropy_and_diversity_are_shares():
    assert mean_entropy(torch.zeros(3, 7)) == pytest.approx(1)
    assert mean_entropy(torch.tensor([[100.0, 0.0]])) == pytest.approx(0)
    assert prediction_diversity(torch.tensor([0, 1, 0, 1]), 4) == pytest.approx(math.log(2) / math.log(4))


def test_a_random_order_tells_no_classes_and_a_sorted_one_all():
    draws = np.random.default_rng(0)
    labels = torch.from_numpy(draws.integers(0, 10, 2000))
    assert stream_correlation(labels, [50] * 40, 10) < 0.02
    assert stream_correlation(labels.sort().values, [50] * 40, 10) > 0.8
    assert stream_correlation(labels, [2000], 10) == 0
    assert stream_correlation(torch.zeros(100, dtype=torch.int64), [50, 50], 10) == 0


def findings(**changes):
    """Those of a shift that statistics repair."""
    found = Findings(512, 64, 10, {"BatchNorm": 19})
    found.entropy, found.stability = {"source": 0.2, "batch": 0.15, "prior": 0.16, "quarter": 0.17}, 0.9
    found.diversity = found.agreement = dict.fromkeys(found.entropy, 0.99)
    found.distances = {"a": 0.01, "b": 0.2, "c": 0.5}
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def safe(found):
    return {name for one in advise(found) if one.safe for name in one.methods.replace(" (BatchNorm)", "").split(", ")}


@pytest.mark.parametrize(
    ("changes", "verdict", "words"),
    [
        ({}, "repaired", "one that statistics repair"),
        ({"distances": {"a": 0.01}, "entropy": {"source": 0.2, "batch": 0.2}}, "no shift", "still fit"),
        ({"distances": {"a": 0.01}}, "repaired", "one that statistics repair"),
        ({"entropy": {"source": 0.1, "batch": 0.2}}, "not repaired", "do not repair it"),
        # A network that predicts few classes is sure of them: entropy rises where accuracy does.
        (
            {"entropy": {"source": 0.1, "batch": 0.2}, "diversity": {"source": 0.3, "batch": 0.99}},
            "repaired",
            "diversity 0.30",
        ),
        (
            {"entropy": {"source": 0.1}, "norms": {"GroupNorm": 3}},
            "no batch statistics",
            "3 GroupNorm, and no BatchNorm",
        ),
        ({"stability": 0.5}, "repaired", "too small for its own statistics: a quarter of it keeps 50%"),
        ({"correlation": 0.6}, "repaired", "Classes come together"),
        (
            {"diversity": {"source": 0.3, "batch": 0.8}, "entropy": {"source": 0.1, "batch": 0.1}},
            "repaired",
            "out of balance",
        ),
    ],
)
def test_conclusions(changes, verdict, words):
    found = findings(**changes)
    assert judge(found) == verdict
    assert words in " ".join(conclude(found))


def test_advice_follows_the_findings():
    assert {"PTBN", "Tent", "AlphaBN"} <= safe(findings())
    small = safe(findings(stability=0.5))
    assert {"AlphaBN", "EMABN"} <= small
    assert not {"PTBN", "Tent"} & small
    together = safe(findings(correlation=0.6))
    assert {"FIND", "LAME with kernel: knn"} <= together
    assert not {"PTBN", "AlphaBN"} & together
    assert not {"PTBN", "FIND"} & safe(findings(entropy={"source": 0.1, "batch": 0.2}))
    groups = safe(findings(entropy={"source": 0.1}, norms={"GroupNorm": 3}, stability=None))
    assert "SAR" in groups
    assert "PTBN" not in groups


def test_it_changes_nothing_and_looks_at_no_label():
    torch.manual_seed(0)
    task = SupervisedTask(encoder="cifar_resnet8", num_classes=10)
    before = {name: value.clone() for name, value in task.state_dict().items()}
    data = DigitsDataModule(domains=["contrast"], limit=100, batch_size=50, stream=Correlated(gamma=None))
    found = diagnose(task, data, accelerator="cpu")
    assert all(torch.equal(value, before[name]) for name, value in task.state_dict().items() if "normalize" not in name)
    assert (found.images, found.batch_size, found.classes) == (100, 50, 10)
    assert len(found.distances) == found.norms["BatchNorm"] == 7
    assert found.agreement["source"] == 1.0


def test_a_network_without_batch_norm():
    task = SupervisedTask(encoder="cifar_resnet26_gn", num_classes=10, mean=(0.5,) * 3, std=(0.5,) * 3)
    found = diagnose(task, DigitsDataModule(limit=8, batch_size=4), accelerator="cpu")
    assert judge(found) == "no batch statistics"
    assert set(found.norms) == {"GroupNorm"}


class _Tags(HTMLParser):
    """Checks that tags close each other, and collects what a page loads."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.loads, self.seen = [], [], set()

    def handle_starttag(self, tag, attrs):
        self.seen.add(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href")]
        if tag not in ("meta", "line", "rect", "circle", "polyline", "path"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        if tag not in ("line", "rect", "circle", "polyline", "path"):
            assert self.open.pop() == tag


def test_the_command_writes_a_page(tmp_path, capsys, monkeypatch):
    draws = np.random.default_rng(0)
    (tmp_path / "camera").mkdir()
    for index in range(12):
        Image.fromarray(draws.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / "camera" / f"{index}.png")
    config = tmp_path / "task.yaml"
    config.write_text("model: {class_path: SupervisedTask, init_args: {encoder: cifar_resnet8}}\nadapter: Tent\n")
    monkeypatch.chdir(tmp_path)
    main(["doctor", "--config", "task.yaml", "--data", "camera", "--resize", "16", "--batch_size", "8",
          "--images", "10", "--accelerator", "cpu"])  # fmt: skip
    printed = capsys.readouterr().out
    found = json.loads((tmp_path / "doctor" / "doctor.json").read_text())
    assert (found["images"], found["batch_size"]) == (10, 8)
    assert "Safe here?" in printed
    page = (tmp_path / "doctor" / "doctor.html").read_text()
    tags = _Tags()
    tags.feed(page)
    assert tags.open == []
    assert tags.loads == []
    assert {"svg", "table", "li"} <= tags.seen
    assert "cifar_resnet8 on camera" in page
    assert not list(tmp_path.glob("lightning_logs"))


@pytest.mark.data
@pytest.mark.parametrize(("domain", "verdict"), [("clean", "no shift"), ("fog", "repaired")])
def test_verdicts_on_real_images(shared_data, tmp_path_factory, domain, verdict):
    import shutil

    root = tmp_path_factory.mktemp("cifar")
    shutil.unpack_archive(shared_data / "cifar-10-test.tar.xz", root)
    task = SupervisedTask(
        encoder="cifar_resnet20", weights=str(shared_data / "resnet20-12fca82f.th"), mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
    )  # fmt: skip
    data = CIFARDataModule(root=str(root), domains=[domain], severity=5, batch_size=100, limit=200)
    assert judge(diagnose(task, data, accelerator="cpu")) == verdict
