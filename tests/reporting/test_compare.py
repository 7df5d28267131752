from __future__ import annotations

import csv
import errno
import itertools
import os
import statistics
from pathlib import Path

import pytest

from ttalight.reporting.compare import compare, main

CORRUPTIONS = (
    "gaussian_noise shot_noise impulse_noise defocus_blur glass_blur motion_blur zoom_blur snow frost fog "
    "brightness contrast elastic_transform pixelate jpeg_compression"
).split()
ABBREVIATIONS = ("Gauss. Shot Impul. Defoc. Glass Motion Zoom Snow Frost Fog Brit. Contr. Elastic Pixel JPEG").split()


def main_table(text: str) -> dict[str, list[str]]:
    """Cells of the first table of a printed comparison by label; the header has the key "method"."""
    lines = text.split("\n\n")[1].splitlines()
    edge = lines[1].index(" ")
    return {line[:edge].rstrip(): line[edge:].split() for line in (lines[0], *lines[2:])}


def counts(text: str) -> list[str]:
    """Numbers of runs behind the rows."""
    header, *rows = main_table(text).values()
    return [row[header.index("n")] for row in rows]


def second_table(text: str) -> dict[str, list[str]]:
    lines = text.split("\n\n")[-1].splitlines()
    edge = lines[1].index(" ")
    return {line[:edge].rstrip(): line[edge:].split() for line in (lines[0], *lines[2:])}


def fails(capsys, *words: str) -> str:
    """Run the command, which must fail; return its one line."""
    with pytest.raises(SystemExit) as caught:
        main(list(words))
    assert caught.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("ttalight compare: error: ")
    return captured.err


class TestTable:
    def test_methods_against_domains(self, make_run):
        runs = [
            make_run("tent", "Tent", (0.5, 0.7)),
            make_run("eata", "EATA", (0.625, 0.6)),
            make_run("source", "Source", (0.2, 0.3)),
        ]
        assert main_table(compare(runs)) == {
            "method": ["mean", "n", "noise", "blur"],
            "Tent": ["60.00", "1", "50.00", "70.00*"],
            "EATA": ["61.25*", "1", "62.50*", "60.00"],
            "Source": ["25.00", "1", "20.00", "30.00"],
        }

    def test_rows_as_given_and_unadapted_first_in_a_folder(self, make_run, tmp_path):
        runs = [make_run("z", "Tent"), make_run("source", "Source"), make_run("a", "EATA")]
        assert list(main_table(compare(runs))) == ["method", "Tent", "Source", "EATA"]
        assert list(main_table(compare([str(tmp_path / "runs")]))) == ["method", "Source", "EATA", "Tent"]
        assert list(main_table(compare([runs[0], str(tmp_path / "runs")]))) == ["method", "Tent", "Source", "EATA"]

    def test_lower_is_better_for_all_but_accuracy(self, make_run):
        runs = [make_run("tent", "Tent", (0.5, 0.7)), make_run("eata", "EATA", (0.6, 0.6))]
        table = main_table(compare(runs, metric="nll"))
        assert table["Tent"] == ["1.400", "1", "1.500", "1.300*"]
        assert table["EATA"] == ["1.400", "1", "1.400*", "1.400"]
        assert main_table(compare(runs, metric="error"))["Tent"] == ["40.00", "1", "50.00", "30.00*"]
        assert main_table(compare(runs, metric="ece"))["Tent"] == ["6.00", "1", "5.00*", "7.00"]

    def test_what_reads_the_same_is_equally_good(self, make_run):
        runs = [make_run(name, name, (a, 0.7)) for name, a in (("A", 0.50001), ("B", 0.50002), ("C", 0.4))]
        column = [cells[2] for cells in main_table(compare(runs)).values()]
        assert column == ["noise", "50.00*", "50.00*", "40.00"]

    def test_one_row_wins_nothing(self, make_run):
        assert "*" not in compare([make_run("tent")])

    def test_severities_are_separate_columns(self, make_run, make_domain):
        rows = [make_domain("clean", 0.9, severity=0), make_domain("fog", 0.5, severity=1), make_domain("fog", 0.4)]
        table = main_table(compare([make_run("tent", domains=rows, samples=300)]))
        assert table["method"] == ["mean", "n", "clean", "Fog-1", "Fog-5"]
        assert table["Tent"] == ["60.00", "1", "90.00", "50.00", "40.00"]

    def test_visits_are_averaged(self, make_run, make_domain):
        rows = [make_domain("fog", 0.5), make_domain("snow", 0.9), make_domain("fog", 0.3, visit=1)]
        text = compare([make_run("tent", domains=rows, samples=300)])
        assert main_table(text)["Tent"] == ["56.67", "1", "40.00", "90.00"]
        assert "visits of a domain averaged" in text

    def test_value_that_is_not_finite_never_wins(self, make_run, make_domain):
        broken = [make_domain("noise", 0.5), make_domain("blur", 0.7)]
        broken[0]["nll"] = None
        runs = [make_run("tent", "Tent", domains=broken), make_run("eata", "EATA"), make_run("sar", "SAR", (0.1, 0.1))]
        assert main_table(compare(runs, metric="nll"))["Tent"] == ["nan", "1", "nan", "1.300*"]

    def test_baseline(self, make_run):
        runs = [make_run("tent", "Tent", (0.5, 0.7)), make_run("source", "Source", (0.7, 0.75))]
        table = main_table(compare(runs, baseline="Source"))
        assert table["method"][:4] == ["mean", "over", "Source", "n"]
        assert table["Tent"][:3] == ["60.00", "-12.50", "1"]
        assert table["Source"][1] == "+0.00"

    def test_baseline_is_subtracted_seed_by_seed(self, make_run):
        """Seeds differ by far more than methods do: only the paired spread is small."""
        runs = [make_run(f"source-{s}", "Source", (0.1 + 0.2 * s, 0.1 + 0.2 * s), seed=s) for s in range(3)]
        gains = (0.01, 0.02, 0.06)
        runs += [
            make_run(f"tent-{s}", "Tent", (0.1 + 0.2 * s + g, 0.1 + 0.2 * s + g), seed=s) for s, g in enumerate(gains)
        ]
        assert main_table(compare(runs, baseline="Source"))["Tent"][1] == "+3.00±2.65"


