from __future__ import annotations

import csv
import errno
import json
import math
import os
from pathlib import Path

import pytest

from ttalight.reporting import read_results, summarize, write_results


def damage(folder: Path, change) -> None:
    """Rewrite a result file after a change to what it holds."""
    file = folder / "results.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))


class TestSummarize:
    def test_by_hand(self, make_domain):
        rows = [make_domain("noise", 0.5, samples=100), make_domain("blur", 0.8, samples=300)]
        mean, weighted = summarize(rows)
        assert mean == pytest.approx({"accuracy": 0.65, "error": 0.35, "nll": 1.35, "ece": 0.065})
        assert weighted == pytest.approx({"accuracy": 0.725, "error": 0.275, "nll": 1.275, "ece": 0.0725})

    @pytest.mark.parametrize("missing", [None, math.nan, math.inf])
    def test_a_missing_value_is_not_skipped(self, make_domain, missing):
        rows = [make_domain("noise", 0.5), make_domain("blur", 0.8)]
        rows[0]["nll"] = missing
        for summary in summarize(rows):
            assert summary["nll"] is None
            assert summary["accuracy"] == pytest.approx(0.65)

    def test_no_rows(self):
        nothing = {"accuracy": None, "error": None, "nll": None, "ece": None}
        assert summarize([]) == (nothing, nothing)

    def test_no_samples_have_no_weighted_mean(self, make_domain):
        mean, weighted = summarize([make_domain("noise", 0.5, samples=0)])
        assert mean["accuracy"] == 0.5
        assert weighted["accuracy"] is None


class TestWriteResults:
    def test_round_trip(self, tmp_path, make_results):
        results = make_results()
        results["protocol"] |= {"severity": [1, 5], "reset": 10, "lr": None}
        write_results(tmp_path / "new" / "run", results)
        assert read_results(tmp_path / "new" / "run") == results
        assert read_results(str(tmp_path / "new" / "run" / "results.json")) == results

    def test_json_is_strict(self, tmp_path, make_results):
        results = make_results()
        results["domains"][0]["nll"] = math.nan
        results["cost"]["images_per_second"] = math.inf
        results["environment"]["loss"] = [-math.inf]
        write_results(tmp_path, results)
        text = (tmp_path / "results.json").read_text()
        assert "NaN" not in text
        assert "Infinity" not in text
        read = read_results(tmp_path)
        assert read["domains"][0]["nll"] is None
        assert read["cost"]["images_per_second"] is None
        assert read["environment"]["loss"] == [None]
        assert math.isnan(results["domains"][0]["nll"])

    def test_csv_holds_the_rows(self, tmp_path, make_results, make_domain):
        rows = [make_domain("a, b", 0.5, visit=1), make_domain("blur", 0.75)]
        write_results(tmp_path, make_results(domains=rows))
        with open(tmp_path / "domains.csv", newline="", encoding="utf-8") as file:
            read = list(csv.DictReader(file))
        assert [row["name"] for row in read] == ["a, b", "blur"]
        assert [float(row["accuracy"]) for row in read] == [0.5, 0.75]
        assert read[0]["visit"] == "1"
        assert read[0]["top5"] == ""
        assert list(read[0]) == list(rows[0])

    def test_leaves_nothing_else_behind(self, tmp_path, make_results):
        write_results(tmp_path, make_results())
        write_results(tmp_path, make_results(seed=1))
        assert sorted(path.name for path in tmp_path.iterdir()) == ["domains.csv", "results.json"]
        assert read_results(tmp_path)["seed"] == 1

    def test_full_disk_keeps_the_earlier_files(self, tmp_path, make_results):
        """The operating system really refuses to write more than a few bytes."""
        write_results(tmp_path, make_results())
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        resource = pytest.importorskip("resource")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))
        try:
            with pytest.raises(OSError, match="what was there before is kept") as caught:
                write_results(tmp_path, make_results(seed=1))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert str(tmp_path / "results.json") in str(caught.value)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    @pytest.mark.parametrize("call", ["replace", "fsync"])
    def test_failing_call_keeps_the_earlier_files(self, tmp_path, make_results, monkeypatch, call):
        write_results(tmp_path, make_results())
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

        def fail(*args):
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(os, call, fail)
            with pytest.raises(OSError, match="No space left on device: could not write") as caught:
                write_results(tmp_path, make_results(seed=1))
        assert caught.value.errno == errno.ENOSPC
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_read_only_folder(self, tmp_path, make_results):
        write_results(tmp_path, make_results())
        tmp_path.chmod(0o500)
        try:
            if os.access(tmp_path, os.W_OK):
                pytest.skip("this user may write anywhere")
            with pytest.raises(PermissionError, match="could not write"):
                write_results(tmp_path, make_results(seed=1))
        finally:
            tmp_path.chmod(0o700)
        assert read_results(tmp_path)["seed"] == 0

    def test_folder_that_cannot_be_made(self, tmp_path, make_results):
        (tmp_path / "file").write_text("")
        with pytest.raises(OSError, match="could not write") as caught:
            write_results(tmp_path / "file" / "run", make_results())
        assert caught.value.filename == str(tmp_path / "file" / "run")


