"""The engine of adaptation: runs a method on a network, batch by batch."""

from __future__ import annotations

import copy
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ttalight.engine.adaptive_network import AdaptiveNetwork, Counters
from ttalight.engine.bad_batch import BatchCheck
from ttalight.engine.method import Method
from ttalight.engine.state import State, difference
from ttalight.models.call import Call
from ttalight.models.norm import find_norms

__all__ = ["Engine", "release"]

#: Engines by the modules that they adapt, parts included.
_engines: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Engine]] = weakref.WeakKeyDictionary()


def release(network: nn.Module) -> nn.Module:
    """Stop the adaptation of a network whose handle is lost, and return the network as it was before.

    Args:
        network: A network that ``Adapter.wrap`` was given, or a part of one; one that is not adapted stays as it is.
    """
    for part in network.modules():
        engine = _engine_of(part)
        if engine is not None:
            engine.release()
    return network


def _engine_of(module: nn.Module) -> Engine | None:
    reference = _engines.get(module)
    engine = None if reference is None else reference()
    return engine if engine is not None and engine.attached else None


def _check_free(module: nn.Module) -> None:
    for name, part in module.named_modules():
        if _engine_of(part) is not None:
            what = f"{type(module).__name__}" + (f", its part {name}," if name else "")
            raise RuntimeError(
                f"{what} is being adapted already: call release() of what wrap() returned, or "
                "ttalight.adapters.release(network) where that is lost"
            )


