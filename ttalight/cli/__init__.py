"""The command line: ``ttalight fit``, ``adapt``, ``compare`` and the commands beside them."""

from ttalight.cli.command import CLI, main

__all__ = ["CLI", "main"]
