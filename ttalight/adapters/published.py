"""Published settings of methods, as arguments and optimizers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import nn
from torch.optim import Optimizer

from ttalight.arguments import CheckedArguments
from ttalight.errors import InputError, InputTypeError

__all__ = ["ChosenOptimizer", "PublishedSettings", "make_published_optimizer"]

#: Settings that belong to the optimizer, and those that are neither its nor an argument.
_OPTIONS = ("lr", "momentum", "nesterov", "weight_decay")
_OTHERS = ("optimizer", "lr_per_image", "batch_size")

P = TypeVar("P", bound="PublishedSettings")


class ChosenOptimizer:
    """Makes the optimizer of a method: the user's, or one with published settings, by default those for CIFAR.

    Args:
        method: Name of the method, for messages.
        published: Its settings by benchmark.
        lr: Rate instead of the published one.
        make: Makes another optimizer, with its own rate; not together with ``lr``.

    Raises:
        ValueError: If both are given, neither is given nor published, or ``lr`` is below 0.
        TypeError: If ``make`` cannot be called.
    """

    def __init__(
        self, method: str, published: dict[str, dict[str, Any]], lr: float | None, make: OptimizerCallable | None
    ) -> None:
        if lr is not None and make is not None:
            raise InputError("give lr (for the published optimizer) or optimizer (with its own lr), not both")
        if make is not None and not callable(make):
            raise InputTypeError(
                "optimizer must make an optimizer of parameters, for example lambda parameters: SGD(parameters, "
                f"lr=0.1), got a {type(make).__name__}"
            )
        if lr is not None and not lr >= 0:
            raise InputError(f"lr must be at least 0, got {lr}")
        self._settings = {**published.get("cifar", {}), **({} if lr is None else {"lr": lr})}
        if make is None and "lr" not in self._settings:
            raise InputError(f"{method} has no published learning rate: give lr or optimizer")
        self._make = make
        #: Whether the settings are those for CIFAR because nothing else was said.
        self.is_default = lr is None and make is None

    @property
    def is_published(self) -> bool:
        """Whether the optimizer is the published one."""
        return self._make is None

    def use(self, settings: dict[str, Any]) -> None:
        """Make optimizers with the settings of another benchmark."""
        self._settings, self.is_default = settings, False

    def __call__(self, parameters: Sequence[nn.Parameter]) -> Optimizer:
        """Return a new optimizer of parameters."""
        if self._make is not None:
            return self._make(parameters)
        return make_published_optimizer(self._settings, parameters)


def make_published_optimizer(settings: dict[str, Any], parameters: Sequence[nn.Parameter]) -> Optimizer:
    """Return the optimizer of published settings, in torch's fused form where it has one for these parameters.

    Args:
        settings: Name of the optimizer (Adam by default), its rate, momentum and so on.
        parameters: The parameters that it updates.
    """
    make: Any = getattr(torch.optim, settings.get("optimizer", "Adam"))
    options = {name: settings[name] for name in _OPTIONS if name in settings}
    try:
        optimizer: Optimizer = make(parameters, **options, fused=True)
    except (RuntimeError, TypeError):
        optimizer = make(parameters, **options)
    return optimizer


class PublishedSettings(CheckedArguments):
    """Base of the methods with published settings."""

    #: Settings by benchmark.
    published: ClassVar[dict[str, dict[str, Any]]] = {}
    _optimizer: ChosenOptimizer

    @classmethod
    def preset(cls: type[P], benchmark: str, **overrides: Any) -> P:
        """Return the method with the settings that were published for a benchmark, those of its optimizer included.

        Args:
            benchmark: A key of ``published``, such as ``imagenet``. Anything else is a ValueError.
            overrides: Arguments that replace published ones, and ``batch_size`` for a rate published for each image.
        """
        if not isinstance(benchmark, str) or benchmark not in cls.published:
            raise InputError(f"{cls.__name__} has settings for {', '.join(cls.published)}, got {benchmark!r}")
        arguments, settings = _split(cls.published[benchmark], overrides.pop("batch_size", None))
        method = cls(**(arguments | overrides))
        if "optimizer" not in overrides:
            method._optimizer.use(settings | {name: overrides[name] for name in ("lr",) if name in overrides})
            method.given_arguments = {**settings, **arguments, **overrides}
        return method


def _split(settings: dict[str, Any], batch_size: int | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the arguments of a method among its published settings, and all settings with a rate."""
    settings = dict(settings)
    if "lr" not in settings or (batch_size is not None and "lr_per_image" in settings):
        if batch_size is None:
            raise InputError("its learning rate is published for each image: give batch_size=")
        settings["lr"] = settings["lr_per_image"] * batch_size
    return {name: value for name, value in settings.items() if name not in (*_OPTIONS, *_OTHERS)}, settings
