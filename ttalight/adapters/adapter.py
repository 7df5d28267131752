"""The base of all adaptation methods: a Lightning callback that stands in for a module's forward."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn
from torch.optim import Optimizer

from ttalight.adapters.bad_batch import OnBadBatch
from ttalight.adapters.engine import Engine
from ttalight.adapters.episodes import Episode, check_episode
from ttalight.adapters.sharding import Shard, StreamShare, check_sharding, check_strategy, prepare
from ttalight.adapters.term import Term
from ttalight.adapters.wrapper import AdaptedNetwork
from ttalight.models.network import Network
from ttalight.seeding import global_seed

__all__ = ["Adapter", "GradientAdapter"]

_ABSENT = object()
_LOOPS = {"validate": "validate_loop", "test": "test_loop", "predict": "predict_loop"}


class Adapter(Callback, ABC):
    """Adapts a classifier to the unlabelled stream that it is evaluated on.

    During ``test``, ``validate`` and ``predict`` an adapter stands in for the forward of the module under
    evaluation, so it works on any LightningModule whose step calls ``self(images)``; inside ``fit`` it does nothing.
    On a plain network, use ``wrap``. Subclasses implement ``configure`` and ``adapt``; labels never reach them.

    Args:
        reset: When to go back to the source weights: ``domain`` (at the boundaries that the stream announces),
            ``batch`` (before every batch), ``never``, or an integer N (after every N updates).
        classifier: Name of the classifier among the network's modules, where it cannot be found.
        seed: Seed of the method's random draws; by default the global one.
        on_bad_batch: What becomes of a batch with NaN or infinite pixels, of bytes instead of floats, or of a size that
            the network does not take. ``error`` stops; ``skip`` predicts with the model as it is; ``source`` predicts
            with the source model. The latter two adapt nothing to it, count it, and predict from a repaired copy:
            pixels that are not finite are 0, bytes are divided by 255, other sizes are scaled to the usual one.
        fast: Make the network's passes in the fastest way that is found when the first of them is due: as they are,
            with images in ``channels_last``, or compiled (``torch.compile``, which takes seconds to minutes). Logits
            are the same up to 1e-4 of the largest one in float32, gradients up to 5e-3 of their norm; which way is
            taken depends on the machine. Passes that ``shard='batch'`` divides stay as they are. See ``FastPass``.
        recompute: Save memory: keep only the inputs of the network's blocks in a pass with gradients, and pass each
            block once more on the way back. Numbers stay the same. Not together with ``fast``. See
            ``RecomputedBlocks``.
        guard_every: Batches from one look at what is not finite to the next. 1 looks at each batch and step before a
            weight moves, for which the host waits for the device once a step. With more it never waits in between: a
            step that is not finite, or keeps no sample, still moves nothing; a model that is not finite at the look
            goes back to what it was at the last one; bad batches are named in a warning, and have been predicted as
            they are, which ``on_bad_batch="skip"`` must allow. Not for methods that decide on the host (``SAR``,
            ``DeYO``, ``ROID``, ``CMF``), and not together with ``repeat_kept``, a ``reset`` after N updates or
            ``episode="image"``.

    Raises:
        ValueError: If an argument is out of range.
    """

    #: Published settings by benchmark; those of CIFAR are the defaults.
    published: ClassVar[dict[str, dict[str, Any]]] = {}
    #: Norm that the gradient of a step is cut down to; None cuts nothing.
    clip_norm: float | None = None
    #: Whether logits come from before or after the update.
    prediction: str = "before"
    #: Whether shard='batch' gives what one process gives: ``adapt`` has to reach the model through ``net`` alone.
    shards_batches: ClassVar[bool] = False
    #: Whether ``configure`` looks at the images of the first batch.
    configured_by_images: bool = False
    #: Whether a step needs numbers on the host, to pick samples for another pass or to reset.
    decides_on_host: ClassVar[bool] = False

    def __init__(
        self,
        reset: Literal["domain", "batch", "never"] | int = "domain",
        classifier: str | None = None,
        seed: int | None = None,
        on_bad_batch: OnBadBatch = "error",
        fast: bool = False,
        recompute: bool = False,
        guard_every: int = 1,
    ) -> None:
        if on_bad_batch not in ("error", "skip", "source"):
            raise ValueError(f"on_bad_batch must be 'error', 'skip' or 'source', got {on_bad_batch!r}")
        if reset not in ("domain", "batch", "never") and not (isinstance(reset, int) and reset >= 1):
            raise ValueError(f"reset must be 'domain', 'batch', 'never' or a number of updates >= 1, got {reset!r}")
        if fast and recompute:
            raise ValueError(
                "fast=True and recompute=True exclude each other: a compiled pass decides itself what it keeps. Leave "
                "one of them out"
            )
        if guard_every < 1:
            raise ValueError(f"guard_every must be at least 1, got {guard_every}")
        self.reset = reset
        self.classifier = classifier
        self.seed = seed
        self.on_bad_batch = on_bad_batch
        self.fast = fast
        self.recompute = recompute
        self.guard_every = guard_every
        #: How several processes divide the coming run; ``Trainer.adapt`` sets it.
        self.shard: Shard | None = None
        self._share: StreamShare | None = None
        self._several = False
        self._engine: Engine | None = None
        self._state: dict[str, Any] = {}
        self._resume = False
        self._checkpoint: dict[str, Any] | None = None
        self._stage = ""
        self._inference_mode: bool | None = None
        self._own_forward: Any = _ABSENT
        self._answered: tuple[Tensor, int, Any] | None = None
        self._dataloader = 0

    # -- what a method says

    @abstractmethod
    def configure(self, net: Network) -> None:
        """Set norm modes and free the parameters to adapt; called once, when the first batch is there."""

    @abstractmethod
    def adapt(self, net: Network, images: Tensor) -> Tensor:
        """Adapt to a batch and return its logits.

        Args:
            net: The network.
            images: (B, 3, H, W).
        """

    def method_state(self) -> dict[str, Tensor]:
        """Return the tensors that the method changes in place; they are reset and saved with the weights."""
        return {}

    def make_optimizer(self, parameters: list[nn.Parameter]) -> Optimizer:
        """Return a new optimizer for the free parameters."""
        raise TypeError(f"{type(self).__name__} frees parameters but has no optimizer: derive it from GradientAdapter")

    def protocol(self) -> dict[str, Any]:
        """Return what a result must say about this method to be comparable."""
        tolerant = {} if self.on_bad_batch == "error" else {"on_bad_batch": self.on_bad_batch}
        return {
            "reset": self.reset,
            "prediction": self.prediction,
            "steps": getattr(self, "steps", None),
            "optimizer": None,
            "lr": None,
            "norm": getattr(self, "norm", None),
            **tolerant,
            **({"fast": True} if self.fast else {}),
            **({"guard_every": self.guard_every} if self.guard_every > 1 else {}),
        }

    def check_defaults(self, classes: int) -> None:
        """Warn when settings published for CIFAR meet a classifier of ImageNet's kind."""

    def check_batch_shard(self, module: nn.Module) -> None:
        """Make sure that shard='batch' gives what one process gives.

        Args:
            module: The model.

        Raises:
            ValueError: If this method does something to a batch that cannot be divided.
            TypeError: If the model cannot be divided.
        """
        if not self.shards_batches:
            raise ValueError(
                f"{type(self).__name__} cannot share a batch among processes: it needs the images of a batch together "
                "inside the network, or was not checked to give the same numbers. Use shard='domain', or one process"
            )

    # -- plain networks

    def wrap(self, network: nn.Module) -> AdaptedNetwork:
        """Return the network as one that adapts whenever it is called.

        Args:
            network: Any classifier; it is adapted in place until ``release()``.
        """
        return AdaptedNetwork(self._begin(network))

    def _begin(self, module: nn.Module) -> Engine:
        if self._engine is not None:
            raise RuntimeError(f"this {type(self).__name__} is adapting a network already: make another one")
        self._engine = Engine(self, module, global_seed() if self.seed is None else self.seed)
        return self._engine

    def _end(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            engine.probe(False)
            self._state = engine.state_dict()
            engine.release()

    # -- what the recorder reads

    @property
    def engine(self) -> Engine | None:
        """The engine of the run in progress."""
        return self._engine

    def state_dict(self) -> dict[str, Any]:
        """Return the adapted state: of the run in progress, or of the last one."""
        return self._engine.state_dict() if self._engine is not None else self._state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Start the next run from an adapted state instead of from the source."""
        if self._engine is not None:
            self._engine.load_state_dict(state_dict)
        else:
            self._state = state_dict
            self._resume = True

    def resume(self, checkpoint: dict[str, Any] | None) -> None:
        """Let the next run go on in the middle of the one that ``engine.checkpoint()`` was taken in.

        Args:
            checkpoint: What it returned; None lets the next run begin anew.
        """
        self._checkpoint = checkpoint

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
        check_strategy(trainer)
        self._share, self._several = None, trainer.world_size > 1
        if self._several:
            self._divide(trainer, pl_module)
        loop = getattr(trainer, _LOOPS[stage])
        self._inference_mode = loop.inference_mode
        loop.inference_mode = False

    def _divide(self, trainer: Trainer, module: LightningModule) -> None:
        check_sharding(self, trainer, module)
        if self.shard == "domain":
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            self._share = StreamShare(data.stream, trainer.global_rank, trainer.world_size, self.reset == "batch")
            data.share = self._share.numbers

    def _start(self, trainer: Trainer, module: LightningModule) -> None:
        if self._stage == "fit":
            return
        engine = self._begin(module)
        if self._several and self.shard == "batch":
            engine.net.deal_out()
        if self._share is not None and self._share.begins_later and self.configured_by_images:
            prepare(engine, trainer)
        if self._resume:
            engine.load_state_dict(self._state)
            self._resume = False
        if self._checkpoint is not None:
            engine.go_on(self._checkpoint)
            self._checkpoint = None
        self._dataloader = -1
        self._own_forward = vars(module).get("forward", _ABSENT)
        module.forward = self._stand_in  # type: ignore[method-assign]

    def _stand_in(self, images: Tensor) -> Any:
        engine = self._engine
        assert engine is not None, "the stand-in is in place only while an engine runs"
        if not isinstance(images, Tensor):
            raise TypeError(
                f"{type(self).__name__} stands in for forward(images) and was given a {type(images).__name__}: let the "
                "module's step pass the image tensor alone. Lightning's default predict_step passes the whole batch: "
                "write predict_step(self, batch, batch_idx) that returns self(batch[0])"
            )
        version = 0 if images.is_inference() else images._version
        if self._answered is not None and self._answered[0] is images and self._answered[1] == version:
            return self._answered[2]
        logits = engine(images)
        self._answered = (images, version, logits)
        return logits

    def _batch_start(self, trainer: Trainer, batch_idx: int, dataloader_idx: int) -> None:
        engine = self._engine
        if engine is None:
            return
        self._answered = None
        stream = getattr(getattr(trainer, "datamodule", None), "stream", None)
        probe = stream is not None and stream.is_probe(batch_idx)
        engine.probe(probe)
        begins = stream.begins_visit(batch_idx) if stream is not None else dataloader_idx != self._dataloader
        if begins and not probe:
            engine.announce()
        if self._share is not None:
            self._share.place(engine, batch_idx)
        self._dataloader = dataloader_idx

    def _batch_end(self, module: LightningModule) -> None:
        engine = self._engine
        if engine is not None and engine.batches == 0:
            raise RuntimeError(
                f"{type(self).__name__} was never reached: the step of {type(module).__name__} does not call "
                "self(images), so its numbers would be those of the unadapted model. Let the step call self(images), "
                "or adapt the network inside with wrap()"
            )

    def _stop(self, module: LightningModule) -> None:
        if self._engine is None:
            return
        if self._own_forward is _ABSENT:
            vars(module).pop("forward", None)
        else:
            module.forward = self._own_forward  # type: ignore[method-assign]
        self._answered, self._own_forward = None, _ABSENT
        self._end()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stand in for the module's forward."""
        self._start(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stand in for the module's forward, outside fit."""
        self._start(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stand in for the module's forward."""
        self._start(trainer, pl_module)

    def on_test_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Tell the engine of a boundary that the stream announces."""
        self._batch_start(trainer, batch_idx, dataloader_idx)

    on_validation_batch_start = on_predict_batch_start = on_test_batch_start

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Make sure that the first batch was adapted to."""
        self._batch_end(pl_module)

    on_validation_batch_end = on_predict_batch_end = on_test_batch_end

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the module back as it was."""
        self._stop(pl_module)

    on_validation_end = on_predict_end = on_test_end

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the module back as it was, whatever happened."""
        self._stop(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the loop its inference mode back."""
        if self._inference_mode is not None and stage in _LOOPS:
            getattr(trainer, _LOOPS[stage]).inference_mode = self._inference_mode
            self._inference_mode = None


class GradientAdapter(Adapter):
    """Base of the methods that take gradient steps.

    Args:
        lr: Learning rate of the published optimizer.
        optimizer: Another optimizer, with its own learning rate; not together with ``lr``.
        steps: Gradient steps for each batch.
        clip_norm: Norm that the gradient of all free parameters together is cut down to in each step; no limit by
            default.
        terms: Plug-in terms that are added to the loss of each sample.
        episode: With ``reset="batch"``, what is adapted to from the source: the ``batch`` together, or each ``image``
            of it by itself. The latter gives what batches of one image give, up to rounding, in less time: images are
            passed together, each with weights of its own (``torch.func``). For ``Tent``, ``RPL`` and
            ``TestTimeTraining`` on tasks whose loss draws nothing and passes an image at most twice. The model's own
            weights stay the source's.
        episode_memory: MiB that the episodes computed at the same time may take, by an estimate.
        kwargs: See ``Adapter``.

    Raises:
        ValueError: If both ``lr`` and ``optimizer`` are given, or one is out of range; here, or at the first batch, if
            episodes of one image cannot be computed side by side.
    """

    #: Whether ``episode='image'`` is possible: the loss of an image depends on it alone and draws nothing, ``adapt``
    #: reaches the model through ``net`` alone, and steps have no penalty and no pull.
    separable: ClassVar[bool] = False
    #: Momentum of the published optimizer where that is SGD; None for Adam.
    sgd_momentum: ClassVar[float | None] = None

    def __init__(
        self,
        lr: float | None = None,
        optimizer: OptimizerCallable | None = None,
        steps: int = 1,
        clip_norm: float | None = None,
        terms: list[Term] | None = None,
        episode: Literal["batch", "image"] = "batch",
        episode_memory: int = 512,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if lr is not None and optimizer is not None:
            raise ValueError("give lr (for the published optimizer) or optimizer (with its own lr), not both")
        if lr is not None and lr < 0:
            raise ValueError(f"lr must be at least 0, got {lr}")
        if steps < 0:
            raise ValueError(f"steps must be at least 0, got {steps}")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"clip_norm must be positive, or None for no limit, got {clip_norm}")
        self.steps = steps
        self.clip_norm = clip_norm
        self.terms = terms or []
        self.episode: Episode = episode
        self.episode_memory = episode_memory
        check_episode(self)
        self._default_lr = lr is None and optimizer is None
        self._lr = self.published["cifar"]["lr"] if lr is None else lr
        self._make = optimizer

    def make_optimizer(self, parameters: list[nn.Parameter]) -> Optimizer:
        """Return the optimizer asked for: by default Adam, or SGD where that is what was published."""
        if self._make is not None:
            return self._make(parameters)
        if self.sgd_momentum is not None:
            return torch.optim.SGD(parameters, lr=self._lr, momentum=self.sgd_momentum, foreach=True)
        return torch.optim.Adam(parameters, lr=self._lr, foreach=True)

    def protocol(self) -> dict[str, Any]:
        """Return what a result must say about this method to be comparable."""
        optimizer = self.make_optimizer([nn.Parameter(torch.zeros(1))])
        lr = float(optimizer.param_groups[0]["lr"])
        clipped = {} if self.clip_norm is None else {"clip_norm": self.clip_norm}
        apart = {"episode": "image"} if self.episode == "image" else {}
        added = {"terms": [repr(term) for term in self.terms]} if self.terms else {}
        return super().protocol() | {"optimizer": type(optimizer).__name__, "lr": lr} | clipped | added | apart

    def check_batch_shard(self, module: nn.Module) -> None:
        """Make sure that shard='batch' gives what one process gives; see ``Adapter``."""
        super().check_batch_shard(module)
        if self.episode == "image":
            raise ValueError("episode='image' needs no other images: use shard='domain', which divides batches")

    def check_defaults(self, classes: int) -> None:
        """Warn when settings published for CIFAR meet a classifier of ImageNet's kind."""
        cifar, imagenet = self.published["cifar"], self.published.get("imagenet")
        if classes >= 200 and self._default_lr and imagenet != cifar:
            name = type(self).__name__
            others = "for ImageNet none are" if imagenet is None else f"those published for ImageNet are {imagenet}"
            warnings.warn(
                f"{name} runs with its settings for CIFAR on {classes} classes; {others} ({name}.published)",
                stacklevel=2,
            )
