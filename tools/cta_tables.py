"""Tables of CTA's paper as Markdown: measured beside published, and what differs between the two."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from cta_plan import DATA, Config, Plan, Row

from ttalight.analysis import mean_geometry, read_geometry
from ttalight.reporting import read_results
from ttalight.reporting.published import published_rows
from ttalight.reporting.summary import counted

PUBLISHED = yaml.safe_load(Path(__file__).with_name("cta_published.yaml").read_text(encoding="utf-8"))
#: Names of the data sets in published rows, and labels of CTA's own tables there.
_IN_ROWS = {"cifar10": "cifar10", "cifar100": "cifar100", "tiny_imagenet": "TinyImageNetDataModule"}
#: What the paper says of its runs.
_PAPER = {"network": "resnet50", "initial weights": "ImageNet", "epochs": 50, "batches of training": 256,
          "images of a corruption": 10000, "batches at test time": 128, "steps": 20,
          "learning rate at test time": 1e-6, "corrupted images": "published files",
          "initial weights of the self-supervised stage": "ImageNet"}  # fmt: skip


def render(plan: Plan, root: Path, oracle: bool = False) -> str:
    """Return a table as Markdown; runs that are not finished show as "-".

    Args:
        plan: The plan of the table.
        root: Folder of the runs.
        oracle: Add rows that choose the number of steps by test accuracy, as public code of some methods does.
    """
    header, lines = {
        1: lambda: _table1(plan, root),
        3: lambda: _table3(plan),
        6: lambda: _table6(plan, root),
    }.get(plan.table, lambda: _comparison(plan, root, oracle))()
    notes = [*_notes(plan, root), *(f"{line}" for line in _differences(plan))]
    parts = [f"# Table {plan.table}, {plan.data}", _markdown(header, lines), "\n".join(f"- {note}" for note in notes)]
    return "\n\n".join(parts) + "\n"


# -- tables


def _table1(plan: Plan, root: Path) -> tuple[list[str], list[list[str]]]:
    published = PUBLISHED["table1"].get(plan.data, {})
    lines = []
    for row in plan.rows:
        accuracies = _accuracies(row, root)
        clean = [values["clean"] for values in accuracies]
        corrupted = [_mean_of_corruptions(values) for values in accuracies]
        theirs = published.get(row.published or row.temperature, (None, None))
        lines.append([row.label, _show(clean), _number(theirs[0]), _show(corrupted), _number(theirs[1])])
    return ["encoder", "clean", "published", "corrupted, mean", "published"], lines


def _comparison(plan: Plan, root: Path, oracle: bool) -> tuple[list[str], list[list[str]]]:
    rows = {row.label: _accuracies(row, root) for row in plan.rows}
    if oracle:
        for row in plan.rows:
            best = [chosen for job in row.jobs if (chosen := _oracle(root / job)) is not None]
            if best:
                rows[f"{row.label} (oracle: best steps by test accuracy)"] = best
    names = list(dict.fromkeys(name for runs in rows.values() for values in runs for name in values if name != "clean"))
    theirs = {row.label: _published(plan, row) for row in plan.rows}
    header = ["", *names, "mean", "published mean", "difference"]
    lines = []
    for label, runs in rows.items():
        published = theirs.get(label)
        means = [_mean_of_corruptions(values) for values in runs]
        mean = None if published is None else published[1]
        difference = f"{100 * statistics.fmean(means) - mean:+.2f}" if means and mean is not None else "-"
        cells = [_show([values[name] for values in runs if name in values]) for name in names]
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


def _table6(plan: Plan, root: Path) -> tuple[list[str], list[list[str]]]:
    lines = []
    for row in plan.rows:
        runs = [mean_geometry(read_geometry(root / job)) for job in row.jobs if _is_complete(root / job)]
        for place in ("encoder", "projector"):
            label = f"{row.label} {place}"
            own = [[mean for mean in means if mean["place"] == place] for means in runs]
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


def _notes(plan: Plan, root: Path) -> Iterator[str]:
    if plan.table == 3:
        return
    missing = [job for row in plan.rows for job in row.jobs if not _is_complete(root / job)]
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
        yield "± is the sample standard deviation over seeds of the adaptation; source training is not repeated."
        yield (
            "rows without published numbers are controls: EMABN has CTA's views and forwards and takes no gradient step"
        )


def _differences(plan: Plan) -> list[str]:
    own = _facts(plan)
    training = DATA[plan.data][0]
    paper = {**_PAPER, "training images": training, "data set": plan.data.replace("digits", "cifar10")}
    found = [f"{name} {own[name]} here, {paper[name]} there" for name in own if own[name] != paper[name]]
    return [f"differs from the paper in {'; '.join(found)}"] if found else ["differs from the paper in nothing known"]


def _facts(plan: Plan) -> dict[str, Any]:
    """Return what the configurations say of what the paper states."""
    configs = {job.name: job.config for job in plan.jobs if job.verb != "export"}
    source, simclr = configs["source"], configs.get("simclr")
    adapted = next((config for name, config in configs.items() if name.startswith("cta_adapt")), None)
    any_adapted = next((config for config in configs.values() if "adapter" in config), None)
    facts: dict[str, Any] = {
        "data set": plan.data,
        "network": source["model"]["init_args"]["encoder"],
        "initial weights": _start(source),
        "epochs": source["trainer"]["max_epochs"],
        "batches of training": source["data"]["init_args"]["batch_size"],
        "training images": DATA[plan.data][0] - source["data"]["init_args"].get("validation", 0),
    }
    if simclr is not None:
        facts["initial weights of the self-supervised stage"] = _start(simclr)
    if any_adapted is not None:
        data = any_adapted["data"]["init_args"]
        facts["images of a corruption"] = data.get("limit", 10000)
        facts["corrupted images"] = "made from clean ones" if "generate" in data else "published files"
        facts["batches at test time"] = data["batch_size"]
    if adapted is not None:
        arguments = adapted["adapter"]["init_args"]
        facts |= {"steps": arguments["steps"], "learning rate at test time": arguments["lr"]}
    return facts


def _start(config: Config) -> str:
    pretrained = config["model"]["init_args"].get("pretrained", False)
    return "ImageNet" if pretrained is True else str(pretrained or "random")


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


def _is_complete(run: Path) -> bool:
    try:
        return read_results(run)["complete"]
    except (FileNotFoundError, ValueError):
        return False


def _accuracies(row: Row, root: Path) -> list[dict[str, float]]:
    """Return domain -> accuracy of each finished run of a row."""
    found = [read_results(root / job) for job in row.jobs if _is_complete(root / job)]
    return [{one["name"]: float(one["accuracy"] or 0.0) for one in counted(run["domains"])} for run in found]


def _oracle(run: Path) -> dict[str, float] | None:
    """Return the accuracies after the number of steps that has the best mean on the test labels, or None."""
    if not _is_complete(run):
        return None
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


def _markdown(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *lines))
