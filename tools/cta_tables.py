"""Tables of CTA's paper as Markdown: measured beside published, and what differs between the two."""

from __future__ import annotations

import inspect
import re
import statistics
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from cta_plan import DATA, Config, Plan, Row

from ttalight import adapters, tasks
from ttalight import data as data_modules
from ttalight.analysis import mean_geometry, read_geometry
from ttalight.reporting import read_results
from ttalight.reporting.html import html_heading, html_list, html_page, html_table, html_wide
from ttalight.reporting.published import published_rows
from ttalight.reporting.summary import counted
from ttalight.reporting.text import markdown_table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PUBLISHED = yaml.safe_load(Path(__file__).with_name("cta_published.yaml").read_text(encoding="utf-8"))
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
#: What a method's rows have here and published ones have not, by label; filled in from the configuration.
_PROTOCOLS = {
    "TTT++": "TTT++ has batches of {data.batch_size}, steps {adapter.steps} and reset {adapter.reset}; the published "
    "run passes up to 500 times over a corruption, and its labels choose learning rate and end",
    "ClusT3": "ClusT3 keeps the positions of an image together (variant {model.variant}); its authors' code mixes "
    "those of a batch with the clusters",
    "NC-TTT": "NC-TTT projects to {model.channels} channels; its authors' code to 1536, what the published run had is "
    "unknown",
    "ReC-TTT": "ReC-TTT has steps {adapter.steps}; the published number is the best of several by test accuracy, and "
    "the weights from ImageNet at 32 pixels that it starts from were never released",
}
#: Settings that say where something is or how it is shown, and the weights that ``_start`` tells of.
_LEFT_OUT = ("accelerator", "default_root_dir", "devices", "limit_val_batches", "log_every_n_steps", "callbacks",
             "channels_last", "dataset", "pretrained", "supervised", "self_supervised", "weights", "aligned", "mean",
             "std")  # fmt: skip
#: What settings are called where their own name does not say it.
_NAMES = {"model.encoder": "network", "model.crop": "crops", "model.lr": "learning rate",
          "adapter.lr": "learning rate at test time", "trainer.max_epochs": "epochs",
          "data.validation": "training images", "data.limit": "images of a corruption",
          "data.generate": "corrupted images", "data.domains": "domains"}  # fmt: skip


def render(plan: Plan, root: Path, done: set[str], oracle: bool = False) -> str:
    """Return a table as Markdown; runs that are not done show as "-".

    Args:
        plan: The plan of the table.
        root: Folder of the runs.
        done: Names of the adaptation runs that are done.
        oracle: Add rows that choose the number of steps by test accuracy, as public code of some methods does.
    """
    runs = _runs(plan, root, done)
    header, lines = {
        1: lambda: _table1(plan, runs),
        3: lambda: _table3(plan),
        6: lambda: _table6(plan, runs),
    }.get(plan.table, lambda: _comparison(plan, runs, oracle))()
    notes = [*_notes(plan, done), *_differences(plan)]
    title = f"# Table {plan.table}, {plan.data}" + (", budget paper" if plan.budget == "paper" else "")
    parts = [title, markdown_table(header, lines), "\n".join(f"- {note}" for note in notes)]
    return "\n\n".join(parts) + "\n"


def _runs(plan: Plan, root: Path, done: set[str]) -> Runs:
    return {row.label: [root / job for job in row.jobs if job in done] for row in plan.rows}


def report(root: Path) -> str:
    """Return a page with every table and figure in a folder, which needs nothing beside it."""
    parts = []
    for path in sorted(root.glob("table*.md")):
        title, table, *notes = path.read_text(encoding="utf-8").strip().split("\n\n")
        header, _, *lines = [line[2:-2].split(" | ") for line in table.splitlines()]
        parts += [html_heading(title.removeprefix("# ")), html_table(header, lines)]
        parts += [html_list([note.removeprefix("- ") for note in own.splitlines()]) for own in notes]
    for path in sorted(root.glob("*.svg")):
        drawing = path.read_text(encoding="utf-8")
        parts += [html_heading(_TITLES.get(path.stem, path.stem)), html_wide(drawing[drawing.index("<svg") :])]
    return html_page(f"Tables of CTA's paper: {root.parent.name}, {root.name}", parts)


