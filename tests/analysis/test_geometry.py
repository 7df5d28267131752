"""Rows, means and files."""

from __future__ import annotations

import json

import pytest
import torch

from ttalight.analysis import (
    Features,
    class_medians,
    davies_bouldin,
    geometry,
    mean_geometry,
    read_features,
    read_geometry,
    stratified,
    write_features,
    write_geometry,
)


def features(seed: int = 0) -> Features:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(12) % 3
    values = {
        (place, steps): torch.randn(12, 4, generator=generator) + labels[:, None]
        for place in ("encoder", "projector")
        for steps in (0, 5)
    }
    return Features(labels, values)


def test_rows_are_the_measures_of_each_place_and_step():
    own = features()
    reference = {"source": {"projector": class_medians(own.values["projector", 0], own.labels, 3)}}
    rows = geometry("fog", own, reference)
    assert [(row["place"], row["steps"]) for row in rows] == list(own.values)
    assert rows[3]["davies_bouldin"] == davies_bouldin(own.values["projector", 5], own.labels)
    assert [list(row["distances"]) for row in rows] == [[], [], ["source"], ["source"]]
    assert rows[2]["distances"]["source"]["mean"] == pytest.approx(0, abs=1e-6)
    assert rows[3]["distances"]["source"]["mean"] > 0.1


def test_too_few_classes_are_no_reason_to_stop():
    own = Features(torch.zeros(4, dtype=torch.long), {("encoder", 0): torch.randn(4, 2)})
    assert geometry("fog", own)[0]["davies_bouldin"] is None


def test_means_leave_clean_out():
    rows = [*geometry("clean", features(9)), *geometry("fog", features(1)), *geometry("snow", features(2))]
    mean = mean_geometry(rows)
    assert [row["domains"] for row in mean] == [2] * 4
    assert mean[0]["davies_bouldin"] == pytest.approx((rows[4]["davies_bouldin"] + rows[8]["davies_bouldin"]) / 2)
    rows[4]["davies_bouldin"] = None
    assert mean_geometry(rows)[0]["davies_bouldin"] is None


def test_files_are_read_as_written(tmp_path):
    own = {"fog": features(1), "clean": features(2)}
    write_features(tmp_path, own)
    found = read_features(tmp_path)
    assert found.keys() == own.keys()
    for name, expected in own.items():
        assert torch.equal(found[name].labels, expected.labels)
        assert found[name].values.keys() == expected.values.keys()
        assert all(torch.equal(found[name].values[key], value) for key, value in expected.values.items())
    rows = geometry("fog", own["fog"])
    write_geometry(tmp_path, rows)
    assert read_geometry(tmp_path) == rows
    assert json.loads((tmp_path / "geometry.json").read_text())["mean"][0]["domains"] == 1


def test_damaged_and_missing_files(tmp_path):
    for read, name in ((read_features, "features.npz"), (read_geometry, "geometry.json")):
        with pytest.raises(FileNotFoundError, match=f"no .*{name}.* FeatureCollector"):
            read(tmp_path)
        (tmp_path / name).write_text("[")
        with pytest.raises(ValueError, match=f"{name} is damaged"):
            read(tmp_path)
    (tmp_path / "geometry.json").write_text('{"schema": 7}')
    with pytest.raises(ValueError, match="schema 7, expected 1"):
        read_geometry(tmp_path)


def test_a_stratified_choice_has_even_classes():
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 3)
    chosen = stratified(labels, 23, seed=1)
    assert torch.bincount(labels[chosen]).tolist() == [10, 10, 3]
    assert torch.equal(chosen, stratified(labels, 23, seed=1))
    assert not torch.equal(chosen, stratified(labels, 23, seed=2))
    assert torch.equal(stratified(labels, 100), torch.arange(63))