class TestSeeds:
    values = ((0.50, 0.60), (0.54, 0.70), (0.58, 0.65))

    def test_mean_and_sample_deviation(self, make_run):
        runs = [make_run(f"tent-{seed}", "Tent", value, seed=seed) for seed, value in enumerate(self.values)]
        text = compare([*runs, make_run("source", "Source", (0.1, 0.1))])
        # Noise: deviations -4, 0, 4 from 54; blur: -5, 5, 0 from 65; means 55, 62, 61.5 of the runs.
        assert main_table(text)["Tent"] == ["59.50±3.91*", "3", "54.00±4.00*", "65.00±5.00*"]
        assert statistics.stdev((55, 62, 61.5)) == pytest.approx(3.91, abs=5e-3)
        assert main_table(text)["Source"] == ["10.00", "1", "10.00", "10.00"]
        assert second_table(text)["Tent"][:3] == ["0", "1", "2"]

    def test_costs_are_averaged(self, make_run):
        runs = [make_run(f"tent-{seed}", seed=seed) for seed in range(3)]
        assert second_table(compare(runs))["Tent"] == ["noise", "50.00", "noise", "50.00", "1.00", "1.00", "51"]

    def test_a_seed_that_failed_is_not_averaged_away(self, make_run, make_domain):
        broken = [make_domain("noise", 0.5), make_domain("blur", 0.7)]
        broken[0]["nll"] = None
        runs = [make_run("tent-0"), make_run("tent-1", seed=1, domains=broken)]
        assert main_table(compare(runs, metric="nll"))["Tent"] == ["nan", "2", "nan", "1.300"]

    @pytest.mark.parametrize("difference", [{"lr": 0.1}, {"reset": "batch"}, {"weights": "b"}])
    def test_only_seeds_are_averaged(self, make_run, difference):
        runs = [make_run("tent-0"), make_run("tent-1", seed=1, **difference)]
        assert counts(compare(runs)) == ["1", "1"]

    def test_same_seed_twice_is_not_averaged(self, make_run):
        """A setting that the result file does not know must differ."""
        text = compare([make_run("margin4"), make_run("margin5"), make_run("margin5-1", seed=1)])
        assert list(main_table(text)) == ["method", "Tent (margin4)", "Tent (margin5)", "Tent (margin5-1)"]
        assert "not averaged, since a seed occurs twice: " in " ".join(text.split())

    def test_same_run_twice_counts_once(self, make_run):
        run = make_run("tent")
        ways = [run, os.path.relpath(run), f"{run}/results.json", str(Path(run).parent)]
        assert counts(compare(ways)) == ["1"]


