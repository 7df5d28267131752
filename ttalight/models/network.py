"""All that an adaptation method sees of a model, whoever wrote it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ttalight.losses import entropy
from ttalight.models.batch_shard import BatchShard
from ttalight.models.depth import norms_before_last_block
from ttalight.models.norm import NormLayer, NormMode, find_norms
from ttalight.models.outputs import logits_of, map_tensors, with_logits

__all__ = ["Head", "Network", "Outputs", "Selection"]

#: Which parameters may adapt: affines of all normalisation layers, of those in front of the last block (see
#: ``norms_before_last_block``), everything but the classifier, everything, or those that a predicate of name and
#: parameter picks.
Selection = Literal["norm", "norm_before_last_block", "features", "all"] | Callable[[str, nn.Parameter], bool]


class _Outputs(NamedTuple):
    logits: Tensor
    features: Tensor | None = None


class Outputs(_Outputs):
    """What one pass of the network gives, in fp32 (fp64 stays).

    Args:
        logits: (B, C) or (B, C, H, W): classes are dimension 1.
        features: What the classifier read, (B, D) or (B, D, H, W); None until ``net.head`` was asked for.
    """

    @cached_property
    def entropies(self) -> Tensor:
        """Entropies of the predictions, (B,) or (B, H, W), with gradients where the logits have them."""
        with torch.set_grad_enabled(self.logits.requires_grad):
            return entropy(self.logits)


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


class Network:
    """A model behind one narrow interface: passes, normalisation layers, classifier, free parameters.

    Calling it runs the model's *original* forward, under the run's precision for that pass only, and counts it.

    Args:
        module: The model.
        forward: Its original forward. The model's own one by default.
        precision: Makes the context of a pass, for example autocast.
        classifier: Name of the classifier among the model's modules; found by a probe when None.
    """

    def __init__(
        self,
        module: nn.Module,
        forward: Callable[[Tensor], Any] | None = None,
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
        classifier: str | None = None,
    ) -> None:
        self.module = module
        self.original = forward if forward is not None else module.forward
        #: What passes are made with: the original forward, or a faster way to compute the same.
        self.run: Callable[[Tensor], Any] = self.original
        self.precision = precision
        self.classifier = classifier
        self.norms: list[NormLayer] = find_norms(module)
        self.parameters: list[nn.Parameter] = []
        #: Those of them that the method brought along, by name.
        self.own: dict[str, nn.Parameter] = {}
        #: Values of ``parameters`` in the source model; there from the first batch on.
        self.source: list[Tensor] = []
        self._source_vector: tuple[list[Tensor], Tensor] | None = None
        self.generator: torch.Generator = torch.Generator(device=self.device)
        #: Passes so far, in whole batches; those that no step has gone backward through yet.
        self.forwards = self.unclaimed = 0.0
        #: Logits of the present batch after fewer steps than the method takes, by number of steps.
        self.readings: dict[int, Tensor] = {}
        #: Fraction of samples that the last step kept.
        self.kept = 1.0
        self.images: Tensor | None = None
        self._shard: BatchShard | None = None
        self.step: Callable[..., None] = _no_engine
        self.backward: Callable[..., None] = _no_engine
        self.descend: Callable[..., None] = _no_engine
        self.recover: Callable[..., None] = _no_engine
        self.draws: Callable[[int], torch.Generator] = _no_engine
        #: Passes of the present batch that returned more than a tensor: logits, and all of it without a graph.
        self._returned: list[tuple[Tensor, Any]] = []
        self._head: nn.Module | None = None
        self._hook: RemovableHandle | None = None
        self._classes: int | None = None
        self._features: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """The device of the model's first parameter or buffer."""
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            return tensor.device
        return torch.device("cpu")

    def __call__(self, images: Tensor, norm: NormMode | None = None, keep: Tensor | None = None) -> Outputs:
        """Run one pass.

        Args:
            images: (B, 3, H, W).
            norm: Mode of the BatchNorm layers for this pass only; their present one by default.
            keep: Places of the images to pass, int64 (K,): the outputs are of these alone, as are batch statistics.
        """
        self._features = None
        if keep is None:
            with self.norm_mode(norm):
                raw = self._pass(images)
        else:
            kept = images.index_select(0, keep)
            with self.norm_mode(norm):
                raw = self._pass(kept, len(kept) / len(images))
        logits = _full(logits_of(raw))
        if keep is None and not isinstance(raw, Tensor):
            self._returned.append((logits.detach(), map_tensors(raw, Tensor.detach)))
        return Outputs(logits, self._read_features(len(images if keep is None else kept)))

    def _read_features(self, images: int) -> Tensor | None:
        """Return what the classifier read in the last pass, of so many images."""
        features = self._features
        if features is None:
            return None
        return _full(features if self._shard is None else self._shard.whole(features, images))

    def auxiliary_loss(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the task's self-supervised loss, scalar or (B,), in fp32; counted as one pass for each view."""
        self._before_pass(getattr(self.module, "auxiliary_views", 1))
        dealt = nullcontext() if self._shard is None else self._shard.inside(self.module.auxiliary_encoders())  # type: ignore[operator]
        with self.precision(), dealt:
            loss: Tensor = self.module.auxiliary_loss(images, generator)  # type: ignore[operator]
        return _full(loss)

    def _pass(self, images: Tensor, batches: float = 1.0) -> Any:
        self._before_pass(batches)
        with self.precision():
            return self.run(images) if self._shard is None else self._shard(self.run, images)

    def deal_out(self) -> None:
        """Let each process pass its slice of every batch; outputs, and statistics, are those of the whole batch."""
        self._shard = BatchShard()
        self.run = self.original  # processes that choose ways of their own would wait for each other
        for layer in self.norms:
            layer.shard = self._shard

    @property
    def is_dealt_out(self) -> bool:
        """Whether passes are divided over processes."""
        return self._shard is not None

    def _before_pass(self, batches: float) -> None:
        self.forwards += batches
        if torch.is_grad_enabled():
            self.unclaimed += batches
        if self.module.training:  # somebody called train() since
            self.module.eval()

    # -- what moves

    def free(self, parameters: Iterable[nn.Parameter], own: Mapping[str, nn.Parameter] | None = None) -> None:
        """Let exactly these parameters receive gradients.

        Args:
            parameters: Parameters of the model.
            own: Parameters that the method brings along, by name; they move, reset and are saved like the model's.

        Raises:
            ValueError: If there is none.
        """
        self.own = dict(own or {})
        self.parameters = [*parameters, *self.own.values()]
        if not self.parameters:
            raise ValueError("there is no parameter to adapt: the selection is empty for this network")
        self.module.requires_grad_(False)
        for parameter in self.parameters:
            parameter.requires_grad_(True)

    @property
    def source_vector(self) -> Tensor:
        """All numbers of ``source``, one tensor after the other, (N,); made once."""
        if self._source_vector is None or self._source_vector[0] is not self.source:
            self._source_vector = self.source, torch.cat([value.flatten() for value in self.source])
        return self._source_vector[1]

    def select(self, selection: Selection) -> list[nn.Parameter]:
        """Return the parameters that a selection names; see ``Selection``.

        Raises:
            ValueError: If the selection is unknown, or the network has no such parameter.
        """
        if callable(selection):
            return [parameter for name, parameter in self.module.named_parameters() if selection(name, parameter)]
        if selection == "norm":
            return self.norm_affines()
        if selection == "norm_before_last_block":
            self.norm_affines()
            before = norms_before_last_block(self.module, self.norms)
            if not any(norm.affine for norm in before):
                raise ValueError(
                    f"all normalisation layers of {type(self.module).__name__} belong to its last block, which this "
                    "method leaves alone: choose parameters='norm'"
                )
            return self.norm_affines(before)
        if selection == "all":
            return list(self.module.parameters())
        if selection == "features":
            _ = self.head
            assert self._head is not None
            classifier = {id(parameter) for parameter in self._head.parameters()}
            return [parameter for parameter in self.module.parameters() if id(parameter) not in classifier]
        raise ValueError(
            "parameters must be 'norm', 'norm_before_last_block', 'features', 'all' or a function of name and "
            f"parameter, got {selection!r}"
        )

    def norm_affines(self, layers: Sequence[NormLayer] | None = None) -> list[nn.Parameter]:
        """Return the weights and biases of the given normalisation layers, of all by default.

        Raises:
            ValueError: If there is none.
        """
        affines = [parameter for norm in (self.norms if layers is None else layers) for parameter in norm.affine]
        if not affines:
            raise ValueError(
                f"{type(self.module).__name__} has no BatchNorm, GroupNorm or LayerNorm with weight and bias, and this "
                "method adapts nothing else: use another network or another method"
            )
        return affines

    def batch_norms(self) -> list[NormLayer]:
        """Return the BatchNorm layers.

        Raises:
            ValueError: If the network has none.
        """
        layers = [norm for norm in self.norms if norm.is_batch_norm]
        if not layers:
            raise ValueError(
                f"{type(self.module).__name__} has no BatchNorm layer, and this method works on batch statistics only: "
                "use another network or another method"
            )
        return layers

    def set_norm_mode(self, mode: NormMode, layers: Sequence[NormLayer] | None = None) -> None:
        """Set the mode of the given normalisation layers, of all by default."""
        for layer in self.norms if layers is None else layers:
            layer.mode = mode

    @contextmanager
    def norm_mode(self, mode: NormMode | None) -> Iterator[None]:
        """Set the mode of all normalisation layers for a while; None changes nothing."""
        if mode is None:
            yield
            return
        before = [layer.mode for layer in self.norms]
        self.set_norm_mode(mode)
        try:
            yield
        finally:
            for layer, earlier in zip(self.norms, before, strict=True):
                layer.mode = earlier

    @contextmanager
    def with_weights(self, weights: Sequence[Tensor]) -> Iterator[None]:
        """Run with other values of the free parameters for a while: teachers, anchors, averages.

        Args:
            weights: One tensor for each of ``parameters``, of the same shape; used as they are, not copied.
        """
        own = [parameter.data for parameter in self.parameters]
        try:
            for parameter, value in zip(self.parameters, weights, strict=True):
                parameter.data = value
            yield
        finally:
            for parameter, value in zip(self.parameters, own, strict=True):
                parameter.data = value

    # -- the classifier

    @property
    def classes(self) -> int:
        """The number of classes C, seen in the logits of a probe; ask for it in ``configure``."""
        if self._classes is None:
            self._classes = self._probe().shape[1]
        return self._classes

    def _probe(self) -> Tensor:
        if self.images is None:
            raise RuntimeError("classifier and classes are found from a batch of images: ask in configure or adapt")
        with torch.no_grad(), self.precision():
            return logits_of(self.original(self.images[:2]))

    @property
    def head(self) -> Head:
        """The classifier, found by asking whose output the logits are.

        Raises:
            ValueError: If no layer or more than one qualifies; the message lists the candidates.
        """
        if self._head is None:
            self._head = self._find_head()
            self._hook = self._head.register_forward_pre_hook(self._keep_features)
        weight: Tensor = self._head.weight  # type: ignore[assignment]
        bias: Tensor | None = self._head.bias  # type: ignore[assignment]
        return Head(weight.detach().flatten(1), None if bias is None else bias.detach())

    def _keep_features(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._features = inputs[0]

    def _find_head(self) -> nn.Module:
        modules: dict[str, nn.Module] = {
            name: module for name, module in self.module.named_modules() if _can_classify(module)
        }
        if self.classifier is not None:
            if self.classifier not in modules:
                raise ValueError(
                    f"classifier={self.classifier!r} is not a Linear layer or 1x1 convolution of "
                    f"{type(self.module).__name__}; it has {', '.join(modules) or 'none'}"
                )
            return modules[self.classifier]
        seen: dict[str, Tensor] = {}
        hooks = [
            module.register_forward_hook(lambda _module, _inputs, output, name=name: seen.__setitem__(name, output))
            for name, module in modules.items()
        ]
        try:
            logits = self._probe()
        finally:
            for hook in hooks:
                hook.remove()
        found = [name for name, output in seen.items() if _same_values(output, logits)]
        if len(found) != 1:
            raise ValueError(
                f"the classifier of {type(self.module).__name__} cannot be found: {len(found)} layers give the logits "
                f"({', '.join(found) or 'none'}). Name one with classifier=; candidates: {', '.join(seen) or 'none'}"
            )
        return modules[found[0]]

    # -- the structure of what the model returns

    def put_back(self, logits: Tensor, after: bool = False) -> Any:
        """Return ``logits`` in the structure that the model returned: tensor, dict or dataclass, free of any graph.

        The other parts are those of the pass that the logits come from. Where a method has changed the logits it is the
        first pass of the whole batch, or the last one; of parts that no such pass gave, there is None.

        Args:
            logits: Of the batch.
            after: Whether the prediction comes from the last pass of the batch.
        """
        if not self._returned:
            return logits
        whole = [output for seen, output in self._returned if len(seen) == len(logits)]
        same = [output for seen, output in self._returned if seen.data_ptr() == logits.data_ptr()]
        if same or whole:
            return with_logits(same[-1] if same else whole[-1 if after else 0], logits)
        return with_logits(map_tensors(self._returned[-1][1], lambda part: None), logits)

    def forget(self) -> None:
        """Drop references to the last pass."""
        self._returned.clear()
        self._features = self.images = None

    def release(self) -> None:
        """Take away what was hung on the model."""
        self.forget()
        if self._hook is not None:
            self._hook.remove()


def _can_classify(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.kernel_size == (1, 1) and module.groups == 1
    return isinstance(module, nn.Linear)


def _same_values(output: Any, logits: Tensor) -> bool:
    return (
        isinstance(output, Tensor)
        and output.numel() == logits.numel()
        and torch.equal(output.reshape(logits.shape).float(), logits.float())
    )


def _full(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _no_engine(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("this network is not being adapted: an Adapter's run or wrap() puts an engine behind it")
