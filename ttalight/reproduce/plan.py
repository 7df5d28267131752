"""The runs that the tables of CTA's paper need. Every job is one complete configuration."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ttalight import data as data_modules
from ttalight.errors import InputError
from ttalight.reproduce.configurations import Configurations
from ttalight.reproduce.recipes import (
    ADAPTING,
    DATA,
    IN_TABLE,
    METHODS,
    RECIPES,
    TRAINING,
    VARIANTS,
    Config,
)

#: Classes that can start from the checkpoint of a SupervisedTask; others take its encoder alone.
_SUPERVISED_START = ("TTTPlusPlus", "ReCTTT", "TTTFlow")
#: The supervised encoder's weights alone.
EXPORTED = "encoder.pt"
_COLLECTOR = "ttalight.analysis.FeatureCollector"


@dataclass(frozen=True)
class Job:
    """One run: ``fit`` or ``adapt`` with a configuration, or ``export`` of a supervised encoder's weights.

    ``reads`` names the jobs whose files it starts from; an adaptation's first one is its model.
    """

    name: str
    verb: str
    config: Config
    passes: float
    reads: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A row of a table: the adaptation runs that it averages, and what it is called in the published tables."""

    label: str
    jobs: tuple[str, ...]
    published: str | None = None
    temperature: float | None = None


@dataclass(frozen=True)
class Plan:
    """The jobs of a table, in an order in which they can run, and its rows.

    ``paper`` is the same table by the recipe paper, None where this is it.
    """

    table: int
    data: str
    budget: str
    jobs: tuple[Job, ...]
    rows: tuple[Row, ...]
    paper: Plan | None


