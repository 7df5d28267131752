from __future__ import annotations

from ttalight.reporting import domain_table, protocol_header


class TestProtocolHeader:
    def test_says_what_was_run(self, make_results):
        first, second = protocol_header(make_results(seed=3)).splitlines()
        assert first == "Tent: stream PerDomain, stream_hash 12345678, severity 5, samples 200, seed 3"
        assert second.startswith("reset domain, prediction before, batch_size 64, steps 1, optimizer Adam, lr 0.001")
        assert second.endswith("source a.pt aaaaaaaa")
        assert "sharding" not in second

    def test_leaves_out_what_does_not_apply(self, make_results):
        nothing = dict.fromkeys(("stream", "stream_hash", "reset", "prediction", "steps", "optimizer", "lr", "norm"))
        results = make_results("Source", **nothing)
        results["source"] = {"file": None, "sha256": None}
        assert protocol_header(results) == "Source: severity 5, samples 200, seed 0\nbatch_size 64"

    def test_never_lets_a_part_pass_for_the_whole(self, make_results, make_domain):
        results = make_results(domains=[make_domain("noise", 0.5)], complete=False)
        assert protocol_header(results).startswith("Tent (unfinished, 100/200 images): ")

    def test_wraps_long_lines(self, make_results):
        results = make_results()
        results["source"]["file"] = "some/folder/" * 8 + "last.ckpt"
        lines = protocol_header(results).splitlines()
        assert max(map(len, lines)) <= 120
        assert sum("last.ckpt" in line for line in lines) == 1


class TestDomainTable:
    def test_values(self, make_results):
        lines = [line.split() for line in domain_table(make_results(accuracies=(0.5, 0.75))).splitlines()]
        assert lines[0] == ["domain", "images", "accuracy", "%", "nll", "ece", "%", "images/s"]
        assert lines[2:] == [
            ["noise", "100", "50.00", "1.500", "5.00", "50"],
            ["blur", "100", "75.00", "1.250", "7.50", "50"],
            ["mean", "200", "62.50", "1.375", "6.25", "50"],
        ]

    def test_severities_and_visits_are_told_apart(self, make_results, make_domain):
        rows = [
            make_domain("clean", 0.9, severity=0),
            make_domain("noise", 0.5, severity=3),
            make_domain("noise", 0.4, severity=5),
            make_domain("noise", 0.3, severity=5, visit=1),
        ]
        table = domain_table(make_results(domains=rows))
        for name in ("clean ", "noise-3 ", "noise-5 visit 1", "noise-5 visit 2"):
            assert sum(line.startswith(name) for line in table.splitlines()) == 1

    def test_probes_are_named_and_summed_up_below(self, make_results, make_domain):
        rows = [make_domain("clean", 0.9, severity=0), make_domain("noise", 0.5)]
        rows += [{**make_domain("clean", 0.8, severity=0, visit=number), "probe": True} for number in (1, 2)]
        results = make_results(domains=rows)
        found = {
            "name": "clean",
            "severity": 0,
            "probes": 2,
            "first": 0.9,
            "last": 0.8,
            "lowest": 0.7,
            "forgotten": 0.1,
        }
        table = domain_table(results | {"forgetting": [found]}).splitlines()
        names = ["clean visit 1", "noise", "clean probe 1", "clean probe 2", "mean"]
        assert [line[: len(name)] for line, name in zip(table[2:7], names, strict=True)] == names
        assert table[-2].split()[:3] == ["mean", "200", "70.00"]
        assert "80.00 % at the last, 70.00 % at the lowest; forgotten 10.00" in table[-1]

    def test_mean_over_images_where_it_is_another(self, make_results, make_domain):
        rows = [make_domain("noise", 0.5, samples=100), make_domain("blur", 0.8, samples=300)]
        lines = [line.split() for line in domain_table(make_results(domains=rows)).splitlines()[-2:]]
        assert [line[:3] for line in lines] == [["mean", "400", "65.00"], ["weighted", "mean", "400"]]
        assert lines[1][3] == "72.50"

    def test_very_many_visits_are_one_line_a_domain(self, make_results, make_domain):
        rows = [make_domain(name, 0.2 + visit / 100, visit=visit) for visit in range(40) for name in ("noise", "blur")]
        lines = [line.split() for line in domain_table(make_results(domains=rows)).splitlines()[2:]]
        assert [line[:3] for line in lines] == [
            ["noise", "4000", "39.50"],
            ["blur", "4000", "39.50"],
            ["mean", "8000", "39.50"],
        ]

    def test_a_missing_value_is_shown(self, make_results):
        results = make_results()
        results["domains"][0]["nll"] = None
        results["mean"]["nll"] = None
        assert domain_table(results).count("nan") == 2
