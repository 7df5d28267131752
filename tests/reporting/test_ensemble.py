"""Saved predictions of several runs, merged."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from ttalight.reporting import PredictionWriter, ensemble_predictions


def write(folder, seed, labels=None, shape=(), classes=3):
    generator = np.random.default_rng(seed)
    logits = generator.normal(size=(5, classes, *shape), scale=4).astype(np.float16)
    labels = np.arange(5) % 3 if labels is None else labels
    labels = np.broadcast_to(labels.reshape(5, *[1] * len(shape)), (5, *shape))
    places = np.arange(5)
    writer = PredictionWriter(folder)
    writer.add(
        position=places, visit=places * 0, domain=places * 0, sample=places, label=labels,
        prediction=logits.argmax(1), logits=logits,
    )  # fmt: skip
    writer.close(["fog"])
    return torch.from_numpy(logits).double()


@pytest.mark.parametrize("shape", [(), (2, 4)])
def test_against_plain_means(tmp_path, shape):
    runs = [tmp_path / name for name in "abc"]
    logits = [write(run, seed, shape=shape) for seed, run in enumerate(runs)]
    expected = torch.stack(logits).softmax(2).mean(0)
    found = ensemble_predictions(runs)
    np.testing.assert_allclose(np.exp(found["logits"]), expected, rtol=1e-5)
    assert np.array_equal(found["prediction"], expected.argmax(1))
    found = ensemble_predictions([runs[0] / "predictions.npz", *runs[1:]], merge="logits")
    np.testing.assert_allclose(found["logits"], torch.stack(logits).mean(0), rtol=1e-5, atol=1e-5)
    assert found["label"].shape == found["prediction"].shape == (5, *shape)
    assert found["domains"].tolist() == ["fog"]


def test_errors(tmp_path):
    write(tmp_path / "a", 0)
    write(tmp_path / "b", 1, labels=np.zeros(5, dtype=int))
    write(tmp_path / "c", 2, classes=4)
    with pytest.raises(ValueError, match="are not of one stream: they differ in label"):
        ensemble_predictions([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(ValueError, match="they differ in classes"):
        ensemble_predictions([tmp_path / "a", tmp_path / "c"])
    for wrong in ([], str(tmp_path / "a")):
        with pytest.raises(ValueError, match="a list of at least one folder"):
            ensemble_predictions(wrong)
    with pytest.raises(ValueError, match="merge must be 'probabilities' or 'logits', got 'vote'"):
        ensemble_predictions([tmp_path / "a"], merge="vote")
    with pytest.raises(FileNotFoundError, match="--predictions true"):
        ensemble_predictions([tmp_path / "d"])
