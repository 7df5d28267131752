"""What must stay finite: read together with what a step reads, and taken back where it is not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ttalight.adapters.adapter import Adapter

__all__ = ["READ", "Guard", "Unfit", "Window", "WindowGuard", "check_guard", "is_finite"]

#: What every step reads.
READ = ("loss", "grad_norm", "selected")
#: Numbers beyond which keeping them aside for every batch costs more than another look before it.
_MOST = 1 << 18
#: Vectors, which are many and small, and other tensors.
Parts = tuple[list[Tensor], list[Tensor]]


class Unfit(Exception):
    """A batch has pixels, or the model weights and statistics, that are not finite.

    Args:
        pixels: Whether the sum of all pixels is not finite, which pixels can also be too large for.
        state: Whether the model was not finite when the batch began.
    """

    def __init__(self, pixels: bool, state: bool) -> None:
        super().__init__("pixels, or weights and statistics, that are not finite")
        self.pixels = pixels
        self.state = state


class Window(NamedTuple):
    """What the batches of a window turned out to be."""

    #: Visit and batch of each.
    places: list[tuple[int, int]]
    #: Those with pixels that are not finite.
    bad: list[tuple[int, int]]
    #: What each step would have read.
    steps: list[list[float]]
    #: Whether the model was not finite at the end, and is again what it was before the first of them.
    taken_back: bool


class Guard:
    """Looks at each batch, and at what the last one left, in the first read that a step makes anyway.

    Until then nothing moves but running statistics and a method's own state, which are kept aside and taken back where
    the look finds a fault. A batch without a step is looked at when it ends: one host synchronisation in either case.
    """

    def __init__(self) -> None:
        #: What must stay finite: all of it, and what also moves where the steps of a batch move nothing.
        self._watched: Parts = [], []
        self._restless: Parts = [], []
        #: Whether all steps of the last batch left the weights as they were; None where it had none.
        self.stayed: bool | None = None
        self._moving: list[Tensor] = []
        self._kept: list[Tensor] = []
        self._unread: list[Tensor] = []
        #: Whether so little moves before the first read that it can be kept aside.
        self.can_wait = True

    def configure(self, live: Sequence[Tensor], source: Sequence[Tensor], steady: int) -> None:
        """Note what the method can change.

        Args:
            live: All of it.
            source: The values that a reset goes back to: what is not finite there is not looked at.
            steady: How many of ``live``, from the first on, move in steps only.
        """
        # The tensors themselves, and no views of them, which copies and pickles would part from them.
        watched = [
            value
            for value, first in zip(live, source, strict=True)
            if value.is_floating_point() and value.numel() and bool(first.isfinite().all())
        ]
        self._watched = _parts(watched)
        self._moving = list(live[steady:])
        self._restless = _parts([value for value in watched if any(value is other for other in self._moving)])
        self._kept = [value.detach().clone() for value in self._moving]
        self.can_wait = sum(value.numel() for value in self._moving) <= _MOST

    def look(self, images: Tensor, touched: bool) -> None:
        """Look at a batch before anything moves.

        Args:
            images: (B, C, H, W).
            touched: Whether the model may have moved since it was the source.

        Raises:
            Unfit: If pixels or model are not finite.
        """
        _judge(_read(self._questions(images, touched)))

    def begin(self, images: Tensor, touched: bool, place: tuple[int, int]) -> None:
        """Note what is to be looked at in a batch, and keep aside what it will move.

        Args:
            images: (B, C, H, W).
            touched: See ``look``.
            place: Visit and batch.
        """
        self._unread = self._questions(images, touched)
        self.stayed = None
        self._keep()

    def read(self, values: Sequence[Tensor]) -> list[float] | None:
        """Return numbers from the device, once what is to be looked at turned out well.

        Args:
            values: Scalars.

        Raises:
            Unfit: If it did not.
        """
        unread, self._unread = self._unread, []
        seen = _read([*values, *unread])
        _judge(seen[len(values) :])
        return seen[: len(values)]

    def note_step(self, moved: bool) -> None:
        """Note whether a step has moved the weights; if none of a batch has, they need no look after it."""
        self.stayed = not moved and self.stayed is not False

    def end(self) -> Window | None:
        """Look at the batch if none of its steps has.

        Raises:
            Unfit: See ``read``.
        """
        if self._unread:
            self.read([])
        return None

    def close(self) -> Window | None:
        """Look at all that is still to be looked at, between two batches."""
        return None

    def drop(self) -> None:
        """Look no more at the batches so far: the model is about to become another."""
        self._unread = []
        self.stayed = None

    @torch.no_grad()
    def take_back(self) -> None:
        """Give what was kept aside the values that it had then."""
        self.drop()
        if self._moving:
            torch._foreach_copy_(self._moving, self._kept)

    @torch.no_grad()
    def _keep(self) -> None:
        if self._moving:
            torch._foreach_copy_(self._kept, self._moving)

    def _questions(self, images: Tensor, touched: bool) -> list[Tensor]:
        """Return scalars that are finite if all is well: of pixels, and of the model where it may have moved."""
        # One small sum tells; it may also be infinite where pixels are large.
        pixels = images.sum(dtype=torch.promote_types(images.dtype, torch.float32)).float()
        watched = self._restless if self.stayed else self._watched
        return [pixels, _size(watched)] if touched and any(watched) else [pixels]

    def is_finite(self) -> bool:
        """Return whether all weights and statistics are finite; one host synchronisation."""
        return not any(self._watched) or is_finite(float(_size(self._watched)))


class WindowGuard(Guard):
    """Looks at several batches and their steps together, so that nothing in between waits for the device.

    Args:
        every: Batches of a window.
    """

    def __init__(self, every: int) -> None:
        super().__init__()
        self.every = every
        self._places: list[tuple[int, int]] = []
        self._clean: list[Tensor] = []
        self._steps: list[Tensor] = []

    def configure(self, live: Sequence[Tensor], source: Sequence[Tensor], steady: int) -> None:
        """Note what the method can change; all of it is kept aside for a window. See ``Guard``."""
        super().configure(live, source, 0)
        self.can_wait = True

    def begin(self, images: Tensor, touched: bool, place: tuple[int, int]) -> None:
        """Note a batch, and keep aside what the window will move. See ``Guard``."""
        if not self._places:
            self._keep()
        self._places.append(place)
        self._clean.append(images.isfinite().all())

    def read(self, values: Sequence[Tensor]) -> list[float] | None:
        """Note what a step would read, for the end of the window."""
        self._steps.append(torch.stack(list(values)))
        return None

    def end(self) -> Window | None:
        """Return what the window was if this batch is its last; one host synchronisation."""
        return self.close() if len(self._places) >= self.every else None

    def close(self) -> Window | None:
        """Return what the window was up to here; one host synchronisation."""
        if not self._places:
            return None
        count = len(self._places)
        state = [_size(self._watched)] if any(self._watched) else []
        seen = torch.cat([torch.stack([*self._clean, *state]), *self._steps]).tolist()
        size = len(self._steps[0]) if self._steps else 1
        numbers = seen[count + len(state) :]
        spoiled = bool(state) and not is_finite(seen[count])
        window = Window(
            places=self._places,
            bad=[place for place, clean in zip(self._places, seen, strict=False) if not clean],
            steps=[numbers[first : first + size] for first in range(0, len(numbers), size)],
            taken_back=spoiled,
        )
        if spoiled:
            self.take_back()
        self.drop()
        return window

    def drop(self) -> None:
        """Look no more at the batches of the window. See ``Guard``."""
        super().drop()
        self._places, self._clean, self._steps = [], [], []


def check_guard(adapter: Adapter) -> None:
    """Refuse what cannot do without the host between two looks.

    Raises:
        ValueError: If that is so.
    """
    if adapter.guard_every == 1:
        return
    reasons = [
        (adapter.decides_on_host, f"{type(adapter).__name__} decides on the host in every step"),
        (getattr(adapter, "repeat_kept", False), "repeat_kept=True counts the kept samples in every step"),
        (isinstance(adapter.reset, int), f"reset={adapter.reset!r} counts updates in every step"),
        (getattr(adapter, "episode", "batch") == "image", "episode='image' looks at every step of an episode"),
    ]
    for holds, reason in reasons:
        if holds:
            raise ValueError(
                f"guard_every={adapter.guard_every} waits for the device once in so many batches: {reason}"
            )
    if adapter.on_bad_batch != "skip":
        raise ValueError(
            f"guard_every={adapter.guard_every} finds a bad batch after its predictions were given out, so that it "
            "can neither stop before it nor predict it otherwise: it needs on_bad_batch='skip', got "
            f"{adapter.on_bad_batch!r}"
        )


def is_finite(value: float) -> bool:
    """Return whether a number is neither infinite nor NaN."""
    return value - value == 0


def _parts(tensors: Sequence[Tensor]) -> Parts:
    return [tensor for tensor in tensors if tensor.ndim == 1], [tensor for tensor in tensors if tensor.ndim != 1]


@torch.no_grad()
def _size(parts: Parts) -> Tensor:
    """Return a number that is finite if all of these are."""
    vectors, others = parts
    norms = [torch.linalg.vector_norm(torch.cat(vectors)).float()] if vectors else []
    if others:
        norms += [norm.float() for norm in torch._foreach_norm(others)]
    return norms[0] if len(norms) == 1 else torch.stack(norms).sum()


def _read(scalars: Sequence[Tensor]) -> list[float]:
    numbers: list[float] = [scalars[0].item()] if len(scalars) == 1 else torch.stack(list(scalars)).tolist()
    return numbers


def _judge(seen: Sequence[float]) -> None:
    if not all(map(is_finite, seen)):
        raise Unfit(pixels=not is_finite(seen[0]), state=not all(map(is_finite, seen[1:])))