class Planner:
    """Makes plans.

    Args:
        recipe: Name of a recipe.
        data: Name of the data set.
        root: Folder that all runs lie in.
        budget: Source training of other methods: ``matched`` or ``paper``.
        methods: Labels of the methods in Tables 2, 4 and 5; by default those of the paper's table.
        generate: Make corruptions from clean images.
        pretrained: File of the weights that stages begin with; by default timm downloads them.

    Raises:
        FileNotFoundError: If there are no configurations to begin with.
        ValueError: If a name is unknown, or data, recipe and budget do not belong together.
    """

    def __init__(
        self,
        recipe: str,
        data: str,
        root: str | Path,
        budget: str = "matched",
        methods: tuple[str, ...] | None = None,
        generate: bool = False,
        pretrained: str | None = None,
    ) -> None:
        for name, known in ((recipe, RECIPES), (data, DATA), (budget, ("matched", "paper"))):
            if name not in known:
                raise InputError(f"{name!r} is none of {', '.join(known)}")
        if (data == "digits") != (recipe == "demo"):
            raise InputError(f"the digits are the data of the recipe demo and of no other, got {data} with {recipe}")
        if budget == "paper" and recipe != "paper":
            raise InputError(
                f"the budget paper, schedules of the methods' authors, belongs to the recipe paper: {recipe} has a "
                "number of epochs of its own, leave --budget out"
            )
        unknown = [method for method in methods or () if method not in METHODS]
        if unknown:
            raise InputError(f"--methods: {', '.join(unknown)} unknown, there are {', '.join(METHODS)}")
        if "TTT-MAE" in (methods or ()) and DATA[data][2] != 32:
            raise InputError(f"--methods: the transformers of TTT-MAE are for images of 32 pixels, {data} has others")
        self.recipe, self.data, self.root, self.budget = RECIPES[recipe], data, Path(root), budget
        self.methods, self.generate = methods, generate
        self.configs = Configurations(self.recipe, data, budget, pretrained)
        self.jobs: dict[str, Job] = {}

    # -- tables

    def plan(self, table: int) -> Plan:
        """Return the plan of a table, 1 to 6."""
        self.jobs = {}
        if table == 1:
            rows = list(self._table1())
        elif table == 3:
            self._fit_cta()
            rows = []
        elif table == 6:
            rows = [self._ttt(method) for method in ("Y", "CTA")]
        else:
            rows = list(self._comparison(table))
        jobs, paper = tuple(self.jobs.values()), None
        if self.generate or self.recipe is not RECIPES["paper"]:
            data = "cifar10" if self.data == "digits" else self.data
            paper = Planner("paper", data, self.root, self.budget, self.methods).plan(table)
        return Plan(table, self.data, self.budget, jobs, tuple(rows), paper)

    def _table1(self) -> Iterator[Row]:
        yield Row("supervised", (self._control("Source", self.source()),), "supervised")
        for temperature in self.recipe.temperatures:
            job = self._control("Source", self.aligned(temperature), aligned=True)
            yield Row(f"aligned, τ {temperature:g}", (job,), None, temperature)

    def _comparison(self, table: int) -> Iterator[Row]:
        source, aligned = self.source(), self._fit_cta()
        yield Row("unadapted", (self._control("Source", source),), "ResNet50")
        for adapter in ("PTBN", "Tent"):
            yield Row(adapter, (self._control(adapter, source),))
        yield Row("aligned, unadapted", (self._control("Source", aligned, aligned=True),), "aligned model")
        yield Row("aligned, PTBN", (self._control("PTBN", aligned, aligned=True),))
        yield Row("aligned, EMABN", self._paired_control(aligned, self._seeds("CTA")))
        for method in self.methods or IN_TABLE[table]:
            yield self._ttt(method)
            if method in VARIANTS:
                yield Row(f"{method}, EMABN", self._paired_control(self._variant(method), self._seeds(method)))

    # -- training

    def source(self) -> str:
        """Plan the supervised stage and return its name."""
        return self._fit("source", self.configs.own("source"))

    def _simclr(self, changes: Config | None = None) -> str:
        config = self.configs.own("simclr")
        config["model"]["init_args"] |= changes or {}
        return self._fit("simclr" if not changes else "_".join(["simclr", *map(str, changes.values())]), config)

    def aligned(self, temperature: float = 0.5) -> str:
        """Plan an alignment, with the stages before it, and return its name."""
        return self._align("align" if temperature == 0.5 else f"align_{temperature:g}", temperature, {}, {})

    def _variant(self, method: str) -> str:
        return self._align(f"{METHODS[method]}_align", 0.5, *VARIANTS[method])

    def _align(self, name: str, temperature: float, start: Config, changes: Config) -> str:
        source, simclr = self.source(), self._simclr(start)
        config = self.configs.own("align")
        config["model"]["init_args"] |= {
            "supervised": self._weights(source), "self_supervised": self._weights(simclr), "temperature": temperature,
            **changes,
        }  # fmt: skip
        return self._fit(name, config, (source, simclr))

    def _fit_cta(self) -> str:
        return self.aligned(0.5)

    def _rival(self, method: str) -> str:
        """Plan the source training of another method and return its name."""
        config = self.configs.method(METHODS[method], fit=True)
        arguments = config["model"]["init_args"]
        reads: tuple[str, ...] = ()
        if method == "CTA-C":
            reads = (self._simclr(),)
            arguments["self_supervised"] = self._weights(reads[0])
        elif method == "TTT-MAE":
            reads = (self._fit("masked_ttt_source", self.configs.method("masked_ttt_source", fit=True)),)
            arguments["autoencoder"] = self._weights(reads[0])
        elif method in ("TTT++", "TTTFlow") and self.configs.has_own_budget(method):
            before = f"{METHODS[method]}_source"
            reads = (self._fit(f"{before}_paper", self.configs.method(before, fit=True)),)
            arguments["supervised"] = self._weights(reads[0])
        elif method == "TTTFlow" or self.recipe.shared_start:
            reads = self._share_start(config)
        return self._fit(self._rival_name(method), config, reads)

    def _rival_name(self, method: str) -> str:
        """Return the name of a method's runs; budgets have names of their own, since they share a folder."""
        return METHODS[method] + ("_paper" if self.configs.has_own_budget(method) else "")

    def _share_start(self, config: Config) -> tuple[str, ...]:
        """Let a method start from the supervised stage, which stands in for weights from ImageNet."""
        source, arguments = self.source(), config["model"]["init_args"]
        if config["model"]["class_path"] in _SUPERVISED_START:
            arguments |= {"pretrained": False, "supervised": self._weights(source)}
            return (source,)
        module = self._data_module(config["data"])
        arguments |= {"pretrained": self._weights(EXPORTED), "mean": list(module.mean), "std": list(module.std)}
        self._add(Job(EXPORTED, "export", {"weights": self._weights(source)}, 0.0, (source,)))
        return (EXPORTED,)

    def _fit(self, name: str, config: Config, reads: tuple[str, ...] = ()) -> str:
        trainer = config["trainer"]
        if self.recipe.epochs is not None:
            trainer["max_epochs"] = self.recipe.epochs
        images = self.recipe.training_images or self.configs.training_images
        task = config["model"]["class_path"]
        per_image = TRAINING[task] + self.recipe.beside.get(task, (0.0, 0.0))[0]
        if config["model"]["init_args"].get("freeze_teacher") is False:
            per_image += 3.0
        passes = per_image * images * trainer["max_epochs"]
        return self._add(Job(name, "fit", self._named(name, config), passes, reads))

    # -- adaptation

    def _ttt(self, method: str) -> Row:
        """Plan the test-time training of a method, with its source training; features are measured along the way."""
        aligned = method == "CTA" or method in VARIANTS
        weights = self._variant(method) if method in VARIANTS else self._fit_cta() if aligned else self._rival(method)
        jobs = []
        for seed in self._seeds(method):
            config = self.configs.own("cta") if aligned else self.configs.method(f"{METHODS[method]}_adapt", fit=False)
            arguments = config["adapter"]["init_args"]
            if method in ("CTA-C", "Y"):  # the same test time as CTA's
                config["adapter"] = self.configs.own("cta")["adapter"]
                arguments = config["adapter"]["init_args"]
            if aligned or method in ("CTA-C", "Y"):
                arguments["read_at"] = [step for step in (0, 1, 3, 5, 10, 15) if step < arguments["steps"]]
            if aligned or method == "Y":
                self._collect(config, aligned)
            arguments |= self.recipe.adapter
            place = "aligned" if aligned else "weights"
            config["model"]["init_args"][place] = self._weights(weights)
            config["data"]["init_args"]["domains"] = ["clean", *self.recipe.domains]
            reads = (weights, "source") if aligned else (weights,)
            jobs.append(self._adapt(f"{self._rival_name(method)}_adapt_{seed}", config, seed, reads))
        return Row(method, tuple(jobs), method)

    def _control(self, adapter: str, weights: str, aligned: bool = False, seed: int = 0) -> str:
        config = self.configs.own("ema_bn" if aligned else "unadapted")
        config["model"]["init_args"]["aligned" if aligned else "weights"] = self._weights(weights)
        arguments: Config = {}
        if adapter == "EMABN":
            steps = self.configs.own("cta")["adapter"]["init_args"]["steps"]
            arguments = {"steps": steps, "reset": "batch", "read_at": [s for s in (0, 1, 3, 5, 10, 15) if s < steps]}
            arguments |= self.recipe.adapter
        elif adapter == "Tent":
            arguments = {"lr": 1.0e-3}
        config["adapter"] = {"class_path": adapter, "init_args": arguments}
        config["data"]["init_args"]["domains"] = ["clean", *self.recipe.domains]
        return self._adapt(f"{weights}_{adapter.lower()}_{seed}", config, seed, (weights,))

    def _paired_control(self, aligned: str, seeds: range) -> tuple[str, ...]:
        return tuple(self._control("EMABN", aligned, aligned=True, seed=seed) for seed in seeds)

    def _collect(self, config: Config, aligned: bool) -> None:
        target = "impulse_noise" if "impulse_noise" in self.recipe.domains else self.recipe.domains[0]
        arguments: Config = {
            "images": self.recipe.measured, "source_images": self.recipe.source_images, "keep": ["clean", target],
        }  # fmt: skip
        if aligned:
            arguments["supervised"] = self._weights("source")
        self.configs.split(config["data"])  # distances are to what was trained on
        config["trainer"]["callbacks"] = [{"class_path": _COLLECTOR, "init_args": arguments}]

    def _adapt(self, name: str, config: Config, seed: int, reads: tuple[str, ...]) -> str:
        if self.recipe.limit is not None:
            config["data"]["init_args"]["limit"] = self.recipe.limit
        if self.generate:
            config["data"]["init_args"]["generate"] = True
        # Seeds draw other views; images and their order stay, so that repetitions and control are paired.
        config["seed_everything"] = seed
        model, adapter = config["model"]["class_path"], config["adapter"]
        arguments = adapter.get("init_args", {})
        per_image = 1.0
        if adapter["class_path"] in ("TestTimeTraining", "EMABN"):
            each = ADAPTING[model] + self.recipe.beside.get(model, (0.0, 0.0))[1]
            each /= 1 if adapter["class_path"] == "TestTimeTraining" else 3  # forwards alone
            per_image += arguments["steps"] * each + len(arguments.get("read_at", ()))
        elif adapter["class_path"] == "MaskedReconstruction":
            per_image += arguments["steps"] * arguments["masks"] * ADAPTING[model] + len(arguments["read_at"])
        elif adapter["class_path"] == "Tent":
            per_image = 3.0
        per_image += 2 if "callbacks" in config["trainer"] else 0
        images = (self.recipe.limit or 10000) * (len(self.recipe.domains) + 1)
        return self._add(Job(name, "adapt", self._named(name, config), per_image * images, reads))

    def _seeds(self, method: str) -> range:
        repeated = self.recipe.repeated is None or method in self.recipe.repeated
        return range(self.recipe.seeds if repeated else 1)

    def _named(self, name: str, config: Config) -> Config:
        named = {**config, "name": name, "trainer": {**config["trainer"], "default_root_dir": str(self.root / name)}}
        return copy.deepcopy(named)

    def _weights(self, job: str) -> str:
        return str(made_by(job, self.root))

    def _data_module(self, config: Config) -> Any:
        return getattr(data_modules, config["class_path"])(**config["init_args"])

    def _add(self, job: Job) -> str:
        self.jobs.setdefault(job.name, job)
        return job.name


def made_by(job: str, root: Path) -> Path:
    """Return the file that others read of a job."""
    return root / job if job == EXPORTED else root / job / "checkpoints" / "last.ckpt"