class Engine:
    """Runs a method on a network, and releases the network as it was.

    A batch is a transaction: it is adapted to and its logits are returned, or, whatever exception ends it, nothing has
    changed.

    Args:
        method: The method.
        module: The network; its weights change in place until ``release``.
        seed: Key of all random draws, with their place in the stream.
        forward: What a pass calls; the network itself by default.

    Raises:
        RuntimeError: If the network, or a part of it, is being adapted already.
        ValueError: If the network lacks something that the method needs.
        TypeError: If a layer or a weight is of a kind that the method cannot adapt.
    """

    def __init__(self, method: Method, module: nn.Module, seed: int, forward: Callable[..., Any] | None = None) -> None:
        _check_free(module)
        self.method = method
        self.net = AdaptiveNetwork(module, seed, forward, method.classifier, method.output, method.clip_norm)
        floats = (value.dtype for value in module.parameters() if value.is_floating_point())
        self.check = BatchCheck(self._try, next(floats, torch.get_default_dtype()))
        #: What the method changes; None before the first batch.
        self.state: State | None = None
        self.attached = False
        #: Whether the next announcement is of the visit that a restored state is in the middle of.
        self.keeps_place = False
        self._boundary = self._probing = False
        self._before_probe: dict[str, Any] | None = None
        method.check(self.net)
        self.attach()

    # -- the network

    def attach(self) -> None:
        """Take the network over.

        Raises:
            RuntimeError: If it, or a part of it, is being adapted already.
        """
        module = self.net.module
        _check_free(module)
        for part in module.modules():
            _engines[part] = weakref.ref(self)
        self.attached = True
        self._training = [(part, part.training) for part in module.modules()]
        self._flags = [(parameter, parameter.requires_grad, parameter.grad) for parameter in module.parameters()]
        for parameter, _, _ in self._flags:
            parameter.grad = None
        module.eval()
        for norm in self.net.norms:
            norm.attach()
        if self.method.passes is not None:
            self.method.passes.attach(self.net)

    def release(self) -> nn.Module:
        """Return the network as it was: weights, statistics, forwards, flags, gradients."""
        if self.state is not None:
            self.state.reset()
        if self.attached:
            self._detach()
        return self.net.module

    def _detach(self) -> None:
        self.attached = False
        if self.method.passes is not None:
            self.method.passes.detach()
        for norm in self.net.norms:
            norm.detach()
        self.net.release()
        for part, training in self._training:
            part.training = training
        for parameter, requires_grad, gradient in self._flags:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        for part in self.net.module.modules():
            _engines.pop(part, None)

    # -- a batch

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled step would trace the optimizer too
    def __call__(self, images: Tensor, call: Call | None = None) -> Any:
        """Adapt to a batch and return its logits, free of any graph, in the structure that the network returns.

        Args:
            images: (B, 3, H, W).
            call: How the network is called with them.
        """
        if not self.attached:
            self.attach()
        device = images.device.type
        self.net.precision = _ambient_autocast(device)
        with _plain_mode(device), self._transaction():
            self.net.call = call or Call()
            logits = self._adapt(images)
            output = self.net.rebuild_output(logits, after=self.method.prediction == "after")
        if self.batches == 1:
            self.method.check_defaults(logits.shape[1])
        return output

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """Undo what a batch has changed if an exception ends it."""
        net, state = self.net, self.state
        if state is not None:
            state.begin()
        before = replace(net.counters), net.forwards, net.backwards, net.last, self._boundary, self._before_probe
        fallbacks, moved = [norm.fallbacks for norm in net.norms], net.guard.moved
        try:
            yield
        except BaseException:
            if state is not None:
                state.rollback()
            else:
                self._forget()
            net.counters, net.forwards, net.backwards, net.last, self._boundary, self._before_probe = before
            net.guard.moved = moved
            for norm, count in zip(net.norms, fallbacks, strict=True):
                norm.fallbacks = count
            net.clear_cache()
            if state is None:
                self._detach()
            raise
        net.clear_cache()

    def _adapt(self, images: Tensor) -> Tensor:
        net, guard, counters = self.net, self.net.guard, self.net.counters
        fault = self.check.fault(images)
        if fault is not None and self.method.on_bad_batch == "error":
            raise fault
        finite = self.check.repaired(images, fault)
        if counters.visit < 0:
            self.announce()
        net.begin(finite, is_bad=fault is not None)
        if self.state is None:
            guard.begin(images)
            guard.read()
            if fault is not None or not guard.pixels_finite:
                return self._finish(self._predict_bad(images, fault))
            self._configure()
        assert self.state is not None
        if self._probing and self._before_probe is None:
            self._before_probe = self.capture()
        is_reset = self._reset_is_due()
        if is_reset:
            self.state.reset()
        self._boundary = False
        guard.begin(images)
        logits = self.method.adapt(net, finite).detach()
        if guard.pixels_finite is None:
            guard.read()
        if fault is not None or not guard.pixels_finite:
            self._undo(is_reset)
            logits = self._predict_bad(images, fault, logits)
        elif not guard.state_finite:
            self._recover()
            logits = self._predict_source()
        else:
            self.check.accept(tuple(images.shape[1:]))
        return self._finish(logits)

    def _finish(self, logits: Tensor) -> Tensor:
        self.net.counters.batch += 1
        self.net.counters.batches += 1
        return logits

    def _configure(self) -> None:
        net, method = self.net, self.method
        if getattr(method, "terms", None):
            _ = net.head  # from here on passes keep the features that terms read
        method.configure(net)
        net.optimizer = method.make_optimizer(net.parameters) if net.parameters else None
        self.state = State(net, method.method_state())
        net.on_reset(self.state.reset)

    def _reset_is_due(self) -> bool:
        reset = self.method.reset
        if isinstance(reset, int):
            return self.net.counters.updates - self.net.counters.updates_at_reset >= reset
        return reset == "batch" or (reset == "domain" and self._boundary)

    # -- batches that are not adapted to

    def _undo(self, is_reset: bool) -> None:
        """Undo what a bad batch has changed; a reset that was due with it stays."""
        assert self.state is not None
        updates_at_reset = self.net.counters.updates_at_reset
        self.state.rollback()
        if is_reset:
            self.state.reset()
        self.net.counters.updates_at_reset = updates_at_reset

    def _predict_bad(self, images: Tensor, fault: Exception | None, logits: Tensor | None = None) -> Tensor:
        """Return the logits of a bad batch, and count it.

        Raises:
            Exception: What is wrong with the batch, if that is to stop the stream.
        """
        counters, policy = self.net.counters, self.method.on_bad_batch
        fault = fault or self._pixel_fault(images)
        if policy == "error":
            raise fault
        if counters.bad_batches == 0:
            model = "the source model" if policy == "source" else "the model as it is"
            warnings.warn(
                f"{fault}: predicted with {model}, as on_bad_batch={policy!r} says; further such batches are counted "
                "and not named",
                stacklevel=2,
            )
        counters.bad_batches += 1
        self.net.last = {}
        return self._predict_source() if policy == "source" or logits is None else logits

    def _pixel_fault(self, images: Tensor) -> Exception:
        bad = int(images.isfinite().flatten(1).all(1).logical_not_().sum())
        place = self.net.counters
        return ValueError(
            f"{bad} of {len(images)} images in batch {place.batch} of visit {max(place.visit, 0)} (counted from 0) "
            "have NaN or infinite pixels: repair them or take them away. Nothing was adapted to this batch"
        )

    def _predict_source(self) -> Tensor:
        """Return the logits of the source model."""
        net, state = self.net, self.state
        assert net.images is not None
        live = [] if state is None else list(state.live.values())
        before = [value.detach().clone() for value in live]
        with torch.no_grad(), ExitStack() as layers:
            for norm in net.norms:
                layers.enter_context(norm.as_source())
            if live and state is not None:
                torch._foreach_copy_(live, state.source)
            try:
                logits = net(net.images).logits
            finally:
                if live:
                    torch._foreach_copy_(live, before)
        net.readings = {steps: logits for steps in self.method.read_at}
        return logits

    def _try(self, image: Tensor) -> object:
        with torch.no_grad(), ExitStack() as layers, self.net.precision():
            for norm in self.net.norms:
                layers.enter_context(norm.as_source())
            return self.net.call(self.net.original, image)

    def _recover(self) -> None:
        """Restore the source after a step that left weights or statistics that are not finite."""
        place = self.net.counters
        warnings.warn(
            f"{type(self.method).__name__} has left weights or statistics that are not finite, before batch "
            f"{place.batch} of visit {max(place.visit, 0)}: it continues from the source, as after a reset. Is the "
            "learning rate too high?",
            stacklevel=2,
        )
        assert self.state is not None
        self.state.reset()
        place.recoveries += 1

    # -- the stream

    def announce(self) -> None:
        """Note that the next batch is the first of a new visit."""
        counters = self.net.counters
        if self.keeps_place and counters.visit >= 0:
            self.keeps_place = False
            return
        self._boundary = counters.visit >= 0
        counters.visit += 1
        counters.batch = 0

    def seek(self, visit: int, batch: int) -> None:
        """Set where the next batch stands, in a process that adapts to a part of the stream.

        Args:
            visit: Number of the announced visit.
            batch: Number of the batch in the visit.
        """
        self.net.counters.visit, self.net.counters.batch = visit, batch

    def prepare(self, images: Tensor) -> None:
        """Configure the method by a batch that another process adapts to.

        Args:
            images: (B, 3, H, W), the first batch of the stream.
        """
        self.net.precision = _ambient_autocast(images.device.type)
        with _plain_mode(images.device.type):
            self.net.images = self.check.repaired(images, None)
            self._configure()
        self.net.clear_cache()
        self.net.forwards = self.net.backwards = 0.0  # the other process counts them

    def probe(self, on: bool) -> None:
        """Begin or end a probe, whose batches are adapted to as any others and whose updates are discarded."""
        self._probing = on
        if not on and self._before_probe is not None:
            assert self.state is not None
            self.state.restore(self._before_probe)
            self.net.counters = Counters(**self._before_probe["counters"])
            self._before_probe = None

    # -- counts, see ``Counters``

    last = property(lambda self: self.net.last)
    batches = property(lambda self: self.net.counters.batches)
    updates = property(lambda self: self.net.counters.updates)
    skipped = property(lambda self: self.net.counters.skipped)
    recoveries = property(lambda self: self.net.counters.recoveries)
    bad_batches = property(lambda self: self.net.counters.bad_batches)
    backwards = property(lambda self: self.net.backwards)

    # -- states

    def reset(self) -> None:
        """Restore weights, statistics, optimizer and method state to the source, bit for bit, and nothing else."""
        if self.state is not None:
            self.state.reset()

    def capture(self) -> dict[str, Any]:
        """Return copies of all that later batches depend on: tensors and plain values only, and finite."""
        net = self.net
        if self.state is not None and not net.guard.check_state():
            self._recover()
        return {
            "method": type(self.method).__name__,
            "configured": self.state is not None,
            "facts": net.facts(),
            "shape": list(self.check.usual or ()),
            "counters": asdict(net.counters),
            "passes": [net.forwards, net.backwards],
            **(_NOTHING if self.state is None else self.state.capture()),
            "before_probe": self._before_probe,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from what ``capture`` returned, of an equal method on an equal network.

        Raises:
            ValueError: If the state is another method's or another network's; nothing has changed then.
        """
        method, network = type(self.method).__name__, type(self.net.module).__name__
        try:
            fault = difference(_FORM | {"counters": asdict(self.net.counters)}, state)
            if fault is not None or state["method"] != method:
                raise ValueError(fault or f"it is of the method {state['method']!r:.50}")
            if state["configured"]:
                self._restore_configured(state)
            else:
                self.reset()
        except ValueError as error:
            raise ValueError(f"the adaptation state does not fit {method} on {network}: {error}") from None
        self.net.counters = Counters(**state["counters"])
        self.net.forwards, self.net.backwards = state["passes"]
        if state["shape"]:
            self.check.accept(tuple(state["shape"]))
        self._before_probe = state["before_probe"]

    def _restore_configured(self, state: dict[str, Any]) -> None:
        is_fresh = self.state is None
        try:
            if is_fresh:
                self.net.know(state["facts"])
                with _plain_mode(self.net.device.type):
                    self._configure()
            assert self.state is not None
            self.state.restore(state)
        except BaseException:
            if is_fresh:
                self._forget()
                self._detach()
                self.attach()
            raise

    def _forget(self) -> None:
        """Return to where no method is configured."""
        if self.state is not None:
            self.state.reset()
        self.state = self.net.optimizer = None
        self.net.parameters, self.net.own = [], {}

    def to(self, device: torch.device) -> None:
        """Move the network and all adaptation state to a device."""
        state = self.capture()
        self.reset()
        self.state = None
        self.net.module.to(device)
        self.net.generator = torch.Generator(device=device)
        self.restore(state)

    def source_copy(self) -> nn.Module:
        """Return a copy of the network as it was before adaptation."""
        module = copy.deepcopy(self.net.module)
        if self.state is not None:
            parameters = dict(module.named_parameters())
            layers = {norm.name: norm for norm in find_norms(module)}
            with torch.no_grad():
                for (name, _), value in zip(self.state.live.items(), self.state.source, strict=True):
                    if name in parameters:
                        parameters[name].copy_(value)
                    elif ".statistics." in name and not name.startswith("method."):
                        layer, _, index = name.rpartition(".statistics.")
                        layers[layer].statistics[int(index)].copy_(value)
        training = dict(zip((name for name, _ in self.net.module.named_modules()), self._training, strict=True))
        for name, part in module.named_modules():
            part.training = training[name][1]
        for parameter, (_, requires_grad, gradient) in zip(module.parameters(), self._flags, strict=True):
            parameter.requires_grad_(requires_grad)
            parameter.grad = None if gradient is None else gradient.clone()
        return module


#: The state of a method that is not configured, and the form of every state.
_NOTHING: dict[str, Any] = {"tensors": {}, "source": {}, "optimizer": None}
_FORM = {
    "method": "",
    "configured": True,
    "facts": {"classifier": None, "classes": None},
    "shape": [],
    "passes": [0, 0],
}
_FORM |= _NOTHING | {"before_probe": None}


@contextmanager
def _plain_mode(device_type: str) -> Iterator[None]:
    """Allow gradients, and switch autocast off: the network's passes switch it on for themselves."""
    with torch.inference_mode(False), torch.enable_grad():
        if not torch.is_autocast_enabled(device_type):
            yield
            return
        with torch.autocast(device_type, enabled=False):
            yield


def _ambient_autocast(device_type: str) -> Callable[[], AbstractContextManager[Any]]:
    """Return a maker of the autocast context that is in force now, for the network's passes."""
    if not torch.is_autocast_enabled(device_type):
        return nullcontext
    dtype = torch.get_autocast_dtype(device_type)
    # Without the cache a cast made under no_grad cannot be mistaken for one that carries gradients.
    return partial(torch.autocast, device_type, dtype=dtype, cache_enabled=False)
