"""Tables of CTA's paper as Markdown: measured beside published, and what differs between the two."""

from __future__ import annotations

import html
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from ttalight.analysis import mean_geometry, read_geometry
from ttalight.reporting import read_results
from ttalight.reporting.html import html_heading, html_list, html_page, html_table, html_wide
from ttalight.reporting.published import published_rows
from ttalight.reporting.summary import counted
from ttalight.reporting.text import markdown_table, markdown_text
from ttalight.reproduce.differences import differences, plain
from ttalight.reproduce.plan import Plan, Row
from ttalight.reproduce.recipes import Config

PUBLISHED = yaml.safe_load(Path(__file__).with_name("published.yaml").read_text(encoding="utf-8"))
#: Names of the data sets in published rows, and labels of CTA's own tables there.
_IN_ROWS = {"cifar10": "cifar10", "cifar100": "cifar100", "tiny_imagenet": "TinyImageNetDataModule"}
#: What the figures show, by file.
_TITLES = {
    "table1": "Table 1: accuracy against the temperature of the alignment",
    "figure2": "Figure 2: features by t-SNE",
    "figure3": "Figure 3: accuracy against steps",
}
#: Label of a row -> folders of its runs that are done.
Runs = dict[str, list[Path]]


def render(plan: Plan, root: Path, done: set[str], oracle: bool = False) -> str:
    """Return a table as Markdown; runs that are not done show as "-".

    Args:
        plan: The plan of the table.
        root: Folder of the runs.
        done: Names of the adaptation runs that are done.
        oracle: Add rows that choose the number of steps by test accuracy, as public code of some methods does.
    """
    runs = runs_of(plan, root, done)
    header, lines = {
        1: lambda: _table1(plan, runs),
        3: lambda: _table3(plan),
        6: lambda: _table6(plan, runs),
    }.get(plan.table, lambda: _comparison(plan, runs, oracle))()
    notes = [*_notes(plan, done), *differences(plan)]
    title = f"# Table {plan.table}, {plan.data}" + (", budget paper" if plan.budget == "paper" else "")
    parts = [title, markdown_table(header, lines), "\n".join(f"- {markdown_text(note)}" for note in notes)]
    return "\n\n".join(parts) + "\n"


def runs_of(plan: Plan, root: Path, done: set[str]) -> Runs:
    """Return the folders of the runs of each row that are done."""
    return {row.label: [root / job for job in row.jobs if job in done] for row in plan.rows}


def report(root: Path) -> str:
    """Return a page with every table and figure in a folder, which needs nothing beside it."""
    parts = []
    for path in sorted(root.glob("table*.md")):
        title, table, *notes = path.read_text(encoding="utf-8").strip().split("\n\n")
        header, _, *lines = [[_unescaped(cell) for cell in line[2:-2].split(" | ")] for line in table.splitlines()]
        parts += [html_heading(title.removeprefix("# ")), html_table(header, lines)]
        parts += [html_list([_unescaped(note.removeprefix("- ")) for note in own.splitlines()]) for own in notes]
    for path in sorted(root.glob("*.svg")):
        drawing = path.read_text(encoding="utf-8")
        parts += [html_heading(_TITLES.get(path.stem, path.stem)), html_wide(drawing[drawing.index("<svg") :])]
    return html_page(f"Tables of CTA's paper: {root.parent.name}, {root.name}", parts)


def _unescaped(text: str) -> str:
    """Return what ``markdown_text`` was given."""
    return html.unescape(re.sub(r"\\([\\`*\[\]|])", r"\1", text))


# -- tables


def _table1(plan: Plan, runs: Runs) -> tuple[list[str], list[list[str]]]:
    published = PUBLISHED["table1"].get(plan.data, {})
    lines = []
    for row in plan.rows:
        found = accuracies(runs[row.label])
        clean = [values["clean"] for values in found]
        corrupted = [mean_of_corruptions(values) for values in found]
        theirs = published.get(row.published or row.temperature, (None, None))
        lines.append([row.label, _show(clean), _number(theirs[0]), _show(corrupted), _number(theirs[1])])
    return ["encoder", "clean", "published", "corrupted, mean", "published"], lines


def _comparison(plan: Plan, runs: Runs, oracle: bool) -> tuple[list[str], list[list[str]]]:
    rows = {label: accuracies(folders) for label, folders in runs.items()}
    if oracle:
        for label, folders in runs.items():
            best = [chosen for folder in folders if (chosen := _oracle(folder)) is not None]
            if best:
                rows[f"{label} (oracle: best steps by test accuracy)"] = best
    names = list(dict.fromkeys(name for own in rows.values() for values in own for name in values if name != "clean"))
    theirs = {row.label: _published(plan, row) for row in plan.rows}
    header = ["", *names, "mean", "published mean", "difference"]
    lines = []
    for label, measured in rows.items():
        published = theirs.get(label)
        means = [mean_of_corruptions(values) for values in measured]
        mean = None if published is None else published[1]
        difference = f"{100 * statistics.fmean(means) - mean:+.2f}" if means and mean is not None else "-"
        cells = [_show([values[name] for values in measured if name in values]) for name in names]
        lines.append([label, *cells, _show(means), _number(mean), difference])
        if published is not None and published[0]:
            shown = [_number(published[0].get(name.removesuffix("_procedural"))) for name in names]
            lines.append([f"{label}, published", *shown, _number(mean), "", ""])
    return header, lines


def _table3(plan: Plan) -> tuple[list[str], list[list[str]]]:
    stages = {name: next(job.config for job in plan.jobs if job.name == name) for name in ("source", "simclr", "align")}
    own = {name: _schedule(config) for name, config in stages.items()}
    lines = []
    for setting, (training, alignment) in PUBLISHED["table3"].items():
        ours = [plain(own[name].get(setting)) for name in stages]
        lines.append([setting, plain(training), *ours[:2], plain(alignment), ours[2]])
    names = ["source training, published", "supervised here", "self-supervised here", "alignment, published", "here"]
    return ["", *names], lines


