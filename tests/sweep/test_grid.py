"""The file of a sweep: its runs, their names and options, and what is wrong with a bad one."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from ttalight.sweep.grid import read_sweep


@pytest.fixture(autouse=True)
def _work(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("base.yaml").write_text("{}")


def read(grid, **more):
    Path("sweep.yaml").write_text(yaml.safe_dump({"config": "base.yaml", "grid": grid} | more, sort_keys=False))
    return read_sweep("sweep.yaml")


def names(grid):
    return [run.name for run in read(grid).runs]


def test_product_in_the_order_of_the_file():
    grid = {
        "seed_everything": [0, 1],
        "adapter": ["PTBN", {"class_path": "ttalight.adapters.Tent", "init_args": {"lr": [1e-3, 1e-6], "steps": 2}}],
        "data.init_args.limit": 20,
    }
    sweep = read(grid)
    assert [run.name for run in sweep.runs] == [
        "PTBN-seed=0", "PTBN-seed=1",
        "Tent-lr=0.001-steps=2-seed=0", "Tent-lr=0.001-steps=2-seed=1",
        "Tent-lr=1e-06-steps=2-seed=0", "Tent-lr=1e-06-steps=2-seed=1",
    ]  # fmt: skip
    assert sweep.runs[5].words == (
        "--config=base.yaml", "--adapter=ttalight.adapters.Tent", "--seed_everything=1",
        "--adapter.init_args.lr=1e-06", "--adapter.init_args.steps=2", "--data.init_args.limit=20",
    )  # fmt: skip
    assert [run.candidate for run in sweep.runs][1:3] == ["PTBN", "Tent-lr=0.001-steps=2"]
    assert sweep.folder == Path("runs/sweep")


def test_classes_and_lists_among_the_values():
    stream = {"class_path": "Correlated", "init_args": {"gamma": 0.1}}
    found = names({"data.init_args.stream": ["Mixed", stream], "data.init_args.domains": [["fog", "clean"], ["clean"]]})
    assert found[0] == "stream=Mixed-domains=fog+clean"
    assert found[3] == "stream=Correlated,gamma=0.1-domains=clean"
    assert (
        '--data.init_args.stream={"class_path": "Correlated", "init_args": {"gamma": 0.1}}'
        in read({"data.init_args.stream": [stream]}).runs[0].words
    )


def test_names_tell_arguments_apart():
    assert names({"adapter.seed": [1], "seed_everything": [2]}) == ["adapter.seed=1-seed_everything=2"]
    assert names({"model.weights": ["runs/a b/last.ckpt"]}) == ["weights=runs_a_b_last.ckpt"]
    long = names({"model.weights": ["x" * 300 + end for end in "ab"]})
    assert len(set(long)) == 2
    assert max(map(len, long)) < 255


def test_a_class_comes_before_its_arguments():
    (run,) = read({"adapter.lr": [0.1], "adapter": ["Tent"]}).runs
    assert run.words[1:] == ("--adapter=Tent", "--adapter.lr=0.1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2]", "is not the file of a sweep: expected 'config'"),
        ("grid: {a: [", "is not a file in YAML"),
        ("{config: base.yaml, grid: 3}", "expected 'config'"),
        ("{grid: {a: [1]}}", "config must be a configuration file of adapt, or a list of such, got None"),
        ("{config: none.yaml, grid: {a: [1]}}", "config names none.yaml, and there is no such file in"),
        ("{config: base.yaml, grids: 1, grid: {a: [1]}}", r"unknown key grids \(nearest: grid\)"),
        ("{config: base.yaml, name: ., grid: {a: [1]}}", "is no name of a folder in runs"),
        ("{config: base.yaml, grid: {a: 1}}", "grid needs at least one list"),
        ("{config: base.yaml, grid: {a: []}}", "the list of a is empty"),
        ("{config: base.yaml, grid: {a: [1, 1]}}", "two runs of the grid would have the folder a=1"),
        ("{config: base.yaml, grid: {name: [x]}}", "grid cannot have name, which the sweep sets"),
        ("{config: base.yaml, grid: {1: [x]}}", "grid has the key 1, expected the path of an argument"),
        ("{config: base.yaml, grid: {adapter: [3]}}", "an entry of adapter must be a class, or a mapping"),
        ("{config: base.yaml, grid: {adapter: [{class_path: T, lr: [1]}]}}", "an entry of adapter must be"),
        (
            "{config: base.yaml, grid: {adapter: [{class_path: T, init_args: {lr: [1]}}], adapter.lr: [2]}}",
            "grid gives adapter.lr twice",
        ),
    ],
)
def test_bad_files(text, message):
    Path("bad.yaml").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        read_sweep("bad.yaml")


def test_names_of_other_things_are_refused():
    with pytest.raises(FileNotFoundError, match=r"there is no file none.yaml"):
        read_sweep("none.yaml")
    Path("runs/sweep").mkdir(parents=True)
    Path("runs/sweep/config.yaml").touch()
    with pytest.raises(ValueError, match="runs/sweep is the folder of a run: give the sweep another name"):
        read({"a": [1]})
    assert read({"a": [1]}, name="other/lr").folder == Path("runs/other/lr")
