"""The base of all adaptation methods: a Lightning callback that stands in for a module's forward."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ttalight.adapters.advice import warn_of_no_step, warn_of_small_batches
from ttalight.adapters.evaluation import EvaluationCallback
from ttalight.adapters.protocol import describe_method
from ttalight.adapters.window import check_window
from ttalight.adapters.wrapper import AdaptedNetwork
from ttalight.arguments import CheckedArguments, shown_arguments
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.engine.engine import MANY, Engine
from ttalight.engine.method import Method, OnBadBatch, Reset
from ttalight.engine.schedule import make_schedules
from ttalight.errors import InputError, InputTypeError, UsageError
from ttalight.models.outputs import Select
from ttalight.models.passes.pass_policy import PassPolicy
from ttalight.seeding import global_seed

__all__ = ["Adapter"]


class Adapter(CheckedArguments, EvaluationCallback, Method):
    """Adapts a classifier to the unlabelled stream that it is evaluated on.

    During ``test``, ``validate`` and ``predict`` an adapter stands in for the forward of the module under
    evaluation, so it works on any LightningModule whose step calls ``self(images)``; inside ``fit`` it does nothing.
    On a plain network, use ``wrap``. Subclasses implement ``configure`` and ``adapt``; labels never reach them.

    Args:
        reset: When to restore the source weights: ``domain`` (at the boundaries that the stream announces), ``batch``
            (before every batch), ``never``, or an integer N (after every N updates).
        classifier: Name of the classifier among the network's modules, where it cannot be found.
        output: Where the logits are in what the network returns, if it returns several tensors: a key, a position, or
            a function of the output.
        seed: Seed of the method's random draws; by default the global one.
        on_bad_batch: What becomes of a batch with NaN or infinite pixels, of bytes instead of floats, or of a size that
            the network does not take. ``error`` stops; ``skip`` predicts with the model as it is; ``source`` predicts
            with the source model. The latter two adapt nothing to it, count it, and predict from a repaired copy:
            pixels that are not finite are 0, bytes are divided by 255, other sizes are scaled to the usual one.
        passes: A way to compute the network's passes in less time (``FastPass``) or memory (``RecomputedBlocks``).
        adapt_every: Adapt to the first of every so many batches of a visit, and only predict the others.
        max_milliseconds: Longest time for a batch. Of those that are expected to take more, most are predicted only.
    """

    def __init__(
        self,
        reset: Reset = "domain",
        classifier: str | None = None,
        output: Select = None,
        seed: int | None = None,
        on_bad_batch: OnBadBatch = "error",
        passes: PassPolicy | None = None,
        adapt_every: int = 1,
        max_milliseconds: float | None = None,
    ) -> None:
        super().__init__()
        if on_bad_batch not in ("error", "skip", "source"):
            raise InputError(f"on_bad_batch must be 'error', 'skip' or 'source', got {on_bad_batch!r}")
        if reset not in ("domain", "batch", "never") and not (type(reset) is int and reset >= 1):
            raise InputError(f"reset must be 'domain', 'batch', 'never' or a number of updates >= 1, got {reset!r}")
        if passes is not None and not isinstance(passes, PassPolicy):
            raise InputTypeError(f"passes must be a way to compute passes, for example FastPass(), got {passes!r:.60}")
        self.reset, self.classifier, self.output, self.seed = reset, classifier, output, seed
        self.on_bad_batch, self.passes = on_bad_batch, passes
        self.adapt_every, self.max_milliseconds = adapt_every, max_milliseconds
        self.schedules = make_schedules(adapt_every, max_milliseconds)
        self._constructed: frozenset[str] = frozenset()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({shown_arguments(self, self.given_arguments)})"

    # -- hooks for subclasses

    def protocol(self) -> dict[str, Any]:
        """Return the settings that are saved with a result, so that results can be compared."""
        return describe_method(self)

    def check_progress(self, net: AdaptiveNetwork, logits: Tensor) -> None:
        """Warn of batches too small for batch statistics, and of a method that makes no step."""
        if net.counters.batches == 1:
            warn_of_small_batches(type(self).__name__, net, len(logits))
            self.check_defaults(logits.shape[1])
        else:
            warn_of_no_step(type(self).__name__, net)

    def check_defaults(self, classes: int) -> None:
        """Warn when settings published for few classes meet a classifier of many."""

    # -- plain networks

    def wrap(self, network: nn.Module | None = None, window: int | None = None) -> AdaptedNetwork:
        """Return a classifier as one that adapts, in place, whenever it is called, until ``release()``.

        Args:
            network: The classifier.
            window: Adapt with each call to the last so many images, and return the logits of the new ones, so that
                batches of one have statistics. The images are part of ``state_dict()``; ``reset()`` drops them.

        Raises:
            ValueError: If the network lacks something that the method needs, or the window is less than one image.
            RuntimeError: If the network, or a part of it, is being adapted already.
        """
        if not isinstance(self, Adapter):  # Tent.wrap(network)
            raise InputTypeError("wrap belongs to an adapter, not to its class: write Tent().wrap(network)")
        if not isinstance(network, nn.Module):
            raise InputTypeError(f"wrap takes a network (nn.Module), got {type(network).__name__}")
        check_window(window)
        return AdaptedNetwork(self, self.begin(network), window)

    def begin(self, module: nn.Module, forward: Any = None) -> Engine:
        """Return the engine of a new adaptation; a RuntimeError where there is one already."""
        if self._engine is not None:
            raise UsageError(f"this {type(self).__name__} is adapting a network already: make another one")
        self._constructed = self._constructed or frozenset(vars(self))
        self._engine = Engine(self, module, global_seed() if self.seed is None else self.seed, forward)
        return self._engine

    def __getstate__(self) -> dict[str, Any]:
        # Copies are of the method as it was constructed: what a run has added belongs to its network.
        own = {name: value for name, value in vars(self).items() if name in self._constructed or not self._constructed}
        return own | {"_engine": None, "_share": None, "_standing": None, "_state": {}, "_initial": None}

    def end(self) -> None:
        """End the adaptation of a network, and keep its state."""
        engine = self._engine
        super().end()
        if engine is not None and engine.batches < MANY:
            warn_of_no_step(type(self).__name__, engine.net)
