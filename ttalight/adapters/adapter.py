"""The base of all adaptation methods: a Lightning callback that stands in for a module's forward."""

from __future__ import annotations

from typing import Any, ClassVar

from lightning import Callback, LightningModule, Trainer
from torch import Tensor, nn

from ttalight.adapters.advice import warn_of_no_step, warn_of_small_batches
from ttalight.adapters.sharding import Shard, check_sharding, first_images, share_of
from ttalight.adapters.timing import add_clock
from ttalight.adapters.wrapper import AdaptedNetwork
from ttalight.arguments import CheckedArguments
from ttalight.data.streams.shares import StreamShare
from ttalight.engine.adaptive_network import AdaptiveNetwork
from ttalight.engine.engine import MANY, Engine
from ttalight.engine.method import Method, OnBadBatch, Reset
from ttalight.engine.schedule import make_schedules
from ttalight.models.outputs import Select
from ttalight.models.pass_policy import PassPolicy
from ttalight.models.stand_in import StepForward
from ttalight.seeding import global_seed

__all__ = ["Adapter"]

_LOOPS = {"validate": "validate_loop", "test": "test_loop", "predict": "predict_loop"}


class Adapter(CheckedArguments, Callback, Method):
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
        max_milliseconds: Longest time for a batch. Batches that are expected to take more are predicted only; now and
            then one is tried.
    """

    #: Published settings by benchmark; see ``GradientAdapter.preset``.
    published: ClassVar[dict[str, dict[str, Any]]] = {}
    #: Whether shard='batch' gives what one process gives: ``adapt`` has to reach the model through ``net`` alone.
    shards_batches: ClassVar[bool] = False
    #: Whether ``configure`` uses the images of the first batch.
    configured_by_images: bool = False

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
        if on_bad_batch not in ("error", "skip", "source"):
            raise ValueError(f"on_bad_batch must be 'error', 'skip' or 'source', got {on_bad_batch!r}")
        if reset not in ("domain", "batch", "never") and not (type(reset) is int and reset >= 1):
            raise ValueError(f"reset must be 'domain', 'batch', 'never' or a number of updates >= 1, got {reset!r}")
        if passes is not None and not isinstance(passes, PassPolicy):
            raise TypeError(f"passes must be a way to compute passes, for example FastPass(), got {passes!r:.60}")
        self.reset = reset
        self.classifier = classifier
        self.output = output
        self.seed = seed
        self.on_bad_batch = on_bad_batch
        self.passes = passes
        self.adapt_every, self.max_milliseconds = adapt_every, max_milliseconds
        self.schedules = make_schedules(adapt_every, max_milliseconds)
        #: How several processes divide the coming run; ``Trainer.adapt`` sets it.
        self.shard: Shard | None = None
        self._share: StreamShare | None = None
        self._engine: Engine | None = None
        self._constructed: frozenset[str] = frozenset()
        #: State of the last run; the one that the coming run starts from, and whether in the middle of a visit.
        self._state: dict[str, Any] = {}
        self._initial: tuple[dict[str, Any], bool] | None = None
        self._stage = ""
        self._inference_mode: bool | None = None
        self._standing: StepForward | None = None
        self._dataloader = 0

    # -- hooks for subclasses

    def protocol(self) -> dict[str, Any]:
        """Return the settings that are saved with a result, so that results can be compared."""
        tolerant = {} if self.on_bad_batch == "error" else {"on_bad_batch": self.on_bad_batch}
        return {
            "reset": self.reset,
            "prediction": self.prediction,
            "steps": getattr(self, "steps", None),
            "optimizer": None,
            "lr": None,
            "norm": getattr(self, "norm", None),
            **tolerant,
            **({} if self.passes is None else {"passes": type(self.passes).__name__}),
            **({} if self.adapt_every == 1 else {"adapt_every": self.adapt_every}),
            **({} if self.max_milliseconds is None else {"max_milliseconds": self.max_milliseconds}),
        }

    def check_batch_shard(self, module: nn.Module) -> None:
        """Check that shard='batch' gives what one process gives on a model; raises ValueError or TypeError."""
        if not self.shards_batches:
            raise ValueError(
                f"{type(self).__name__} cannot share a batch among processes: it needs the images of a batch together "
                "inside the network, or was not checked to give the same numbers. Use shard='domain', or one process"
            )

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

    def wrap(self, network: nn.Module | None = None) -> AdaptedNetwork:
        """Return a classifier as one that adapts, in place, whenever it is called, until ``release()``.

        Raises:
            ValueError: If the network lacks something that the method needs.
            RuntimeError: If the network, or a part of it, is being adapted already.
        """
        if not isinstance(self, Adapter):  # Tent.wrap(network)
            raise TypeError("wrap belongs to an adapter, not to its class: write Tent().wrap(network)")
        if not isinstance(network, nn.Module):
            raise TypeError(f"wrap takes a network (nn.Module), got {type(network).__name__}")
        return AdaptedNetwork(self, self._begin(network))

    def _begin(self, module: nn.Module, forward: Any = None) -> Engine:
        if self._engine is not None:
            raise RuntimeError(f"this {type(self).__name__} is adapting a network already: make another one")
        self._constructed = self._constructed or frozenset(vars(self))
        self._engine = Engine(self, module, global_seed() if self.seed is None else self.seed, forward)
        return self._engine

    def __getstate__(self) -> dict[str, Any]:
        # Copies are of the method as it was constructed: what a run has added belongs to its network.
        own = {name: value for name, value in vars(self).items() if name in self._constructed or not self._constructed}
        return own | {"_engine": None, "_share": None, "_standing": None, "_state": {}, "_initial": None}

    def end(self) -> None:
        """End the adaptation of a network, and keep its state."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.probe(False)
            self._state = engine.capture()
            engine.release()
            if engine.batches < MANY:
                warn_of_no_step(type(self).__name__, engine.net)

    # -- what the recorder reads

    @property
    def engine(self) -> Engine | None:
        """The engine of the run in progress."""
        return self._engine

    def state_dict(self) -> dict[str, Any]:
        """Return the adapted state: of the run in progress, or of the last one."""
        return self._engine.capture() if self._engine is not None else self._state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Start the next run from an adapted state instead of from the source."""
        if self._engine is not None:
            self._engine.restore(state_dict)
        else:
            self._state, self._initial = state_dict, (state_dict, True)

    def resume(self, state: dict[str, Any] | None) -> None:
        """Let the next run continue in the middle of the stream that a state was captured in; None lets it begin."""
        self._initial = None if state is None else (state, False)

    # -- Lightning

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make gradients possible in the coming evaluation."""
        self._stage = stage
        if stage == "fit":
            return
        adapters = [callback for callback in trainer.callbacks if isinstance(callback, Adapter)]  # type: ignore[attr-defined]
        if len(adapters) > 1:
            names = ", ".join(type(adapter).__name__ for adapter in adapters)
            raise ValueError(f"a run takes exactly one adapter, got {len(adapters)} among the callbacks: {names}")
        check_sharding(trainer, self.shard, self.reset)
        self._share = None
        if trainer.world_size > 1 and self.shard == "batch":
            self.check_batch_shard(pl_module)
        elif trainer.world_size > 1:
            self._share = share_of(trainer, each_batch=self.reset == "batch")
        loop = getattr(trainer, _LOOPS[stage])
        self._inference_mode = loop.inference_mode
        loop.inference_mode = False

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stand in for the module's forward, outside fit."""
        if self._stage == "fit":
            return
        engine = self._begin(pl_module, pl_module.forward)
        add_clock(engine, trainer)
        if trainer.world_size > 1 and self.shard == "batch":
            engine.net.shard_batches()
        with trainer.precision_plugin.forward_context():  # methods are configured under the precision of a step
            if self._share is not None and self._share.begins_later and self.configured_by_images:
                engine.prepare(first_images(trainer))
            if self._initial is not None:
                engine.restore(*self._initial)
        self._initial = None
        self._dataloader = -1
        self._standing = StepForward(pl_module, engine.scheduled, type(self).__name__)

    on_validation_start = on_predict_start = on_test_start

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Tell the engine of a boundary that the stream announces."""
        engine = self._engine
        if engine is None or self._standing is None:
            return
        self._standing.clear()
        stream = getattr(getattr(trainer, "datamodule", None), "stream", None)
        for schedule in engine.schedules:
            schedule.arrive(batch_idx)
        probe = stream is not None and stream.is_probe(batch_idx)
        engine.probe(probe)
        begins = stream.begins_visit(batch_idx) if stream is not None else dataloader_idx != self._dataloader
        if begins and not probe:
            engine.announce()
        if self._share is not None and (place := self._share.place(batch_idx)):
            engine.seek(*place)
        self._dataloader = dataloader_idx

    on_validation_batch_start = on_predict_batch_start = on_test_batch_start

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Check that the first batch was adapted to."""
        if self._engine is not None and self._engine.batches == 0:
            raise RuntimeError(
                f"{type(self).__name__} was never reached: the step of {type(pl_module).__name__} does not call "
                "self(images), so its numbers would be those of the unadapted model. Let the step call self(images), "
                "or adapt the network inside with wrap()"
            )

    on_validation_batch_end = on_predict_batch_end = on_test_batch_end

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException | None = None
    ) -> None:
        """Release the module as it was, whatever happened."""
        if self._engine is not None:
            if self._standing is not None:
                self._standing.end()
            self._standing = None
            self.end()

    on_test_end = on_validation_end = on_predict_end = on_exception

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the loop's inference mode."""
        if self._inference_mode is not None and stage in _LOOPS:
            getattr(trainer, _LOOPS[stage]).inference_mode = self._inference_mode
            self._inference_mode = None
