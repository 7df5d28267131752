"""Sets runs side by side: ``ttalight compare``."""

from __future__ import annotations

import shutil
import sys
from argparse import ArgumentError
from collections.abc import Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from jsonargparse import ArgumentParser

from ttalight.errors import InputError, MissingPackageError, TTALightError
from ttalight.files.atomic import write_files
from ttalight.reporting.groups import Group, Run, find_runs, group_runs, stream_differences
from ttalight.reporting.latex import render_latex
from ttalight.reporting.overview import STREAM_FIELDS, progress
from ttalight.reporting.published import match_published
from ttalight.reporting.render import render_markdown, render_text
from ttalight.reporting.report import render_html
from ttalight.reporting.results import Metric
from ttalight.reporting.table import Table, table_csv, tabulate
from ttalight.reporting.text import WIDTH, printable
from ttalight.reporting.wide import wide, wide_csv

if TYPE_CHECKING:
    import pandas


def compare(
    runs: list[str],
    different: list[str] | None = None,
    output: str | None = None,
    metric: Metric = "accuracy",
    baseline: str | None = None,
    partial: bool = False,
    across_weights: bool = False,
    across_streams: bool = False,
    published: bool = False,
    width: int = WIDTH,
) -> str:
    """Set the results of several runs side by side.

    Runs of one method with the same protocol and weights but different seeds are one row, mean ± sample standard
    deviation. Numbers on different streams do not belong into one table: that is an error unless it is asked for.

    Args:
        runs: Folders of runs, or folders that hold such at any depth.
        different: Settings of the stream that may differ: data, stream, stream_hash, severity, samples.
        output: Folder for table.md, table.tex, table.html, table_wide.csv, and table.csv, which has the numbers as
            measured.
        metric: What to compare.
        baseline: Label or method of a row; further columns show what each mean gains over it, with a bootstrap
            interval where the runs have predictions.
        partial: Show unfinished runs as well, marked, without a mean.
        across_weights: Average seeds whose source weights differ, where each has trained its own.
        across_streams: Average runs whose streams differ in their order alone, where each has its own data.seed.
        published: Set published numbers of the same method and data beside the runs, and say what differs.
        width: Columns of the terminal that the text is for.

    Returns:
        The text to print: what all rows share, the table, and what differs between rows.

    Raises:
        OSError: If a run or the output cannot be reached.
        ValueError: If a run cannot be read, none is left, or the streams differ.
    """
    table, notes = compared(runs, different or (), metric, baseline, partial, across_weights, across_streams)
    matches, unmatched = match_published([row.group for row in table.rows]) if published else ([], [])
    if unmatched:
        notes.append(f"nothing published that fits: {', '.join(unmatched)}")
    if output is not None:
        texts = {
            "table.csv": table_csv(table),
            "table_wide.csv": wide_csv(table),
            "table.md": render_markdown(table, notes, matches),
            "table.tex": render_latex(table, notes),
            "table.html": render_html(table, notes, matches),
        }
        write_files(output, texts)
    return render_text(table, notes, matches, width)


def to_frame(
    runs: list[str],
    different: list[str] | None = None,
    metric: Metric = "accuracy",
    baseline: str | None = None,
    partial: bool = False,
    across_weights: bool = False,
    across_streams: bool = False,
) -> pandas.DataFrame:
    """Set the results of several runs side by side in a table of pandas.

    Args:
        runs: As in :func:`compare`, and so are the other arguments.
        different: Settings of the stream that may differ.
        metric: What to compare.
        baseline: Label or method of a row.
        partial: Take unfinished runs as well.
        across_weights: Average seeds whose source weights differ.
        across_streams: Average runs whose streams differ in their order alone.

    Returns:
        A row for each method and the columns of ``table_wide.csv``: ``mean`` first, domains by their abbreviations.
        Fractions are in percent, not rounded; what is missing is NaN.

    Raises:
        ImportError: If pandas is not installed.
        OSError: If a run cannot be reached.
        ValueError: If a run cannot be read, none is left, or the streams differ.
    """
    if find_spec("pandas") is None:
        raise MissingPackageError("to_frame needs pandas, which is not installed: pip install 'ttalight[frames]'")
    import pandas

    table, _ = compared(runs, different or (), metric, baseline, partial, across_weights, across_streams)
    header, rows = wide(table)
    return pandas.DataFrame(rows, columns=header).set_index("method")


