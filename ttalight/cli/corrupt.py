"""Writes a corrupted copy of a labelled image set: ``ttalight corrupt``."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from jsonargparse import ArgumentParser
from torch import Tensor
from tqdm import tqdm  # type: ignore[import-untyped]

from ttalight.cli.error_messages import one_line, without_parser
from ttalight.data.arrays import ImageArrays
from ttalight.data.corruptions import COMMON, EXTRA, corrupt_chunk, frost_source, parameters
from ttalight.data.layout import LABELS, SETTINGS, read_settings, write_npy, write_settings
from ttalight.data.module import ImageDataModule
from ttalight.errors import ExistingFileError, InputError, TTALightError
from ttalight.version import __version__

__all__ = ["main", "write_corrupted"]

_SEVERITIES = (1, 2, 3, 4, 5)
_ALL = "all"


def write_corrupted(
    data: ImageDataModule,
    output: str,
    corruptions: Sequence[str] = COMMON,
    severities: Sequence[int] = _SEVERITIES,
    split: Literal["train", "validation", "test"] = "test",
    seed: int = 0,
    table: Literal["cifar", "tiny_imagenet", "imagenet"] | None = None,
    frost_dir: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a corrupted copy of a labelled image set in the layout of the public benchmarks.

    ``<corruption>.npy`` has the images of all severities, uint8 (S * N, H, W, 3), block after block; ``labels.npy`` the
    label of each; ``corruptions.json`` says how they were made. The bytes are a function of the arguments and the
    version of this package. After an interruption the same call continues with the corruption that was not finished.

    Args:
        data: The image set; of its own settings, ``limit`` counts here.
        output: Folder to write to.
        corruptions: Names of corruptions; by default the common fifteen, ``all`` adds the four extra ones.
        severities: Severities in the order of the blocks. The public sets have all five.
        split: Split to corrupt.
        seed: Seed of the random draws.
        table: Whose strengths to use; by default the table that fits the size of the images.
        frost_dir: Folder with the original pictures of frost; procedural textures by default.
        overwrite: Replace what is in the folder.

    Returns:
        The folder.

    Raises:
        ValueError: If an argument is out of range.
        FileExistsError: If the folder has files that were made otherwise, or is complete already.
        FileNotFoundError: If data are missing.
        OSError: If a file cannot be written.
    """
    names = [*COMMON, *EXTRA] if list(corruptions) == [_ALL] else list(dict.fromkeys(corruptions))
    table = table or data.corruption_table  # type: ignore[assignment]
    assert table is not None
    _check(names, severities, table)
    data.prepare_data()
    clean = data.load(split)
    count = len(clean) if data.limit is None else min(data.limit, len(clean))
    kept = ImageArrays(clean.images[:count], clean.labels[:count])
    images = clean.images[: data.clean_needed(len(clean))]
    draws: dict[str, Any] = {"seed": seed, "table": table, "frost_dir": frost_dir}
    for name in names:  # what cannot work should fail before anything is written
        for severity in severities:
            corrupt_chunk(images[:1], name, severity, chunk=0, **draws)
    folder = Path(output)
    _claim(folder, _settings(data, kept, split, severities, draws), names, overwrite)
    parts = {name: _corrupt(images, name, severities, count, data.corruption_chunk, draws) for name in names}
    _write_missing(folder, kept, len(severities), parts)
    return folder


def _settings(
    data: ImageDataModule, clean: ImageArrays, split: str, severities: Sequence[int], draws: dict[str, Any]
) -> dict[str, Any]:
    """Return all that the bytes of the files depend on."""
    return {
        "ttalight": __version__,
        "source": _source(data, clean),
        "split": split,
        "samples": len(clean),
        "seed": draws["seed"],
        "table": draws["table"],
        "severities": list(severities),
        "images_per_chunk": data.corruption_chunk,
        "frost": draws["frost_dir"] if draws["frost_dir"] is not None else frost_source(None),
    }


def _write_missing(
    folder: Path, clean: ImageArrays, severities: int, corrupted: dict[str, Iterator[npt.NDArray[np.uint8]]]
) -> None:
    """Write the labels, and the images of each corruption that has no file yet."""
    images, labels = severities * len(clean), clean.labels.numpy()
    write_npy(folder / LABELS, (images,), np.int64, (labels for _ in range(severities)))
    shape = (images, *clean.images.shape[2:], 3)
    with tqdm(total=len(corrupted) * images, unit="image", mininterval=0.2 if sys.stderr.isatty() else 10) as bar:
        for name, parts in corrupted.items():
            bar.set_description(name, refresh=False)
            if (folder / f"{name}.npy").is_file():
                bar.update(images)
            else:
                _write(folder / f"{name}.npy", shape, _counted(parts, bar))


def _write(file: Path, shape: tuple[int, ...], parts: Iterator[npt.NDArray[np.uint8]]) -> None:
    try:
        write_npy(file, shape, np.uint8, parts)
    except OSError as error:
        raise OSError(
            f"cannot write {file.name} ({error}): the files before it are complete, and the same command continues "
            "with this one"
        ) from error