def _table6(plan: Plan, runs: Runs) -> tuple[list[str], list[list[str]]]:
    lines = []
    for row in plan.rows:
        measured = [mean_geometry(read_geometry(folder)) for folder in runs[row.label]]
        for place in ("encoder", "projector"):
            label = f"{row.label} {place}"
            own = [[mean for mean in means if mean["place"] == place] for means in measured]
            first: list[dict[str, Any]] = [dict(min(means, key=_steps)) for means in own]
            last: list[dict[str, Any]] = [dict(max(means, key=_steps)) for means in own]
            lines.append(_pair("Davies-Bouldin index", label, first, last, ("davies_bouldin",), "davies_bouldin"))
            references = list(dict.fromkeys(name for mean in first for name in mean["distances"]))
            for reference in references:
                published = "distance" if reference == "source" else ""
                for field in ("mean", "relative"):
                    path = ("distances", reference, field)
                    name = f"distance to {reference}" + (", relative" if field == "relative" else "")
                    lines.append(_pair(name, label, first, last, path, published if field == "mean" else ""))
    steps = f"after {plan.jobs[-1].config['adapter']['init_args']['steps']} steps"
    return ["measure", "features", "no adaptation", "published", steps, "published (20)"], lines


def _pair(
    name: str, label: str, first: Sequence[Any], last: Sequence[Any], path: Sequence[str], published: str
) -> list[str]:
    def values(means: Sequence[Any]) -> list[float]:
        found = []
        for value in means:
            for key in path:
                value = value[key]
            found += [] if value is None else [value]
        return found

    theirs = PUBLISHED["table6"].get(published, {}).get(label, (None, None))
    return [name, label, _show(values(first), 1), _number(theirs[0]), _show(values(last), 1), _number(theirs[1])]


def _steps(mean: Any) -> int:
    return int(mean["steps"])


# -- what stands beside the numbers


def _notes(plan: Plan, done: set[str]) -> Iterator[str]:
    if plan.table == 3:
        return
    missing = [job for row in plan.rows for job in row.jobs if job not in done]
    if missing:
        yield f"not finished: {', '.join(missing)}"
    if plan.table == 6:
        yield (
            "distances are Euclidean, between class medians of target and training images, the mean over classes and "
            "then over corruptions; the paper does not say how it averages. 'source' are the features of the same "
            "place, 'supervised' those that the classifier was trained on; 'relative' is divided by the norm of the "
            "training medians."
        )
    elif plan.table != 1:
        yield (
            "± is the sample standard deviation over seeds of the adaptation, which draw other views of the same "
            "batches; source training is not repeated. The paper does not say what its ± is taken over; public code of "
            "these methods repeats the adaptation on new batches."
        )
        controls = [row.label for row in plan.rows if row.published is None]
        yield f"controls: {'; '.join(controls)}. EMABN has CTA's views and forwards and takes no gradient step"
        without = [row.label for row in plan.rows if row.published is not None and _published(plan, row) is None]
        if without and plan.data in _IN_ROWS:
            yield f"no published numbers: {', '.join(without)}"


def _schedule(config: Config) -> Config:
    arguments = config["model"]["init_args"]
    own = {name: arguments.get(name, default) for name, default in (("lr", 5e-4), ("final_lr", 1e-6))}
    temperature = {"ContrastiveTask": 0.01, "AlignmentTask": 0.5}.get(config["model"]["class_path"])
    return {
        "epochs": config["trainer"]["max_epochs"],
        "batch size": config["data"]["init_args"]["batch_size"],
        "optimizer": "Adam",
        "scheduler": "cosine annealing",
        "starting learning rate": own["lr"],
        "final learning rate": own["final_lr"],
        "warm-up epochs": arguments.get("warmup_epochs", 2),
        "temperature": arguments.get("temperature", temperature),
    }


# -- numbers


def accuracies(folders: Sequence[Path]) -> list[dict[str, float]]:
    """Return domain -> accuracy of each run."""
    found = [counted(read_results(folder)["domains"]) for folder in folders]
    return [{row["name"]: float(row["accuracy"] or 0.0) for row in rows} for rows in found]


def _oracle(run: Path) -> dict[str, float] | None:
    """Return the accuracies after the number of steps that has the best mean on the test labels, or None."""
    results = read_results(run)
    if results["method"] != "TestTimeTraining" or not results.get("readings"):
        return None
    tables = [results["domains"], *(reading["domains"] for reading in results["readings"])]
    choices = [{row["name"]: float(row["accuracy"] or 0.0) for row in counted(rows)} for rows in tables]
    return max(choices, key=mean_of_corruptions)


def mean_of_corruptions(values: dict[str, float]) -> float:
    """Return the mean accuracy over all domains but the clean one."""
    return statistics.fmean(value for name, value in values.items() if name != "clean")


def _published(plan: Plan, row: Row) -> tuple[dict[str, float], float] | None:
    """Return domain -> accuracy and the mean, in percent, as printed."""
    if row.published is None or plan.data not in _IN_ROWS:
        return None
    for other in published_rows():
        own = other.authors.startswith("Barbeau") and _IN_ROWS[plan.data] in other.data
        if own and other.label == row.published:
            return {name: 100 * value for name, value in other.accuracy.items()}, 100 * other.mean
    return None


def _show(values: Sequence[float], factor: float = 100.0) -> str:
    if not values:
        return "-"
    spread = f" ± {factor * statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{factor * statistics.fmean(values):.2f}{spread}"


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
