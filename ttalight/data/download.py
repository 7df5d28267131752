"""Folders of data, and downloads of published archives: checksums, resumed downloads, safe unpacking."""

from __future__ import annotations

import hashlib
import http.client
import os
import tarfile
from collections.abc import Collection
from pathlib import Path, PurePosixPath
from shutil import copyfileobj
from typing import IO
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from tqdm import tqdm  # type: ignore[import-untyped]

from ttalight.errors import DownloadError, InputError
from ttalight.files.atomic import open_replacing

__all__ = ["DATA_VARIABLE", "data_root", "fetch", "file_md5", "unpack"]

#: Environment variable that names the folder with data sets.
DATA_VARIABLE = "TTALIGHT_DATA"

_BLOCK = 1 << 20
_LARGEST = 1 << 28  # bytes in a member of an archive; the largest that is expected has 155 million
_TIMEOUT = 60.0


def data_root(root: str | None) -> Path:
    """Return the folder with data sets: the argument, else what TTALIGHT_DATA names, else ``data``."""
    return Path(root or os.environ.get(DATA_VARIABLE) or "data").expanduser()


def file_md5(path: Path) -> str:
    """Return the MD5 of a file as 32 hexadecimal digits."""
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def fetch(url: str, path: Path, md5: str) -> None:
    """Download a file unless it is there already; a download that broke off continues where it stopped.

    Args:
        url: Where the file is published.
        path: Where it goes; what has arrived is in ``<name>.part`` beside it until it is complete and verified.
        md5: Its published checksum.

    Raises:
        ConnectionError: If the server cannot be reached or the download breaks off.
        ValueError: If the checksum differs.
    """
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        _receive(url, part, path)
        _verify(part, md5, f"removed what came from {url}; try again", remove=True)
        os.replace(part, path)
    else:
        _verify(path, md5, "remove it to have it downloaded again", remove=False)


def _verify(path: Path, md5: str, advice: str, remove: bool) -> None:
    found = file_md5(path)
    if found == md5:
        return
    if remove:
        path.unlink()
    raise InputError(f"{path} is not the published file: its md5 is {found}, expected {md5}; {advice}")


def _receive(url: str, part: Path, path: Path) -> None:
    present = part.stat().st_size if part.is_file() else 0
    headers = {"User-Agent": "ttalight", **({"Range": f"bytes={present}-"} if present else {})}
    try:
        with urlopen(Request(url, headers=headers), timeout=_TIMEOUT) as response:
            if response.status != 206:  # the server sends the whole file
                present = 0
            expected = int(response.headers.get("Content-Length", 0)) + present
            with part.open("ab" if present else "wb") as file:
                _copy(response, file, present, expected, path.name)
    except (OSError, http.client.HTTPException) as error:
        if isinstance(error, HTTPError) and error.code == 416 and present:  # nothing is left to send
            return
        arrived = part.stat().st_size if part.is_file() else 0
        raise DownloadError(
            f"the download of {url} stopped after {arrived:,} bytes ({error}): run the same again to continue, "
            f"or get the file by other means and put it at {path}"
        ) from error


def _copy(response: IO[bytes], file: IO[bytes], present: int, expected: int, name: str) -> None:
    with tqdm(initial=present, total=expected or None, unit="B", unit_scale=True, desc=name) as bar:
        while block := response.read(_BLOCK):
            file.write(block)
            bar.update(len(block))
    file.flush()
    if expected and os.fstat(file.fileno()).st_size < expected:
        raise DownloadError(f"{expected:,} were announced")


def unpack(archive: Path, folder: Path, wanted: Collection[str]) -> None:
    """Unpack the wanted members of a tar archive and nothing else.

    Args:
        archive: The archive, compressed or not, already verified.
        folder: Where the members go; names within the archive are kept.
        wanted: Names of the members.

    Raises:
        ValueError: If the archive lacks one of them, or has a member that is not as it should be: a path that leads
            out of the folder, a link or a special file, or one that is too large.
    """
    left = set(wanted)
    with tarfile.open(archive) as tar:
        for member in tar:
            name = PurePosixPath(member.name)
            if name.is_absolute() or ".." in name.parts:
                raise InputError(f"{archive} is not to be trusted: its member {member.name!r} leads out of the folder")
            if str(name) not in left:
                continue
            if not member.isfile() or member.size > _LARGEST:
                raise InputError(
                    f"{archive} is not to be trusted: its member {member.name!r} should be a plain file of at most "
                    f"{_LARGEST:,} bytes"
                )
            source = tar.extractfile(member)
            assert source is not None
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with source, open_replacing(target) as file:
                copyfileobj(source, file, _BLOCK)
            left.remove(str(name))
    if left:
        raise InputError(f"{archive} lacks {', '.join(sorted(left))}: is it the published archive?")
