"""The file of a sweep, and the runs that its grid has."""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from ttalight.errors import InputError, MissingFileError
from ttalight.files.run_folder import RUN_FILES, find_files, is_run_name

__all__ = ["RUNS", "Run", "Sweep", "read_sweep"]

#: Folder of the folders of runs, as that of ``ttalight adapt``.
RUNS = "runs"

_KEYS = ("name", "config", "grid")
#: Options of ``adapt`` that the sweep sets for each run, without their dots.
_OWN = ("config", "name", "overwrite", "print_config", "resume", "trainer.default_root_dir")
#: Longest name of a run's folder; file systems allow 255 bytes.
_LONGEST = 200


@dataclass(frozen=True)
class Run:
    """A run of the grid.

    Attributes:
        name: The name of its folder within the sweep's.
        words: Its options of ``ttalight adapt``.
        candidate: The adapter and its arguments, as its name has them: equal in runs that differ in anything else.
    """

    name: str
    words: tuple[str, ...]
    candidate: str


@dataclass(frozen=True)
class Sweep:
    """The content of a sweep's file. All runs are below ``folder``."""

    file: Path
    text: str
    name: str
    configs: tuple[Path, ...]
    runs: tuple[Run, ...]

    @property
    def folder(self) -> Path:
        """The folder of all runs."""
        return Path(RUNS) / self.name


@dataclass(frozen=True)
class _Setting:
    """An argument with one value, and whether the name of a run shows it."""

    path: str
    value: Any
    shown: bool = True

    @property
    def parts(self) -> tuple[str, ...]:
        """The path as options are written: ``adapter.init_args.lr`` and ``adapter.lr`` are the same."""
        return tuple(part for part in self.path.split(".") if part != "init_args")

    @property
    def word(self) -> str:
        """The option of ``ttalight adapt``."""
        return f"--{self.path}={self.value if isinstance(self.value, str) else json.dumps(self.value)}"