def compared(
    runs: Sequence[str],
    different: Sequence[str],
    metric: Metric,
    baseline: str | None,
    partial: bool,
    across_weights: bool,
    across_streams: bool,
) -> tuple[Table, list[str]]:
    """Return the numbers behind :func:`compare`, and the remarks on them."""
    found, without = find_runs(runs)
    unfinished = [run for run in found if not run.results["complete"]]
    shown = found if partial else [run for run in found if run.results["complete"]]
    if not shown:
        left = f": {_unfinished(unfinished)}, show with --partial true" if unfinished else ", no results.json there"
        raise InputError(f"no finished run in {' '.join(runs)}{left}")
    allowed = _allowed(shown, different, across_streams)
    notes = [f"different {field}: {values}" for field, values in allowed.items()]
    groups, remarks = group_runs(shown, across_weights, across_streams)
    if across_streams and "stream_hash" not in different:
        _check_orders(groups, remarks)
    notes += remarks
    if unfinished and not partial:
        notes.append(f"left out, not finished: {_unfinished(unfinished)}")
    if without:
        notes.append(f"left out, no results.json: {' '.join(without)}")
    return tabulate(groups, metric, baseline), notes


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: The words after ``ttalight compare``; those of the process by default.

    Raises:
        SystemExit: With code 2 and one line on stderr if anything is wrong.
    """
    about = "Set the results of several runs side by side."
    parser = ArgumentParser(prog="ttalight compare", description=about, exit_on_error=False, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", type=str, help="Folders of runs, or folders that hold such at any depth.")
    fields = " ".join(STREAM_FIELDS)
    parser.add_argument(
        "--different", nargs="+", type=str, metavar="FIELD", help=f"Settings of the stream that may differ: {fields}."
    )
    flags = {
        "partial": "Show unfinished runs as well, marked, without a mean.",
        "across_weights": "Average seeds whose source weights differ, where each has trained its own.",
        "across_streams": "Average runs whose streams differ in their order alone, where each has its own data.seed.",
        "published": "Set published numbers of the same method and data beside the runs, and say what differs.",
    }
    for name, text in flags.items():
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        parser.add_argument(*spellings, type=bool, nargs="?", const=True, default=False, help=text)
    parser.add_function_arguments(compare, skip={"runs", "different", *flags}, as_group=False)
    parser.set_defaults(width=max(WIDTH, shutil.get_terminal_size((WIDTH, 1)).columns))
    try:
        options = parser.parse_args(None if args is None else list(args))
        sys.stdout.write(compare(**options.as_dict()) + "\n")
    except (ArgumentError, OSError, TTALightError) as error:
        sys.stderr.write(f"ttalight compare: error: {printable(' '.join(str(error).split()))}\n")
        raise SystemExit(2) from None


def _allowed(runs: Sequence[Run], different: Sequence[str], across_streams: bool) -> dict[str, str]:
    """Return the differences between streams, or refuse them."""
    unknown = [field for field in different if field not in STREAM_FIELDS]
    if unknown:
        raise InputError(
            f"--different got {' '.join(unknown)}, which is no setting of the stream: "
            f"it takes {' '.join(STREAM_FIELDS)} (other settings may differ anyway; give the runs before this option)"
        )
    differences = stream_differences(runs)
    if across_streams:
        differences.pop("stream_hash", None)  # the table says how many orders a row has
    if differences.keys() - set(different):
        values = "; ".join(f"{field} is {values}" for field, values in differences.items() if field not in different)
        orders = ". If they are orders of one stream, average them with --across-streams"
        raise InputError(
            f"these runs were not measured on the same stream: {values}"
            f"{orders if differences.keys() == {'stream_hash'} else ''}. "
            f"To set them side by side all the same, add --different {' '.join(differences)}"
        )
    return differences


def _check_orders(groups: Sequence[Group], remarks: Sequence[str]) -> None:
    """Refuse rows that are averages over different streams."""
    whole = [group for group in groups if group.complete]
    odd = next((group for group in whole if group.streams != whole[0].streams), None)
    if odd is not None:
        counts = ", ".join(f"{group.label} has {len(group.streams)}" for group in (whole[0], odd))
        shared = len(whole[0].streams & odd.streams)
        raise InputError(
            f"these rows were not measured on the same stream orders: {counts}, and {shared} of them are in both. "
            "Run every method with the same values of data.seed, or add --different stream_hash"
            + "".join(f". {remark}" for remark in remarks)
        )


def _unfinished(runs: Sequence[Run]) -> str:
    return ", ".join(f"{run.name} ({progress(run.results)})" for run in runs)
