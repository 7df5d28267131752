"""Tables for papers and programs: LaTeX, CSV with a line a method, pandas."""

from __future__ import annotations

import csv

import pytest

from ttalight.reporting.compare import compare, to_frame


def test_latex(make_run, make_domain, tmp_path):
    rows = {"A_b": (0.5, 0.7), "C&D": (0.6, 0.6)}
    runs = []
    for method, values in rows.items():
        domains = [make_domain(name, value) for name, value in zip(("gaussian_noise", "100%"), values, strict=True)]
        runs += [make_run(f"{method}-{s}", method, domains=domains, seed=s) for s in range(2)]
    domains = [make_domain(name, 0.55) for name in ("gaussian_noise", "100%")]
    runs.append(make_run("x", "C&D", domains=domains, seed=2))
    compare(runs, output=str(tmp_path), baseline="A_b")
    text = (tmp_path / "table.tex").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("%")]
    assert lines == [
        r"\begin{tabular}{lrrrrr}",
        r"\toprule",
        r"Method & Mean & Over A\_b & n & Gauss. & 100\% \\",
        r"\midrule",
        r"A\_b & \textbf{60.0} & $+0.0$ & 2 & 50.0 & \textbf{70.0} \\",
        r"C\&D & 58.3{\scriptsize$\,\pm\,2.9$} & $-1.7$ & 3 & \textbf{58.3}{\scriptsize$\,\pm\,2.9$} & "
        r"58.3{\scriptsize$\,\pm\,2.9$} \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]
    assert r"\usepackage{booktabs,graphicx}" in text
    assert "% 2 seeds gave equal numbers: A_b" in text


def test_wide_csv(make_run, tmp_path):
    runs = [make_run("source", "Source", (0.2, 0.3))]
    runs += [
        make_run(f"tent-{seed}", "Tent", value, seed=seed)
        for seed, value in enumerate(((0.50, 0.60), (0.54, 0.70), (0.58, 0.65)))
    ]
    compare(runs, output=str(tmp_path), baseline="Source")
    with open(tmp_path / "table_wide.csv", newline="", encoding="utf-8") as file:
        source, tent = csv.DictReader(file)
    assert list(tent) == "method mean gain n noise blur|mean std|gain std|noise std|blur std".replace(
        " ", "|", 5
    ).split("|")
    assert list(tent.values()) == ["Tent", "59.50", "34.50", "3", "54.00", "65.00", "3.91", "", "4.00", "5.00"]
    assert list(source.values()) == ["Source", "25.00", "0.00", "1", "20.00", "30.00", "", "", "", ""]


def test_frame(make_run):
    pandas = pytest.importorskip("pandas")
    runs = [make_run("tent", "Tent", (0.5, 0.7)), make_run("eata", "EATA", (0.625, 1 / 3))]
    frame = to_frame(runs)
    assert isinstance(frame, pandas.DataFrame)
    assert list(frame.columns) == ["mean", "n", "noise", "blur"]
    assert list(frame.index) == ["Tent", "EATA"]
    assert frame.loc["EATA", "blur"] == pytest.approx(100 / 3)


def test_frame_without_pandas(make_run, monkeypatch):
    monkeypatch.setattr("ttalight.reporting.compare.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs pandas, which is not installed: pip install 'ttalight\[frames\]'"):
        to_frame([make_run("tent")])
