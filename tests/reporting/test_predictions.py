"""Predictions on disk."""

from __future__ import annotations

import errno
import os
import tracemalloc
import zipfile

import numpy as np
import pytest

from ttalight.reporting import PredictionWriter, read_predictions


def batch(start: int, size: int = 4, classes: int = 3, **replaced):
    generator = np.random.default_rng(start)
    logits = generator.normal(size=(size, classes)).astype(np.float32)
    positions = np.arange(start, start + size)
    columns = {
        "position": positions,
        "visit": np.zeros(size, dtype=int),
        "domain": np.full(size, 1),
        "sample": positions + 100,
        "label": generator.integers(0, classes, size),
        "prediction": logits.argmax(1),
        "logits": logits,
    }
    return columns | replaced


def test_batches_become_one_array_a_column(tmp_path):
    writer = PredictionWriter(tmp_path / "run")
    batches = [batch(0), batch(4, size=1), batch(5)]
    for columns in batches:
        writer.add(**columns)
    writer.close(["clean", "fog"])
    with np.load(tmp_path / "run" / "predictions.npz", allow_pickle=False) as archive:
        found = dict(archive)
    assert found["domains"].tolist() == ["clean", "fog"]
    assert found["logits"].dtype == np.float16
    for name in batches[0]:
        expected = np.concatenate([columns[name] for columns in batches])
        assert np.array_equal(found[name], expected.astype(found[name].dtype)), name
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["predictions.npz"]


def test_what_half_precision_cannot_hold(tmp_path):
    writer = PredictionWriter(tmp_path)
    writer.add(**batch(0, size=1, logits=np.array([[1e9, -np.inf, np.nan]])))
    writer.close(["clean", "fog"])
    (row,) = read_predictions(tmp_path, "logits")["logits"]
    assert row[:2].tolist() == [65504, -65504]
    assert np.isnan(row[2])


def test_dense_predictions(tmp_path):
    writer = PredictionWriter(tmp_path)
    maps = np.zeros((4, 2, 5), dtype=int)
    writer.add(**batch(0, label=maps, prediction=maps, logits=np.zeros((4, 3, 2, 5))))
    writer.close(["clean", "fog"])
    assert read_predictions(tmp_path)["label"].shape == (4, 2, 5)


def test_images_of_several_sizes(tmp_path):
    writer = PredictionWriter(tmp_path)
    maps = np.zeros((4, 2, 5), dtype=int)
    writer.add(**batch(0, label=maps, prediction=maps, logits=np.zeros((4, 3, 2, 5))))
    with pytest.raises(ValueError, match=r"label of shape \(3, 3\) a sample after \(2, 5\).*one size"):
        writer.add(**batch(4, label=np.zeros((4, 3, 3), dtype=int)))
    writer.discard()
    assert list(tmp_path.iterdir()) == []


def test_memory_does_not_grow(tmp_path):
    writer = PredictionWriter(tmp_path)
    columns = batch(0, size=1000, classes=100)
    writer.add(**columns)
    tracemalloc.start()
    try:
        for _ in range(40):
            writer.add(**columns)
        writer.close(["clean", "fog"])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "predictions.npz").stat().st_size > 8e6
    assert peak < 4e6


def test_full_disk_keeps_the_earlier_file(tmp_path, monkeypatch):
    writer = PredictionWriter(tmp_path)
    writer.add(**batch(0))
    writer.close(["clean", "fog"])
    before = (tmp_path / "predictions.npz").read_bytes()
    again = PredictionWriter(tmp_path)
    again.add(**batch(8))

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left on device: could not write predictions"):
            again.close(["clean", "fog"])
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.npz"]
    assert (tmp_path / "predictions.npz").read_bytes() == before


def test_what_a_killed_run_left_is_taken_away(tmp_path):
    (tmp_path / ".predictions.npz.1.parts").mkdir()
    (tmp_path / ".predictions.npz.1.parts" / "label").write_bytes(b"1234")
    PredictionWriter(tmp_path).discard()
    assert list(tmp_path.iterdir()) == []


def test_without_a_batch_there_is_no_file(tmp_path):
    PredictionWriter(tmp_path).close(["clean", "fog"])
    assert list(tmp_path.iterdir()) == []


class TestRead:
    def test_all_but_the_logits(self, tmp_path):
        writer = PredictionWriter(tmp_path)
        writer.add(**batch(0))
        writer.close(["clean", "fog"])
        names = {"position", "visit", "domain", "sample", "label", "prediction", "domains"}
        assert read_predictions(tmp_path).keys() == names

    def test_missing(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no .*predictions\.npz: repeat the run with --predictions true"):
            read_predictions(tmp_path)

    def test_truncated(self, tmp_path):
        writer = PredictionWriter(tmp_path)
        writer.add(**batch(0))
        writer.close(["clean", "fog"])
        file = tmp_path / "predictions.npz"
        whole = file.read_bytes()
        for length in (0, 10, len(whole) // 2, len(whole) - 5):
            file.write_bytes(whole[:length])
            with pytest.raises(ValueError, match="is not a file of predictions, or it is damaged"):
                read_predictions(tmp_path)

    def test_objects_are_never_unpickled(self, tmp_path):
        file = tmp_path / "predictions.npz"
        np.savez(file, label=np.array([{"a": 1}], dtype=object))
        with pytest.raises(ValueError, match="damaged"):
            read_predictions(tmp_path, "label")

    def test_another_archive(self, tmp_path):
        with zipfile.ZipFile(tmp_path / "predictions.npz", "w") as archive:
            archive.writestr("label.npy", b"no array")
        with pytest.raises(ValueError, match="damaged"):
            read_predictions(tmp_path, "label")
