"""Figure 3: accuracy against steps, from the readings of one run."""

from __future__ import annotations

import json

import pytest

from ttalight.reporting import summarize
from ttalight.reporting.compare import compare
from ttalight.reporting.figures import iterations_figure
from ttalight.reporting.iterations import iteration_curves


def reading(make_domain, steps, accuracies):
    rows = [make_domain(name, accuracy) for name, accuracy in zip(("noise", "blur"), accuracies, strict=True)]
    return {"steps": steps, "domains": rows, "mean": summarize(rows)[0]}


@pytest.fixture
def with_readings(make_domain):
    return {"readings": [reading(make_domain, 0, (0.2, 0.4)), reading(make_domain, 1, (0.3, 0.5))]}


def test_curves_end_with_the_run_itself(make_results, with_readings):
    curves = iteration_curves(make_results(extra=with_readings, steps=5))
    assert curves.steps == [0, 1, 5]
    assert curves.domains == {"noise": [0.2, 0.3, 0.5], "blur": [0.4, 0.5, 0.7]}
    assert curves.mean == pytest.approx([0.3, 0.4, 0.6])


def test_a_run_without_readings(make_results):
    with pytest.raises(ValueError, match=r"the run of Tent has no predictions after fewer steps: .*read_at"):
        iteration_curves(make_results())


def test_figure_lines_and_dashed_control(make_results, with_readings):
    pytest.importorskip("matplotlib", reason="figures need the plots extra")
    run = make_results("TestTimeTraining", extra=with_readings, steps=5)
    control = make_results("EMABN", accuracies=(0.4, 0.6), extra=with_readings, steps=5)
    lines = iterations_figure(run, control).axes[0].lines
    assert len(lines) == 6
    assert list(lines[0].get_ydata()) == pytest.approx([20, 30, 50])
    assert [line.get_linestyle() for line in lines] == ["-"] * 3 + ["--"] * 3
    assert lines[0].get_color() == lines[3].get_color() != lines[1].get_color()
    assert list(lines[5].get_ydata()) == pytest.approx([30, 40, 50])


def test_page_has_curves_of_readings(make_run, with_readings, tmp_path):
    runs = [make_run("a", "EMABN", extra=with_readings, steps=5), make_run("b", "Tent")]
    compare(runs, output=str(tmp_path / "table"))
    page = (tmp_path / "table" / "table.html").read_text()
    plot = page[page.index("Accuracy against steps") :]
    assert plot[: plot.index("</svg>")].count("<polyline") == 1
    assert json.loads((tmp_path / "runs" / "b" / "results.json").read_text()).get("readings") is None
    compare(runs[1:], output=str(tmp_path / "other"))
    assert "Accuracy against steps" not in (tmp_path / "other" / "table.html").read_text()