class TestAcrossWeights:
    def runs(self, make_run, **second):
        return [make_run("a"), make_run("b", accuracies=(0.7, 0.9), seed=1, weights="b", **second)]

    def test_seeds_with_own_weights_share_a_row(self, make_run):
        text = compare(self.runs(make_run), across_weights=True)
        assert main_table(text)["Tent"] == ["70.00±14.14", "2", "60.00±14.14", "80.00±14.14"]
        above = " ".join(text.split("\n\n")[0].split())
        assert "averaged over runs whose source weights differ: Tent (2 files)" in above
        assert "source 2 files" in above
        assert "a.pt" not in text

    def test_only_on_request(self, make_run):
        assert counts(compare(self.runs(make_run))) == ["1", "1"]

    @pytest.mark.parametrize("key", ["model", "network"])
    def test_other_networks_are_no_seeds(self, make_run, key):
        runs = [make_run("a", extra={key: "x"}), make_run("b", seed=1, weights="b", extra={key: "y"})]
        table = main_table(compare(runs, across_weights=True))
        assert list(table)[1:] == [f"Tent ({key} x)", f"Tent ({key} y)"]

    def test_one_seed_twice_is_not_averaged(self, make_run):
        text = compare([make_run("a"), make_run("b", weights="b")], across_weights=True)
        assert "not averaged, since a seed occurs twice" in text

    @pytest.mark.parametrize("words", [["--across-weights"], ["--across_weights"], ["--across_weights", "true"]])
    def test_command(self, make_run, capsys, words):
        main([*self.runs(make_run), *words])
        assert "source weights differ: Tent (2 files)" in capsys.readouterr().out


class TestAcrossStreams:
    def runs(self, make_run, method="Tent", values=(0.5, 0.6, 0.7), **settings):
        return [
            make_run(f"{method}-{order}", method, (value, value), stream_hash=f"{order}" * 64, **settings)
            for order, value in enumerate(values)
        ]

    def test_mean_and_spread_over_orders(self, make_run):
        runs = [*self.runs(make_run, "Source", (0.2, 0.2, 0.2)), *self.runs(make_run)]
        text = compare(runs, across_streams=True, baseline="Source")
        table = main_table(text)
        assert table["Tent"] == ["60.00±10.00*", "+40.00±10.00", "3", "60.00±10.00*", "60.00±10.00*"]
        assert table["Source"] == ["20.00", "+0.00", "3", "20.00", "20.00"]
        above = " ".join(text.split("\n\n")[0].split())
        assert "mean±sample standard deviation over n stream orders" in above
        assert "stream_hash 3 orders" in above
        assert "3 stream orders gave equal numbers: Source" in above
        assert "seed_everything" not in above

    def test_orders_and_seeds_together(self, make_run):
        runs = [make_run(f"t{s}", accuracies=(0.5, 0.5 + s / 10), seed=s, stream_hash=f"{s}" * 64) for s in range(2)]
        text = compare(runs, across_streams=True)
        assert main_table(text)["Tent"] == ["52.50±3.54", "2", "50.00", "55.00±7.07"]
        assert "over n seeds and stream orders" in " ".join(text.split())

    def test_several_orders_are_an_error_that_says_how(self, make_run, capsys):
        runs = self.runs(make_run)
        assert "If they are orders of one stream, average them with --across-streams. " in fails(capsys, *runs)
        main([*runs, "--across-streams"])
        assert counts(capsys.readouterr().out) == ["3"]

    @pytest.mark.parametrize("other", [{"stream_args": {"gamma": 1}}, {"lr": 0.1}, {"weights": "b"}])
    def test_only_orders_are_averaged(self, make_run, other):
        runs = [make_run("a", stream_args={"gamma": 0}), make_run("b", stream_hash="f" * 64, **other)]
        assert counts(compare(runs, across_streams=True, different=["stream_hash"])) == ["1", "1"]

    def test_other_kinds_of_streams_are_refused(self, make_run, capsys):
        runs = [make_run("a"), make_run("b", stream="Mixed", stream_hash="f" * 64)]
        assert "--different stream\n" in fails(capsys, *runs, "--across-streams")

    def test_rows_have_the_same_orders(self, make_run, capsys):
        runs = [*self.runs(make_run, "Source"), *self.runs(make_run)[:2]]
        message = fails(capsys, *runs, "--across-streams")
        assert "not measured on the same stream orders: Source has 3, Tent has 2, and 2 of them are in both" in message
        main([*runs, "--across-streams", "--different", "stream_hash"])
        assert counts(capsys.readouterr().out) == ["3", "2"]


