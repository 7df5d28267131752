"""Settings in which the runs of a plan differ from CTA's paper, read from their configurations."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from itertools import chain
from typing import Any

from ttalight import adapters, tasks
from ttalight import data as data_modules
from ttalight.reproduce.plan import Plan
from ttalight.reproduce.recipes import DATA, Config

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
    "TTT-MAE": "TTT-MAE has {model.encoder}, trained from random weights; its authors have ViT-L on ImageNet, and "
    "nothing for CIFAR is published",
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


def differences(plan: Plan) -> Iterator[str]:
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
    sections: dict[str, Config] = {
        name: config[name].get("init_args", {}) for name in ("model", "data", "adapter") if name in config
    }
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
    return plain(value)


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


def plain(value: Any) -> str:
    """Write a value as it stands in a table."""
    return "-" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
