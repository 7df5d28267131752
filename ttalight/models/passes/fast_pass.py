"""Passes of a network, computed in the fastest of a few ways that give the same predictions."""

from __future__ import annotations

import itertools
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ttalight.errors import InputError
from ttalight.losses.entropy import is_masked
from ttalight.models.network import Network
from ttalight.models.norm import exact_statistics, preserve_statistics
from ttalight.models.outputs import logits_of
from ttalight.models.passes.pass_policy import PassPolicy

__all__ = ["FastPass", "Precision"]

#: Precision of passes: that of the caller (float32 without autocast), bfloat16 by autocast, or whichever is fastest.
Precision = Literal["32", "bf16-mixed", "auto"]

#: What logits may differ by, as a share of the largest one, and gradients, as a share of their norm; the last line is
#: for lower precisions. Bfloat16 beside float32 may differ more, and has to predict alike.
_TOLERANCES = {torch.float64: (1e-9, 1e-8), torch.float32: (1e-4, 5e-3)}
_LOW_PRECISION = (3e-2, 3e-1)
_BESIDE_FLOAT32 = (1e-1, 5e-1)
_ROUNDS = 5
#: A way that takes so many times as long as the fastest one is not timed again.
_BEHIND = 1.15
#: A way that saves a smaller share of the time is not worth other last digits; nor one of lower precision its rounding.
_LEAST_GAIN, _LEAST_GAIN_OF_LOWER = 0.03, 0.2
_OWN, _COMPILE, _LOWER = "own", "torch.compile", "bf16 "


class _Trial(NamedTuple):
    """Logits of a pass, predictions and gradients."""

    logits: Tensor
    predictions: Tensor
    gradients: list[Tensor]


