"""Intervals of a difference."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from ttalight.reporting import PredictionWriter
from ttalight.reporting.bootstrap import paired_interval
from ttalight.reporting.compare import compare


class TestPairedInterval:
    def test_equals_normal_interval_if_independent(self):
        """One visit: mean ± 1.96 standard errors."""
        difference = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], size=4000, p=[0.1, 0.7, 0.2])
        low, high = paired_interval(difference, np.zeros(4000, int), np.arange(4000), draws=2000)
        half = 1.96 * difference.std() / np.sqrt(4000)
        assert (low + high) / 2 == pytest.approx(difference.mean(), abs=0.2 * half)
        assert (high - low) / 2 == pytest.approx(half, rel=0.08)

    def test_versions_of_one_image_are_not_independent(self):
        """The same difference in nine domains tells no more than in one."""
        difference = np.random.default_rng(0).choice([-1.0, 0.0, 1.0], size=500)
        one = paired_interval(difference, np.zeros(500, int), np.arange(500))
        nine = paired_interval(np.tile(difference, 9), np.repeat(np.arange(9), 500), np.tile(np.arange(500), 9))
        assert nine == pytest.approx(one)
        apart = paired_interval(np.tile(difference, 9), np.repeat(np.arange(9), 500), np.arange(4500))
        assert apart[1] - apart[0] == pytest.approx((one[1] - one[0]) / 3, rel=0.15)

    def test_visits_count_equally_whatever_their_size(self):
        difference = np.concatenate([np.ones(10), np.zeros(990)])
        visit = np.repeat([0, 1], [10, 990])
        assert paired_interval(difference, visit, np.arange(1000)) == pytest.approx((0.5, 0.5))

    def test_order_does_not_matter(self):
        generator = np.random.default_rng(1)
        difference, visit = generator.normal(size=300), generator.integers(0, 4, 300)
        image = np.arange(300)
        order = generator.permutation(300)
        mixed = paired_interval(difference[order], visit[order], image[order])
        assert mixed == pytest.approx(paired_interval(difference, visit, image))


class TestCompare:
    @pytest.fixture
    def make(self, make_run, make_domain):
        """Write a run with predictions: the share of images that each domain's method gets right."""

        def write(name, method, shares, seed=0, labels_of=0, probes=False, **kwargs):
            generator = np.random.default_rng([seed, len(method)])
            rows, columns = [], {"label": [], "prediction": [], "visit": [], "sample": []}
            for visit, share in enumerate(shares):
                label = np.random.default_rng([labels_of, visit]).integers(0, 9, 400)
                prediction = np.where(generator.random(400) < share, label, label + 1)
                rows.append(make_domain(f"d{visit}", float((prediction == label).mean()), samples=400))
                for key, value in zip(columns, (label, prediction, np.full(400, visit), np.arange(400)), strict=True):
                    columns[key].append(value)
            if probes:
                rows[-1]["probe"] = True
            folder = make_run(name, method, domains=rows, seed=seed, samples=400 * len(shares), **kwargs)
            joined = {key: np.concatenate(value) for key, value in columns.items()}
            size = len(joined["label"])
            writer = PredictionWriter(folder)
            writer.add(position=np.arange(size), domain=joined["visit"], logits=np.zeros((size, 10)), **joined)
            writer.close([row["name"] for row in rows])
            return folder

        return write

    def gain(self, tmp_path, runs, **kwargs):
        compare(runs, baseline="Source", output=str(tmp_path / "out"), **kwargs)
        with open(tmp_path / "out" / "table.csv", newline="", encoding="utf-8") as file:
            (line,) = [row for row in csv.DictReader(file) if row["domain"] == "gain" and row["method"] == "Tent"]
        return line

    def test_interval_holds_the_gain(self, make, tmp_path):
        runs = [make("source", "Source", (0.4, 0.6)), make("tent", "Tent", (0.5, 0.7))]
        line = self.gain(tmp_path, runs)
        low, mean, high = (float(line[name]) for name in ("low", "mean", "high"))
        assert low < mean < high
        assert 0.03 < high - low < 0.12
        text = compare(runs, baseline="Source")
        assert f"{100 * low:+.2f}..{100 * high:+.2f}" in text
        assert "95 % of the gain, 1000 paired bootstrap draws of images" in " ".join(text.split())

    def test_errors_turn_the_interval(self, make, tmp_path):
        runs = [make("source", "Source", (0.4, 0.6)), make("tent", "Tent", (0.5, 0.7))]
        accuracy, error = self.gain(tmp_path, runs), self.gain(tmp_path, runs, metric="error")
        assert float(error["low"]) == -float(accuracy["high"])
        assert float(error["mean"]) == pytest.approx(-float(accuracy["mean"]))

    def test_seeds_are_averaged(self, make, tmp_path):
        runs = [make(f"source{s}", "Source", (0.4, 0.6), seed=s) for s in range(3)]
        runs += [make(f"tent{s}", "Tent", (0.5, 0.7), seed=s) for s in range(3)]
        one, three = self.gain(tmp_path, [runs[0], runs[3]]), self.gain(tmp_path, runs)
        lengths = [float(line["high"]) - float(line["low"]) for line in (one, three)]
        assert lengths[1] < lengths[0]
        assert float(three["low"]) < float(three["mean"]) < float(three["high"])

    def test_probes_do_not_count(self, make, tmp_path):
        plain = self.gain(tmp_path, [make("a", "Source", (0.4, 0.6)), make("b", "Tent", (0.5, 0.7))])
        shares = {"Source": (0.4, 0.6, 0.9), "Tent": (0.5, 0.7, 0.1)}
        probed = [make(f"p-{m}", m, s, probes=True, stream_hash="f" * 64) for m, s in shares.items()]
        line = self.gain(tmp_path, probed)
        assert (line["low"], line["high"]) == (plain["low"], plain["high"])

    def test_says_why_there_is_none(self, make, make_run, make_domain):
        rows = [make_domain("d0", 0.5, samples=400), make_domain("d1", 0.5, samples=400)]
        runs = [
            make("source", "Source", (0.4, 0.6)),
            make_run("tent", "Tent", domains=rows, samples=800),
            make("eata", "EATA", (0.5, 0.7), labels_of=1),
        ]
        text = " ".join(compare(runs, baseline="Source").split())
        assert "no interval for Tent: no predictions.npz; --predictions true writes it" in text
        assert "no interval for EATA: " in text
        assert "predictions.npz has other images than the run that it is compared with" in text
        assert "bootstrap" not in text
