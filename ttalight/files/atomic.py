"""Atomic writing: a crash leaves either the old or the new file, never half of one."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO

__all__ = ["open_replacing", "write_files"]


@contextlib.contextmanager
def open_replacing(path: Path, temporary: Path | None = None) -> Iterator[BinaryIO]:
    """Open a file for writing that gets its name only once it is complete and on the disk.

    Args:
        path: The file. Its folder exists.
        temporary: Name of the file until then, ``<name>.part`` beside it by default. It stays where writing fails.
    """
    part = path.with_name(f"{path.name}.part") if temporary is None else temporary
    with part.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


def write_files(folder: str | Path, contents: Mapping[str, str | bytes], keep: Mapping[str, str] | None = None) -> None:
    """Write files into a folder, which is made if need be.

    All contents are on the disk under temporary names before the first file is replaced, in the order given.

    Args:
        folder: Where to write.
        contents: File name -> contents; text is written as UTF-8 with line ends as given.
        keep: File name -> the name under which what was there before stays.

    Raises:
        OSError: If the disk is full or the folder not writable; names the path. Files not yet replaced are untouched.
    """
    folder = Path(folder)
    targets = {folder / name: folder / f".{name}.{os.getpid()}.tmp" for name in contents}
    path = folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in contents.items():
            path = folder / name
            with open(targets[path], "wb") as file:
                file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in targets.items():
            if keep is not None and path.name in keep and path.exists():
                os.replace(path, folder / keep[path.name])
            os.replace(temporary, path)
    except OSError as error:
        reason = f"{error.strerror or error}: could not write, what was there before is kept"
        raise OSError(error.errno, reason, str(path)) from error
    finally:
        for temporary in targets.values():
            with contextlib.suppress(OSError):  # replaced, or never made
                temporary.unlink()
