"""Summaries of the rows of a run."""

from __future__ import annotations

import math

import pytest

from ttalight.data.corruptions import COMMON, EXTRA
from ttalight.reporting import digest, summarize
from ttalight.reporting.summary import FAMILIES


def probe(make_domain, accuracy, number):
    return {**make_domain("clean", accuracy, severity=0, visit=number), "probe": True}


class TestGroups:
    def test_families_are_those_of_the_published_benchmark(self):
        names = [name for family in FAMILIES.values() for name in family]
        assert sorted(names) == sorted({*COMMON, *EXTRA, "frost_procedural"})
        assert [len(set(family) & set(COMMON)) for family in FAMILIES.values()] == [3, 4, 4, 4]
        assert all(family[-1] in EXTRA for family in FAMILIES.values())

    def test_worst_domain_and_worst_group_need_not_agree(self, make_domain):
        values = {"clean": 0.9, "gaussian_noise": 0.5, "shot_noise": 0.55, "fog": 0.4, "snow": 0.8}
        found = digest([make_domain(name, value) for name, value in values.items()])
        assert [(group["name"], group["rows"]) for group in found["groups"]] == [
            ("clean", 1),
            ("noise", 2),
            ("weather", 2),
        ]
        assert found["groups"][1]["accuracy"] == pytest.approx(0.525)
        assert found["worst"] == {
            "domain": "fog",
            "domain_accuracy": 0.4,
            "group": "noise",
            "group_accuracy": pytest.approx(0.525),
        }
        assert found.keys() == {"groups", "worst"}

    def test_visits_of_a_domain_are_averaged(self, make_domain):
        rows = [make_domain("fog", 0.2), make_domain("snow", 0.5), make_domain("fog", 0.9, visit=1)]
        assert digest(rows)["worst"]["domain"] == "snow"

    def test_no_worst_among_unknown_values(self, make_domain):
        assert "worst" not in digest([make_domain("fog", 0.2), {**make_domain("snow", 0.2), "accuracy": math.nan}])
        assert digest([]) == {"groups": []}


class TestRounds:
    def test_mean_of_each_round(self, make_domain):
        rows = [make_domain(name, a, visit=v) for v in (0, 1) for name, a in (("fog", 0.5 + v / 5), ("snow", 0.7))]
        assert [(entry["visit"], entry["rows"]) for entry in digest(rows)["rounds"]] == [(0, 2), (1, 2)]
        assert [entry["accuracy"] for entry in digest(rows)["rounds"]] == pytest.approx([0.6, 0.7])


class TestProbes:
    def test_count_in_no_mean(self, make_domain):
        rows = [make_domain("fog", 0.5), make_domain("snow", 0.7)]
        with_probes = [rows[0], probe(make_domain, 0.99, 0), rows[1], probe(make_domain, 0.9, 1)]
        assert summarize(with_probes) == summarize(rows)
        assert digest(with_probes)["worst"] == digest(rows)["worst"]
        assert digest(with_probes)["groups"] == digest(rows)["groups"]

    def test_show_what_is_forgotten(self, make_domain):
        rows = [probe(make_domain, value, number) for number, value in enumerate((0.95, 0.6, 0.8))]
        (found,) = digest([make_domain("fog", 0.5), *rows])["forgetting"]
        assert found == {
            "name": "clean",
            "severity": 0,
            "probes": 3,
            "first": 0.95,
            "last": 0.8,
            "lowest": 0.6,
            "forgotten": pytest.approx(0.15),
        }

    def test_a_lost_probe_is_not_nothing_forgotten(self, make_domain):
        rows = [probe(make_domain, value, number) for number, value in enumerate((0.95, math.nan))]
        (found,) = digest(rows)["forgetting"]
        assert (found["last"], found["forgotten"], found["lowest"]) == (None, None, 0.95)


def test_optional_measures_need_every_row(make_domain):
    rows = [{**make_domain("fog", 0.5), "brier": 0.2}, {**make_domain("snow", 0.5), "brier": 0.6}]
    assert summarize(rows)[0]["brier"] == pytest.approx(0.4)
    del rows[1]["brier"]
    assert summarize(rows)[0]["brier"] is None
    assert "entropy" not in summarize(rows)[0]
