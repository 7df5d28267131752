"""Output of a command: without the tips and remarks of libraries."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator

__all__ = ["be_quiet", "drop_remarks", "quiet"]

#: Beginnings of what Lightning tells about the machine and itself.
_REMARKS = ("💡 Tip", "TPU available", "HPU available", "GPU available: False", "Seed set to", "`Trainer.", "Loading `")
_LOGGERS = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "lightning.fabric.utilities.seed",
)


def drop_remarks() -> None:
    """Drop what libraries remark about themselves, and two warnings of Lightning that no user can act on."""
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if _is_worth_telling not in logger.filters:
            logger.addFilter(_is_worth_telling)
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated")
    warnings.filterwarnings("ignore", r"Found \d+ module\(s\) in eval mode")  # the frozen parts of tasks


def be_quiet() -> None:
    """Drop all of Lightning's messages below warnings."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Be quiet as long as the context lasts."""
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    be_quiet()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _is_worth_telling(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_REMARKS)
