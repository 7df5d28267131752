"""Untrusted result files and predictions: each ends in one line, or is shown without harm."""

from __future__ import annotations

import copy
import csv
import io
import json
import re
import zipfile
from html.parser import HTMLParser

import numpy as np
import pytest

from ttalight.reporting import domain_table, protocol_header, read_predictions, read_results, write_results
from ttalight.reporting.compare import compare, main
from ttalight.reporting.figures import can_plot, domain_figure

ESCAPES = "\x1b[31mred\x07\r\n\u202e"
HTML = '<script>alert(1)</script><img src="http://x" onerror=1>'
WRONG = (
    None, True, -1, 0, 2.5, 10**30, 1e300, -0.5, "", "x", ESCAPES, HTML, "=1+1", [], [None], [[]], {}, {"a": {"b": 1}},
    "long" * 2000,
)  # fmt: skip


def nested(depth):
    value = "x"
    for _ in range(depth):
        value = {"a": value}
    return value


@pytest.fixture
def whole(make_results, make_domain):
    """Results with everything that a file may have."""
    rows = [make_domain("noise", 0.5), make_domain("blur", 0.7), make_domain("noise", 0.6, visit=1)]
    rows = [{**row, "start": 100 * i, "brier": 0.3, "entropy": 1.0, "diversity": 0.9} for i, row in enumerate(rows)]
    averages = {"accuracy": 0.6, "error": 0.4, "nll": 1.0, "ece": 0.1}
    extra = {
        "model": "SupervisedTask", "network": "cifar_resnet8", "classes": 10, "bad_batches": 0,
        "readings": [{"steps": 1, "domains": copy.deepcopy(rows), "mean": averages}],
        "overall": {**averages, "samples": 300}, "groups": [{**averages, "name": "noise", "rows": 2}],
        "worst": {"domain": "noise", "domain_accuracy": 0.5, "group": "noise", "group_accuracy": 0.5},
        "rounds": [{**averages, "visit": 0, "rows": 2}],
        "forgetting": [{"name": "clean", "severity": None, "probes": 2, "first": 0.9, "last": 0.8, "lowest": 0.8,
                        "forgotten": 0.1}],
        "curve": {"images": [100, 200, 300], "accuracy": [0.5, 0.7, 0.6], "running": [0.5, 0.6, 0.6]},
    }  # fmt: skip
    return json.loads(json.dumps(make_results(domains=rows, extra=extra, steps=2, stream_args={"order": ["a"]})))


