"""The engine of adaptation: runs a method on a network, batch by batch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from operator import attrgetter
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from ttalight.engine.adaptive_network import AdaptiveNetwork, Counters
from ttalight.engine.method import Method
from ttalight.engine.observer import Observer
from ttalight.engine.recent import RecentBatches
from ttalight.engine.schedule import Schedule, check_states, load_states, states_of
from ttalight.engine.state import State
from ttalight.errors import InputError
from ttalight.files.adaptation_states import check_form, check_values
from ttalight.models.attaching.admission import Admission, pixel_fault, warn_of_bad_batch, warn_of_recovery
from ttalight.models.attaching.call import Call, present_autocast
from ttalight.models.attaching.takeover import Takeover, check_free, check_loaded
from ttalight.models.vectors import JoinedParameters, can_join
from ttalight.seeding import global_generators

__all__ = ["Engine"]

#: Number of batches after which ``check_progress`` is called a second time.
MANY = 50


class Engine:
    """Runs a method on a network, and releases the network as it was.

    A batch is a transaction: whatever exception ends it, nothing has changed.

    Args:
        method: The method.
        module: The network. Its weights change in place until ``release``.
        seed: Key of all random draws, with their place in the stream.
        forward: What a pass calls, by default the network itself.

    Raises:
        RuntimeError: If the network, or a part of it, is being adapted already.
        ValueError: If the network lacks something that the method needs.
        TypeError: If a layer or a weight is of a kind that the method cannot adapt.
    """

    def __init__(self, method: Method, module: nn.Module, seed: int, forward: Callable[..., Any] | None = None) -> None:
        check_free(module)
        check_loaded(module)
        floats = (value.dtype for value in module.parameters() if value.is_floating_point())
        self.method = method
        options = {"forward": forward, "classifier": method.classifier, "output": method.output}
        self.net = AdaptiveNetwork(module, seed, method.clip_norm, **options)
        self.admission = Admission(next(floats, torch.get_default_dtype()), self._try)
        #: What the method changes. None before the first batch.
        self.state: State | None = None
        self.takeover: Takeover | None = None
        #: Whether the next batch begins a visit, and whether the next visit is the one of a restored state.
        self._boundary = self._keeps_place = False
        #: State from before the present probe. None outside of probes.
        self.before_probe: dict[str, Any] | None = None
        self.schedules: list[Schedule] = copy.deepcopy(list(method.schedules))
        #: Whether a schedule let the last batch be predicted only.
        self.is_missed = False
        self.recent = RecentBatches()
        self.observers: list[Observer] = []
        method.check(self.net)
        if getattr(method, "terms", None):
            self.net.classifier.check()
        self.attach()

    def attach(self) -> None:
        """Take the network over; a RuntimeError if it, or a part of it, is being adapted already."""
        self.takeover = Takeover(self.net.module, self)
        self._generators = [*global_generators(self.net.device), self.net.generator]
        for norm in self.net.norms:
            norm.attach()
        if self.method.passes is not None:
            self.method.passes.attach(self.net)

    def release(self) -> nn.Module:
        """Return the network as it was: weights, statistics, forwards, flags, gradients."""
        if self.takeover is not None:  # else it was released, and may be another engine's by now
            self.reset()
            self._detach()
        return self.net.module

    def _detach(self) -> None:
        assert self.takeover is not None, "only a network that was taken over is released"
        if self.method.passes is not None:
            self.method.passes.detach()
        for norm in self.net.norms:
            norm.detach()
        self.net.release()
        if self.net.joined is not None:
            self.net.joined.separate()
        self.takeover.end()
        self.takeover = None

    # -- a batch

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # a compiled step would trace the optimizer too
    def __call__(self, images: Tensor, call: Call | None = None, adapt: bool = True) -> Any:
        """Adapt to a batch and return its logits, without a graph, in the structure that the network returns.

        Args:
            images: (B, 3, H, W).
            call: How the network is called with them. By default with the images alone.
            adapt: Whether the batch is adapted to. Otherwise see ``predict``.
        """
        began = perf_counter()
        if self.takeover is None:
            self.attach()
        net, state, device = self.net, self.state, images.device.type
        is_cast = torch.is_autocast_enabled(device)
        net.call, net.precision = call, present_autocast(device) if is_cast else nullcontext
        counts = replace(net.counters), net.forwards, net.backwards, net.last, net.guard.moved, self._boundary
        before = (*counts, net.readings, list(self.admission.sizes))
        draws = list(map(torch.Generator.get_state, self._generators))
        off = torch.autocast(device, enabled=False) if is_cast else nullcontext()
        with torch.inference_mode(False), torch.enable_grad(), off:
            if state is not None:
                state.begin()
            try:
                logits = self._run(images, adapt)
                output = net.rebuild_output(logits, after=self.method.prediction == "after")
                if not adapt:
                    self._undo(state, before, draws)
                    if state is None:
                        self.attach()
                    return output
                if net.counters.batches in (1, MANY):
                    self.method.check_progress(net, logits)
                self.recent.add(logits, perf_counter() - began)
                for observer in self.observers:
                    observer.observe(self, logits)
            except BaseException:
                self._undo(state, before, draws)
                raise
            finally:
                net.clear_cache()
        return output

    def _undo(self, state: State | None, before: tuple[Any, ...], draws: list[Tensor]) -> None:
        """Restore what there was before a batch: the state, None where it was the first one, counts, and draws."""
        net = self.net
        if state is not None:
            state.rollback()
        else:
            self._unconfigure()
            self._detach()
        net.counters, net.forwards, net.backwards, net.last, net.guard.moved, self._boundary, net.readings = before[:7]
        self.admission.sizes = before[7]
        for generator, drawn in zip(self._generators, draws, strict=True):
            generator.set_state(drawn)

    def predict(self, images: Tensor, call: Call | None = None) -> Any:
        """Return the logits of a batch without adapting to it; nothing changes. See ``__call__``.

        They come from ``Method.predict`` and the state that the next batch would begin with: that of the source where a
        reset is due, which with ``reset="batch"`` it always is. A network that was not adapted yet predicts as the
        method's source. Bad batches are an error or are predicted, as ``on_bad_batch`` says. They are not counted.
        """
        return self(images, call, adapt=False)

    def _run(self, images: Tensor, adapt: bool) -> Tensor:
        """Return the logits of a batch, from ``Method.adapt`` or from ``Method.predict``, which ``_undo`` follows."""
        net, guard, counters, logits = self.net, self.net.guard, self.net.counters, None
        if len(images) and images.shape[1:] in self.admission.sizes and images.is_floating_point():
            finite, fault = images.detach().nan_to_num(nan=0.0, posinf=0.0, neginf=0.0), None
        else:
            finite, fault = self.admission.admit(images)
        if fault is not None and self.method.on_bad_batch == "error":
            raise fault
        if counters.visit < 0:
            self.announce()
        guard.begin(images)
        net.begin(finite, is_bad=fault is not None or not adapt)
        if self.state is None and guard.is_pixels_finite() and fault is None:
            self._configure()
        if self.state is not None:
            is_reset, self._boundary = self._reset_is_due(), False
            if is_reset:
                self.state.reset()
            guard.check_state()
            logits = (self.method.adapt if adapt else self.method.predict)(net, finite).detach()
            guard.read()
            if fault is not None or not guard.pixels_finite:  # a reset that was due with a bad batch stays
                (self.state.reset if is_reset else self.state.rollback)()
        if fault is not None or not guard.pixels_finite:
            logits = self._predict_bad(images, fault, logits, adapt)
        elif not guard.state_finite:
            if adapt:
                self._recover()
            logits = self._predict_source()
        elif images.shape[1:] not in self.admission.sizes:
            self.admission.sizes.append(images.shape[1:])
        counters.batch += 1
        counters.batches += 1
        assert logits is not None
        return logits

    def _reset_is_due(self) -> bool:
        reset, counters = self.method.reset, self.net.counters
        if isinstance(reset, int):
            return counters.updates - counters.updates_at_reset >= reset
        return reset == "batch" or (reset == "domain" and self._boundary)

    def _configure(self) -> None:
        net, method = self.net, self.method
        if getattr(method, "terms", None):
            _ = net.head  # from here on passes keep the features that terms read
        method.configure(net)
        is_joined = method.is_elementwise and can_join(net.parameters)
        net.joined = JoinedParameters(net.parameters) if is_joined else None
        net.leaves = net.parameters if net.joined is None else [net.joined.vector]
        net.optimizer = method.make_optimizer(net.leaves) if net.parameters else None
        self.state = State(net, method.method_state())
        net.restore_source = self.state.reset

    def _unconfigure(self) -> None:
        self.reset()
        if self.net.joined is not None:
            self.net.joined.separate()
        self.state = self.net.optimizer = self.net.joined = None
        self.net.parameters, self.net.leaves, self.net.own = [], [], {}

    # -- bad batches and recovery

    def _predict_bad(self, images: Tensor, fault: Exception | None, logits: Tensor | None, warn: bool) -> Tensor:
        """Return the logits of a bad batch, those of the method where there are any, and count it."""
        counters, policy = self.net.counters, self.method.on_bad_batch
        fault = fault or pixel_fault(images, counters.batch, counters.visit)
        if policy == "error":
            raise fault
        if warn and counters.bad_batches == 0:
            warn_of_bad_batch(fault, policy)
        counters.bad_batches += 1
        self.net.last = {}
        return self._predict_source() if policy == "source" or logits is None else logits

    def _predict_source(self) -> Tensor:
        """Return the logits of the source model."""
        net = self.net
        assert net.images is not None
        with self.at_source(), net.as_source():
            logits = net(net.images).logits
        net.readings = {steps: logits for steps in self.method.read_at}
        return logits

    def _try(self, image: Tensor) -> object:
        net = self.net
        with net.as_source(), net.precision():
            return net.original(image) if net.call is None else net.call(net.original, image)

    def _recover(self) -> None:
        """Restore the source after a step that left weights or statistics that are not finite."""
        warn_of_recovery(type(self.method).__name__, self.net.counters.batch, self.net.counters.visit)
        self.net.reset()

    # -- the stream

    def announce(self) -> None:
        """Note that the next batch is the first of a new visit."""
        counters = self.net.counters
        if self._keeps_place and counters.visit >= 0:
            self._keeps_place = False
            return
        self._boundary = counters.visit >= 0
        counters.visit, counters.batch = counters.visit + 1, 0

    def seek(self, visit: int, batch: int) -> None:
        """Set visit and number of the next batch, in a process that adapts to a part of the stream."""
        self.net.counters.visit, self.net.counters.batch = visit, batch

    def prepare(self, images: Tensor) -> None:
        """Configure the method by the first batch of the stream, (B, 3, H, W), that another process adapts to."""
        with torch.inference_mode(False), torch.enable_grad():
            self.net.images, _ = self.admission.admit(images)
            self._configure()
        self.net.clear_cache()
        self.net.forwards = self.net.backwards = 0.0  # the other process counts them

    def probe(self, on: bool) -> None:
        """Begin or end a probe, whose batches are adapted to as any others and whose updates are discarded."""
        if on and self.before_probe is None:
            self.before_probe = self.capture()
        elif not on and self.before_probe is not None:
            passes = {"passes": [self.net.forwards, self.net.backwards]}
            self.restore(self.before_probe | passes, self._keeps_place)

    # -- counts, see ``Counters``

    last, backwards = property(attrgetter("net.last")), property(attrgetter("net.backwards"))
    batches, updates = property(attrgetter("net.counters.batches")), property(attrgetter("net.counters.updates"))
    skipped, recoveries = property(attrgetter("net.counters.skipped")), property(attrgetter("net.counters.recoveries"))
    bad_batches, missed = property(attrgetter("net.counters.bad_batches")), property(attrgetter("net.counters.missed"))

    # -- states

    def reset(self) -> None:
        """Restore weights, statistics, optimizer and method state to the source, bit for bit, and nothing else."""
        if self.state is not None:
            self.state.reset()

    def capture(self) -> dict[str, Any]:
        """Return copies of all that later batches depend on: tensors and plain values only, and finite."""
        if self.state is not None and not self.net.guard.is_state_finite():
            self._recover()
        return {
            "method": type(self.method).__name__,
            "configured": self.state is not None,
            "facts": self.net.classifier.facts(),
            "size": list(self.admission.sizes[0]) if self.admission.sizes else [],
            "counters": asdict(self.net.counters),
            "passes": [self.net.forwards, self.net.backwards],
            **({"tensors": {}, "source": {}, "optimizer": None} if self.state is None else self.state.capture()),
            "before_probe": self.before_probe,
            "schedules": states_of(self.schedules),
            "ways": {} if self.method.passes is None else self.method.passes.capture(),
        }

    def restore(self, state: dict[str, Any], keep_place: bool = False) -> None:
        """Continue from what ``capture`` returned, of an equal method on an equal network.

        Args:
            state: The state.
            keep_place: Whether the next announced visit continues the one that the state was captured in.

        Raises:
            ValueError: If the state is another method's or another network's. Nothing has changed then.
        """
        is_fresh, facts = self.state is None, self.net.classifier.facts()
        try:
            self._check(state)
            if self.state is not None:
                self.state.restore(state) if state["configured"] else self.state.reset()
        except BaseException as error:
            if is_fresh:
                self._unconfigure()
                self.net.classifier.know(facts, self.net.device)
                self._detach()
                self.attach()
            if not isinstance(error, ValueError):
                raise
            names = f"{type(self.method).__name__} on {type(self.net.module).__name__}"
            raise InputError(f"the adaptation state does not fit {names}: {error}") from None
        self.net.counters = Counters(**{name: state["counters"][name] for name in asdict(self.net.counters)})
        self.before_probe = state["before_probe"]
        self.net.forwards, self.net.backwards = state["passes"]
        self._keeps_place = keep_place
        load_states(self.schedules, state["schedules"])
        if self.method.passes is not None:
            self.method.passes.restore(state["ways"])
        self.admission.sizes = [torch.Size(state["size"])] if state["size"] else []

    def _check(self, state: Any) -> None:
        """Configure the method if an untrusted state needs it; a ValueError if the state does not fit."""
        check_form(state, type(self.method).__name__, asdict(self.net.counters))
        check_states(self.schedules, state["schedules"])
        if state["configured"] and self.state is None:
            self.net.classifier.know(state["facts"], self.net.device)
            self.net.saved = state["tensors"]
            with torch.inference_mode(False), torch.enable_grad():
                self._configure()
        saved_as = None if self.net.joined is None else self.net.joined.divide_state
        for part in (state, state["before_probe"]):
            if self.state is not None and part is not None and part["configured"]:
                check_values(part, self.state.live, self.state.source, self.net.optimizer, saved_as)

    def to(self, device: torch.device) -> None:
        """Move the network and all adaptation state to a device."""
        state = self.capture()
        self._unconfigure()
        self.recent = RecentBatches()
        self.net.module.to(device)
        self.net.generator = torch.Generator(device=device)
        self._generators = [*global_generators(device), self.net.generator]
        self.restore(state)

    def next_state(self) -> AbstractContextManager[None]:
        """Set the state temporarily to the one that the next batch begins with. May wait for the device once."""
        is_source = self._reset_is_due() or not self.net.guard.is_state_finite()
        return self.at_source() if is_source else nullcontext()

    def at_source(self) -> AbstractContextManager[None]:
        """Set weights, statistics and method state to the source temporarily."""
        return nullcontext() if self.state is None else self.state.at_source()