def read_sweep(path: str | Path) -> Sweep:
    """Read the file of a sweep.

    Args:
        path: A file in YAML with ``config`` (a configuration of ``adapt``, or several), ``grid`` (paths of arguments
            with lists of values) and, if it is not to be that of the file, ``name``.

    Raises:
        FileNotFoundError: If the file or a configuration is missing.
        ValueError: If the file is no such mapping, or two runs of the grid would have the same name.
    """
    file = Path(path)
    if not file.is_file():
        raise MissingFileError(f"there is no file {file}: give the file of a sweep, with 'config' and 'grid'")
    text = file.read_text(encoding="utf-8", errors="replace")
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise InputError(f"{file} is not a file in YAML: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("grid"), dict):
        raise InputError(
            f"{file} is not the file of a sweep: expected 'config' (a configuration of adapt, or a list) and 'grid' "
            "(paths of arguments, each with a list of values)"
        )
    for key in content.keys() - set(_KEYS):
        raise InputError(f"{file} has an unknown key {key}{_nearest(key, _KEYS)}: expected {', '.join(_KEYS)}")
    name = str(content.get("name", file.stem))
    if not is_run_name(name):
        raise InputError(f"{file}: name {name!r:.60} is no name of a folder in runs: use letters, digits, '-' and '_'")
    configs = _configs(content.get("config"), file)
    sweep = Sweep(file, text, name, configs, tuple(_runs(content["grid"], configs, file)))
    if find_files(sweep.folder, RUN_FILES):
        raise InputError(f"{sweep.folder} is the folder of a run: give the sweep another name, by 'name' in {file}")
    return sweep


def _configs(given: Any, file: Path) -> tuple[Path, ...]:
    paths = given if isinstance(given, list) else [given]
    if not paths or not all(isinstance(path, str) for path in paths):
        raise InputError(f"{file}: config must be a configuration file of adapt, or a list of such, got {given!r:.60}")
    for path in paths:
        if not Path(path).is_file():
            raise MissingFileError(f"{file}: config names {path}, and there is no such file in {Path.cwd()}")
    return tuple(map(Path, paths))


def _runs(grid: dict[Any, Any], configs: Sequence[Path], file: Path) -> Iterable[Run]:
    axes = list(_axes(grid, file))
    combinations = [list(itertools.chain(*choice)) for choice in itertools.product(*axes)]
    if not any(setting.shown for axis in axes for choice in axis for setting in choice):
        raise InputError(f"{file}: grid needs at least one list of values, such as 'seed_everything: [0, 1]'")
    names = _short_names({setting.parts for axis in axes for choice in axis for setting in choice if setting.shown})
    runs: dict[str, Run] = {}
    for settings in combinations:
        counts = Counter(setting.parts for setting in settings)
        if twice := [parts for parts, count in counts.items() if count > 1]:
            raise InputError(f"{file}: grid gives {'.'.join(twice[0])} twice: give it in one place")
        # An option of a class comes after the class: a class that is named later begins with its own defaults.
        ordered = sorted(settings, key=lambda setting: len(setting.parts))
        words = (*(f"--config={path}" for path in configs), *(setting.word for setting in ordered))
        texts = [_text(setting, names) for setting in settings if setting.shown]
        candidate = [_text(setting, names) for setting in settings if setting.shown and setting.parts[0] == "adapter"]
        name = _fitting("-".join(texts))
        if name in runs:
            raise InputError(f"{file}: two runs of the grid would have the folder {name}: leave one of them out")
        runs[name] = Run(name, words, _fitting("-".join(candidate)))
    return runs.values()


def _axes(grid: dict[Any, Any], file: Path) -> Iterable[list[list[_Setting]]]:
    """Yield the choices of each key, the adapter first; a choice is one setting, or several of an adapter."""
    for key in sorted(grid, key=lambda key: key != "adapter"):
        values = grid[key]
        if not isinstance(key, str) or not all(key.split(".")):
            raise InputError(f"{file}: grid has the key {key!r:.60}, expected the path of an argument of adapt")
        if ".".join(_Setting(key, None).parts) in _OWN:
            raise InputError(f"{file}: grid cannot have {key}, which the sweep sets for each run")
        if values == []:
            raise InputError(f"{file}: the list of {key} is empty: give it a value, or leave it out")
        if key == "adapter":
            entries = values if isinstance(values, list) else [values]
            yield [choice for entry in entries for choice in _adapters(entry, file)]
        elif isinstance(values, list):
            yield [[_Setting(key, value)] for value in values]
        else:
            yield [[_Setting(key, values, shown=False)]]


def _adapters(entry: Any, file: Path) -> Iterable[list[_Setting]]:
    """Yield the settings of an entry of ``adapter``: a class, or a class with lists of arguments."""
    if isinstance(entry, str):
        entry = {"class_path": entry}
    if (
        not isinstance(entry, dict)
        or not isinstance(entry.get("class_path"), str)
        or entry.keys() - {"class_path", "init_args"}
        or not isinstance(entry.get("init_args", {}), dict)
    ):
        raise InputError(
            f"{file}: an entry of adapter must be a class, or a mapping of class_path and init_args, got {entry!r:.80}"
        )
    arguments = entry.get("init_args", {})
    lists = [value if isinstance(value, list) else [value] for value in arguments.values()]
    if [] in lists:
        raise InputError(f"{file}: adapter {entry['class_path']} has an argument with an empty list: give it a value")
    for values in itertools.product(*lists):
        own = [_Setting(f"adapter.init_args.{name}", value) for name, value in zip(arguments, values, strict=True)]
        yield [_Setting("adapter", entry["class_path"]), *own]


# -- names


def _short_names(paths: Iterable[tuple[str, ...]]) -> dict[tuple[str, ...], str]:
    """Return the last part of each path, or the whole where others end alike."""
    short = {parts: "seed" if parts == ("seed_everything",) else parts[-1] for parts in paths}
    counts = Counter(short.values())
    return {parts: name if counts[name] == 1 else ".".join(parts) for parts, name in short.items()}


def _text(setting: _Setting, names: dict[tuple[str, ...], str]) -> str:
    if setting.parts == ("adapter",):
        return str(setting.value).rpartition(".")[2]
    return re.sub(r"[^\w.,=+-]", "_", f"{names[setting.parts]}={_value_text(setting.value)}", flags=re.ASCII)


def _value_text(value: Any) -> str:
    if isinstance(value, dict):
        own = {**value}
        kind = [str(own.pop("class_path")).rpartition(".")[2]] if "class_path" in own else []
        own |= arguments if isinstance(arguments := own.pop("init_args", None), dict) else {}
        return ",".join([*kind, *(f"{name}={_value_text(part)}" for name, part in own.items())])
    if isinstance(value, list):
        return "+".join(map(_value_text, value))
    return value if isinstance(value, str) else json.dumps(value)


def _fitting(name: str) -> str:
    """Return a name that file systems take: a long one ends in a digest of what is cut off."""
    if len(name) <= _LONGEST:
        return name
    return f"{name[:_LONGEST]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def _nearest(key: Any, keys: Sequence[str]) -> str:
    near = difflib.get_close_matches(str(key), keys, n=1)
    return f" (nearest: {near[0]})" if near else ""