class TestEqualNumbers:
    def test_say_so_in_one_line(self, make_run):
        runs = [make_run(f"{method}-{seed}", method, seed=seed) for method in ("A", "B") for seed in range(3)]
        text = compare(runs, baseline="A")
        assert main_table(text)["B"] == ["60.00", "+0.00", "3", "50.00", "70.00"]
        above = " ".join(text.split("\n\n")[0].split())
        assert above.count("3 seeds gave equal numbers: A, B (seed_everything changes the draws of a method") == 1
        assert "vary data.seed and compare with --across-streams" in above

    def test_a_small_deviation_is_no_zero(self, make_run):
        runs = [make_run(f"t-{seed}", accuracies=(0.5, 0.7 + seed / 1e6), seed=seed) for seed in range(2)]
        text = compare(runs)
        assert main_table(text)["Tent"] == ["60.00±<0.01", "2", "50.00", "70.00±<0.01"]
        assert "equal numbers" not in text


class TestRanks:
    def test_places_are_averaged_over_domains(self, make_run):
        runs = [
            make_run("a", "A", (0.9, 0.5)),
            make_run("b", "B", (0.8, 0.7)),
            make_run("c", "C", (0.8, 0.6)),
            make_run("part", "Part", (0.99, 0.99), complete=False),
        ]
        below = second_table(compare(runs, partial=True))
        at = below["method"].index("rank")
        # Noise: 1, 2.5, 2.5; blur: 3, 1, 2; the unfinished run takes no place.
        assert [below[name][at] for name in "ABC"] == ["2.0", "1.8", "2.2"]
        assert below["Part (partial, 200/200 images)"][at] == "-"
        lower = second_table(compare(runs[:3], metric="nll"))
        assert [lower[name][at] for name in "ABC"] == ["2.0", "1.8", "2.2"]

    def test_a_single_row_has_none(self, make_run):
        assert "rank" not in second_table(compare([make_run("a")]))["method"]


