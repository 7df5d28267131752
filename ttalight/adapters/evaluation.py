"""The Lightning half of an adapter: an engine stands in for the forward of the module under evaluation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial
from typing import Any, ClassVar

from lightning import Callback, LightningModule, Trainer
from torch import nn

from ttalight.adapters.sharding import Shard, check_sharding
from ttalight.adapters.timing import add_clock
from ttalight.data.streams.partition import StreamShare
from ttalight.engine.engine import Engine
from ttalight.engine.method import Reset
from ttalight.engine.schedule import run_scheduled
from ttalight.errors import InputError, UsageError
from ttalight.models.attaching.stand_in import StepForward

__all__ = ["EvaluationCallback"]

_LOOPS = {"validate": "validate_loop", "test": "test_loop", "predict": "predict_loop"}


class EvaluationCallback(Callback, ABC):
    """Drives an engine in ``test``, ``validate`` and ``predict``, and does nothing inside ``fit``.

    It makes gradients possible in the loop, stands in for the module's forward, and tells the engine where the stream's
    visits and probes begin. Subclasses say how an adaptation begins and ends.
    """

    reset: Reset
    #: Whether shard='batch' gives what one process gives: ``adapt`` has to reach the model through ``net`` alone.
    shards_batches: ClassVar[bool] = False
    #: Whether ``configure`` uses the images of the first batch.
    configured_by_images: bool = False

    def __init__(self) -> None:
        #: How several processes divide the coming run; ``Trainer.adapt`` sets it.
        self.shard: Shard | None = None
        self._share: StreamShare | None = None
        self._engine: Engine | None = None
        #: State of the last run; the one that the coming run starts from, and whether in the middle of a visit.
        self._state: dict[str, Any] = {}
        self._initial: tuple[dict[str, Any], bool] | None = None
        self._stage = ""
        self._inference_mode: bool | None = None
        self._standing: StepForward | None = None
        self._dataloader = 0

    @property
    def engine(self) -> Engine | None:
        """The engine of the run in progress."""
        return self._engine

    @abstractmethod
    def begin(self, module: nn.Module, forward: Any = None) -> Engine:
        """Return the engine of a new adaptation, which is ``engine`` until ``end``.

        Args:
            module: The network.
            forward: What a pass calls, by default the network itself.
        """

    def end(self) -> None:
        """End the adaptation of a network, and keep its state."""
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.probe(False)
            self._state = engine.capture()
            engine.release()

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

    def check_batch_shard(self, module: nn.Module) -> None:
        """Check that shard='batch' gives the numbers of one process on a model.

        Raises:
            ValueError: If it does not.
            TypeError: If the model does not support it.
        """
        if not self.shards_batches:
            raise InputError(
                f"{type(self).__name__} cannot share a batch among processes: it needs the images of a batch together "
                "inside the network, or was not checked to give the same numbers. Use shard='domain', or one process"
            )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make gradients possible in the coming evaluation."""
        self._stage = stage
        if stage == "fit":
            return
        adapters = [callback for callback in trainer.callbacks if isinstance(callback, EvaluationCallback)]  # type: ignore[attr-defined]
        if len(adapters) > 1:
            names = ", ".join(type(adapter).__name__ for adapter in adapters)
            raise InputError(f"a run takes exactly one adapter, got {len(adapters)} among the callbacks: {names}")
        check_sharding(trainer, self.shard, self.reset)
        self._share = None
        if trainer.world_size > 1 and self.shard == "batch":
            self.check_batch_shard(pl_module)
        elif trainer.world_size > 1:
            self._share = _share_of(trainer, each_batch=self.reset == "batch")
        loop = getattr(trainer, _LOOPS[stage])
        self._inference_mode = loop.inference_mode
        loop.inference_mode = False

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stand in for the module's forward, outside fit."""
        if self._stage == "fit":
            return
        engine = self.begin(pl_module, pl_module.forward)
        add_clock(engine, trainer)
        if trainer.world_size > 1 and self.shard == "batch":
            engine.net.shard_batches()
        with trainer.precision_plugin.forward_context():  # methods are configured under the precision of a step
            if self._share is not None and self._share.begins_later and self.configured_by_images:
                engine.prepare(_first_images(trainer))
            if self._initial is not None:
                engine.restore(*self._initial)
        self._initial = None
        self._dataloader = -1
        self._standing = StepForward(pl_module, partial(run_scheduled, engine), type(self).__name__)

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
            raise UsageError(
                f"{type(self).__name__} was never reached: the step of {type(pl_module).__name__} does not call "
                "self(images), so its numbers would be those of the unadapted model. Let the step call self(images), "
                "or adapt the network inside with wrap()"
            )

    on_validation_batch_end = on_predict_batch_end = on_test_batch_end

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException | None = None
    ) -> None:
        """Release the module as it was, after an evaluation or an exception."""
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


def _share_of(trainer: Trainer, each_batch: bool) -> StreamShare:
    """Give this process's part of the stream to the data module, and return it.

    Args:
        trainer: The trainer.
        each_batch: Whether the method starts every batch from the source.
    """
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    share = StreamShare(data.stream, trainer.global_rank, trainer.world_size, each_batch)
    data.share = share.numbers
    return share


def _first_images(trainer: Trainer) -> Any:
    """Return the images of the first batch of the whole stream, on the device and in the precision of a step."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    return trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(data.first_batch()))[0]
