"""The layer of a model whose output the logits are, and which of its rows they take."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ttalight.errors import InputError
from ttalight.losses.entropy import is_masked
from ttalight.models.cosine_classifier import CosineClassifier

__all__ = ["Classifier", "can_classify", "find_classifier"]

#: Whole numbers below this are exact in every floating-point type.
_BASE = 256
#: Predictions that are compared to tell columns apart.
_COMPARED = 8

_Run = Callable[[], Tensor]


class Classifier(NamedTuple):
    """A layer that gives the logits.

    Args:
        name: Its name among the model's modules.
        module: A Linear layer or a 1x1 convolution.
        rows: The row of its weight that each logit belongs to, int64 (C,), where the model returns some of its outputs
            or another order; None where it returns all of them, or where that cannot be seen.
    """

    name: str
    module: nn.Module
    rows: Tensor | None = None

    @property
    def scale(self) -> float:
        """Factor on the product of features and weight, 1 for an ordinary layer."""
        return self.module.scale if isinstance(self.module, CosineClassifier) else 1.0

    def weights(self, classes: int) -> tuple[Tensor, Tensor | None]:
        """Return the rows of the classes, (C, D), and their biases, (C,) or None, without gradient.

        Args:
            classes: C, the number of the model's logits.

        Raises:
            ValueError: If the layer's rows are not those of the logits.
        """
        weight: Tensor = self.module.weight.detach().flatten(1)  # type: ignore[operator]
        bias: Tensor | None = self.module.bias  # type: ignore[assignment]
        bias = None if bias is None else bias.detach()
        if self.rows is not None:
            weight, bias = weight[self.rows], None if bias is None else bias[self.rows]
        if len(weight) != classes:
            raise InputError(
                f"the classifier {self.name!r} has {len(weight)} outputs and the model returns {classes} logits that "
                "are not some of them: name the layer that gives the logits with classifier="
            )
        return weight, bias


def find_classifier(module: nn.Module, run: _Run, name: str | None = None) -> Classifier:
    """Find the classifier of a model by asking whose output the logits are.

    It is the one layer whose output the logits are: all of it, or some of its columns in any order (a class list that
    is restricted behind the classifier). Logits of masked classes are not compared. Logits of pixels may be the layer's
    output scaled up bilinearly; features are then at the lower resolution.

    Args:
        module: The model.
        run: Makes a pass of a few images and returns the logits, (B, C) or (B, C, H, W). It is called once, and again
            once or twice where logits are not all of a layer's output.
        name: The layer's name, where it cannot be found.

    Raises:
        ValueError: If no layer or more than one qualifies, or the name is none of a layer; the message lists the
            candidates.
    """
    layers = {path: layer for path, layer in module.named_modules() if can_classify(layer)}
    kind = type(module).__name__
    if name is not None:
        if name not in layers:
            raise InputError(
                f"classifier={name!r} is not a Linear layer or 1x1 convolution of {kind}; it has "
                f"{', '.join(layers) or 'none'}"
            )
        layers = {name: layers[name]}
    logits, seen = _pass(layers, run)
    found = [Classifier(path, layers[path]) for path, output in seen.items() if _gives_all(output, logits)]
    if not found:
        chosen = {path: _rows(layers[path], run) for path, output in seen.items() if _gives_some(output, logits)}
        found = [Classifier(path, layers[path], rows) for path, rows in chosen.items() if rows is not None]
    if not found:
        found = [Classifier(path, layers[path]) for path, output in seen.items() if _gives_resized(output, logits)]
    if name is not None:
        return found[0] if found else Classifier(name, layers[name])
    if len(found) != 1:
        raise InputError(
            f"the classifier of {kind} cannot be found: {len(found)} layers give the logits "
            f"({', '.join(layer.name for layer in found) or 'none'}). Name one with classifier=; candidates: "
            f"{', '.join(seen) or 'none'}"
        )
    return found[0]


def can_classify(module: nn.Module) -> bool:
    """Return whether a module is a Linear layer or a 1x1 convolution."""
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


def _pass(layers: dict[str, nn.Module], run: _Run) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the logits of a pass, and what each layer that took part put out."""
    seen: dict[str, Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _module, _inputs, output, path=path: seen.__setitem__(path, output))
        for path, layer in layers.items()
    ]
    try:
        logits = run()
    finally:
        for hook in hooks:
            hook.remove()
    return logits, {path: output for path, output in seen.items() if isinstance(output, Tensor)}


