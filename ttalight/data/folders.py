"""Entries of a folder of images. Hidden ones are left out, and links never lead in circles."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ttalight.errors import InputError

__all__ = ["find_files", "subfolders"]

#: What systems leave in folders without a dot in front, beside files whose endings tell them.
_HIDDEN = {"__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}


def subfolders(folder: Path) -> list[str]:
    """Return the names of the folders in a folder, sorted.

    Links to folders are among them. Hidden folders are left out, as are links to the folder itself or to one that
    contains it.

    Raises:
        OSError: If there is no such folder, or it cannot be read.
    """
    return sorted(_listed(str(folder))[0])


def find_files(folder: Path, names: Iterable[str], endings: tuple[str, ...]) -> dict[str, list[str]]:
    """Find the files of some classes, each the content of one subfolder at any depth.

    Hidden files are left out, and folders as by `subfolders`. A folder that several links of one class lead to counts
    once.

    Args:
        folder: Has the subfolders.
        names: Names of the subfolders; ``.`` is the folder itself.
        endings: Endings of the files that are wanted, in lower case.

    Returns:
        Name of the subfolder to the paths of its files within ``folder``, in the order of their folders and names.

    Raises:
        ValueError: If links make a folder part of two classes.
        OSError: If a folder cannot be read.
    """
    owners: dict[tuple[int, int], str] = {}
    found: dict[str, list[str]] = {}
    for name in names:
        found[name] = []
        for place, files in sorted(_walk(str(folder / name))):
            owner = owners.setdefault(_identity(place), name)
            if owner != name:
                raise InputError(
                    f"{place} is a folder of the class {owner}, and a link makes it one of the class {name}: remove "
                    "the link"
                )
            within = os.path.relpath(place, folder)
            found[name] += [os.path.join(within, file) for file in sorted(files) if file.lower().endswith(endings)]
    return found


def _walk(top: str) -> Iterator[tuple[str, list[str]]]:
    """Yield a folder and all below it, each once, with the names of the files in it."""
    left, seen = [top], set()
    while left:
        place = left.pop()
        identity = _identity(place)
        if identity not in seen:
            seen.add(identity)
            folders, files = _listed(place)
            left += [os.path.join(place, name) for name in sorted(folders, reverse=True)]
            yield place, files


def _listed(folder: str) -> tuple[list[str], list[str]]:
    """Return the names of the folders and of the files in a folder. A broken link is a file that cannot be read."""
    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name in _HIDDEN:
                continue
            if entry.is_symlink():
                if not os.path.isdir(entry.path):
                    files.append(entry.name)
                elif not _contains(entry.path, folder):
                    folders.append(entry.name)
            elif entry.is_dir(follow_symlinks=False):
                folders.append(entry.name)
            elif entry.is_file(follow_symlinks=False):  # no pipe, whose reader would wait
                files.append(entry.name)
    return folders, files


def _contains(link: str, folder: str) -> bool:
    """Return whether a link leads to a folder or to one above it."""
    target, inner = Path(os.path.realpath(link)), Path(os.path.realpath(folder))
    return target in (inner, *inner.parents)


def _identity(path: str) -> tuple[int, int]:
    status = os.stat(path)
    return status.st_dev, status.st_ino