def sweep_figure(plan: Plan, root: Path, done: set[str]) -> Figure:
    """Return the accuracies of Table 1 against the temperature of the alignment, measured beside published ones.

    Args:
        plan: The plan of Table 1.
        root: Folder of the runs.
        done: Names of the adaptation runs that are done.
    """
    from matplotlib.figure import Figure

    runs, published = _runs(plan, root, done), PUBLISHED["table1"].get(plan.data, {})
    measured: dict[float | str, tuple[float, float]] = {}
    for row in plan.rows:
        for values in _accuracies(runs[row.label]):
            shown = 100 * values["clean"], 100 * _mean_of_corruptions(values)
            measured[row.temperature or "supervised"] = shown
    figure = Figure(figsize=(9, 4), layout="constrained")
    for place, (axes, title) in enumerate(zip(figure.subplots(1, 2), ("clean", "corrupted, mean"), strict=True)):
        for values, color, label in ((measured, "tab:blue", "here"), (published, "tab:gray", "published")):
            points = sorted((at, value[place]) for at, value in values.items() if at != "supervised")
            if points:
                axes.plot(*zip(*points, strict=True), "o-", color=color, label=label)
            if "supervised" in values:
                axes.axhline(values["supervised"][place], color=color, linestyle="--", label=f"supervised, {label}")
        axes.set_xscale("log")
        axes.set_xlabel("temperature of the alignment")
        axes.set_ylabel("accuracy in %")
        axes.set_title(title)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    return figure


# -- tables


def _table1(plan: Plan, runs: Runs) -> tuple[list[str], list[list[str]]]:
    published = PUBLISHED["table1"].get(plan.data, {})
    lines = []
    for row in plan.rows:
        accuracies = _accuracies(runs[row.label])
        clean = [values["clean"] for values in accuracies]
        corrupted = [_mean_of_corruptions(values) for values in accuracies]
        theirs = published.get(row.published or row.temperature, (None, None))
        lines.append([row.label, _show(clean), _number(theirs[0]), _show(corrupted), _number(theirs[1])])
    return ["encoder", "clean", "published", "corrupted, mean", "published"], lines


def _comparison(plan: Plan, runs: Runs, oracle: bool) -> tuple[list[str], list[list[str]]]:
    rows = {label: _accuracies(folders) for label, folders in runs.items()}
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
        means = [_mean_of_corruptions(values) for values in measured]
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
        ours = [_plain(own[name].get(setting)) for name in stages]
        lines.append([setting, _plain(training), *ours[:2], _plain(alignment), ours[2]])
    names = ["source training, published", "supervised here", "self-supervised here", "alignment, published", "here"]
    return ["", *names], lines


def _table6(plan: Plan, runs: Runs) -> tuple[list[str], list[list[str]]]:
    lines = []
    for row in plan.rows:
        measured = [mean_geometry(read_geometry(folder)) for folder in runs[row.label]]
        for place in ("encoder", "projector"):
            label = f"{row.label} {place}"
            own = [[mean for mean in means if mean["place"] == place] for means in measured]
            first, last = ([dict(min(m, key=_steps)) for m in own], [dict(max(m, key=_steps)) for m in own])
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
            "these methods repeats the adaptation on batches drawn anew."
        )
        controls = [row.label for row in plan.rows if row.published is None]
        yield f"controls: {'; '.join(controls)}. EMABN has CTA's views and forwards and takes no gradient step"
        without = [row.label for row in plan.rows if row.published is not None and _published(plan, row) is None]
        if without and plan.data in _IN_ROWS:
            yield f"no published numbers: {', '.join(without)}"


def _differences(plan: Plan) -> Iterator[str]:
    """Say what is known of how these runs differ from the paper's: by their settings, and where it says nothing."""
    if plan.paper is not None:
        found = [
            f"{name} {own} here, {theirs} there{where}" for name, own, theirs, where in _compared(plan, plan.paper)
        ]
        yield f"differs from the recipe paper, the paper's settings as far as they are known, in {'; '.join(found)}"
    source, adapted = _config(plan, "source"), next((job.config for job in plan.jobs if job.verb == "adapt"), None)
    unstated = [
        f"crops of the supervised stage ({_value(source, 'model.crop')})",
        f"precision of training ({_value(source, 'trainer.precision')})",
    ]
    if adapted is not None:
        unstated.append(f"precision at test time ({_value(adapted, 'trainer.precision')})")
    steps = next((job.config for job in plan.jobs if "cta_adapt" in job.name), None)
    if steps is not None:
        optimizer = _value(steps, "adapter.optimizer") or "Adam"
        unstated += [
            f"optimizer at test time ({optimizer})",
            f"return to the source ({_value(steps, 'adapter.reset')})",
        ]
    yield f"not stated in the paper, chosen here: {', '.join(unstated)}"
    if _start(plan, "source") == "ImageNet":
        yield "weights from ImageNet are timm's; the paper does not say which it has, nor how its first layer was made"
    if plan.table in (2, 4, 5):
        if plan.budget == "matched":
            yield (
                "other methods are trained by the settings of the paper's Table 3 (budget matched); published rows, as "
                "far as is known, by their authors'"
            )
        for row in plan.rows:
            if row.label in _PROTOCOLS:
                config = _config(plan, row.jobs[0])
                words = re.split(r"[{}]", _PROTOCOLS[row.label])
                yield "".join(str(_value(config, word)) if place % 2 else word for place, word in enumerate(words))


