"""The commands of the command line: one line about each, and where it is."""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["COMMANDS", "Command"]


class Command(NamedTuple):
    """A command.

    Attributes:
        about: One line for the help.
        main: Module and function that take its words. None for those of Lightning's command line.
    """

    about: str
    main: str | None = None


COMMANDS = {
    "fit": Command("Train a model."),
    "validate": Command("Evaluate a model on the validation data."),
    "test": Command("Evaluate a model on the test data, without adapting it."),
    "predict": Command("Predict the labels of images."),
    "adapt": Command("Adapt a model to a stream while measuring it."),
    "compare": Command("Set the results of several runs side by side.", "ttalight.reporting.compare:main"),
    "corrupt": Command("Write a corrupted copy of a labelled image set.", "ttalight.cli.corrupt:main"),
    "doctor": Command("Say without labels what a network and images need.", "ttalight.doctor.command:main"),
    "reproduce": Command("Run what the tables of CTA's paper need.", "ttalight.reproduce.command:main"),
    "sweep": Command("Run a grid of adaptations in one process.", "ttalight.sweep.command:main"),
}
