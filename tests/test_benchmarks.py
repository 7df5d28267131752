"""The tools that measure the package's size, and compare versions of it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

import ttalight
from ttalight.adapters import ETA, FastPass, Source
from ttalight.data import DigitsDataModule
from ttalight.tasks import SupervisedTask

ROOT = Path(__file__).resolve().parents[1]
TOOLS = ROOT / "tools" / "benchmarks"
PACKAGE = Path(ttalight.__file__).parent


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def core_size():
    return load("core_size")


@pytest.fixture
def circle(tmp_path):
    """A package of four modules, two of which import each other, one under TYPE_CHECKING and one in a function."""
    package = tmp_path / "sample"
    package.mkdir()
    texts = {
        "__init__": "",
        "a": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from sample.b import B\n",
        "b": "import sample.c\ndef f():\n    from . import d\n",
        "c": "from sample import a\n",
        "d": "from .b import f\n",
    }
    for name, text in texts.items():
        (package / f"{name}.py").write_text(text)
    return package


def test_import_circles(core_size, circle):
    three = ["sample.a", "sample.b", "sample.c"]
    assert core_size.import_circles(circle, typing=False) == []
    assert core_size.import_circles(circle) == [three]
    assert core_size.import_circles(circle, inside=True) == [[*three, "sample.d"]]
    assert core_size.import_circles(circle, typing=False, inside=True) == [["sample.b", "sample.d"]]


def test_core_files_are_found(core_size):
    lines = core_size.lines_of(PACKAGE)
    assert "adapters/wrapper.py" in lines
    assert lines["adapters/wrapper.py"] == len((PACKAGE / "adapters/wrapper.py").read_text().splitlines())


def test_long_functions_and_files_are_found(core_size, tmp_path):
    (tmp_path / "long.py").write_text("def f():\n" + "    pass\n" * 60 + "\n" * 340)
    assert core_size.too_long(tmp_path) == ["long.py: 401 lines", "long.py:1 f: 61 lines"]


def test_inherited_constructor_arguments_count(core_size):
    assert {"reset", "seed"} <= core_size.constructor_arguments(Source)
    assert {"margin", "lr", "reset"} <= core_size.constructor_arguments(ETA)


def test_calls_of_a_step_are_seen(core_size):
    for calls in core_size.step_calls(PACKAGE).values():
        assert any(call.startswith("adapters/wrapper.py") and call.endswith("__call__") for call in calls)


@pytest.fixture
def golden(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    return load("golden")


def test_golden_rows_compare_bit_for_bit(golden, capsys):
    before = {
        "Tent | net | x | a": torch.tensor([1.0, float("nan")]),
        "Tent | net | x | b": "ValueError",
        "ETA | y": 1.0,
    }
    assert golden.compare(before, dict(before), brief=False) == 0
    now = {"Tent | net | x | a": torch.tensor([1.0 + 1e-6, float("nan")]), "Tent | net | x | c": 2.0, "ETA | y": 3.0}
    assert golden.compare(before, now, brief=False) == 4
    out = capsys.readouterr().out
    assert "Tent | net | x | a: 9.5e-07" in out
    assert "Tent | net | x | b: only in the first" in out
    assert "Tent | net | x | c: only in the second" in out
    assert "ETA: 0 of 1 rows are equal bit for bit\n    ETA | y: 2.0e+00\n0 of 4 rows" in out


def test_the_package_has_no_import_circle(core_size):
    assert core_size.import_circles(PACKAGE) == core_size.import_circles(PACKAGE, inside=True) == []


def test_packages_import_as_the_architecture_page_says():
    page = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (`[a-z].+) \| (.+) \|$", page, re.MULTILINE)
    allowed = {name: set(re.findall(r"\w+", right)) for left, right in rows for name in re.findall(r"`(\w+)`", left)}
    assert {"cli", "tasks", "adapters", "engine", "losses"} <= allowed.keys()
    found = set()
    for path in PACKAGE.rglob("*.py"):
        package = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for target in set(re.findall(r"^ *(?:from|import) ttalight\.(\w+)", path.read_text(), re.MULTILINE)):
            if package in allowed and target in allowed and target not in {package, *allowed[package]}:
                found.add(f"{package} -> {target}")
    assert {line for line in found if not line.startswith("cli ")} == set()


@pytest.mark.parametrize("folder", [PACKAGE, ROOT / "tools", ROOT / "tests" / "stress"], ids=lambda path: path.name)
def test_there_is_no_long_function_or_file(core_size, folder):
    assert core_size.too_long(folder) == []


def test_a_step_enters_few_functions_and_files(core_size):
    calls = core_size.step_calls(PACKAGE)["one normalisation layer"]
    functions = set(calls)
    assert len(functions) <= 45
    assert len({function.partition(":")[0] for function in functions}) <= 10


def test_ensembles_are_compared_at_equal_compute():
    tool = load("ensemble")
    data = DigitsDataModule(batch_size=20, domains=["clean", "fog"], limit=40)
    data.setup("test")

    def network(seed):
        torch.manual_seed(seed)
        return SupervisedTask(encoder="cifar_resnet8").eval()

    makers = [lambda: network(0), lambda: network(1)]
    source = tool.source_images(data)
    assert [len(images) for images in source] == [20] * 14 + [17]
    rows = tool.compare(tool.configurations(["Tent", "EATA"], makers, 0, source, "probabilities"), data)
    head, clean, fog, mean, forwards, backwards = rows
    both = ["Tent + EATA", "Tent, 2 networks", "Tent + EATA, 2 networks", "Tent, 2 steps"]
    assert head == ["", "Source", "Tent", "EATA", "Tent, network 2", *both]
    assert [clean[0], fog[0], mean[0]] == ["clean", "fog", "mean"]
    values = [[float(value) for value in row[1:]] for row in (clean, fog, mean)]
    assert values[2] == pytest.approx([(a + b) / 2 for a, b in zip(values[0], values[1], strict=True)], abs=0.01)
    cost = dict(zip(head[1:], zip(forwards[1:], backwards[1:], strict=True), strict=True))
    assert cost["Source"] == ("1.00", "0.00")
    assert cost["Tent"] == ("1.00", "1.00")
    assert cost["Tent, 2 networks"] == cost["Tent, 2 steps"] == ("2.00", "2.00")
    assert tool.show(rows).splitlines()[1] == "| --- |" + " ---: |" * 8


def test_precisions_are_compared_image_by_image(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    tool = load("precision")
    data = DigitsDataModule(batch_size=20, domains=["clean", "fog"], limit=40)
    data.setup("test")
    batches = tool.stream(data)
    assert [len(domain) for domain in batches] == [2, 2]
    network = SupervisedTask(encoder="cifar_resnet8").eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    passes = FastPass(precision="bf16-mixed", compile=False)
    seen = [tool.adapt("Tent", network, batches, **options) for options in ({}, {"passes": passes})]
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert [seen[0].ways, seen[1].ways[:5]] == ["", "bf16 "]
    labels = [torch.cat([labels for _, labels in domain]) for domain in batches]
    apart = [labels[0].clone(), labels[1].clone()]
    apart[1][:4] = -1
    cells = tool.row(tool.Seen(labels, 2.0, ""), tool.Seen(apart, 1.0, "bf16 own"), labels)
    assert cells == ["95.00", "90.00", "100.00", "95.00", "-5.00", "2.00", "bf16 own"]
