"""Features that the classifier of a model reads in each pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ttalight.errors import InputError
from ttalight.models.attaching.attachment import attach_forward, detach_forward
from ttalight.models.classifier import Classifier, can_classify, find_classifier
from ttalight.models.parts import all_modules

__all__ = ["ClassifierHook", "Head"]


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


class ClassifierHook:
    """Finds the classifier of a model, and keeps what it reads.

    Args:
        module: The model.
        name: Name of the classifier among its modules. By default it is found with the first ``find``.

    Raises:
        ValueError: If no Linear layer or 1x1 convolution has this name.
    """

    def __init__(self, module: nn.Module, name: str | None = None) -> None:
        self.module, self.name = module, name
        #: What the classifier read in the last pass, once ``keep_features`` was called.
        self.features: Tensor | None = None
        self.found: Classifier | None = None
        #: Which classes are not masked, boolean (C,), once a probe has seen logits.
        self.possible: Tensor | None = None
        self._attached: nn.Module | None = None
        if name is not None:
            self._layer(name)

    @property
    def candidates(self) -> dict[str, nn.Module]:
        """Layers that can be the classifier, by name."""
        return {path: layer for path, layer in self.module.named_modules() if can_classify(layer)}

    def _layer(self, name: str) -> nn.Module:
        layers = self.candidates
        if name not in layers:
            raise InputError(
                f"classifier={name!r} is not a Linear layer or 1x1 convolution of {type(self.module).__name__}; it has "
                f"{', '.join(layers) or 'none'}"
            )
        return layers[name]

    def check(self) -> None:
        """Check that there is a layer that can be the classifier.

        Raises:
            ValueError: If there is none.
        """
        if not self.candidates:
            scripted = any(isinstance(part, torch.jit.ScriptModule) for part in all_modules(self.module))
            raise InputError(
                f"{type(self.module).__name__} has no Linear layer and no 1x1 convolution"
                f"{' outside TorchScript' if scripted else ''}, so it has no classifier "
                "that this method could use: use a method that needs none, such as Tent"
            )

    def facts(self) -> dict[str, Any]:
        """Return what probes have found: name and rows of the classifier, and which classes are not masked."""
        name, rows = (None, None) if self.found is None else (self.found.name, self.found.rows)
        return {"classifier": name, "rows": rows, "possible": self.possible}

    def know(self, facts: dict[str, Any], device: torch.device) -> None:
        """Take what ``facts`` of an equal model returned, so that no probe is needed.

        Raises:
            ValueError: If it is not that.
        """
        name, rows, possible = (facts[key] for key in ("classifier", "rows", "possible"))
        fits = isinstance(name, (str, type(None)))
        fits = fits and _is_vector(rows, torch.int64) and _is_vector(possible, torch.bool)
        layer = self._layer(name) if fits and name is not None else None
        if fits and layer is not None:
            weight: Tensor = layer.weight  # type: ignore[assignment]
            chosen = torch.arange(len(weight)) if rows is None else rows
            fits = len(chosen) > 0 and 0 <= int(chosen.min()) <= int(chosen.max()) < len(weight)
            fits = fits and (possible is None or len(possible) == len(chosen))
        if not fits:
            raise InputError("its facts are not a classifier and its classes")
        self.found = None if layer is None else Classifier(name, layer, None if rows is None else rows.to(device))
        self.possible = None if possible is None else possible.to(device)

    def find(self, probe: Callable[[], Tensor]) -> Classifier:
        """Return the classifier; see ``find_classifier``."""
        if self.found is None:
            self.found = find_classifier(self.module, probe, self.name)
        return self.found

    def head(self, classes: int) -> Head:
        """Keep features from now on, and return the classifier that ``find`` has found, in fp32 (fp64 stays).

        Args:
            classes: The number of the model's logits.

        Raises:
            ValueError: If the layer's rows are not those of the logits.
        """
        assert self.found is not None, "find comes first"
        self.keep_features()
        weight, bias = self.found.weights(classes)
        return Head(_full(weight), None if bias is None else _full(bias), self.found.scale)

    def keep_features(self) -> None:
        """Keep what the classifier reads in each pass from now on."""
        if self._attached is None and self.found is not None:
            self._attached = self.found.module
            attach_forward(self._attached, partial(self._forward, self._attached.forward))

    def _forward(self, own: Callable[..., Any], *args: Tensor, **kwargs: Tensor) -> Any:
        self.features = (*args, *kwargs.values())[0]
        return own(*args, **kwargs)

    def release(self) -> None:
        """Keep no features any more, nor what probes have found."""
        if self._attached is not None:
            detach_forward(self._attached)
        self._attached = self.features = self.found = self.possible = None


def _is_vector(value: Any, dtype: torch.dtype) -> bool:
    return value is None or (isinstance(value, Tensor) and value.ndim == 1 and value.dtype == dtype)


def _full(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