class TestDomains:
    def test_mean_over_images_beside_the_mean(self, make_run, make_domain):
        rows = [make_domain("noise", 0.5, samples=100), make_domain("blur", 0.8, samples=300)]
        table = main_table(compare([make_run("a", domains=rows, samples=400)]))
        assert table["method"] == ["mean", "weighted", "n", "noise", "blur"]
        assert table["Tent"] == ["65.00", "72.50", "1", "50.00", "80.00"]

    def test_probes_are_no_column(self, make_run, make_domain):
        rows = [make_domain("noise", 0.5), {**make_domain("clean", 0.9, severity=0), "probe": True}]
        forgetting = {"name": "clean", "severity": 0, "probes": 1, "first": 0.9, "last": 0.9, "lowest": 0.9}
        run = make_run("a", domains=rows, extra={"forgetting": [{**forgetting, "forgotten": 0.0}]})
        text = compare([run])
        assert main_table(text)["method"] == ["mean", "n", "noise"]
        assert "Tent, clean: accuracy 90.00 % at the first of 1 probes" in " ".join(text.split())

    def test_measures_of_newer_files(self, make_run, make_domain):
        rows = [{**make_domain("noise", 0.5), "brier": 0.25, "miou": 0.4}]
        runs = [make_run("new", domains=rows), make_run("old", "EATA", domains=[make_domain("noise", 0.5)])]
        table = main_table(compare(runs, metric="brier"))
        assert (table["Tent"], table["EATA"]) == (["0.250", "1", "0.250"], ["nan", "1", "nan"])
        assert main_table(compare(runs, metric="miou"))["Tent"] == ["40.00", "1", "40.00"]

    def test_runs_on_other_data_are_refused(self, make_run, capsys):
        runs = [make_run("a", data="cifar10"), make_run("b", "EATA", data="cifar100"), make_run("c", "SAR")]
        message = fails(capsys, *runs)
        assert f"data is cifar10 in {runs[0]}, cifar100 in {runs[1]}. " in message
        assert "data" not in compare([runs[0], runs[2]]).partition("\n\n")[0]  # an older file does not say


class TestLabels:
    def test_settings_tell_rows_of_a_method_apart(self, make_run):
        runs = [make_run("a", lr=0.1), make_run("b", lr=0.2), make_run("c", "EATA", lr=0.3)]
        assert list(main_table(compare(runs)))[1:] == ["Tent (lr 0.1)", "Tent (lr 0.2)", "EATA"]

    def test_weights_tell_rows_of_a_method_apart(self, make_run):
        runs = [make_run("x"), make_run("y", weights="b")]
        assert list(main_table(compare(runs)))[1:] == ["Tent (source a.pt aaaaaaaa)", "Tent (source b.pt bbbbbbbb)"]

    def test_folders_do_where_settings_would_be_too_many(self, make_run):
        runs = [make_run("a"), make_run("b", lr=0.2, steps=3, reset="never", prediction="after")]
        assert list(main_table(compare(runs)))[1:] == ["Tent (a)", "Tent (b)"]

    def test_paths_do_where_folders_have_one_name(self, make_run):
        runs = [make_run("x/tent"), make_run("y/tent")]
        assert list(main_table(compare(runs)))[1:] == [f"Tent ({Path(run).as_posix()})" for run in runs]