def _gives_all(output: Tensor, logits: Tensor) -> bool:
    """Return whether logits are a layer's output, apart from those that are masked."""
    if output.numel() != logits.numel():
        return False
    same = (output.reshape(logits.shape).to(logits.dtype) == logits) | is_masked(logits)
    return bool(same.all())


def _gives_some(output: Tensor, logits: Tensor) -> bool:
    """Return whether each column of the logits that is not masked is one of a layer's output."""
    if output.ndim < 2 or len(output) != len(logits) or output.shape[1] < logits.shape[1]:
        return False
    wanted, given = _columns(logits), _columns(output.to(logits.dtype))
    if wanted.shape[1] != given.shape[1]:
        return False
    masked = is_masked(wanted, dim=0)
    places = torch.linspace(0, wanted.shape[1] - 1, min(_COMPARED, wanted.shape[1])).long().tolist()
    same = torch.ones(len(wanted), len(given), dtype=torch.bool, device=wanted.device)
    for place in places:
        value = wanted[:, place, None]
        same &= (value == given[None, :, place]) | masked[:, place, None]
    return bool(same.any(1).all())


def _gives_resized(output: Tensor, logits: Tensor) -> bool:
    """Return whether logits of pixels are a layer's output, scaled up bilinearly."""
    if output.ndim != 4 or logits.ndim != 4 or output.shape[:2] != logits.shape[:2]:
        return False
    size = logits.shape[2:]
    return any(
        torch.allclose(F.interpolate(output, size=size, mode="bilinear", align_corners=aligned).to(logits), logits)
        for aligned in (False, True)
    )


def _rows(layer: nn.Module, run: _Run) -> Tensor | None:
    """Return which outputs of a layer the logits are, (C,), by passes in which each output is its own number.

    None if the logits are anything else than some of the outputs. Of masked classes, whose number is not seen, it is 0.
    """
    weight: Tensor = layer.weight  # type: ignore[assignment]
    numbers = torch.arange(len(weight), device=weight.device)
    rows = 0 * numbers[:1]
    unit = 1
    while unit == 1 or unit < len(numbers):
        columns = _columns(_pass_of_numbers(layer, run, numbers // unit % _BASE))
        digits = columns.amax(1)
        masked = is_masked(digits, dim=0)
        digits = digits.masked_fill(masked, 0)
        clear = (columns == digits[:, None]) | is_masked(columns, dim=0)
        if not bool(clear.all() & (digits == digits.round()).all() & (digits >= 0).all()):
            return None
        rows = rows + unit * digits.long()
        unit *= _BASE
    each_once = (rows[~masked].sort().values.diff() > 0).all()
    return rows if bool(each_once & (rows < len(numbers)).all()) else None


def _pass_of_numbers(layer: nn.Module, run: _Run, numbers: Tensor) -> Tensor:
    """Return the logits of a pass in which a layer puts out these numbers, (K,), for every image."""

    def replace(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        shape = [1, -1, *[1] * (output.ndim - 2)]
        return numbers.to(output.dtype).view(shape).expand_as(output).clone()

    hook = layer.register_forward_hook(replace)
    try:
        return run()
    finally:
        hook.remove()


def _columns(tensor: Tensor) -> Tensor:
    """Return the values of each class, (C, N), of (B, C) or (B, C, H, W)."""
    return tensor.detach().float().transpose(0, 1).flatten(1)