def _compared(plan: Plan, paper: Plan) -> list[tuple[str, str, str, str]]:
    """Return name, value here, value there, and where, of all settings in which two plans of a table differ."""
    there = {job.name for job in paper.jobs}
    both = [job.name for job in plan.jobs if job.verb != "export" and job.name in there]
    found: dict[tuple[str, str, str], list[str]] = {}
    if plan.data != paper.data:
        found["data set", plan.data, paper.data] = both
    for job in both:
        own, theirs = _config(plan, job), _config(paper, job)
        for key in dict.fromkeys([*_settings(own), *_settings(theirs)]):
            values = _shown(key, _value(own, key), plan), _shown(key, _value(theirs, key), paper)
            if values[0] != values[1]:
                found.setdefault((_NAMES.get(key, key.partition(".")[2].replace("_", " ")), *values), []).append(job)
        starts = _start(plan, job), _start(paper, job)
        if starts[0] != starts[1]:
            found.setdefault(("start", str(starts[0]), str(starts[1])), []).append(job)
    seeds = {row.label: len(row.jobs) for row in paper.rows}
    for row in plan.rows:
        if len(row.jobs) != seeds.get(row.label, len(row.jobs)):
            found.setdefault(("runs", str(len(row.jobs)), str(seeds[row.label])), []).append(row.label)
    kinds = {"": both}
    for verb, where in (("fit", " in training"), ("adapt", " at test time")):
        kinds[where] = [job.name for job in plan.jobs if job.verb == verb and job.name in both]
    return [(*what, _where(jobs, kinds)) for what, jobs in found.items()]


def _where(jobs: list[str], kinds: dict[str, list[str]]) -> str:
    for where, all_of_them in kinds.items():
        if jobs == all_of_them:
            return where
    return f" ({', '.join(dict.fromkeys(re.sub(r'_[0-9]+$', '', job) for job in jobs))})"


def _config(plan: Plan, job: str) -> Config:
    return next(other.config for other in plan.jobs if other.name == job)


def _settings(config: Config) -> list[str]:
    """Return the names of what a configuration sets and numbers may depend on, such as ``model.lr``."""
    sections = {name: config[name].get("init_args", {}) for name in ("model", "data", "adapter") if name in config}
    sections["trainer"] = config["trainer"]
    if "adapter" in config:
        sections["data"] = {key: value for key, value in sections["data"].items() if key != "validation"}
    return [f"{name}.{key}" for name, own in sections.items() for key in own if key not in _LEFT_OUT]


def _value(config: Config, key: str) -> Any:
    """Return a setting, by the class's own default where the configuration leaves it out."""
    section, _, name = key.partition(".")
    if section == "trainer":
        return config["trainer"].get(name, "32-true" if name == "precision" else None)
    own = config.get(section, {})
    return own["init_args"][name] if name in own.get("init_args", {}) else _defaults(own.get("class_path")).get(name)


def _defaults(class_path: str | None) -> dict[str, Any]:
    """Return the defaults of all arguments of a task, data module or adapter, those of its bases included."""
    for module in (tasks, data_modules, adapters):
        if hasattr(module, str(class_path)):
            bases = [base for base in getattr(module, str(class_path)).__mro__ if "__init__" in vars(base)]
            found = [inspect.signature(base.__init__).parameters.values() for base in reversed(bases)]
            return {own.name: own.default for own in chain(*found) if own.default is not own.empty}
    return {}


def _shown(key: str, value: Any, plan: Plan) -> str:
    """Write a setting as a reader counts it."""
    if key == "data.validation":
        value = DATA[plan.data][0] - (value or 0)
    elif key == "data.limit":
        value = value or 10000
    elif key == "data.generate":
        value = "made from clean ones" if value else "published files"
    elif key == "data.domains":
        value = len(value)
    elif isinstance(value, dict):
        value = f"{value['class_path'].rpartition('.')[2]} {value.get('init_args', '')}"
    elif isinstance(value, (list, tuple)):
        value = " ".join(map(str, value))
    return _plain(value)


def _start(plan: Plan, name: str) -> str | None:
    """Say where a training stage starts from; None for what has no such choice."""
    job = next(other for other in plan.jobs if other.name == name)
    arguments = job.config["model"]["init_args"]
    if (
        job.verb != "fit"
        or "self_supervised" in arguments
        or "pretrained" not in _defaults(job.config["model"]["class_path"])
    ):
        return None
    if job.reads:
        return f"{_config(plan, 'source')['trainer']['max_epochs']} epochs of the supervised stage"
    pretrained = _value(job.config, "model.pretrained")
    return "ImageNet" if pretrained is True else str(pretrained or "random weights")


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


def _accuracies(folders: Sequence[Path]) -> list[dict[str, float]]:
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
    return max(choices, key=_mean_of_corruptions)


def _mean_of_corruptions(values: dict[str, float]) -> float:
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


def _plain(value: Any) -> str:
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
