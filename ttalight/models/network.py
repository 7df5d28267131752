"""The interface of a model to an adaptation method."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cached_property, partial
from operator import attrgetter
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ttalight.errors import InputError, InputTypeError, UsageError
from ttalight.losses import entropy
from ttalight.models.attaching.call import Call
from ttalight.models.attaching.classifier_hook import ClassifierHook, Head
from ttalight.models.depth import norms_before_last_block
from ttalight.models.norm import NormLayer, NormMode, PassState, find_norms
from ttalight.models.outputs import Select, logits_of, map_tensors, possible_classes, with_logits
from ttalight.models.parts import all_modules
from ttalight.models.passes.batch_shard import BatchShard
from ttalight.models.vectors import other_values

__all__ = ["Head", "Network", "Outputs", "Selection"]

#: Which parameters may adapt: affines of all normalisation layers, of those in front of the last block (see
#: ``norms_before_last_block``), everything but the classifier, everything, or those that a predicate of name and
#: parameter picks.
Selection = Literal["norm", "norm_before_last_block", "features", "all"] | Callable[[str, nn.Parameter], bool]


class _Outputs(NamedTuple):
    logits: Tensor
    features: Tensor | None = None


class Outputs(_Outputs):
    """Outputs of one pass of the network, in fp32 (fp64 stays).

    Args:
        logits: (B, C) or (B, C, H, W): classes are dimension 1.
        features: What the classifier read, (B, D) or (B, D, H, W); None until ``net.head`` was asked for.
    """

    @property
    def vectors(self) -> Tensor:
        """Features of images, (B, D), with gradients; there are some after ``net.head`` was asked for."""
        assert self.features is not None, "passes keep features from the first use of net.head on"
        return self.features.flatten(1)

    @cached_property
    def entropies(self) -> Tensor:
        """Entropies of the predictions, (B,) or (B, H, W), with gradients where the logits have them."""
        with torch.set_grad_enabled(self.logits.requires_grad):
            return entropy(self.logits)


class Network:
    """A model behind one narrow interface: passes, normalisation layers, classifier, trainable parameters.

    Calling it runs the model under the run's precision for that pass only, and counts the pass.

    Args:
        module: The model.
        forward: What a pass calls; the model itself by default, its hooks included.
        classifier: Name of the classifier among the model's modules; found by a probe when None.
        output: Where the logits are in what the model returns; see ``logits_of``.

    Raises:
        ValueError: If the model has no layer of the classifier's name.
    """

    def __init__(
        self,
        module: nn.Module,
        forward: Callable[..., Any] | None = None,
        classifier: str | None = None,
        output: Select = None,
    ) -> None:
        self.module = module
        #: Callable that maps images to the model's output.
        self.original: Callable[..., Any] = module if forward is None else forward
        #: Callable that computes a pass: ``original``, or a faster equivalent.
        self.run: Callable[..., Any] = self.original
        #: Makes the context of a pass, for example autocast.
        self.precision: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.output = output
        self.norms: list[NormLayer] = find_norms(module)
        #: State of the current pass, shared by the normalisation layers.
        self.pass_state = self.norms[0].passes if self.norms else PassState()
        self.parameters: list[nn.Parameter] = []
        #: Those of them that are the method's own, by name.
        self.own: dict[str, nn.Parameter] = {}
        #: Values of ``parameters`` in the source model; there from the first batch on.
        self.source: list[Tensor] = []
        self.generator: torch.Generator = torch.Generator(device=self.device)
        #: Passes so far, in whole batches; those that no backward has followed yet.
        self.forwards = self.pending_forwards = 0.0
        #: Logits of the present batch after fewer steps than the method takes, by number of steps.
        self.readings: dict[int, Tensor] = {}
        #: The present batch, and how the model is called with it.
        self.images: Tensor | None = None
        self.call: Call | None = None
        #: The layer whose output the logits are, and what is known of the classes.
        self.classifier = ClassifierHook(module, classifier)
        self._source_vector: tuple[list[Tensor], Tensor] | None = None
        #: Whether the model changes its input in place; None before the first pass.
        self._changes_input: bool | None = None
        #: Passes of the present batch that returned more than a tensor: logits, and all of it without a graph.
        self._returned: list[tuple[Tensor, Any]] = []
        self._trainable: list[bool] = []
        self._modules, self._all = list(all_modules(module)), list(module.parameters())

    @property
    def device(self) -> torch.device:
        """The device of the model's first parameter or buffer."""
        for tensor in (*self.module.parameters(), *self.module.buffers()):
            return tensor.device
        return torch.device("cpu")

    def __call__(
        self, images: Tensor, norm: NormMode | None = None, keep: Tensor | None = None, batches: float = 1.0
    ) -> Outputs:
        """Run one pass.

        Args:
            images: (B, 3, H, W).
            norm: Mode of the BatchNorm layers for this pass only; their present one by default.
            keep: Places of the images to pass, int64 (K,): the outputs are of these alone, as are batch statistics.
            batches: Passes of a whole batch that this one costs; with ``keep`` it is the share of images that pass.
        """
        call = self.call
        if keep is not None:
            batches, call = len(keep) / len(images), None if call is None else call.of(keep, len(images))
            images = images.index_select(0, keep)
        with nullcontext() if norm is None else self.norm_mode(norm):
            raw = self._pass(images, call, batches)
        is_plain: bool = isinstance(raw, Tensor) and raw.ndim in (2, 4) and raw.shape[1] > 1 and self.output is None
        logits = _full(raw if is_plain else logits_of(raw, self.output))
        if keep is None and not isinstance(raw, Tensor):
            self._returned.append((logits.detach(), map_tensors(raw, Tensor.detach)))
        features, self.classifier.features = self.classifier.features, None
        shard = self.pass_state.shard
        if features is not None:
            features = _full(features if shard is None else shard.whole(features, len(images)))
        return Outputs(logits, features)

    def auxiliary_loss(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Return the task's self-supervised loss, scalar or (B,), in fp32; counted as one pass for each view."""
        self._count(getattr(self.module, "auxiliary_views", 1))
        shard = self.pass_state.shard
        dealt = nullcontext() if shard is None else shard.inside(self.module.auxiliary_encoders())  # type: ignore[operator]
        with self.precision(), dealt:
            loss: Tensor = self.module.auxiliary_loss(images, generator)  # type: ignore[operator]
        return _full(loss)

    def _pass(self, images: Tensor, call: Call | None, batches: float) -> Any:
        self._count(batches)
        given, version = images, images._version
        if self._changes_input is not False:
            images, version = images.clone(), 0
        elif not images.requires_grad:
            images = images.detach()  # which some networks let require gradients
        run, shard = self.run if call is None else partial(call, self.run), self.pass_state.shard
        with self.precision():
            raw = run(images) if shard is None else shard(run, images)
        if self._changes_input is None:  # its data, of which versions say nothing, can be changed as well
            self._changes_input = images._version != version or not torch.equal(images.detach(), given.detach())
        self._changes_input |= images._version != version
        return raw

    def shard_batches(self) -> None:
        """Let each process pass its slice of every batch; outputs, and statistics, are those of the whole batch."""
        self.pass_state.shard = BatchShard()
        self.run = self.original  # processes that choose ways of their own would wait for each other

    def _count(self, batches: float) -> None:
        self.forwards += batches
        if torch.is_grad_enabled():
            self.pending_forwards += batches
        if any(map(attrgetter("training"), self._modules)):  # train() was called since
            self.module.eval()

    # -- trainable parameters

    def set_trainable(self, parameters: Iterable[nn.Parameter], own: Mapping[str, nn.Parameter] | None = None) -> None:
        """Let exactly these parameters receive gradients.

        Args:
            parameters: Parameters of the model.
            own: Parameters of the method, by name. They are updated, reset and saved like the model's.

        Raises:
            ValueError: If there is none.
            TypeError: If they are held in 16 bits.
        """
        self.own = dict(own or {})
        self.parameters = [*parameters, *self.own.values()]
        self.check_trainable(self.parameters)
        self._trainable = []
        self.fix_flags()

    free = set_trainable  # the name until version 0.2

    @staticmethod
    def check_trainable(parameters: Sequence[nn.Parameter]) -> None:
        """Check that parameters can be adapted.

        Raises:
            ValueError: If there is none.
            TypeError: If they are held in 16 bits.
        """
        if not parameters:
            raise InputError("there is no parameter to adapt: the selection is empty for this network")
        halves = {parameter.dtype for parameter in parameters} & {torch.float16, torch.bfloat16}
        if halves:
            raise InputTypeError(
                f"the parameters to adapt are {halves.pop()}, in which small steps round to nothing: convert the "
                "network with network.float() and let autocast run its passes in 16 bits"
            )

    def fix_flags(self) -> None:
        """Let exactly ``parameters`` require gradients, whatever the user's step has set since."""
        everything = [*self._all, *self.own.values()]
        if list(map(attrgetter("requires_grad"), everything)) == self._trainable:
            return
        chosen = set(map(id, self.parameters))
        self._trainable = [id(parameter) in chosen for parameter in everything]
        for parameter, trainable in zip(everything, self._trainable, strict=True):
            parameter.requires_grad_(trainable)
            parameter.grad = None

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
                raise InputError(
                    f"all normalisation layers of {type(self.module).__name__} belong to its last block, which this "
                    "method leaves alone: choose parameters='norm'"
                )
            return self.norm_affines(before)
        if selection == "all":
            return list(self.module.parameters())
        if selection == "features":
            classifier = {id(parameter) for parameter in self.classifier.find(self._probe).module.parameters()}
            return [parameter for parameter in self.module.parameters() if id(parameter) not in classifier]
        raise InputError(
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
            raise InputError(
                f"{type(self.module).__name__} has no BatchNorm, GroupNorm or LayerNorm with weight and bias, and this "
                "method adapts nothing else: use another network or another method"
            )
        return affines

    def batch_norms(self) -> list[NormLayer]:
        """Return the BatchNorm layers; a ValueError if the network has none."""
        layers = [norm for norm in self.norms if norm.is_batch_norm]
        if not layers:
            raise InputError(
                f"{type(self.module).__name__} has no BatchNorm layer, and this method works on batch statistics only: "
                "use another network or another method"
            )
        return layers

    def set_norm_mode(self, mode: NormMode, layers: Sequence[NormLayer] | None = None) -> None:
        """Set the mode of the given normalisation layers, of all by default."""
        for layer in self.norms if layers is None else layers:
            layer.mode = mode

    @contextmanager
    def norm_mode(self, mode: NormMode) -> Iterator[None]:
        """Set the mode of all normalisation layers temporarily."""
        before = [layer.mode for layer in self.norms]
        self.set_norm_mode(mode)
        try:
            yield
        finally:
            for layer, earlier in zip(self.norms, before, strict=True):
                layer.mode = earlier

    @contextmanager
    def as_source(self) -> Iterator[None]:
        """Normalise temporarily as the source model does, without gradients."""
        with torch.no_grad(), ExitStack() as layers:
            for layer in self.norms:
                layers.enter_context(layer.as_source())
            yield

    def with_weights(self, weights: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Run temporarily with other values of the trainable parameters: teachers, anchors, averages.

        Args:
            weights: One tensor for each of ``parameters``, of the same shape; used as they are, not copied.
        """
        return other_values(self.parameters, weights)

    # -- the classifier

    @property
    def classes(self) -> int:
        """The number of classes C, seen in the logits of a probe; ask for it in ``configure``."""
        return len(self.possible_classes)

    @property
    def possible_classes(self) -> Tensor:
        """The classes that are not masked, boolean (C,), seen in the logits of a probe; ask for it in ``configure``."""
        if self.classifier.possible is None:
            self.classifier.possible = possible_classes(self._probe())
        return self.classifier.possible

    def _probe(self) -> Tensor:
        if self.images is None:
            raise UsageError("classifier and classes are found from a batch of images: ask in configure or adapt")
        few = torch.arange(min(2, len(self.images)), device=self.images.device)
        images, call = self.images.index_select(0, few), self.call
        with torch.no_grad(), self.precision(), self.pass_state.repeat():  # which moves no statistics
            raw = self.original(images) if call is None else call.of(few, len(self.images))(self.original, images)
        return logits_of(raw, self.output)

    @property
    def head(self) -> Head:
        """The classifier, found by asking whose output the logits are; from then on passes keep its features.

        Raises:
            ValueError: If no layer or more than one qualifies; the message lists the candidates.
        """
        self.classifier.find(self._probe)
        return self.classifier.head(self.classes)

    # -- the structure of what the model returns

    def rebuild_output(self, logits: Tensor, after: bool = False) -> Any:
        """Return ``logits`` in the structure that the model returned: tensor, dict or dataclass, without a graph.

        The other parts are those of the pass that the logits come from. Where a method has changed the logits it is the
        first pass of the whole batch, or the last one; of parts that no such pass gave, there is None.

        Args:
            logits: Of the batch.
            after: Whether the prediction comes from the last pass of the batch.
        """
        if not self._returned:
            return logits
        images = None if self.images is None else len(self.images)
        whole = [output for seen, output in self._returned if len(seen) == len(logits) == images]
        same = [output for seen, output in self._returned if seen.data_ptr() == logits.data_ptr()]
        if same or whole:
            return with_logits(same[-1] if same else whole[-1 if after else 0], logits, self.output)
        changed = with_logits(self._returned[-1][1], logits, self.output)
        return map_tensors(changed, lambda part: part if part is logits else None)

    def drop_outputs(self) -> None:
        """Drop what passes have returned so far, because they were of other images than the present batch."""
        self._returned.clear()

    def clear_cache(self) -> None:
        """Drop references to the last batch."""
        self._returned.clear()
        self.classifier.features = self.images = None
        self.call = None

    def release(self) -> None:
        """Remove the hook on the classifier."""
        self.clear_cache()
        self.classifier.release()


def _full(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float64 else tensor.float()
