"""The classifier of a model: the layer whose output the logits are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

__all__ = ["Classifier", "Head"]


class Head(NamedTuple):
    """The classifier: ``logits = scale * features @ weight.T + bias``.

    Args:
        weight: (C, D).
        bias: (C,), or None.
        scale: Factor on the product, 1 for an ordinary classifier.
    """

    weight: Tensor
    bias: Tensor | None
    scale: float | Tensor = 1.0


class Classifier:
    """Finds the classifier of a model, and keeps what it reads.

    Args:
        module: The model.
        name: Name of the classifier among its modules; None lets ``find`` look.

    Raises:
        ValueError: If no Linear layer or 1x1 convolution has this name.
    """

    def __init__(self, module: nn.Module, name: str | None = None) -> None:
        self.module = module
        #: What the classifier read in the last pass, once ``keep_features`` was called.
        self.features: Tensor | None = None
        self.found_name: str | None = None
        self._layer: nn.Module | None = None
        self._hook: RemovableHandle | None = None
        if name is not None:
            self.set(name)

    def _candidates(self) -> dict[str, nn.Module]:
        return {name: module for name, module in self.module.named_modules() if _can_classify(module)}

    def check(self) -> None:
        """Check that there is a layer that can be the classifier.

        Raises:
            ValueError: If there is none.
        """
        if not self._candidates():
            raise ValueError(
                f"{type(self.module).__name__} has no Linear layer and no 1x1 convolution, so it has no classifier "
                "that this method could use: use a method that needs none, such as Tent"
            )

    def set(self, name: str) -> None:
        """Take the layer of a name.

        Raises:
            ValueError: If no Linear layer or 1x1 convolution has this name.
        """
        layers = self._candidates()
        if name not in layers:
            raise ValueError(
                f"classifier={name!r} is not a Linear layer or 1x1 convolution of {type(self.module).__name__}; it has "
                f"{', '.join(layers) or 'none'}"
            )
        self.found_name, self._layer = name, layers[name]

    def find(self, probe: Callable[[], Tensor]) -> nn.Module:
        """Return the layer whose output the logits are.

        Args:
            probe: Runs the model and returns its logits.

        Raises:
            ValueError: If no layer or more than one qualifies; the message lists the candidates.
        """
        if self._layer is not None:
            return self._layer
        seen: dict[str, Any] = {}
        hooks = [
            layer.register_forward_hook(lambda _layer, _inputs, output, name=name: seen.__setitem__(name, output))
            for name, layer in self._candidates().items()
        ]
        try:
            logits = probe()
        finally:
            for hook in hooks:
                hook.remove()
        found = [name for name, output in seen.items() if _same_values(output, logits)]
        if len(found) != 1:
            raise ValueError(
                f"the classifier of {type(self.module).__name__} cannot be found: {len(found)} layers give the logits "
                f"({', '.join(found) or 'none'}). Name one with classifier=; candidates: {', '.join(seen) or 'none'}"
            )
        self.set(found[0])
        return self.find(probe)

    def keep_features(self) -> None:
        """Keep what the classifier reads in each pass from now on."""
        if self._hook is None and self._layer is not None:
            self._hook = self._layer.register_forward_pre_hook(_FeatureHook(self), with_kwargs=True)

    def release(self) -> None:
        """Keep no features any more."""
        if self._hook is not None:
            self._hook.remove()
        self._hook = self.features = None


class _FeatureHook:
    """Hands the input of a layer to a ``Classifier``; copies of the layer have a hook that does nothing."""

    def __init__(self, classifier: Classifier | None = None) -> None:
        self.classifier = classifier

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Tensor]) -> None:
        if self.classifier is not None:
            self.classifier.features = (*args, *kwargs.values())[0]

    def __reduce__(self) -> tuple[Any, ...]:
        return _FeatureHook, ()


def _can_classify(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


@torch.no_grad()
def _same_values(output: Any, logits: Tensor) -> bool:
    return (
        isinstance(output, Tensor)
        and output.numel() == logits.numel()
        and torch.equal(output.reshape(logits.shape).float(), logits.float())
    )