def places(value, path=()):
    """Yield the path of every value in a tree, of lists those of the first and the last."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    for key, part in items if isinstance(value, dict) else items[:1] + items[1:][-1:]:
        yield (*path, key)
        if isinstance(part, (dict, list)):
            yield from places(part, (*path, key))


def edited(results, path, value):
    changed = copy.deepcopy(results)
    owner = changed
    for key in path[:-1]:
        owner = owner[key]
    if value is Ellipsis:
        del owner[path[-1]]
    else:
        owner[path[-1]] = value
    return changed


def put(folder, results):
    (folder / "runs" / "odd").mkdir(parents=True, exist_ok=True)
    (folder / "runs" / "odd" / "results.json").write_text(json.dumps(results))


def run(words, capsys):
    """Return the exit code of compare and what it said; a traceback is an error of the test."""
    try:
        main(words)
        code = 0
    except SystemExit as stop:
        code = stop.code
    said = capsys.readouterr()
    lines = (said.err if code else said.out).splitlines()
    assert all(line.isprintable() for line in lines)
    if code:
        assert code == 2
        assert len(lines) == 1
        assert lines[0].startswith("ttalight compare: error: ")
    return code, "\n".join(lines)


def attempt(folder):
    """Return the results in a folder, or None and why they are refused."""
    try:
        return read_results(folder), ""
    except ValueError as error:
        return None, str(error)


class Tags(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.seen, self.odd = set(), []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.seen.add(tag)
        self.odd += [name for name, value in attributes if name.startswith("on") or name in ("src", "href")]


def check_pages(folder):
    """Nothing in what was written can run or lead elsewhere."""
    page = Tags((folder / "table.html").read_text(encoding="utf-8"))
    assert not page.odd
    assert not page.seen & {"script", "img", "a", "iframe"}
    text = (folder / "table.md").read_text(encoding="utf-8")
    assert all(line.isprintable() for line in text.splitlines())
    assert not re.search(r"<\w|(?<!\\)\[", text)
    content = (folder / "table.csv").read_text(encoding="utf-8")
    for cells in csv.reader(io.StringIO(content)):
        assert not any(re.match(r"\s*[=+@]|-\D", cell) for cell in cells)


def test_every_value_replaced_by_every_wrong_one(tmp_path, whole, make_run, capsys):
    """All fields, one at a time, in what is read, compared and shown."""
    make_run("good", "Source", domains=whole["domains"])
    put(tmp_path, whole)
    words = [str(tmp_path / "runs"), "--output", str(tmp_path / "out"), "--published", "--across-weights"]
    words += ["--different", "stream", "stream_hash", "severity", "samples", "data"]
    assert run(words, capsys)[0] == 0
    refused = shown = 0
    for path in list(places(whole)):
        for value in (Ellipsis, *WRONG):
            put(tmp_path, edited(whole, path, value))
            results, said = attempt(tmp_path / "runs" / "odd")
            if results is None:
                assert "results.json " in said
                assert "\n" not in said
                refused += 1
                if refused % 50 == 0:
                    assert run(words, capsys)[0] == 2
                continue
            domain_table(results)
            protocol_header(results)
            if value in (Ellipsis, None, 0, HTML, ESCAPES):
                shown += 1
                run(words, capsys)  # a row that another run lacks is refused
                check_pages(tmp_path / "out")
    assert refused > 1000
    assert shown > 100


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("curve", "images"), [], r"curve has lists of several lengths \(images 0, accuracy 3, running 3\)"),
        (("curve", "images"), [0, 0, 0], r"curve\.images must rise from above 0"),
        (("curve", "images"), [100, 100, 300], r"curve\.images must rise from above 0"),
        (("curve", "running", 1), 7.0, r"curve\.running\[1\] is 7\.0, expected 0 to 1"),
        (("protocol", "stream_args"), nested(900), "protocol is nested more than 20 deep"),
        (("protocol", "other"), nested(900), "protocol is nested more than 20 deep"),
        (("environment", "other"), nested(21), "environment is nested more than 20 deep"),
        (("protocol", "resize"), 10**30, "protocol has 1000000.*, expected integers of 64 bits"),
        (("readings", 0, "domains"), [], r"readings\[0\] has 0 domains, the run has 3"),
        (("domains", 1, "samples"), -1, r"domains\[1\]\.samples is -1, expected at least 0"),
        (("domains", 1, "accuracy"), 70, r"domains\[1\]\.accuracy is 70, expected 0 to 1"),
        (("domains", 1, "nll"), 1e300, r"domains\[1\]\.nll is 1e\+300, expected at least 0"),
        (("domains", 1, "name"), "x" * 5000, r"domains\[1\]\.name has 5,000 characters, expected at most 4,096"),
        (("schema",), nested(900), "has schema .*this version of ttalight reads schema 1"),
    ],
)  # fmt: skip
def test_the_line_says_what_is_wrong(path, value, message, tmp_path, whole):
    put(tmp_path, edited(whole, path, value))
    with pytest.raises(ValueError, match=message):
        read_results(tmp_path / "runs" / "odd")


def test_a_run_without_a_curve_of_its_own_is_shown(tmp_path, whole, capsys):
    """Its stream has probes only."""
    curve = {"images": [], "accuracy": [], "running": []}
    put(tmp_path, edited(whole, ("curve",), curve))
    assert run([str(tmp_path / "runs"), "--output", str(tmp_path / "out")], capsys)[0] == 0


class TestNames:
    """Names of methods, domains, files and folders end up on terminals, in pages and in spreadsheets."""

    @pytest.fixture
    def named(self, tmp_path, make_results, make_domain):
        def write(name, folder):
            results = make_results(
                f"{name}", domains=[make_domain(name, 0.5), make_domain("blur", 0.7)], data=name, weights=name,
                extra={"network": name, "forgetting": [{"name": name, "severity": None, "probes": 1, "first": 0.5,
                                                        "last": 0.5, "lowest": 0.5, "forgotten": 0.0}]},
            )  # fmt: skip
            write_results(tmp_path / "runs" / folder, results)
            write_results(tmp_path / "runs" / "other", results | {"protocol": results["protocol"] | {"lr": 0.5}})
            return results

        return write

    @pytest.mark.parametrize(
        "name", [ESCAPES, HTML, "[x](javascript:alert(1))", "a|b", "\x02b\x03", "\x9b31m", "\ud800"]
    )
    def test_terminal_and_pages(self, name, named, tmp_path, capsys):
        results = named(name, "run")
        code, said = run([str(tmp_path / "runs"), "--output", str(tmp_path / "out")], capsys)
        assert code == 0
        assert name.encode("unicode_escape").decode()[:5] in said
        check_pages(tmp_path / "out")
        for text in (domain_table(results), protocol_header(results)):
            assert all(line.isprintable() for line in text.split("\n"))

    @pytest.mark.parametrize("name", ["=1+1", "+1", "-1+cmd|' /C calc'!A0", "@SUM(1)", "\t=1", "\r=1", " =1", "＝1"])
    def test_formulas(self, name, named, tmp_path, capsys):
        named(name, "run")
        assert run([str(tmp_path / "runs"), "--output", str(tmp_path / "out")], capsys)[0] == 0
        for file in (tmp_path / "out" / "table.csv", tmp_path / "runs" / "run" / "domains.csv"):
            rows = list(csv.DictReader(io.StringIO(file.read_text(encoding="utf-8"))))
            texts = [row[key] for row in rows for key in ("label", "method", "domain", "name") if key in row]
            assert any(text[:1] in ("'", "\\") for text in texts)
            assert not any(text.lstrip()[:1] in tuple("=+-@＝") for text in texts)
        gains = [row["mean"] for row in rows if row.get("metric") == "gain"]
        assert all(float(gain) <= 1 for gain in gains)

    def test_folders(self, named, tmp_path, capsys):
        named("Tent", f"{ESCAPES.replace('/', '')}<b>")
        assert run([str(tmp_path / "runs"), "--output", str(tmp_path / "out")], capsys)[0] == 0
        check_pages(tmp_path / "out")

    def test_errors(self, tmp_path, capsys):
        code, said = run([f"{tmp_path}/\x1b[2Jnone"], capsys)
        assert code == 2
        assert "\\x1b[2Jnone" in said

    @pytest.mark.skipif(not can_plot(), reason="matplotlib is not installed")
    def test_figures(self, make_results, make_domain):
        """A name is no formula."""
        domain_figure(make_results("$x^$", domains=[make_domain("$\\frac{1}$", 0.5)])).canvas.draw()


class TestMany:
    def test_a_million_rows_are_refused_at_once(self, tmp_path, whole):
        row = json.dumps(whole["domains"][0])
        text = json.dumps(edited(whole, ("domains",), "here")).replace('"here"', f"[{','.join([row] * 1_000_000)}]")
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(ValueError, match=r"is not read: it has (more than 500,000 rows|.* bytes)"):
            read_results(tmp_path)

    def test_time_grows_with_the_number_of_domains(self, tmp_path, make_run, make_domain):
        """Ten times as many domains take far less than a hundred times as long."""
        import time

        seconds = {}
        for count in (1000, 10_000):
            for method in ("Source", "Tent"):
                rows = [make_domain(f"d{index}", 0.5) for index in range(count)]
                make_run(f"{count}/{method}", method, domains=rows)
            took = []
            for _ in range(3):  # the least of which other work on the machine has touched least
                began = time.process_time()
                compare([str(tmp_path / "runs" / str(count))], output=str(tmp_path / "out"), baseline="Source")
                took.append(time.process_time() - began)
            seconds[count] = min(took)
        assert seconds[10_000] < 30 * max(seconds[1000], 0.025)


COLUMNS = ("position", "visit", "domain", "sample", "label", "prediction")


def packed(folder, **arrays):
    np.savez(folder / "predictions.npz", **arrays)


class TestPredictions:
    @pytest.fixture
    def columns(self):
        return {name: np.zeros(4, np.int32) for name in COLUMNS} | {"domains": np.array(["a"])}

    @pytest.mark.parametrize("column", COLUMNS)
    @pytest.mark.parametrize(
        "odd",
        [np.int32(0), np.zeros((0,), np.int32), np.zeros(3, np.int32), np.zeros(4), np.zeros(4, bool),
         np.array(["a"] * 4), np.zeros(4, "M8[s]"), np.zeros(4, "V3"), np.zeros(4, "i4,f8"), np.array([{}] * 4, object),
         np.zeros((4, 2), np.int32), np.zeros(4, complex)],
        ids=lambda odd: f"{odd.dtype} {odd.shape}",
    )  # fmt: skip
    def test_odd_columns(self, column, odd, columns, tmp_path):
        packed(tmp_path, **columns | {column: odd})
        with pytest.raises(ValueError, match=r"is not a file of predictions, or it is damaged \(.+\): repeat the run"):
            read_predictions(tmp_path)

    @pytest.mark.parametrize("name", ["visit", "domain", "sample", "position"])
    def test_negative_ones(self, name, columns, tmp_path):
        packed(tmp_path, **columns | {name: np.array([0, 0, 0, -1])})
        with pytest.raises(ValueError, match=f"{name} has -1, expected 0 or more"):
            read_predictions(tmp_path)

    @pytest.mark.parametrize("domains", [np.array("a"), np.array([1, 2]), np.array([["a"]]), np.array([b"a"])])
    def test_odd_domains(self, domains, columns, tmp_path):
        packed(tmp_path, **columns | {"domains": domains})
        with pytest.raises(ValueError, match=r"domains is .* of shape"):
            read_predictions(tmp_path)
        packed(tmp_path, **columns | {"domain": np.full(4, 7)})
        with pytest.raises(ValueError, match="domain has 7, and there are 1 domains"):
            read_predictions(tmp_path)

    def test_a_huge_header(self, tmp_path):
        text = f"{{'descr': '<i4', 'fortran_order': False, 'shape': ({'1,' * 100_000}), }}\n".encode()
        member = b"\x93NUMPY\x02\x00" + len(text).to_bytes(4, "little") + text
        with zipfile.ZipFile(tmp_path / "predictions.npz", "w") as archive:
            archive.writestr("position.npy", member)
        with pytest.raises(ValueError, match="is not a file of predictions"):
            read_predictions(tmp_path)

    def test_intervals_say_why_there_are_none(self, columns, tmp_path, make_run, capsys):
        for name in ("Source", "Tent"):
            make_run(name, name)
        for odd in (np.int32(0), np.zeros(0, np.int32), np.zeros(3, np.int32), np.zeros((4, 2), np.int32)):
            for name in ("Source", "Tent"):
                packed(tmp_path / "runs" / name, **columns | {"label": odd})
            code, said = run([str(tmp_path / "runs"), "--baseline", "Source"], capsys)
            assert code == 0
            assert "no interval for Tent: " in said
