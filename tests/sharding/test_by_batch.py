"""shard='batch': two processes that share every batch give what one gives."""

from __future__ import annotations

import pytest
import torch

from ttalight.reporting import read_predictions

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = (
    "Source", "PTBN", "AlphaBN", "AlphaBN, constant", "Tent", "Tent, after, two steps", "Tent with STAG",
    "Tent, reset by domain", "ETA", "EATA", "EATA on the stream", "SAR", "SHOT", "NCTTA", "DeYO", "TestTimeTraining",
    "TestTimeTraining, batch", "TestTimeTraining with STAG",
)  # fmt: skip
CLOSE = {"rtol": 1e-9, "atol": 1e-9, "equal_nan": True}


@pytest.fixture(scope="module")
def together(run_group):
    return run_group("batch")


@pytest.fixture(scope="module")
def alone(cases, tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    torch.set_num_threads(1)
    return cases.by_batch(folder, 1), folder


@pytest.mark.parametrize("name", NAMES)
def test_logits_and_weights_are_those_of_one_process(name, together, alone, cases):
    expected = alone[0][name]
    for result in together[0]:
        ours = result[name]
        assert [len(logits) for logits in ours["logits"]] == list(cases.SIZES)
        torch.testing.assert_close(ours["logits"], expected["logits"], **CLOSE)
        torch.testing.assert_close(ours["tensors"], expected["tensors"], **CLOSE)
        torch.testing.assert_close(ours["last"], expected["last"], **CLOSE)
        assert (ours["updates"], ours["recoveries"]) == (expected["updates"], expected["recoveries"])
    if name.split(",")[0] not in ("Source", "PTBN", "AlphaBN"):
        assert expected["updates"] >= 3  # else there was nothing to compare


@pytest.mark.parametrize("name", ["Tent", "TTT"])
def test_a_run_of_the_trainer_is_that_of_one_process(name, together, alone):
    (first, second), folder = together
    one = alone[0][f"run of {name}"]
    for result in (first, second):
        ours = result[f"run of {name}"]
        assert ours["results"]["complete"]
        for row, expected in zip(ours["results"]["domains"], one["results"]["domains"], strict=True):
            assert (row["name"], row["samples"]) == (expected["name"], expected["samples"])
            assert row["accuracy"] == expected["accuracy"]
            assert row["nll"] == pytest.approx(expected["nll"], rel=1e-9)
        torch.testing.assert_close(ours["state"]["tensors"], one["state"]["tensors"], **CLOSE)
        assert ours["state"]["counters"] == one["state"]["counters"]
    assert first[f"run of {name}"]["results"]["protocol"]["sharding"] == "batch"
    columns = ("position", "label", "prediction")
    ours, theirs = (read_predictions(path / name, *columns) for path in (folder, alone[1]))
    assert all((ours[column] == theirs[column]).all() for column in columns)


def test_every_method_is_compared(cases):
    assert set(NAMES) == set(cases.BY_BATCH)
