"""Configurations of the runs, made of those in ``configs``.

CTA's own stages are from the folder of the data set, other methods from ``cifar10_matched`` or ``cifar10_paper``, with
network, data and trainer of the data set's folder put in, and what the authors of a method have otherwise on other data
than CIFAR-10 (``OTHER_DATA``).
"""

from __future__ import annotations

from pathlib import Path

import yaml

from ttalight.errors import MissingFileError
from ttalight.reproduce.recipes import DATA, METHODS, OTHER_DATA, Config, Recipe

PACKAGE = Path(__file__).resolve().parents[1]
#: Tasks that mask the patches of a transformer, whatever network the others have.
MASKED = ("MaskedAutoencoderTask", "MaskedTTT")


def configs_folder(package: Path = PACKAGE) -> Path:
    """Return the folder of the configurations: in an installed package inside it, in a clone beside it.

    Args:
        package: Folder of the package.

    Raises:
        FileNotFoundError: If it is in neither place.
    """
    places = [package / "configs", package.parent / "configs"]
    for place in places:
        if (place / "cifar10_matched").is_dir():
            return place
    raise MissingFileError(
        f"the configurations of the runs are missing: there is no folder configs in {package} or beside it; install "
        "ttalight again, or run the command in a clone"
    )


class Configurations:
    """Complete configurations of a data set's stages and of other methods, as a recipe wants them.

    Args:
        recipe: Scale of the runs.
        data: Name of the data set.
        budget: Source training of other methods: ``matched`` or ``paper``.
        pretrained: File of the weights that stages begin with; by default timm downloads them.

    Raises:
        FileNotFoundError: If there are no configurations to begin with.
    """

    def __init__(self, recipe: Recipe, data: str, budget: str, pretrained: str | None) -> None:
        self.recipe, self.data, self.budget, self.pretrained = recipe, data, budget, pretrained
        self.training_images, self.classes, self.side = DATA[data]
        self.folder = configs_folder()
        self._base = self.folder / (recipe.folder or data)

    def own(self, name: str) -> Config:
        """Return a configuration of the data set's own folder."""
        return self._in_place(_read(self._base / f"{name}.yaml"), fit=name in ("source", "simclr", "align"))

    def method(self, name: str, fit: bool) -> Config:
        """Return a configuration of another method, from the budget's folder if it is there."""
        folder = f"cifar10_{self.budget}"
        if not (self.folder / folder / f"{name}.yaml").is_file():
            folder = "cifar10_matched"
        config = self._in_place(_read(self.folder / folder / f"{name}.yaml"), fit)
        if fit and self.recipe.rival_epochs is not None:
            config["trainer"]["max_epochs"] = self.recipe.rival_epochs
        for section, arguments in OTHER_DATA.get(self.data, {}).get(f"{folder}/{name}", {}).items():
            config[section]["init_args"] |= arguments
        return config

    def has_own_budget(self, method: str) -> bool:
        """Return whether a method is trained as its authors do it."""
        return self.budget == "paper" and (self.folder / "cifar10_paper" / f"{METHODS[method]}.yaml").is_file()

    def split(self, data: Config) -> None:
        """Set how many images are trained on, as the recipe says."""
        if self.recipe.training_images is not None:
            data["init_args"]["validation"] = self.training_images - self.recipe.training_images

    def _in_place(self, config: Config, fit: bool) -> Config:
        """Put network, data and trainer of data set and recipe into a configuration."""
        file = "source.yaml" if fit else "unadapted.yaml"
        own = _read(self._base / file)
        arguments = config["model"]["init_args"]
        is_masked = config["model"]["class_path"] in MASKED
        for name in ("num_classes",) if is_masked else ("encoder", "num_classes", "stem"):
            if name in own["model"]["init_args"] and (name in arguments or name != "num_classes"):
                arguments[name] = own["model"]["init_args"][name]
        if "num_classes" in arguments:
            arguments["num_classes"] = self.classes
        arguments |= {name: value for name, value in self.recipe.model.items() if _knows(config, name, fit)}
        if is_masked:
            arguments["encoder"] = self.recipe.transformer
        if self.pretrained is not None and arguments.get("pretrained") is True:
            arguments["pretrained"] = self.pretrained
        if self.side != 32 and config["model"]["class_path"] == "NCTTT":
            arguments["image_size"] = self.side
        data = _read(self.folder / self.data / file)["data"]
        if self.data != "digits":
            data["init_args"]["batch_size"] = config["data"]["init_args"]["batch_size"]
        if fit:
            self.split(data)
        config["data"] = data
        data["init_args"] |= {} if fit else self.recipe.adapt_data
        config["trainer"] = {**config["trainer"], **self.recipe.trainer}
        if self.recipe.trainer.get("accelerator") == "cpu":
            config["trainer"].pop("devices", None)
        if not fit:
            config["trainer"].pop("limit_val_batches", None)
        return config


def _knows(config: Config, name: str, fit: bool) -> bool:
    """Return whether a recipe's argument is one of a configuration's task."""
    task = config["model"]["class_path"]
    if name == "decoder_blocks":
        return bool(task == "ReCTTT")
    if name in ("encoder", "channels_last") and task in MASKED:
        return False
    if name in ("lr", "warmup_epochs"):
        return fit and "optimizer" not in config["model"]["init_args"]
    return True


def _read(path: Path) -> Config:
    config: Config = yaml.safe_load(path.read_text(encoding="utf-8"))
    return config