class TestProtocol:
    def test_shared_settings_are_above_the_table(self, make_run):
        text = compare([make_run("tent"), make_run("cotta", "CoTTA", reset="never", lr=0.01, weights="b")])
        above = " ".join(text.split("\n\n")[0].split())
        assert (
            "stream PerDomain, stream_hash 12345678, severity 5, samples 200, prediction before, batch_size 64" in above
        )
        for name in ("reset", "lr 0", "a.pt"):
            assert name not in above
        below = second_table(text)
        names = "reset lr rank worst domain worst group forwards/batch backwards/batch images/s source"
        assert below["method"] == names.split()
        weakest = ["1.5", "noise", "50.00", "noise", "50.00"]
        assert below["Tent"] == ["domain", "0.001", *weakest, "1.00", "1.00", "50", "a.pt", "aaaaaaaa"]
        assert below["CoTTA"] == ["never", "0.01", *weakest, "1.00", "1.00", "50", "b.pt", "bbbbbbbb"]

    @pytest.mark.parametrize(
        ("field", "value", "shown"),
        [
            ("stream", "Continual", "PerDomain in {a}, Continual in {b}"),
            ("stream_hash", "ffff" * 16, "1234567890abcdef in {a}, ffffffffffffffff in {b}"),
            ("severity", [1, 3], "5 in {a}, 1 3 in {b}"),
            ("samples", None, "200 in {a}, none in {b}"),
        ],
    )
    def test_other_streams_are_refused(self, make_run, capsys, field, value, shown):
        runs = [make_run("tent"), make_run("eata", "EATA", **{field: value})]
        message = fails(capsys, *runs)
        assert f"{field} is {shown.format(a=runs[0], b=runs[1])}" in message
        assert message.endswith(f"add --different {field}\n")
        main([*runs, "--different", field])
        text = " ".join(capsys.readouterr().out.split("\n\n")[0].split())
        assert f"different {field}: {shown.format(a=runs[0], b=runs[1])}" in text

    def test_every_difference_must_be_named(self, make_run, capsys):
        runs = [make_run("tent"), make_run("eata", "EATA", stream="Mixed", stream_hash="f" * 64)]
        assert "add --different stream stream_hash" in fails(capsys, *runs)
        message = fails(capsys, *runs, "--different", "stream_hash")
        assert "stream is PerDomain" in message
        assert "stream_hash is" not in message
        assert message.endswith("add --different stream stream_hash\n")

    def test_values_of_many_runs_stay_readable(self, make_run, capsys):
        runs = [make_run(f"r{i}", f"Method{i}", severity=3 if i else 5) for i in range(8)]
        assert f"3 in {' '.join(runs[1:5])} and 3 more" in fails(capsys, *runs)

    def test_domains_that_only_one_stream_has(self, make_run, make_domain):
        runs = [
            make_run("tent"),
            make_run("eata", "EATA", domains=[make_domain("fog", 0.5), make_domain("blur", 0.8)], stream_hash="f" * 64),
        ]
        table = main_table(compare(runs, different=["stream_hash"]))
        assert table["method"] == ["mean", "n", "noise", "blur", "Fog"]
        assert table["Tent"] == ["60.00", "1", "50.00", "70.00", "-"]
        assert table["EATA"] == ["65.00*", "1", "-", "80.00*", "50.00"]

    def test_same_hash_but_other_domains(self, make_run, make_domain, capsys):
        runs = [make_run("tent"), make_run("eata", "EATA", domains=[make_domain("noise", 0.5)])]
        assert "same stream_hash but not the same domains" in fails(capsys, *runs)

    def test_field_that_is_not_of_the_stream(self, make_run, capsys):
        message = fails(capsys, make_run("tent"), "--different", "lr")
        assert "got lr, which is no setting of the stream: it takes data stream stream_hash severity samples" in message


class TestRuns:
    def test_parents_are_searched(self, make_run, tmp_path):
        make_run("digits/b", "B")
        make_run("digits/deep/a", "A")
        assert list(main_table(compare([str(tmp_path)]))) == ["method", "B", "A"]

    def test_a_training_run_has_nothing_to_show(self, make_run, tmp_path):
        run = make_run("tent")
        (tmp_path / "runs" / "fit" / "checkpoints").mkdir(parents=True)
        (tmp_path / "runs" / "table.md").write_text("")
        text = compare(sorted(map(str, (tmp_path / "runs").iterdir())))
        assert main_table(text).keys() == {"method", "Tent"}
        noted = " ".join(text.split())
        assert f"left out, no results.json: {tmp_path}/runs/fit {tmp_path}/runs/table.md" in noted
        assert run not in noted

    def test_unfinished_runs_are_left_out(self, make_run, make_domain):
        part = make_run("part", "Part", domains=[make_domain("noise", 0.99)], complete=False)
        text = compare([make_run("tent"), part])
        assert main_table(text).keys() == {"method", "Tent"}
        assert f"left out, not finished: {part} (100/200 images)" in " ".join(text.split())

    def test_unfinished_runs_are_marked_where_asked_for(self, make_run, make_domain):
        part = make_run("part", "Tent", domains=[make_domain("noise", 0.99)], complete=False)
        text = compare([make_run("tent"), part, make_run("eata", "EATA", (0.4, 0.4))], partial=True)
        table = main_table(text)
        assert table["Tent (part) (partial, 100/200 images)"] == ["-", "1", "99.00", "-"]
        assert table["Tent (tent)"] == ["60.00*", "1", "50.00*", "70.00*"]
        assert "left out" not in text

    def test_unfinished_seeds_are_not_averaged(self, make_run, make_domain):
        part = make_run("part", seed=1, domains=[make_domain("noise", 0.99)], complete=False)
        assert counts(compare([make_run("tent"), part], partial=True)) == ["1", "1"]

    def test_nothing_finished(self, make_run, capsys, tmp_path):
        part = make_run("part", complete=False)
        message = fails(capsys, part)
        assert f"no finished run in {part}: {part} (200/200 images), show with --partial true" in message
        (tmp_path / "empty").mkdir()
        assert "no results.json there" in fails(capsys, str(tmp_path / "empty"))

    def test_missing_run(self, make_run, capsys):
        assert "there is no nowhere: give folders of runs" in fails(capsys, make_run("tent"), "nowhere")

    def test_every_unreadable_run_is_named(self, make_run, capsys):
        runs = [make_run(name) for name in ("a", "b", "c")]
        for run in runs[1:]:
            file = Path(run) / "results.json"
            file.write_text(file.read_text()[:-40])
        message = fails(capsys, *runs)
        assert f"{runs[1]}/results.json is not a result file" in message
        assert f"{runs[2]}/results.json is not a result file" in message
        assert f"{runs[0]}/" not in message


