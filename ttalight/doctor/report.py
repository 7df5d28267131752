"""The doctor's report: text for the terminal, and one page of HTML that needs nothing else."""

from __future__ import annotations

from ttalight.doctor.verdict import Findings, advise, conclude
from ttalight.reporting.html import html_heading, html_list, html_page, html_table, html_wide
from ttalight.reporting.svg import Series, bar_plot
from ttalight.reporting.text import number, text_blocks, wrap

__all__ = ["render_page", "render_report"]

_NAMES = {
    "source": "the source's (Source)",
    "batch": "the batch's (PTBN)",
    "prior": "both (AlphaBN)",
    "quarter": "a quarter of the batch's",
}
_HEADER = ["statistics", "entropy / ln C", "diversity", "information", "agreement with Source %"]
#: Layers that are shown; of more, evenly chosen ones.
_LAYERS = 40


def _rows(findings: Findings) -> list[list[str]]:
    return [
        [
            _NAMES[name],
            number(findings.entropy[name], 3),
            number(findings.diversity[name], 3),
            number(findings.information[name], 3),
            number(100 * findings.agreement[name], 1),
        ]
        for name in findings.entropy
    ]


def _methods(findings: Findings) -> list[list[str]]:
    return [[one.methods, "yes" if one.safe else "no", one.reason] for one in advise(findings)]


def render_report(findings: Findings) -> str:
    """Return the conclusions, the predictions and the methods as text for a terminal."""
    about = f"{findings.images} images of unknown class, batches of {findings.batch_size}, {findings.classes} classes"
    lines = "\n".join(wrap(line) for line in [about, *conclude(findings)])
    methods = "\n".join(wrap(f"{name}: {safe}; {why}") for name, safe, why in _methods(findings))
    return "\n\n".join([lines, *text_blocks(_HEADER, _rows(findings)), "Safe here?", methods])


def render_page(findings: Findings, title: str) -> str:
    """Return the report as an HTML page without scripts and without links to other files.

    Args:
        findings: What was measured.
        title: Heading of the page.
    """
    names = list(findings.distances)
    step = -(-len(names) // _LAYERS) or 1
    shown = names[::step]
    parts = [
        html_list(conclude(findings)),
        html_heading("Safe here?"),
        html_table(["methods", "safe", "because"], _methods(findings), words=True),
        html_heading("Predictions without labels"),
        html_table(_HEADER, _rows(findings)),
    ]
    if shown:
        bars = Series("distance", (), [findings.distances[name] for name in shown])
        parts += [
            html_heading("Distance of the batch's statistics from the running ones, by layer"),
            html_wide(bar_plot(bars, shown, "nats", width=640)),
        ]
    return html_page(title, parts, "ttalight doctor")
