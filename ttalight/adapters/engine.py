"""The one engine behind every adaptation method: passes, steps, draws, snapshots and resets."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ttalight.adapters.bad_batch import BadBatches
from ttalight.adapters.descent import Descent
from ttalight.adapters.episodes import Episodes
from ttalight.adapters.guard import READ, check_guard, is_finite
from ttalight.adapters.parameter_vector import flatten
from ttalight.distributed import average
from ttalight.models.fast_pass import FastPass
from ttalight.models.network import Network
from ttalight.models.recompute import RecomputedBlocks
from ttalight.seeding import derive_seed

if TYPE_CHECKING:
    from ttalight.adapters.adapter import Adapter

__all__ = ["Engine"]

_COUNTERS = ("visit", "batch", "batches", "updates", "skipped", "recoveries", "bad_batches", "_updates_at_reset")
_adapted: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class Engine:
    """Runs one method on one model and leaves the model as it was.

    Args:
        adapter: The method.
        module: The model; its weights change in place until ``release``.
        seed: Draws are keyed by this and by their place in the stream.

    Raises:
        RuntimeError: If another method is adapting the model already.
        ValueError: If options of the method exclude each other.
    """

    def __init__(self, adapter: Adapter, module: nn.Module, seed: int) -> None:
        if module in _adapted:
            raise RuntimeError(f"{type(module).__name__} is being adapted already: release the first adapter before")
        self.adapter = adapter
        self.net = Network(module, classifier=adapter.classifier)
        self.net.step, self.net.backward, self.net.descend = self.step, self.backward, self.descend
        self.net.draws, self.net.recover = self.draws, self.recover
        if adapter.fast:
            self.net.run = FastPass(self.net)
        check_guard(adapter)
        self.bad = BadBatches(self)
        self.episodes = Episodes(self) if getattr(adapter, "episode", "batch") == "image" else None
        self._recomputed = RecomputedBlocks(self.net) if adapter.recompute else None
        self.seed = seed
        #: What moves the free parameters, if there are any.
        self.descent: Descent | None = None
        self.configured = False
        #: Where the next batch stands: visit of the stream, batch in the visit.
        self.visit, self.batch = -1, 0
        self.batches = self.updates = self.skipped = self.recoveries = 0
        #: Batches that were predicted and not adapted to, see ``Adapter``'s ``on_bad_batch``.
        self.bad_batches = 0
        self.backwards = 0.0
        #: What the last step showed: loss, gradient norm, fraction of samples kept, and whether the method recovered.
        self.last: dict[str, float] = {}
        self._updates_at_reset = 0
        self._boundary = False
        self._collapsed: Tensor | None = None
        #: What the method can change, by name; the values that a reset goes back to; whether it may differ from them.
        self.live: dict[str, Tensor] = {}
        self.source: list[Tensor] = []
        self.touched = False
        self._pending: dict[str, Any] | None = None
        self._probing = False
        self._aside: dict[str, Any] | None = None
        self._checkpoint: dict[str, Any] | None = None
        _adapted.add(module)
        self._training = [(part, part.training) for part in module.modules()]
        self._flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in module.parameters()]
        module.eval()
        for norm in self.net.norms:
            norm.attach()
        if self._recomputed is not None:
            self._recomputed.attach()

    @property
    def optimizer(self) -> torch.optim.Optimizer | None:
        """The optimizer of the free parameters, if there are any."""
        return None if self.descent is None else self.descent.optimizer

    # -- a batch

    def announce(self) -> None:
        """Note that the next batch is the first of a new visit."""
        self._boundary = self.visit >= 0
        self.visit += 1
        self.batch = 0

    def go_to(self, visit: int, batch: int) -> None:
        """Note where the next batch stands, in a process that goes through a part of the stream.

        Args:
            visit: Number of the announced visit.
            batch: Number of the batch in the visit.
        """
        self.visit, self.batch = visit, batch

    def prepare(self, images: Tensor) -> None:
        """Configure the method by a batch that another process adapts to.

        Args:
            images: (B, 3, H, W), the first batch of the stream.
        """
        self.net.precision = _ambient_autocast(images.device.type)
        with torch.inference_mode(False), torch.enable_grad(), _no_autocast(images.device.type):
            self.net.images = images.clone() if images.is_inference() else images
            self._configure()
        self.net.forget()
        self.net.forwards = self.backwards = 0.0  # the other process counts them

    def probe(self, on: bool) -> None:
        """Enter or leave a probe: the method treats its batches as any others, and nothing of it stays.

        Weights, method state, counters and with them the keys of all draws go on from where the probe began.
        """
        self._probing = on
        if not on and self._checkpoint is not None and self._checkpoint["aside"] is not None:
            self.go_on({**self._checkpoint, "state": self._checkpoint["aside"], "aside": None})
        if not on and self._aside is not None:
            self.load_state_dict(self._aside)
            self._aside = None

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled step would trace the optimizer too, and round otherwise
    def __call__(self, images: Tensor) -> Any:
        """Adapt to a batch and return its logits, free of any graph, in the structure that the model returns."""
        try:
            logits = self._adapt(images)
            if self.batches == 1:
                self.adapter.check_defaults(logits.shape[1])
            return self.net.put_back(logits, after=getattr(self.adapter, "prediction", "before") == "after")
        finally:
            self.net.forget()

    def _adapt(self, images: Tensor) -> Tensor:
        self.net.precision = _ambient_autocast(images.device.type)
        with torch.inference_mode(False), torch.enable_grad(), _no_autocast(images.device.type):
            if images.is_inference():
                images = images.clone()
            fault = self.bad.fault(images)
            if fault is not None and self.episodes is not None and len(images) > 1:
                if self.adapter.on_bad_batch == "error":
                    raise fault
                return self._one_by_one(images)
            if fault is not None:
                images = self.bad.repair(images, fault)
            self.net.images = images
            if self._checkpoint is not None:
                self._restore(self._checkpoint)
            if self._probing and self._aside is None and (fault is None or self.configured):
                if not self.configured:
                    self._configure()
                self._aside = self.state_dict()
            if self._pending is not None:  # its counters say whether a reset is due
                self._configure()
            if self.visit < 0:
                self.announce()
            if self._reset_is_due():
                self.reset()
            self._boundary = False
            self.last = {}
            self.net.unclaimed = 0.0
            self.net.readings = {}
            logits = (self._follow(images) if fault is None else self.bad.only_predict(images)).detach()
        self.batch += 1
        self.batches += 1
        return logits

    def _follow(self, images: Tensor) -> Tensor:
        if not self.configured:
            self._configure()
        return self.bad.attempt(images, self._let_adapt)

    def _let_adapt(self, images: Tensor) -> Tensor:
        if self.episodes is not None and len(images) > 1:
            return self.episodes(images)
        self.touched = True
        return self.adapter.adapt(self.net, images)

    def _one_by_one(self, images: Tensor) -> Tensor:
        """Return the logits of images that are batches of their own, some of which cannot be adapted to."""
        net, place = self.net, (self.batch, self.batches)
        passes = net.forwards, self.backwards
        logits: list[Tensor] = []
        readings: list[dict[int, Tensor]] = []
        for image in images.tensor_split(len(images)):
            self.batch, self.batches = place
            logits.append(self._adapt(image))
            readings.append(net.readings)
        net.forwards = passes[0] + (net.forwards - passes[0]) / len(images)
        self.backwards = passes[1] + (self.backwards - passes[1]) / len(images)
        net.readings = {steps: torch.cat([reading[steps] for reading in readings]) for steps in readings[0]}
        return torch.cat(logits)

    def abandon(self, passes: tuple[float, float]) -> None:
        """Forget a batch that was begun, but for what has moved by it.

        Args:
            passes: Forwards and backwards before it.
        """
        net = self.net
        net.forwards, self.backwards = passes
        net.unclaimed, net.readings = 0.0, {}
        for parameter in net.parameters:
            parameter.grad = None
        self._collapsed = None

    @contextmanager
    def unmoved(self) -> Iterator[None]:
        """Give everything that the method can change its present value back, bit for bit."""
        kept = [value.detach().clone() for value in self.live.values()]
        try:
            yield
        finally:
            if kept:
                with torch.no_grad():
                    torch._foreach_copy_(list(self.live.values()), kept)

    def draws(self, step: int = 0) -> torch.Generator:
        """Return the generator for a step's random draws, keyed by (seed, visit, batch, step)."""
        key = derive_seed(self.seed, "adapt", self.visit, self.batch, step)
        return self.net.generator.manual_seed(key)

    def step(self, losses: Tensor, weights: Tensor | None = None, penalty: Tensor | None = None) -> None:
        """Reduce per-sample losses, go backward and move the free parameters: ``backward``, then ``descend``.

        Args:
            losses: (B,), or a scalar that is a mean already.
            weights: (B,); a weight of zero drops the sample. The loss is the mean of weighted losses over those kept.
            penalty: A scalar that does not depend on the samples, added to the mean.

        Raises:
            RuntimeError: If the loss does not depend on the free parameters.
        """
        self.backward(losses, weights, penalty)
        self.descend()

    def backward(self, losses: Tensor, weights: Tensor | None = None, penalty: Tensor | None = None) -> None:
        """Reduce per-sample losses and leave the gradient at the free parameters; see ``step``."""
        loss, kept = _reduce(losses, weights)
        self._leaves_out = weights is not None
        if penalty is not None:
            loss = loss + penalty
        if loss.requires_grad:
            loss.backward(inputs=self.net.parameters)  # type: ignore[no-untyped-call]
        if all(parameter.grad is None for parameter in self.net.parameters):
            raise RuntimeError(
                "the loss does not depend on the parameters to adapt: does the model's forward run under no_grad, or "
                "detach its outputs?"
            )
        if self.net.is_dealt_out:
            average([parameter.grad for parameter in self.net.parameters if parameter.grad is not None])
        self.backwards += self.net.unclaimed
        self.net.unclaimed = 0.0
        self._reduced = loss.detach(), kept

    def descend(self, pulled: tuple[Tensor, Tensor] | None = None) -> None:
        """Move the free parameters by the gradient that ``backward`` left.

        Args:
            pulled: A gradient to add, one vector for all free parameters, and the part of the loss that it is of.

        A step whose loss or gradient is not finite, or that keeps no sample, changes nothing and is counted in
        ``skipped``. One host synchronisation.
        """
        parameters, descent = self.net.parameters, self.descent
        assert descent is not None, "a method that steps has free parameters"
        gradient = flatten([torch.zeros_like(p) if (grad := p.grad) is None else grad for p in parameters])
        loss, kept = self._reduced
        if pulled is not None:
            gradient += pulled[0]
            loss = loss + pulled[1]
        norm = torch.linalg.vector_norm(gradient)
        values = dict(zip(READ, (loss, norm, kept), strict=True))
        if self._collapsed is not None:
            values["recovered"] = self._collapsed
        seen = self.bad.guard.read(list(values.values()))
        limit = self.adapter.clip_norm
        as_it_was = pulled is None and limit is None
        moves = seen is None or (all(map(is_finite, seen)) and seen[2] > 0)
        if moves and limit is not None:
            gradient *= (limit / (norm + 1e-6)).clamp(max=1.0)
        if seen is None:
            # A step that keeps no sample would still move by its momentum.
            descent.move(gradient, as_it_was, when=(loss + norm).isfinite() & (kept > 0), must=self._leaves_out)
        else:
            self.last = dict(zip(values, seen, strict=True))
            self.net.kept = seen[2]
            self.bad.guard.note_step(moves)
            if moves:
                descent.move(gradient, as_it_was)
            self.updates += moves
            self.skipped += not moves
        for parameter in parameters:
            parameter.grad = None
        self._collapsed = None
        if self.last.get("recovered"):
            self.recover()

    # -- states

    def _configure(self) -> None:
        adapter, net = self.adapter, self.net
        if getattr(adapter, "terms", None):
            _ = net.head  # from here on passes keep the features that terms read
        adapter.configure(net)
        if net.parameters:
            self.descent = Descent(adapter.make_optimizer, net.parameters)
        names = {id(parameter): name for name, parameter in net.module.named_parameters()}
        names |= {id(parameter): f"own.{name}" for name, parameter in net.own.items()}
        self.live = {names[id(parameter)]: parameter for parameter in net.parameters}
        for norm in net.norms:
            if norm.mode == "ema":
                self.live |= {f"{norm.name}.statistics.{i}": value for i, value in enumerate(norm.statistics)}
        self.live |= {f"method.{name}": value for name, value in adapter.method_state().items()}
        self.source = [value.detach().clone() for value in self.live.values()]
        net.source = self.source[: len(net.parameters)]
        self.bad.guard.configure(list(self.live.values()), self.source, steady=len(net.parameters))
        self.configured = True
        if self._pending is not None:
            self.load_state_dict(self._pending)

    def _reset_is_due(self) -> bool:
        reset = self.adapter.reset
        if reset == "batch":
            return True
        if reset == "domain":
            return self._boundary
        return isinstance(reset, int) and self.updates - self._updates_at_reset >= reset

    @torch.no_grad()
    def reset(self) -> None:
        """Restore weights, statistics, optimizer and method state to the source, bit for bit, and nothing else."""
        if self._pending is not None:
            self._pending = {**self._pending, "reset": True}
        self._updates_at_reset = self.updates
        if not self.touched:
            return
        if self.adapter.reset != "batch":
            self.bad.close()
        self.touched = False
        self.net.kept = 1.0
        if self.live:
            torch._foreach_copy_(list(self.live.values()), self.source)
        if self.descent is not None:
            self.descent.reset()

    def recover(self, when: Tensor | None = None) -> None:
        """Go back to the source in the middle of a batch, on the method's own decision.

        Args:
            when: Boolean scalar: the decision is then read, and carried out, together with what the coming
                ``descend`` reads, so that it costs no further host synchronisation. None decides now.
        """
        if when is not None:
            self._collapsed = when
            return
        self.reset()
        self.recoveries += 1
        self.touched = True

    def state_dict(self) -> dict[str, Any]:
        """Return copies of everything the method has changed: tensors and plain numbers only, and finite."""
        if self._pending is not None:
            return copy.deepcopy(self._pending)
        self.bad.close()
        self.bad.check_state()
        return {
            "tensors": {name: value.detach().clone() for name, value in self.live.items()},
            "optimizer": None if self.descent is None else self.descent.state_dict(),
            "counters": {name: getattr(self, name) for name in _COUNTERS},
            "kept": self.net.kept,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state; before the first batch it is kept until the method is configured.

        Raises:
            ValueError: If the state is another method's or another network's.
        """
        if not self.configured:
            self._pending = state
            return
        tensors: dict[str, Tensor] = state["tensors"]
        if {k: v.shape for k, v in tensors.items()} != {k: v.shape for k, v in self.live.items()}:
            odd = sorted(tensors.keys() ^ self.live.keys())
            raise ValueError(
                f"the adaptation state does not fit {type(self.adapter).__name__} on "
                f"{type(self.net.module).__name__}: "
                + (f"only on one side: {', '.join(odd[:5])}" if odd else "shapes differ")
            )
        self.bad.guard.drop()
        for name, value in self.live.items():
            value.copy_(tensors[name])
        if self.descent is not None and state["optimizer"] is not None:
            self.descent.load_state_dict(state["optimizer"])
        self._set_counters(state["counters"])
        self.net.kept = state["kept"]
        self._pending, self.touched = None, True
        if state.get("reset"):  # asked for before the method was configured
            self.reset()

    def checkpoint(self) -> dict[str, Any]:
        """Return what another engine needs to ``go_on`` after the last batch: tensors and plain values only.

        That is more than ``state_dict``: what a reset goes back to where a method makes it from its first batch, the
        place in a probe, and the counts of passes.
        """
        method = {name: value.clone() for name, value in zip(self.live, self.source, strict=True)}
        return {
            "state": self.state_dict(),
            "source": {name: value for name, value in method.items() if name.startswith("method.")},
            "aside": self._aside,
            "shape": list(self.bad.usual or ()),
            "passes": [self.net.forwards, self.backwards],
        }

    def go_on(self, checkpoint: dict[str, Any]) -> None:
        """Go on in the middle of a run, announcements and resets that are due with the next batch included.

        Args:
            checkpoint: What ``checkpoint()`` of an engine of the same method and model returned.
        """
        self._checkpoint = checkpoint
        self.bad.usual = tuple(checkpoint["shape"]) or None
        self._set_counters(checkpoint["state"]["counters"])

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        self._checkpoint = None
        counters = {name: getattr(self, name) for name in _COUNTERS}  # a boundary may have been announced since
        self._configure()
        self.load_state_dict(checkpoint["state"])
        self._set_counters(counters)
        for name, value in zip(self.live, self.source, strict=True):
            if name in checkpoint["source"]:
                value.copy_(checkpoint["source"][name])
        self._aside = checkpoint["aside"]
        self.net.forwards, self.backwards = checkpoint["passes"]

    def _set_counters(self, counters: dict[str, int]) -> None:
        for name, count in counters.items():
            setattr(self, name, count)

    def to(self, device: torch.device) -> None:
        """Move the model and all adaptation state to a device."""
        state = self.state_dict() if self.configured else None
        touched = self.touched
        self.reset()  # a method is configured from the source
        self.net.module.to(device)
        self.net.generator = torch.Generator(device=device)
        if state is None:
            return
        source = [value.to(device) for value in self.source]
        self.configured = False
        self._configure()
        self.source, self.net.source = source, source[: len(self.net.parameters)]
        self.load_state_dict(state)
        self.touched = touched

    def release(self) -> None:
        """Give the model back as it was: weights, statistics, forwards, flags, gradients."""
        self.bad.close()
        self.reset()
        for norm in self.net.norms:
            norm.detach()
        if self._recomputed is not None:
            self._recomputed.detach()
        self.net.release()
        for part, training in self._training:
            part.training = training
        for parameter, requires_grad, gradient in self._flags:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        _adapted.discard(self.net.module)


def _reduce(losses: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the mean loss over kept samples and the fraction kept."""
    if weights is None:
        return losses.mean(), losses.new_ones(())
    kept = (weights != 0).sum()
    return (losses * weights).sum() / kept.clamp(min=1), kept / weights.numel()


def _no_autocast(device_type: str) -> AbstractContextManager[Any]:
    on = torch.is_autocast_enabled(device_type)
    return torch.autocast(device_type, enabled=False) if on else nullcontext()


def _ambient_autocast(device_type: str) -> Callable[[], AbstractContextManager[Any]]:
    """Return a maker of the autocast context that is in force now, for the network's passes."""
    if not torch.is_autocast_enabled(device_type):
        return nullcontext
    dtype = torch.get_autocast_dtype(device_type)
    # Without the cache a cast made under no_grad cannot be mistaken for one that carries gradients.
    return partial(torch.autocast, device_type, dtype=dtype, cache_enabled=False)