class TestOutput:
    def test_csv_has_the_numbers_as_measured(self, make_run, tmp_path):
        runs = [make_run(f"tent-{seed}", "Tent", value, seed=seed) for seed, value in enumerate(TestSeeds.values)]
        runs.insert(0, make_run("source", "Source", (0.123456789, 0.3)))
        compare(runs, output=str(tmp_path / "out"))
        with open(tmp_path / "out" / "table.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert [(row["label"], row["domain"], row["severity"], row["n"]) for row in rows] == [
            ("Source", "noise", "5", "1"),
            ("Source", "blur", "5", "1"),
            ("Source", "mean", "", "1"),
            ("Source", "weighted_mean", "", "1"),
            ("Source", "mean", "", "1"),
            ("Tent", "noise", "5", "3"),
            ("Tent", "blur", "5", "3"),
            ("Tent", "mean", "", "3"),
            ("Tent", "weighted_mean", "", "3"),
            ("Tent", "mean", "", "3"),
        ]
        assert [row["std"] for row in rows[:4]] == ["", "", "", ""]
        assert float(rows[0]["mean"]) == 0.123456789
        assert [float(row["mean"]) for row in rows[5:8]] == pytest.approx([0.54, 0.65, 0.595])
        assert [float(row["std"]) for row in rows[5:8]] == pytest.approx(
            [0.04, 0.05, statistics.stdev((0.55, 0.62, 0.615))]
        )
        assert [(row["metric"], row["mean"]) for row in (rows[4], rows[9])] == [("rank", "2.0"), ("rank", "1.0")]

    def test_markdown(self, make_run, make_domain, tmp_path):
        part = make_run("part", domains=[make_domain("noise", 0.99)], complete=False)
        runs = [make_run("a", "Tent|x", (0.5, 0.7)), make_run("b", "EATA", (0.6, 0.6), lr=0.1), part]
        compare(runs, output=str(tmp_path))
        text = (tmp_path / "table.md").read_text(encoding="utf-8")
        assert "| method | mean | n | noise | blur |\n| --- | ---: | ---: | ---: | ---: |" in text
        assert "| Tent\\|x | 60.00 | 1 | 50.00 | **70.00** |" in text
        assert "| EATA | 60.00 | 1 | **60.00** | 60.00 |" in text
        assert f"- left out, not finished: {part}" in text
        assert "| method | lr | rank | worst domain | worst group | forwards/batch | backwards/batch |" in text
        assert "*: best" not in text

    def test_folder_that_cannot_be_written(self, make_run, capsys, monkeypatch, tmp_path):
        run = make_run("tent")

        def fail(*args):
            raise OSError(errno.EROFS, "Read-only file system")

        monkeypatch.setattr(os, "replace", fail)
        message = fails(capsys, run, "--output", str(tmp_path / "out"))
        assert "Read-only file system" in message
        assert str(tmp_path / "out" / "table.csv") in message
        assert list((tmp_path / "out").iterdir()) == []


