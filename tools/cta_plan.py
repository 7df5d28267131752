"""The runs that the tables of CTA's paper need. Every job is one complete configuration.

Base configurations are those in configs/: CTA's own stages from the folder of the data set, other methods from
cifar10_matched or cifar10_paper, with network, data and trainer of the data set's folder put in, and what the authors
of a method have otherwise on other data than CIFAR-10 (``OTHER_DATA``).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ttalight import data as data_modules
from ttalight.data.corruptions import COMMON

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
Config = dict[str, Any]

#: Data set of a table, by number; the others take any.
TABLE_DATA = {2: "cifar10", 4: "cifar100", 5: "tiny_imagenet", 6: "cifar10"}
#: Training images, classes, side in pixels.
DATA = {"cifar10": (50000, 10, 32), "cifar100": (50000, 100, 32), "tiny_imagenet": (100000, 200, 64),
        "digits": (1000, 10, 32)}  # fmt: skip
#: Passes of one training image, on networks that all else is small beside: a forward counts 1, forward and backward 3.
#: ReC-TTT's has two encoders, the frozen one on two images, and a decoder on four times the batch.
TRAINING = {"SupervisedTask": 3.0, "ContrastiveTask": 6.0, "AlignmentTask": 6.0, "JointTask": 9.0, "ProbeTask": 1.0,
            "TTTPlusPlus": 6.0, "RotationTTT": 15.0, "ClusT3": 3.0, "NCTTT": 3.0, "ReCTTT": 20.0}  # fmt: skip
#: Passes of one image in one step of adaptation. ReC-TTT's frozen decoder has no gradients of weights.
ADAPTING = {"CrossTaskTTT": 6.0, "ProbeTask": 6.0, "JointTask": 6.0, "TTTPlusPlus": 9.0, "RotationTTT": 12.0,
            "ClusT3": 3.0, "NCTTT": 3.0, "ReCTTT": 16.0}  # fmt: skip
#: What comes to both on a ResNet-20, as measured on a CPU: beside its thin maps ClusT3's assignments to clusters, 150
#: for each position, are the larger part, and NC-TTT's noise is not small.
BESIDE = {"ClusT3": (12.0, 10.0), "NCTTT": (1.0, 0.0)}
#: Label in tables -> files of the method in cifar10_matched and cifar10_paper.
METHODS = {"TTT": "rotation_ttt", "TTT++": "ttt_plus_plus", "ClusT3": "clust3", "NC-TTT": "nc_ttt",
           "ReC-TTT": "rec_ttt", "CTA-C": "probe", "CTA": "cta", "Y": "joint",
           "CTA-unfrozen": "cta_unfrozen", "CTA-twins": "cta_twins"}  # fmt: skip
#: Variants of CTA that its paper mentions without a table: what they change in self-supervised stage and alignment.
VARIANTS: dict[str, tuple[Config, Config]] = {
    "CTA-unfrozen": ({}, {"freeze_teacher": False}),
    "CTA-twins": ({"objective": "barlow_twins"}, {}),
}
#: Methods of the paper's tables.
IN_TABLE = {2: ("TTT++", "ClusT3", "NC-TTT", "ReC-TTT", "CTA-C", "CTA"), 4: ("ClusT3", "NC-TTT", "ReC-TTT", "CTA"),
            5: ("ClusT3", "NC-TTT", "ReC-TTT", "CTA")}  # fmt: skip
_WEAKER_STEPS: Config = {
    "model": {"encoder_weight": 5.0, "head_weight": 20.0},
    "adapter": {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1.0e-4, "momentum": 0.9}}},
}
#: Arguments that the authors of a method set otherwise on other data than CIFAR-10: data -> configuration -> section of
#: the configuration -> arguments. TTT++ on CIFAR-100 has a queue of 1792 beside the batch of 256, 2048 together.
OTHER_DATA: dict[str, dict[str, Config]] = {
    "cifar100": {
        "cifar10_matched/ttt_plus_plus_adapt": _WEAKER_STEPS,
        "cifar10_paper/ttt_plus_plus": {"model": {"calibration_images": 2048}},
        "cifar10_paper/ttt_plus_plus_adapt": {**_WEAKER_STEPS, "model": {**_WEAKER_STEPS["model"], "queue": 1792}},
    },
    "tiny_imagenet": {
        "cifar10_paper/clust3": {
            "model": {
                "scheduler": {
                    "class_path": "torch.optim.lr_scheduler.CosineAnnealingLR",
                    "init_args": {"T_max": 350},
                },
            },
        },
    },
}

#: Classes that can start from the checkpoint of a SupervisedTask; others take its encoder alone.
_SUPERVISED_START = ("TTTPlusPlus", "ReCTTT")
#: The supervised encoder's weights alone.
EXPORTED = "encoder.pt"
_COLLECTOR = "ttalight.analysis.FeatureCollector"


@dataclass(frozen=True)
class Recipe:
    """Scale of the runs.

    ``folder`` has network, trainer and stages, the folder named as the data set if None; ``model``, ``trainer``,
    ``adapt_data`` and ``adapter`` are put into every configuration that knows them.
    """

    temperatures: tuple[float, ...]
    folder: str | None = None
    epochs: int | None = None
    #: Epochs of the other methods' source training, if not those of their configurations.
    rival_epochs: int | None = None
    domains: tuple[str, ...] = COMMON
    limit: int | None = None
    model: Config = field(default_factory=dict)
    adapt_data: Config = field(default_factory=dict)
    trainer: Config = field(default_factory=dict)
    adapter: Config = field(default_factory=dict)
    #: Class -> passes that come to ``TRAINING`` and ``ADAPTING`` on the recipe's network.
    beside: dict[str, tuple[float, float]] = field(default_factory=dict)
    shared_start: bool = False
    #: Methods whose adaptation is repeated with other seeds; all if None.
    repeated: tuple[str, ...] | None = None
    seeds: int = 3
    training_images: int | None = None
    measured: int = 10000
    source_images: int = 10000
    about: str = ""


RECIPES = {
    "paper": Recipe((0.01, 0.025, 0.05, 0.1, 0.25, 0.5), about="the paper's: ResNet-50, schedules of Table 3"),
    "small": Recipe(
        (0.05, 0.25, 0.5),
        folder="cifar10_small",
        epochs=12,
        limit=500,
        model={"encoder": "cifar_resnet20", "lr": 1.0e-3, "channels_last": True, "decoder_blocks": [1, 1, 1]},
        adapt_data={"generate": True},
        trainer={"accelerator": "cpu", "precision": "bf16-mixed", "limit_val_batches": 0},
        beside=BESIDE,
        shared_start=True,
        repeated=("CTA", "CTA-C", "Y"),
        training_images=25000,
        measured=500,
        source_images=5000,
        about="ResNet-20, 25,000 training images, 12 epochs a stage, 500 images of each corruption",
    ),
    "lite0": Recipe(
        (0.5,),
        folder="cifar10_lite0",
        rival_epochs=20,
        limit=2000,
        model={"encoder": "tf_efficientnet_lite0", "channels_last": True, "warmup_epochs": 1},
        adapt_data={"generate": True},
        trainer={"accelerator": "cpu", "precision": "32-true"},
        repeated=("CTA", "CTA-C", "Y"),
        training_images=45000,
        measured=2000,
        source_images=5000,
        about="EfficientNet-Lite0 from ImageNet weights, 45,000 training images, 2,000 images of each corruption",
    ),
    "demo": Recipe(
        (0.25, 0.5),
        folder="digits",
        epochs=2,
        domains=("contrast", "pixelate"),
        limit=60,
        model={"encoder": "cifar_resnet8", "lr": 2.0e-3, "decoder_blocks": [1, 1, 1], "flip": 0.0, "image_size": 32,
               "warmup_epochs": 0},
        trainer={"accelerator": "cpu", "precision": "32-true", "limit_val_batches": 0, "log_every_n_steps": 10},
        adapter={"steps": 2, "read_at": [0, 1]},
        beside=BESIDE,
        shared_start=True,
        repeated=("CTA",),
        seeds=2,
        measured=60,
        source_images=200,
        about="the embedded digits, to see that everything works",
    ),
}  # fmt: skip


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
                raise ValueError(f"{name!r} is none of {', '.join(known)}")
        if (data == "digits") != (recipe == "demo"):
            raise ValueError(f"the digits are the data of the recipe demo and of no other, got {data} with {recipe}")
        if budget == "paper" and recipe != "paper":
            raise ValueError(
                f"the budget paper, schedules of the methods' authors, belongs to the recipe paper: {recipe} has a "
                "number of epochs of its own, leave --budget out"
            )
        unknown = [method for method in methods or () if method not in METHODS]
        if unknown:
            raise ValueError(f"--methods: {', '.join(unknown)} unknown, there are {', '.join(METHODS)}")
        self.recipe, self.data, self.root, self.budget = RECIPES[recipe], data, Path(root), budget
        self.methods, self.generate, self.pretrained = methods, generate, pretrained
        self.training_images, self.classes, self.side = DATA[data]
        self.jobs: dict[str, Job] = {}
        self._base = CONFIGS / (self.recipe.folder or data)

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
        return self._fit("source", self._own("source"))

    def _simclr(self, changes: Config | None = None) -> str:
        config = self._own("simclr")
        config["model"]["init_args"] |= changes or {}
        return self._fit("simclr" if not changes else "_".join(["simclr", *map(str, changes.values())]), config)

    def aligned(self, temperature: float = 0.5) -> str:
        """Plan an alignment, with the stages before it, and return its name."""
        return self._align("align" if temperature == 0.5 else f"align_{temperature:g}", temperature, {}, {})

    def _variant(self, method: str) -> str:
        return self._align(f"{METHODS[method]}_align", 0.5, *VARIANTS[method])

    def _align(self, name: str, temperature: float, start: Config, changes: Config) -> str:
        source, simclr = self.source(), self._simclr(start)
        config = self._own("align")
        config["model"]["init_args"] |= {
            "supervised": self._weights(source), "self_supervised": self._weights(simclr), "temperature": temperature,
            **changes,
        }  # fmt: skip
        return self._fit(name, config, (source, simclr))

    def _fit_cta(self) -> str:
        return self.aligned(0.5)

    def _rival(self, method: str) -> str:
        """Plan the source training of another method and return its name."""
        config = self._method(METHODS[method], fit=True)
        arguments, reads = config["model"]["init_args"], ()
        if method == "CTA-C":
            reads = (self._simclr(),)
            arguments["self_supervised"] = self._weights(reads[0])
        elif method == "TTT++" and self._has_own_budget(method):
            before = self._method("ttt_plus_plus_source", fit=True)
            reads = (self._fit("ttt_plus_plus_source_paper", before),)
            arguments["supervised"] = self._weights(reads[0])
        elif self.recipe.shared_start:
            reads = self._share_start(config)
        return self._fit(self._rival_name(method), config, reads)

    def _rival_name(self, method: str) -> str:
        """Return the name of a method's runs; budgets have names of their own, since they share a folder."""
        return METHODS[method] + ("_paper" if self._has_own_budget(method) else "")

    def _has_own_budget(self, method: str) -> bool:
        return self.budget == "paper" and (CONFIGS / "cifar10_paper" / f"{METHODS[method]}.yaml").is_file()

    def _method(self, name: str, fit: bool) -> Config:
        """Return a configuration of another method, from the budget's folder if it is there."""
        folder = f"cifar10_{self.budget}"
        if not (CONFIGS / folder / f"{name}.yaml").is_file():
            folder = "cifar10_matched"
        config = self._in_place(_read(CONFIGS / folder / f"{name}.yaml"), fit)
        if fit and self.recipe.rival_epochs is not None:
            config["trainer"]["max_epochs"] = self.recipe.rival_epochs
        for section, arguments in OTHER_DATA.get(self.data, {}).get(f"{folder}/{name}", {}).items():
            config[section]["init_args"] |= arguments
        return config

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
        images = self.recipe.training_images or self.training_images
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
            config = self._own("cta") if aligned else self._method(f"{METHODS[method]}_adapt", fit=False)
            arguments = config["adapter"]["init_args"]
            if method in ("CTA-C", "Y"):  # the same test time as CTA's
                config["adapter"] = self._own("cta")["adapter"]
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
        config = self._own("ema_bn" if aligned else "unadapted")
        config["model"]["init_args"]["aligned" if aligned else "weights"] = self._weights(weights)
        arguments: Config = {}
        if adapter == "EMABN":
            steps = self._own("cta")["adapter"]["init_args"]["steps"]
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
        self._split(config["data"])  # distances are to what was trained on
        config["trainer"]["callbacks"] = [{"class_path": _COLLECTOR, "init_args": arguments}]

    def _split(self, data: Config) -> None:
        """Train on as many images as the recipe has."""
        if self.recipe.training_images is not None:
            data["init_args"]["validation"] = self.training_images - self.recipe.training_images

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
        elif adapter["class_path"] == "Tent":
            per_image = 3.0
        per_image += 2 if "callbacks" in config["trainer"] else 0
        images = (self.recipe.limit or 10000) * (len(self.recipe.domains) + 1)
        return self._add(Job(name, "adapt", self._named(name, config), per_image * images, reads))

    def _seeds(self, method: str) -> range:
        repeated = self.recipe.repeated is None or method in self.recipe.repeated
        return range(self.recipe.seeds if repeated else 1)

    # -- configurations

    def _own(self, name: str) -> Config:
        """Return a configuration of the data set's own folder."""
        return self._in_place(_read(self._base / f"{name}.yaml"), fit=name in ("source", "simclr", "align"))

    def _in_place(self, config: Config, fit: bool) -> Config:
        """Put network, data and trainer of data set and recipe into a configuration."""
        file = "source.yaml" if fit else "unadapted.yaml"
        own = _read(self._base / file)
        arguments = config["model"]["init_args"]
        for name in ("encoder", "num_classes", "stem"):
            if name in own["model"]["init_args"] and (name in arguments or name != "num_classes"):
                arguments[name] = own["model"]["init_args"][name]
        if "num_classes" in arguments:
            arguments["num_classes"] = self.classes
        arguments |= {name: value for name, value in self.recipe.model.items() if _knows(config, name, fit)}
        if self.pretrained is not None and arguments.get("pretrained") is True:
            arguments["pretrained"] = self.pretrained
        if self.side != 32 and config["model"]["class_path"] == "NCTTT":
            arguments["image_size"] = self.side
        data = _read(CONFIGS / self.data / file)["data"]
        if self.data != "digits":
            data["init_args"]["batch_size"] = config["data"]["init_args"]["batch_size"]
        if fit:
            self._split(data)
        config["data"] = data
        data["init_args"] |= {} if fit else self.recipe.adapt_data
        config["trainer"] = {**config["trainer"], **self.recipe.trainer}
        if self.recipe.trainer.get("accelerator") == "cpu":
            config["trainer"].pop("devices", None)
        if not fit:
            config["trainer"].pop("limit_val_batches", None)
        return config

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


def _knows(config: Config, name: str, fit: bool) -> bool:
    """Return whether a recipe's argument is one of a configuration's task."""
    task = config["model"]["class_path"]
    if name == "decoder_blocks":
        return task == "ReCTTT"
    if name in ("lr", "warmup_epochs"):
        return fit and "optimizer" not in config["model"]["init_args"]
    return True


def _read(path: Path) -> Config:
    config: Config = yaml.safe_load(path.read_text(encoding="utf-8"))
    return config
