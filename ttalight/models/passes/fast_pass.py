"""Passes of a network, made in the fastest of a few ways that give the same numbers."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ttalight.losses.entropy import is_masked
from ttalight.models.network import Network
from ttalight.models.norm import exact_statistics, preserve_statistics
from ttalight.models.outputs import logits_of
from ttalight.models.passes.pass_policy import PassPolicy

__all__ = ["FastPass"]

#: What logits may differ by, as a share of the largest one, and gradients, as a share of their norm; the last line is
#: for lower precisions.
_TOLERANCES = {torch.float64: (1e-9, 1e-8), torch.float32: (1e-4, 5e-3)}
_LOW_PRECISION = (3e-2, 3e-1)
_ROUNDS = 5
#: A way that saves a smaller share of the time is not worth other last digits.
_LEAST_GAIN = 0.03


class FastPass(PassPolicy):
    """Makes the passes of a network in the fastest way found: as they are, on images in channels_last, or compiled.

    The first pass of a kind (with gradients or without, norm modes, precision, size of the images, one image or more)
    tries the ways: each makes one pass that is compared with the network's own, its gradients too, and five more, in
    turns with the others, that are timed. A way that fails or gives other numbers is left out. The first time that
    nothing else is left or faster, a warning says why. Compiled passes take batches of other sizes where these do not
    need another compilation, which would stop the stream; otherwise such a pass is the network's own.

    """

    def __init__(self) -> None:
        self._chosen: dict[tuple[Any, ...], str] = {}
        self._compiled: Callable[[Tensor], Any] | None = None
        self._warned = False

    def attach(self, net: Network) -> None:
        """Compute the passes of a network; see ``PassPolicy``."""
        self.net = net
        net.run = self

    def detach(self) -> None:
        """Restore the network's own passes."""
        self.net.run = self.net.original
        self._chosen, self._compiled = {}, None

    def __call__(self, images: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return what the network's forward returns; with further arguments the pass is the network's own."""
        if args or kwargs:
            return self.net.original(images, *args, **kwargs)
        kind = self._kind(images)
        if kind not in self._chosen:
            self._chosen[kind] = self._fastest(images)
        with torch.compiler.set_stance("eager_on_recompile"):
            return self._ways[self._chosen[kind]](images)

    @property
    def chosen(self) -> list[str]:
        """The way of each kind of pass so far: ``own``, ``channels_last`` or ``torch.compile``."""
        return list(self._chosen.values())

    def _kind(self, images: Tensor) -> tuple[Any, ...]:
        device = images.device
        autocast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
        gradients = torch.is_grad_enabled(), images.requires_grad
        modes = tuple(norm.mode for norm in self.net.norms)
        return images.shape[1:], len(images) > 1, images.dtype, device, gradients, autocast, modes

    @property
    def _ways(self) -> dict[str, Callable[[Tensor], Any]]:
        return {"own": self._own, "channels_last": self._channels_last, "torch.compile": self._compile}

    def _own(self, images: Tensor) -> Any:
        return self.net.original(images)

    def _channels_last(self, images: Tensor) -> Any:
        if images.ndim != 4:
            return self.net.original(images)
        with exact_statistics(self.net.norms):
            return self.net.original(images.contiguous(memory_format=torch.channels_last))

    def _compile(self, images: Tensor) -> Any:
        if self._compiled is None:
            self._compiled = torch.compile(self._own, dynamic=True)
        return self._compiled(images)

    # -- the trial

    def _fastest(self, images: Tensor) -> str:
        ways = self._ways
        # Networks of one class share what is compiled, and only one of them may have its features kept by a hook.
        with preserve_statistics(self.net.norms), torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
            own = self._try(ways["own"], images)
            faults: list[str] = []
            for name in list(ways)[1:]:
                fault = self._fault(ways[name], images, own)
                if fault is not None:
                    faults.append(f"{name} {fault}")
                    del ways[name]
            rounds = [{name: self._seconds(way, images) for name, way in ways.items()} for _ in range(_ROUNDS)]
        times = {name: min(seconds[name] for seconds in rounds) for name in ways}
        best = min(times, key=times.__getitem__)
        if times[best] <= (1 - _LEAST_GAIN) * times["own"]:
            return best
        if not self._warned:
            self._warned = True
            slow = [f"{name} is no faster" for name in list(ways)[1:]]
            warnings.warn(f"FastPass changes nothing here: {'; '.join(faults + slow)}", stacklevel=2)
        return "own"

    def _fault(self, way: Callable[[Tensor], Any], images: Tensor, own: list[Tensor]) -> str | None:
        try:
            return _difference(own, self._try(way, images))
        except Exception as error:  # compilers fail in any way, and the network's own pass has just worked
            reason = (str(error).strip() or "no message").splitlines()[0][:200]
            return f"fails ({type(error).__name__}: {reason})"

    def _try(self, way: Callable[[Tensor], Any], images: Tensor) -> list[Tensor]:
        """Return the logits of a pass and the gradients that it gives."""
        logits = logits_of(way(images.clone()), self.net.output)  # some networks change it in place
        logits = logits.masked_fill(is_masked(logits), 0)  # classes that are masked are not compared
        inputs = [tensor for tensor in (images, *self.net.parameters) if tensor.requires_grad]
        gradients: Sequence[Tensor | None] = ()
        if logits.requires_grad and inputs:
            with torch.autocast(images.device.type, enabled=False):
                gradients = torch.autograd.grad(logits.float().square().mean(), inputs, allow_unused=True)
        return [logits.detach(), *(gradient for gradient in gradients if gradient is not None)]

    def _seconds(self, way: Callable[[Tensor], Any], images: Tensor) -> float:
        _wait(images.device)
        start = time.perf_counter()
        self._try(way, images)
        _wait(images.device)
        return time.perf_counter() - start

    def __getstate__(self) -> dict[str, Any]:
        return {"_chosen": {}, "_compiled": None, "_warned": self._warned}  # copies choose for their own network


def _difference(own: list[Tensor], other: list[Tensor]) -> str | None:
    """Return what is wrong with a way's logits and gradients, given the network's own."""
    limits = _TOLERANCES.get(own[0].dtype, _LOW_PRECISION)
    apart = [float((other[0] - own[0]).abs().max() / own[0].abs().max())]
    if len(own) > 1:
        mine, theirs = (torch.cat([gradient.flatten() for gradient in way[1:]]) for way in (own, other))
        apart.append(float((theirs - mine).norm() / mine.norm()))
    for what, share, limit in zip(("logits", "gradients"), apart, limits, strict=False):
        if not share <= limit:
            return f"gives other {what} (by {share:.0e}, more than {limit:.0e})"
    return None


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