class TestReadResults:
    def test_missing_file(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"no .*results\.json: give the folder of a run"):
            read_results(tmp_path)

    def test_truncated_anywhere(self, tmp_path, make_results):
        write_results(tmp_path, make_results())
        file = tmp_path / "results.json"
        whole = file.read_text().rstrip()
        for length in range(0, len(whole), 97):
            file.write_text(whole[:length])
            with pytest.raises(ValueError, match=r"results\.json is not a result file, it is damaged or not JSON"):
                read_results(tmp_path)

    @pytest.mark.parametrize("content", [b"\xff\xfe{}", b'{"schema": NaN}', b"Epoch 1"])
    def test_not_strict_json(self, tmp_path, content):
        (tmp_path / "results.json").write_bytes(content)
        with pytest.raises(ValueError, match=r"damaged or not JSON.*repeat the run"):
            read_results(tmp_path)

    @pytest.mark.parametrize("content", ["[]", "{}", '{"schema": 2}', '{"schema": "1"}'])
    def test_other_schema(self, tmp_path, content):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(ValueError, match=r"has schema .*reads schema 1"):
            read_results(tmp_path)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda r: r.pop("mean"), "the top level lacks mean"),
            (lambda r: (r["protocol"].pop("lr"), r["protocol"].pop("norm")), "protocol lacks lr, norm"),
            (lambda r: r["domains"][1].pop("ece"), r"domains\[1\] lacks ece"),
            (lambda r: r.update(domains={}), "domains is {}, expected a list"),
            (lambda r: r.update(cost=[]), r"cost is \[\], expected a mapping"),
            (lambda r: r.update(environment=1), "environment is 1, expected a mapping"),
            (lambda r: r.update(complete=1), "complete is 1, expected bool"),
            (lambda r: r.update(method=None), "method is None, expected str"),
            (lambda r: r.update(model=3), "model is 3, expected str"),
            (
                lambda r: r["domains"][0].update(accuracy="0.5"),
                r"domains\[0\].accuracy is '0.5', expected float or null",
            ),
            (lambda r: r["domains"][0].update(samples=True), r"domains\[0\].samples is True, expected int"),
            (lambda r: r["domains"][0].update(samples=1.5), r"domains\[0\].samples is 1.5, expected int"),
            (
                lambda r: r["protocol"].update(severity=["5"]),
                "protocol.severity is .*expected int or list of int or null",
            ),
        ],
    )
    def test_what_does_not_follow_the_schema(self, tmp_path, make_results, change, message):
        write_results(tmp_path, make_results())
        damage(tmp_path, change)
        with pytest.raises(ValueError, match=rf"results\.json does not follow schema 1: {message}"):
            read_results(tmp_path)

    def test_integers_become_floats_unknown_keys_stay(self, tmp_path, make_results):
        write_results(tmp_path, make_results())
        damage(tmp_path, lambda r: (r["domains"][0].update(accuracy=1), r.update(comment="x", model="Net")))
        results = read_results(tmp_path)
        assert results["domains"][0]["accuracy"] == 1
        assert results["model"] == "Net"
        assert dict(results)["comment"] == "x"