class TestWidth:
    def many(self, make_run, make_domain, seeds: int, names=CORRUPTIONS, **kwargs) -> str:
        runs = []
        for method, seed in itertools.product(("Source", "CrossTaskTTT"), range(seeds)):
            rows = [make_domain(name, 0.5 + seed / 100 + len(method) / 99) for name in names]
            runs.append(make_run(f"{method}-{seed}", method, domains=rows, seed=seed, samples=len(rows) * 100))
        return compare(runs, **kwargs)

    def test_names_stay_whole_where_there_is_room(self, make_run, make_domain):
        names = ["photographs", "drawings", "cartoons", "sketches_of_objects"]
        assert main_table(self.many(make_run, make_domain, 1, names))["method"][2:] == names

    def test_fifteen_corruptions_fit_on_a_line(self, make_run, make_domain):
        text = self.many(make_run, make_domain, 1)
        assert max(map(len, text.splitlines())) <= 120
        table = main_table(text)
        assert table["method"] == ["mean", "n", *ABBREVIATIONS]
        assert len(table["CrossTaskTTT"]) == 17

    def test_seeds_and_gains_are_one_block_at_160(self, make_run, make_domain, tmp_path, capsys, monkeypatch):
        text = self.many(make_run, make_domain, 3, baseline="Source", width=160)
        assert max(map(len, text.splitlines())) <= 160
        _, table, _ = text.split("\n\n")
        assert table.splitlines()[0].split() == ["method", "mean", "over", "Source", "n", *ABBREVIATIONS]
        assert table.splitlines()[-1].split()[1] == "63.1±1.0*"
        monkeypatch.setenv("COLUMNS", "160")
        main([str(tmp_path / "runs"), "--baseline", "Source"])
        assert table in capsys.readouterr().out

    def test_what_does_not_fit_follows_below(self, make_run, make_domain):
        names = [f"domain_{index}" for index in range(20)]
        text = self.many(make_run, make_domain, 3, names)
        assert max(map(len, text.splitlines())) <= 120
        _, first, second, _ = text.split("\n\n")
        cells = [line.split() for block in (first, second) for line in block.splitlines()]
        tent = list(itertools.chain(*(line[1:] for line in cells if line[0] == "CrossTaskTTT")))
        assert len(tent) == 2 + 20
        assert tent[0] == "63.1±1.0*"

    def test_different_names_are_never_abbreviated_alike(self, make_run, make_domain):
        names = [f"rotated_by_{angle}" for angle in range(10, 31)]
        shown = [
            name
            for block in self.many(make_run, make_domain, 1, names).split("\n\n")[1:-1]
            for name in block.splitlines()[0].split()
            if name.startswith("rot")
        ]
        assert shown == names


class TestMain:
    def test_prints_the_table_and_writes_it(self, make_run, capsys, tmp_path):
        runs = [make_run("a", "Tent", (0.5, 0.7)), make_run("b", "EATA", (0.6, 0.6))]
        main([*runs, "--output", str(tmp_path / "out"), "--metric", "error", "--baseline", "Tent"])
        assert capsys.readouterr().out == compare(runs, metric="error", baseline="Tent") + "\n"
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
            "table.csv", "table.html", "table.md", "table.tex", "table_wide.csv",
        ]  # fmt: skip

    def test_partial(self, make_run, capsys):
        main([make_run("a", complete=False), "--partial", "true"])
        assert "(partial, 200/200 images)" in capsys.readouterr().out

    def test_words_that_make_no_sense(self, make_run, capsys):
        run = make_run("tent")
        assert "the following arguments are required: runs" in fails(capsys)
        assert "Got value: speed" in fails(capsys, run, "--metric", "speed")
        assert "unrecognized arguments: --faster" in fails(capsys, run, "--faster")
        assert "baseline 'Nobody' names 0 rows: give one of 'Tent'" in fails(capsys, run, "--baseline", "Nobody")

    def test_help(self, capsys):
        with pytest.raises(SystemExit) as caught:
            main(["--help"])
        assert caught.value.code == 0
        assert "--different" in capsys.readouterr().out
