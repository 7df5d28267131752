"""Decides which errors of a command are one line that a user can act on, and which keep their traceback."""

from __future__ import annotations

import errno
import re
import traceback

from ttalight.errors import TTALightError
from ttalight.reporting.text import printable

__all__ = ["expected_message", "one_line", "without_parser"]

_ADVICE = {
    errno.ENOSPC: "free some space, then run it again",
    errno.EROFS: "write to another folder: --trainer.default_root_dir names one for the run",
    errno.EDQUOT: "your quota is used up: free some space, then run it again",
    errno.EFBIG: "files may not be as large here: raise the limit, then run it again",
    errno.EACCES: "check the permissions, or choose another folder",
}
#: Errors by which Lightning says that it cannot make what the user configured.
_CONFIGURED = (ValueError, TypeError, RuntimeError, ImportError)
#: How an error that arose in a process of a data loader begins. Its last line is the error as it was raised there.
_WORKER = re.compile(r"Caught \w+ in DataLoader worker process")


def expected_message(error: BaseException) -> str | None:
    """Return what to say about an error that needs no traceback, or None where the traceback is what helps.

    Expected are the errors of ``ttalight.errors``, those of the file system, memory that does not suffice, and what
    Lightning says of the trainer's configuration and of a checkpoint to resume from.
    """
    if isinstance(error, TTALightError):
        text = str(error)
        return one_line(text.strip().splitlines()[-1].partition(": ")[2] if _WORKER.match(text) else text)
    if isinstance(error, OSError) and error.strerror and (error.filename is not None or error.errno in _ADVICE):
        place = "" if error.filename is None else f"{error.filename}: "
        advice = _ADVICE.get(error.errno or 0)
        return one_line(f"{place}{error.strerror}" + (f": {advice}" if advice else ""))
    import torch  # here, since commands that do not need it start faster
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    if isinstance(error, MisconfigurationException) or (isinstance(error, _CONFIGURED) and _is_of_the_trainer(error)):
        return one_line(str(error))
    if _is_of_a_checkpoint(error):
        return one_line(
            f"ckpt_path: the checkpoint cannot be resumed from ({type(error).__name__}: {str(error)[:300]}): name "
            "another one, or start from its weights with the task's own argument"
        )
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error):
        return one_line(
            f"out of memory ({str(error).strip().partition(chr(10))[0] or type(error).__name__}): free memory or use "
            "another device, then resume the run; a smaller --data.batch_size needs less, and is another run"
        )
    return None


def without_parser(error: BaseException) -> BaseException:
    """Return the error of a constructor that the parser has wrapped in words of its own, or the error itself."""
    while _modules(error)[-1:] == ["jsonargparse"] and (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return error


def one_line(text: str) -> str:
    """Return a text on one line, without characters that a terminal would obey."""
    return printable(" ".join(text.split()))


def _modules(error: BaseException) -> list[str]:
    """Return the top-level packages of an error's frames, the one where it arose last."""
    frames = traceback.walk_tb(error.__traceback__)
    return [str(frame.f_globals.get("__name__", "")).partition(".")[0] for frame, _ in frames]


def _is_of_the_trainer(error: BaseException) -> bool:
    """Return whether Lightning refused the seed or an argument of the trainer."""
    names = {frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)}
    return _modules(error)[-1:] == ["lightning"] and bool(names & {"_set_seed", "instantiate_trainer"})


def _is_of_a_checkpoint(error: BaseException) -> bool:
    """Return whether an error arose while Lightning was taking a checkpoint over."""
    from lightning.pytorch.trainer.connectors import checkpoint_connector

    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [
        frame.f_code.co_name for frame in frames if frame.f_globals.get("__name__") == checkpoint_connector.__name__
    ]
    return bool(names) and "dump_checkpoint" not in names
