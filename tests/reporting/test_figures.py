"""The figure of a run."""

from __future__ import annotations

import pytest

from ttalight.reporting import figures
from ttalight.reporting.figures import domain_figure

pytest.importorskip("matplotlib", reason="figures need the plots extra")


def test_bars_are_the_accuracies():
    rows = [{"name": "clean", "accuracy": 0.9}, {"name": "fog", "accuracy": None}]
    figure = domain_figure({"method": "Tent", "domains": rows, "mean": {"accuracy": 0.9}})
    axes = figure.axes[0]
    assert [bar.get_height() for bar in axes.patches] == [90.0, 0.0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["clean", "fog"]
    assert axes.lines[0].get_ydata()[0] == 90.0


def test_figure_of_very_many_domains(monkeypatch):
    monkeypatch.setattr(figures, "by_domain", list)
    rows = [{"name": str(index), "accuracy": 0.5} for index in range(1000)]
    figure = domain_figure({"method": "Tent", "domains": rows, "mean": {"accuracy": 0.5}})
    assert 150 * figure.get_figwidth() < 2**16  # pixels, as a file
    assert len(figure.axes[0].patches) == 1000
