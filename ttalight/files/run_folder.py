"""The folder of a run: what a run writes there, and a lock that lets only one run use it at a time."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from ttalight.errors import InputError

try:
    import fcntl
except ImportError:  # pragma: no cover  (Windows)
    fcntl = None  # type: ignore[assignment]

__all__ = ["RUN_FILES", "SIDE_FILES", "UNFINISHED", "find_files", "hold_folder", "is_run_name", "remove"]

#: What tells that a folder has a run. Results that say they are complete go first, and what a run is resumed by last.
RUN_FILES = (
    "results.json", "domains.csv", "predictions.npz", "stream.npz", "ranks", "adaptation", "checkpoints", "config.yaml",
)  # fmt: skip
#: Patterns of what a run leaves beside them.
SIDE_FILES = ("events.out.tfevents.*", ".predictions.npz.*.parts", "hparams.yaml")
#: Patterns of files that were being written when a process was killed.
UNFINISHED = (".*.tmp", "checkpoints/.*.tmp", "adaptation/.*.tmp")

#: The file that is locked, and the one that names the process where the file system has no locks.
_LOCK, _OWNER = ".lock", ".lock-owner"
#: So often a lock is tried, a tenth of a second apart.
_ATTEMPTS = 5
#: Variables that all processes of one launch share.
_LAUNCH = ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_STEP_ID", "MASTER_ADDR", "MASTER_PORT")
#: Errors of file systems that have no such locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)

#: Folders that this process holds, with thread and descriptor.
_held: dict[Path, tuple[int, int]] = {}


@contextlib.contextmanager
def hold_folder(folder: str | Path, first: bool = True) -> Iterator[None]:
    """Hold the folder of a run, so that no other run writes there meanwhile.

    The lock is that of the system (``flock``) on the file ``.lock``, which ends with the process, however that ends.
    Where the file system has none, the file ``.lock-owner`` names the process; it counts as long as that process lives.
    A thread that holds a folder may hold it again. The folder is made if need be, and removed again if it stays empty.

    Args:
        folder: The folder.
        first: Whether this is the first process of the run. The others share its lock: they only make sure that it is
            not one of another run.

    Raises:
        ValueError: If another run uses the folder.
        OSError: If the folder cannot be made or written.
    """
    path = Path(folder).resolve()
    if path in _held and _held[path][0] == threading.get_ident():
        yield
        return
    if not first:
        _check_owner(path)
        yield
        return
    made = _make(path)
    try:
        _held[path] = threading.get_ident(), _lock(path)
        try:
            yield
        finally:
            _unlock(path, _held.pop(path)[1])
    finally:
        with contextlib.suppress(OSError):  # one that is not empty stays
            for parent in made:
                parent.rmdir()


def is_run_name(name: str) -> bool:
    """Return whether a name is one of a folder below that of all runs, without marks that terminals obey."""
    return name.isprintable() and all(part.strip(" .") for part in name.split("/"))


def find_files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Return the files and folders in a folder that one of several patterns fits."""
    return [path for pattern in patterns for path in folder.glob(pattern)]


def remove(paths: Sequence[Path]) -> None:
    """Remove files, and folders with all that is in them."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _make(path: Path) -> list[Path]:
    """Make a folder, and return it and its parents that were missing, the innermost first."""
    missing = []
    parent = path
    while not parent.exists():
        missing.append(parent)
        parent = parent.parent
    path.mkdir(parents=True, exist_ok=True)
    return missing


def _lock(folder: Path) -> int:
    """Lock a folder and return the descriptor of the file that keeps the lock."""
    path = folder / _LOCK
    for attempt in range(_ATTEMPTS):
        folder.mkdir(parents=True, exist_ok=True)  # a run that could not begin may just have removed it
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
        try:
            _flock(descriptor)
        except BlockingIOError:
            owner = os.read(descriptor, 1000).decode(errors="replace")
            os.close(descriptor)
            if attempt == _ATTEMPTS - 1:
                raise _refusal(folder, owner) from None
            time.sleep(0.1)  # the run before may be about to end
            continue
        except OSError as error:
            os.close(descriptor)
            if error.errno not in _NO_LOCKS:
                raise
            path.unlink(missing_ok=True)
            return _lock_by_name(folder)
        if _is_file(descriptor, path):  # else the run before has just removed it
            os.truncate(descriptor, 0)
            os.write(descriptor, _owner().encode())
            return descriptor
        os.close(descriptor)
    raise _refusal(folder, "")


def _flock(descriptor: int, shared: bool = False) -> None:
    if fcntl is None:
        raise OSError(errno.ENOSYS, "no flock")
    fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def _lock_by_name(folder: Path) -> int:
    path = folder / _OWNER
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileExistsError:
            owner = path.read_text(errors="replace")
            if not _is_gone(owner):
                raise _refusal(folder, owner, f"; if it is gone, remove {path}") from None
            path.unlink(missing_ok=True)
            continue
        os.write(descriptor, _owner().encode())
        return descriptor


def _unlock(folder: Path, descriptor: int) -> None:
    for path in (folder / _LOCK, folder / _OWNER):
        with contextlib.suppress(OSError):  # Windows removes no file that is open
            if _is_file(descriptor, path):
                path.unlink()
    os.close(descriptor)


def _check_owner(folder: Path) -> None:
    """Refuse the lock of another run, in a process that is not the first of its own."""
    for path in (folder / _LOCK, folder / _OWNER):
        if not path.is_file():
            continue
        with path.open() as file:
            owner = file.read(1000)
            try:
                _flock(file.fileno(), shared=True)
                held = False
            except OSError:
                held = not _is_gone(owner)
        host, process, launch = (owner.split("\n") + [""] * 3)[:3]
        launched = (host, process) == (socket.gethostname(), str(os.getppid()))  # by the first process
        if held and owner and not launched and launch != _launch():
            raise _refusal(folder, owner)


def _refusal(folder: Path, owner: str, advice: str = "") -> ValueError:
    words = owner.split("\n")
    who = f" (process {words[1]} on {words[0]})" if len(words) > 1 else ""
    return InputError(
        f"a run in {folder} is still running{who}: wait until it has ended, or give this one another name or "
        f"folder{advice}"
    )


def _owner() -> str:
    return "\n".join((socket.gethostname(), str(os.getpid()), _launch()))


def _launch() -> str:
    return " ".join(os.environ.get(name, "") for name in _LAUNCH)


def _is_gone(owner: str) -> bool:
    """Return whether the process that an owner names is known to have ended."""
    host, process = (owner.split("\n") + [""] * 2)[:2]
    if host != socket.gethostname() or not process.isdecimal() or os.name == "nt":  # there, signal 0 is no question
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return True
    except OSError:
        return False
    return False


def _is_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _drop_in_child() -> None:
    """Close the locks that a forked process has inherited: they would outlive this process."""
    for _, descriptor in _held.values():
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_drop_in_child)