def _corrupt(
    images: Tensor, name: str, severities: Sequence[int], count: int, chunk_size: int, draws: dict[str, Any]
) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield the first ``count`` corrupted images of each severity, (n, H, W, 3) at a time."""
    for severity in severities:
        for chunk, start in enumerate(range(0, count, chunk_size)):
            part = corrupt_chunk(images[start : start + chunk_size], name, severity, chunk=chunk, **draws)
            yield part[: count - start].permute(0, 2, 3, 1).numpy()


def _counted(parts: Iterator[npt.NDArray[np.uint8]], bar: Any) -> Iterator[npt.NDArray[np.uint8]]:
    for part in parts:
        yield part
        bar.update(len(part))


def _check(names: Sequence[str], severities: Sequence[int], table: str) -> None:
    if not names or not severities:
        raise InputError("name at least one corruption and one severity")
    if len(set(severities)) < len(severities):
        raise InputError(f"severities must differ, got {' '.join(map(str, severities))}")
    for name in names:
        for severity in severities:
            parameters(table, name, severity)


def _source(data: ImageDataModule, clean: ImageArrays) -> dict[str, Any]:
    digest = hashlib.sha256(clean.labels.numpy().astype("<i8").tobytes())
    for start in range(0, len(clean), 1000):
        digest.update(clean.images[start : start + 1000].numpy().tobytes())
    return {"data": type(data).__name__, "shape": list(clean.images.shape), "sha256": digest.hexdigest()}


def _claim(folder: Path, settings: dict[str, Any], names: Sequence[str], overwrite: bool) -> None:
    """Make sure that everything in the folder belongs to these settings, and note what is going to be there."""
    known = [folder / f"{name}.npy" for name in (*COMMON, *EXTRA)]
    present = [path for path in (*known, folder / LABELS, folder / SETTINGS) if path.is_file()]
    if overwrite:
        for path in (*known, folder / LABELS, folder / SETTINGS):
            path.unlink(missing_ok=True)
            path.with_name(f"{path.name}.part").unlink(missing_ok=True)
        present = []
    found = read_settings(folder) if present else None
    if present and found is None:
        raise ExistingFileError(
            f"{folder} has {present[0].name} but no {SETTINGS}, so it was not made by this command: give another "
            "--output, or replace it with --overwrite"
        )
    before: list[str] = (found or {}).pop("corruptions", [])
    if found is not None and found != settings:
        differences = "; ".join(
            f"{key} is {found.get(key)!r} there and {settings.get(key)!r} here"
            for key in {**settings, **found}
            if found.get(key) != settings.get(key)
        )
        raise ExistingFileError(
            f"{folder} was made with other settings ({differences}): give another --output, or replace it with "
            "--overwrite"
        )
    if all((folder / f"{name}.npy").is_file() for name in names):
        raise ExistingFileError(f"{folder} is complete: give another --output, or replace it with --overwrite")
    folder.mkdir(parents=True, exist_ok=True)
    write_settings(folder, settings | {"corruptions": list(dict.fromkeys([*before, *names]))})


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: The words after ``ttalight corrupt``; those of the process by default.

    Raises:
        ArgumentError: If the words are wrong.
        SystemExit: With code 2 and one line on stderr if anything else is wrong, 130 if it was interrupted.
    """
    about = "Write a corrupted copy of a labelled image set in the layout of the public benchmarks."
    parser = ArgumentParser(prog="ttalight corrupt", description=about, exit_on_error=False, allow_abbrev=False)
    parser.add_function_arguments(write_corrupted, skip={"corruptions", "severities", "overwrite"}, as_group=False)
    parser.add_argument(
        "--corruptions", nargs="+", type=str, default=list(COMMON), metavar="NAME",
        help=f"Names of corruptions: the common fifteen if not given; '{_ALL}' adds the four extra ones.",
    )  # fmt: skip
    parser.add_argument(
        "--severities", nargs="+", type=int, default=list(_SEVERITIES), metavar="S",
        help="Severities, in the order in which their images are written.",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="Replace what is in the folder.")
    options = parser.parse_args(None if args is None else list(args))
    try:
        # Renamed in jsonargparse 4.49; the old name goes away in 5.0.
        instantiate = parser.instantiate if hasattr(parser, "instantiate") else parser.instantiate_classes
        options = instantiate(options)
        folder = write_corrupted(**options.as_dict())
        sys.stdout.write(f"Corrupted images: {folder}\n")
    except KeyboardInterrupt:
        sys.stderr.write("ttalight corrupt: interrupted; the same command continues from here\n")
        raise SystemExit(130) from None
    except Exception as error:
        cause = without_parser(error)
        if not isinstance(cause, (OSError, TTALightError)):
            raise
        sys.stderr.write(f"ttalight corrupt: error: {one_line(str(cause))}\n")
        raise SystemExit(2) from None
