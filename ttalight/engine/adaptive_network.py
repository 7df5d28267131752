"""The network as a method sees it: passes, steps, random draws, resets, and checks that all stays finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ttalight.distributed import average
from ttalight.errors import UsageError
from ttalight.models.network import Network
from ttalight.models.vectors import JoinedParameters, divide, flatten, gradient_vector
from ttalight.seeding import derive_seed

__all__ = ["AdaptiveNetwork", "Counters", "Guard"]


@dataclass
class Counters:
    """Counts of a run, and the place of its next batch."""

    visit: int = -1
    batch: int = 0
    batches: int = 0
    updates: int = 0
    skipped: int = 0
    recoveries: int = 0
    bad_batches: int = 0
    missed: int = 0
    updates_at_reset: int = 0


class Guard:
    """Checks that pixels, weights and statistics are finite.

    The checks of a batch are scalars on the device, read with the numbers that the first step of the batch reads
    anyway, or when the batch ends.
    """

    def __init__(self) -> None:
        #: Whether the pixels of the batch are finite, and whether the model was before it. None until they are read.
        self.pixels_finite: bool | None = None
        self.state_finite: bool | None = None
        #: Whether a step has updated the weights since they were last checked.
        self.moved = False
        self._unread: list[Tensor] = []
        self._weights: list[Tensor] = []
        self._others: list[Tensor] = []

    def watch(self, weights: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        """Set what must stay finite: weights, updated by steps alone, and others. Those not finite now are left out."""
        self._weights, self._others = (
            [value for value in values if value.is_floating_point() and value.numel() and bool(value.isfinite().all())]
            for values in (weights, others)
        )

    def begin(self, images: Tensor) -> None:
        """Begin a batch, (B, C, H, W)."""
        self._unread = [*images.detach().aminmax()]
        self.pixels_finite = self.state_finite = None

    def check_state(self) -> None:
        """Have weights and statistics checked with the coming read."""
        watched = [*self._weights, *self._others] if self.moved else self._others
        if watched:
            self._unread.append(_sum_of_norms(watched))

    def read(self, values: Sequence[Tensor] = ()) -> list[float]:
        """Return scalars from the device, and note the checks that were not read yet. One host synchronisation."""
        scalars, count = [*values, *self._unread], len(values)
        if not scalars:
            return []
        seen: list[float] = [scalars[0].item()] if len(scalars) == 1 else torch.stack(scalars).tolist()
        if self._unread:
            self._unread = []
            self.pixels_finite = all(map(math.isfinite, seen[count : count + 2]))
            self.state_finite = all(map(math.isfinite, seen[count + 2 :]))
            self.moved = self.moved and not self.state_finite
        return seen[:count]

    def is_pixels_finite(self) -> bool:
        """Return whether the pixels of the batch are finite. One host synchronisation."""
        self.read()
        return self.pixels_finite is True

    def is_state_finite(self) -> bool:
        """Return whether weights and statistics are finite. One host synchronisation where they may not be."""
        unread, self._unread = self._unread, []
        self.check_state()
        checks, self._unread = self._unread, unread
        return all(map(math.isfinite, checks))


class AdaptiveNetwork(Network):
    """A ``Network`` whose trainable parameters can be stepped.

    Args:
        module: See ``Network``.
        seed: Key of all random draws, with their place in the stream.
        clip_norm: Norm that the gradient of a step is clipped to. None clips nothing.
        kwargs: See ``Network``.
    """

    def __init__(self, module: nn.Module, seed: int, clip_norm: float | None = None, **kwargs: Any) -> None:
        super().__init__(module, **kwargs)
        self.seed, self.clip_norm, self.guard = seed, clip_norm, Guard()
        self.optimizer: Optimizer | None = None
        #: The parameters as one vector, where the optimizer moves that; and what it moves.
        self.joined: JoinedParameters | None = None
        self.leaves: list[nn.Parameter] = []
        self.counters = Counters()
        #: Backwards so far, in whole batches.
        self.backwards = 0.0
        #: Loss, gradient norm and fraction of samples kept of the last step, and whether it asked for a reset.
        self.last: dict[str, float] = {}
        #: Tensors of a saved state by name, where ``configure`` has no images because that state follows.
        self.saved: Mapping[str, Any] = {}
        #: Restores the source; the engine sets it.
        self.restore_source: Callable[[], None] = lambda: None
        #: Whether no step of the present batch may update anything.
        self.is_bad = False
        self._reduced: tuple[Tensor, Tensor]
        self._gradients: list[Tensor] = []
        self._reset_if: Tensor | None = None

    def draws(self, step: int = 0) -> torch.Generator:
        """Return the generator of a step's random draws, keyed by (seed, visit, batch, step)."""
        place = self.counters
        return self.generator.manual_seed(derive_seed(self.seed, "adapt", place.visit, place.batch, step))

    def step(
        self,
        losses: Tensor,
        weights: Tensor | None = None,
        penalty: Tensor | None = None,
        penalty_gradient: tuple[Tensor, Tensor] | None = None,
    ) -> bool:
        """Reduce per-sample losses, go backward and let the optimizer step: ``backward``, then ``optimizer_step``.

        Args:
            losses: (B,), or a scalar that is a mean already.
            weights: (B,). A weight of zero drops the sample. The loss is the mean of weighted losses over those kept.
            penalty: A scalar that does not depend on the samples, added to the mean.
            penalty_gradient: A gradient in closed form, one vector (N,) for all trainable parameters, and the penalty
                that it is of, a scalar without gradient.

        Returns:
            Whether the parameters were updated. A loss that does not depend on them is a RuntimeError.
        """
        self.backward(losses, weights, penalty, penalty_gradient)
        return self.optimizer_step()

    def backward(
        self,
        losses: Tensor,
        weights: Tensor | None = None,
        penalty: Tensor | None = None,
        penalty_gradient: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        """Reduce per-sample losses and compute the gradients of the trainable parameters; see ``step``."""
        if weights is None:
            loss, kept = losses.mean(), losses.new_ones(())
        else:
            count = (weights != 0).sum()
            loss, kept = (losses * weights).sum() / count.clamp(min=1), count / weights.numel()
        if penalty is not None:
            loss = loss + penalty
        if self._gradients:
            self.zero_grad()
        if loss.requires_grad:
            with self.pass_state.repeat():
                loss.backward()  # type: ignore[no-untyped-call]
        self._gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        if not self._gradients:
            raise UsageError(
                "the loss does not depend on the parameters to adapt: does the model's forward run under no_grad, "
                "freeze its parameters, detach its outputs, or have all that adapts inside a checkpoint with "
                "use_reentrant=True?"
            )
        if self.joined is not None:
            is_whole = len(self._gradients) == len(self.parameters)
            gradient = torch.cat(self._gradients) if is_whole else gradient_vector(self.parameters)
            self.joined.vector.grad, self._gradients = gradient, [gradient]
            for parameter, part in zip(self.parameters, gradient.split_with_sizes(self.joined.sizes), strict=True):
                parameter.grad = part
        if self.pass_state.shard is not None:
            average(self._gradients)
        loss = loss.detach()
        if penalty_gradient is not None:
            vector, value = penalty_gradient
            loss = loss + value
            for leaf, part in zip(self.leaves, divide(vector, self.leaves), strict=True):
                leaf.grad = part if leaf.grad is None else leaf.grad.add_(part)
            self._gradients = [leaf.grad for leaf in self.leaves if leaf.grad is not None]
        self.backwards += self.pending_forwards
        self.pending_forwards = 0.0
        self._reduced = loss, kept

    def optimizer_step(self) -> bool:
        """Let the optimizer step, and return whether it updated the parameters. One host synchronisation.

        A step whose loss or gradient is not finite, that keeps no sample, or that is of a bad batch, updates nothing.
        """
        assert self.optimizer is not None, "a method that steps has trainable parameters"
        guard, gradients = self.guard, self._gradients
        norm = torch.linalg.vector_norm(gradients[0] if len(gradients) == 1 else flatten(gradients))
        values = {"loss": self._reduced[0], "grad_norm": norm, "selected": self._reduced[1]}
        if self._reset_if is not None:
            values["recovered"] = self._reset_if
        seen = guard.read(list(values.values()))
        self.last = dict(zip(values, seen, strict=True))
        is_good = guard.pixels_finite is True and guard.state_finite is True and not self.is_bad
        moves = is_good and seen[2] > 0 and all(map(math.isfinite, seen))
        if moves:
            if self.clip_norm is not None:
                torch._foreach_mul_(gradients, (self.clip_norm / (norm + 1e-6)).clamp(max=1.0))
            self.optimizer.step()
            guard.moved = True
        self.counters.updates += moves
        self.counters.skipped += not moves
        self._reset_if = None
        if is_good and self.last.get("recovered"):
            self.reset()
        return moves

    def zero_grad(self) -> None:
        """Drop the gradients of the trainable parameters."""
        self._gradients = []
        for parameter in (*self.parameters, *self.leaves):
            parameter.grad = None

    def reset(self) -> None:
        """Restore the source in the middle of a batch, on the method's own decision; counted in ``recoveries``."""
        self.restore_source()
        self.counters.recoveries += 1

    def reset_if(self, condition: Tensor) -> None:
        """Restore the source with the coming step if a condition, a boolean scalar, holds; read with the step."""
        self._reset_if = condition

    def begin(self, images: Tensor, is_bad: bool) -> None:
        """Begin to adapt to a batch of finite images, (B, C, H, W), of which no step updates anything if it is bad."""
        self.images, self.is_bad, self.last, self.readings, self.pending_forwards = images, is_bad, {}, {}, 0.0
        self.fix_flags()

    def clear_cache(self) -> None:
        """Drop references to the last batch, and its gradients."""
        super().clear_cache()
        self.zero_grad()
        self._reset_if, self.saved = None, {}


@torch.no_grad()
def _sum_of_norms(tensors: Sequence[Tensor]) -> Tensor:
    """Return a number that is finite if all of these are."""
    vectors = [tensor for tensor in tensors if tensor.ndim == 1]
    others = [tensor for tensor in tensors if tensor.ndim != 1]
    norms = [torch.linalg.vector_norm(torch.cat(vectors)).float()] if vectors else []
    if others:
        norms += [norm.float() for norm in torch._foreach_norm(others)]
    return norms[0] if len(norms) == 1 else torch.stack(norms).sum()
