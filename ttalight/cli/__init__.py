"""The command line: ``ttalight fit``, ``adapt``, ``compare`` and the commands beside them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ttalight.cli.entry import main

if TYPE_CHECKING:
    from ttalight.cli.command import CLI

__all__ = ["CLI", "main"]


def __getattr__(name: str) -> Any:
    """Import Lightning's command line where it is used: other commands start faster."""
    if name == "CLI":
        from ttalight.cli.command import CLI

        return CLI
    raise AttributeError(f"module 'ttalight.cli' has no attribute {name!r}")
