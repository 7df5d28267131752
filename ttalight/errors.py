"""Errors whose message says what was seen, what was expected and what to do about it.

The command line prints them as one line. All others keep their traceback, because they are faults of the code. Each
class is also the built-in one that it stands for, so ``except ValueError`` catches an ``InputError``.
"""

from __future__ import annotations

__all__ = [
    "DownloadError",
    "ExistingFileError",
    "InputError",
    "InputTypeError",
    "MissingFileError",
    "MissingPackageError",
    "TTALightError",
    "UsageError",
]


class TTALightError(Exception):
    """Base of the errors that a user can act on."""


class InputError(TTALightError, ValueError):
    """A value, a file or a batch is not as it has to be."""


class InputTypeError(TTALightError, TypeError):
    """An argument or a batch is of another type than it has to be."""


class UsageError(TTALightError, RuntimeError):
    """A call does not fit the state that an object or a run is in."""


class MissingFileError(TTALightError, FileNotFoundError):
    """There is no such file or folder."""


class ExistingFileError(TTALightError, FileExistsError):
    """There is a file or folder already, and no option to replace it was given."""


class DownloadError(TTALightError, ConnectionError):
    """A file could not be downloaded."""


class MissingPackageError(TTALightError, ImportError):
    """An optional package is not installed."""