class FastPass(PassPolicy):
    """Computes the passes of a network in the fastest way found: another layout, compiled, or in bfloat16.

    The first pass of a kind (with gradients or without, norm modes, precision, size of the images, one image or more)
    tries the ways: the network as it is, on images in ``channels_last``, compiled by ``torch.compile``, and with
    ``precision="auto"`` each of these in bfloat16. Each way makes one pass that is compared with the network's own, its
    gradients too, and up to five more that are timed, in turns. A way that fails or gives other numbers is left out:
    other logits or gradients for the ways of one precision, and predictions too for bfloat16. The latter also has to
    save a fifth of the time. A trial leaves weights, statistics and random states as they were. The first time that
    nothing else is left or faster, a warning says why.

    What was chosen is in ``adapted.report()``, in ``results.json`` and in saved states: a resumed run takes the same
    ways without a trial. Compiled passes take batches of other sizes where these do not need another compilation, which
    would stop the stream; otherwise such a pass is the network's own.

    Args:
        precision: ``32``: that of the caller, float32 unless autocast is on. ``bf16-mixed``: bfloat16 by autocast, as
            the Trainer's precision of that name. ``auto``: bfloat16 where it is faster and predicts alike.
        compile: Whether to try ``torch.compile``, which takes up to a minute.
        agreement: Least share of the trial's images, in (0, 1], that ``auto`` wants predicted as in float32.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(self, precision: Precision = "32", compile: bool = True, agreement: float = 0.995) -> None:
        if precision not in get_args(Precision):
            raise InputError(f"precision must be '32', 'bf16-mixed' or 'auto', got {precision!r:.60}")
        if not 0 < agreement <= 1:
            raise InputError(f"agreement must be a share in (0, 1], got {agreement!r:.60}")
        self.precision, self.compile, self.agreement = precision, compile, agreement
        self.net: Any = None
        #: Way and reason of each kind of pass, by its description.
        self.record: dict[str, tuple[str, str]] = {}
        self._chosen: dict[tuple[Any, ...], str] = {}
        self._compiled: Callable[[Tensor], Any] | None = None
        self._warned = False

    def attach(self, net: Network) -> None:
        """Compute the passes of a network; see ``PassPolicy``."""
        if self.net is not net:
            self.net, self.record, self._chosen, self._compiled = net, {}, {}, None
        net.run = self

    def detach(self) -> None:
        """Restore the network's own passes."""
        self.net.run = self.net.original

    def describe(self) -> str:
        """Return name and arguments, those that are the default left out."""
        given = [] if self.precision == "32" else [f"precision={self.precision!r}"]
        given += [] if self.compile else ["compile=False"]
        given += [f"agreement={self.agreement:g}"] if self.precision == "auto" and self.agreement != 0.995 else []
        return f"FastPass({', '.join(given)})" if given else "FastPass"

    def capture(self) -> dict[str, list[str]]:
        """Return way and reason of each kind of pass, by its description."""
        return {kind: [*choice] for kind, choice in self.record.items()}

    def restore(self, record: Mapping[str, Sequence[str]]) -> None:
        """Use recorded ways; those that these settings do not have are tried again."""
        known = {name for names in map(self._names, (False, True)) for name in names}
        self.record |= {kind: (way, reason) for kind, (way, reason) in record.items() if way in known}
        self._chosen = {kind: way for kind, way in self._chosen.items() if self.record[_described(kind)][0] == way}

    def __call__(self, images: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the network's forward returns; with further arguments the pass is the network's own."""
        if args or kwargs:
            with self._cast(images) if self.precision == "bf16-mixed" else nullcontext():
                return self.net.original(images, *args, **kwargs)
        kind = self._kind(images)
        if kind not in self._chosen:
            self._chosen[kind] = self._choose(kind, images)
        way = self._chosen[kind]
        with torch.compiler.set_stance("eager_on_recompile") if way.endswith(_COMPILE) else nullcontext():
            return self._run(way, images)

    @property
    def chosen(self) -> list[str]:
        """The way of each kind of pass so far: ``own``, ``channels_last`` or ``torch.compile``, ``bf16`` before it."""
        return list(self._chosen.values())

    def _kind(self, images: Tensor) -> tuple[Any, ...]:
        device = images.device
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        gradients = torch.is_grad_enabled(), images.requires_grad
        modes = tuple(norm.mode for norm in self.net.norms)
        return images.shape[1:], len(images) > 1, images.dtype, device, gradients, autocast, modes

    # -- the ways

    def _names(self, is_cast: bool) -> list[str]:
        """Return the ways to try, the first being what the others are compared with."""
        names = [_OWN, "channels_last", *([_COMPILE] if self.compile else [])]
        lower = [f"{_LOWER}{name}" for name in names]
        if self.precision == "bf16-mixed":
            return lower
        return [*names, *lower] if self.precision == "auto" and not is_cast else names

    def _run(self, way: str, images: Tensor) -> Any:
        layout = way.removeprefix(_LOWER)
        with self._cast(images) if layout != way else nullcontext():
            if layout == "channels_last" and images.ndim == 4:
                with exact_statistics(self.net.norms):
                    return self.net.original(images.contiguous(memory_format=torch.channels_last))
            if layout == _COMPILE:
                if self._compiled is None:
                    self._compiled = torch.compile(self._own, dynamic=True)
                return self._compiled(images)
            return self.net.original(images)

    def _own(self, images: Tensor) -> Any:
        return self.net.original(images)

    def _cast(self, images: Tensor) -> AbstractContextManager[Any]:
        return torch.autocast(images.device.type, torch.bfloat16, cache_enabled=False)

    # -- the trial

    def _choose(self, kind: tuple[Any, ...], images: Tensor) -> str:
        """Return the way of a kind of pass: the recorded one, or the fastest one."""
        described, names = _described(kind), self._names(is_cast=bool(kind[5]))
        with self._unchanged():
            recorded = self.record.get(described)
            if recorded is not None and recorded[0] in names:
                way = recorded[0]
                if not way.endswith(_COMPILE) or self._fault(way, images, self._try(names[0], images)) is None:
                    return way
            way, reason = self._fastest(names, images)
        self.record[described] = way, reason
        if way == _OWN and not self._warned:
            self._warned = True
            warnings.warn(f"FastPass changes nothing here: {reason}", stacklevel=2)
        return way

    @contextmanager
    def _unchanged(self) -> Iterator[None]:
        if not self.compile:
            with preserve_statistics(self.net.norms):
                yield
            return
        # Networks of one class share what is compiled, and only one of them may have its features kept by a hook.
        with preserve_statistics(self.net.norms), torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
            yield

    def _fastest(self, names: Sequence[str], images: Tensor) -> tuple[str, str]:
        """Return the fastest way that gives the same numbers, and why it is."""
        own, faults = self._try(names[0], images), {}
        for name in names[1:]:
            if (fault := self._fault(name, images, own)) is not None:
                faults[name] = f"{name} {fault}"
        times = self._times([name for name in names if name not in faults], images)
        alike = [name for name in times if name.startswith(_LOWER) == names[0].startswith(_LOWER)]
        best = min(alike, key=times.__getitem__)
        if times[best] > (1 - _LEAST_GAIN) * times[names[0]]:
            best = names[0]
        fastest = min(times, key=times.__getitem__)
        if fastest not in alike and times[fastest] <= (1 - _LEAST_GAIN_OF_LOWER) * times[best]:
            best = fastest
        slow = [f"{name} is no faster" for name in times if name not in (names[0], best)]
        if best == names[0]:
            return best, "; ".join([*faults.values(), *slow])
        images_alike = (
            "" if best in alike else f", with at least {self.agreement:.1%} of {len(images)} predictions equal"
        )
        return best, f"{times[names[0]] / times[best]:.2f} times as fast as {names[0]}{images_alike}"

    def _times(self, names: Sequence[str], images: Tensor) -> dict[str, float]:
        """Return the shortest seconds of ways that take turns; those far behind drop out."""
        times: dict[str, float] = {}
        left = list(names)
        for _ in range(_ROUNDS):
            for name in left:
                times[name] = min(self._seconds(name, images), times.get(name, float("inf")))
            left = [name for name in left if times[name] <= _BEHIND * min(times.values())]
            if len(left) < 2:
                break
        return times

    def _fault(self, name: str, images: Tensor, own: _Trial) -> str | None:
        try:
            return self._difference(own, self._try(name, images), is_lower=name.startswith(_LOWER))
        except Exception as error:  # compilers fail in any way, and the network's own pass has just worked
            reason = (str(error).strip() or "no message").splitlines()[0][:200]
            return f"fails ({type(error).__name__}: {reason})"

    def _difference(self, own: _Trial, other: _Trial, is_lower: bool) -> str | None:
        """Return what is wrong with a way's logits, predictions and gradients, given the network's own."""
        is_beside = is_lower and self.precision == "auto"
        limits = _BESIDE_FLOAT32 if is_beside else _TOLERANCES.get(own.logits.dtype, _LOW_PRECISION)
        apart = [float((other.logits - own.logits).abs().max() / own.logits.abs().max())]
        if own.gradients:
            mine, theirs = (torch.cat([part.flatten() for part in way.gradients]) for way in (own, other))
            apart.append(float((theirs - mine).norm() / mine.norm()))
        for what, share, limit in zip(("logits", "gradients"), apart, limits, strict=False):
            if not share <= limit:
                return f"gives other {what} (by {share:.0e}, more than {limit:.0e})"
        if is_beside:
            equal = float((own.predictions == other.predictions).double().mean())
            if equal < self.agreement:
                return f"predicts {1 - equal:.1%} of {len(own.predictions)} images differently"
        return None

    def _try(self, name: str, images: Tensor) -> _Trial:
        """Return what a pass gives, from the present random state, which stays."""
        accelerators = [images.device] if images.device.type != "cpu" else []
        with torch.random.fork_rng(accelerators, device_type=images.device.type if accelerators else "cuda"):
            logits = logits_of(self._run(name, images.clone()), self.net.output)  # some networks change it in place
        predictions = logits.detach().argmax(1)
        logits = logits.masked_fill(is_masked(logits), 0)  # classes that are masked are not compared
        inputs = [tensor for tensor in (images, *self.net.parameters) if tensor.requires_grad]
        gradients: Sequence[Tensor | None] = ()
        if logits.requires_grad and inputs:
            with torch.autocast(images.device.type, enabled=False):
                gradients = torch.autograd.grad(logits.float().square().mean(), inputs, allow_unused=True)
        found = [gradient for gradient in gradients if gradient is not None]
        return _Trial(logits.detach(), predictions, found)

    def _seconds(self, name: str, images: Tensor) -> float:
        _wait(images.device)
        start = time.perf_counter()
        self._try(name, images)
        _wait(images.device)
        return time.perf_counter() - start

    def __getstate__(self) -> dict[str, Any]:
        # Copies choose for their own network.
        return vars(self) | {"net": None, "record": {}, "_chosen": {}, "_compiled": None}


def _described(kind: tuple[Any, ...]) -> str:
    """Return a kind of pass in words, the same in every process."""
    shape, is_several, dtype, device, (gradients, to_pixels), autocast, modes = kind
    layers = [f"{len(list(same))} {mode}" for mode, same in itertools.groupby(modes)]
    parts = [
        f"{'images' if is_several else 'one image'} of {'x'.join(map(str, shape))}",
        f"{str(dtype).removeprefix('torch.')} on {device.type}",
        ("gradients to pixels" if to_pixels else "gradients") if gradients else "no gradients",
        *([f"autocast to {str(autocast).removeprefix('torch.')}"] if autocast else []),
        *([f"norm layers {' + '.join(layers)}"] if layers else []),
    ]
    return ", ".join(parts)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
