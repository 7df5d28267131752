"""Batches that a network cannot take as they are, and what is predicted from instead."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ttalight.adapters.guard import READ, Guard, Unfit, Window, WindowGuard, is_finite

if TYPE_CHECKING:
    from ttalight.adapters.engine import Engine

__all__ = ["BadBatches", "OnBadBatch", "check_batch_type", "refusal", "repaired"]

#: What an adapter does with a batch that the network cannot take: ``error`` stops, ``skip`` predicts with the model as
#: it is and does not adapt, ``source`` predicts with the source model and does not adapt.
OnBadBatch = Literal["error", "skip", "source"]


class BadBatches:
    """Finds the batches of a stream that a network cannot take, and does with them what ``on_bad_batch`` says.

    Also takes a model back that a step has left with values that are not finite.

    Args:
        engine: The engine whose batches these are.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        every = engine.adapter.guard_every
        self.guard = Guard() if every == 1 else WindowGuard(every)
        #: (C, H, W) of the first batch.
        self.usual: tuple[int, ...] | None = None
        self._taken: set[tuple[int, ...]] = set()

    def fault(self, images: Tensor) -> Exception | None:
        """Return what is wrong with a batch, as far as that must be known before anything moves."""
        return self._refusal(images) or self._look(images)

    def attempt(self, images: Tensor, adapt: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the logits of a batch that is adapted to, or only predicted where it turns out that it cannot be.

        Args:
            images: (B, C, H, W).
            adapt: Adapts to it and returns its logits.

        Raises:
            Exception: What is wrong with the batch, if that is to stop the stream.
        """
        logits = self._attempt(images, adapt) if self._can_wait else adapt(images)
        self.usual = self.usual or tuple(images.shape[1:])
        self._taken.add(tuple(images.shape[1:]))
        return logits

    @property
    def _can_wait(self) -> bool:
        """Whether a batch is looked at on the way, and not before."""
        return self.engine.configured and self.engine.episodes is None and self.guard.can_wait

    def _attempt(self, images: Tensor, adapt: Callable[[Tensor], Tensor]) -> Tensor:
        engine = self.engine
        passes = engine.net.forwards, engine.backwards
        self.guard.begin(images, engine.touched, (max(engine.visit, 0), engine.batch))
        unfit: Unfit | None = None
        try:
            logits = adapt(images)
            self._note(self.guard.end())
            return logits
        except Unfit as error:
            unfit = error
        except Exception:  # of pixels that are not finite anything may come
            try:
                self._note(self.guard.end())
            except Unfit as error:
                unfit = error
            if unfit is None:
                raise
        self.guard.take_back()
        engine.abandon(passes)
        fault = self._fault_of(images, unfit)
        if fault is None:  # the model is the source again, or pixels are too large to be added up
            return adapt(images)
        engine.net.images = images = self.repair(images, fault)
        return self.only_predict(images)

    def _refusal(self, images: Tensor) -> Exception | None:
        """Return what is wrong with type and size of a batch."""
        fault: Exception | None = check_batch_type(images)
        if self._is_new_size(images):
            assert self.usual is not None
            net = self.engine.net
            with self.engine.unmoved(), net.norm_mode("source"), net.precision():
                refused = refusal(net.original, repaired(images[:1], self._dtype()), self.usual)
            if refused is None:
                self._taken.add(tuple(images.shape[1:]))
            fault = refused or fault
        return fault

    def _is_new_size(self, images: Tensor) -> bool:
        """Return whether images have a size that the network has not taken yet, after others that it has."""
        shape, usual = tuple(images.shape[1:]), self.usual
        # Other channels or dimensions are the network's own to refuse: there is nothing to scale.
        comparable = usual is not None and len(usual) == len(shape) == 3 and usual[0] == shape[0]
        return comparable and shape not in self._taken

    def _look(self, images: Tensor) -> Exception | None:
        """Return what is wrong with pixels, where that cannot wait.

        What one NaN does to running statistics and weights, no reset within the domain takes back.
        """
        if self._can_wait:
            return None
        try:
            self.guard.look(images, self.engine.touched)
        except Unfit as unfit:
            return self._fault_of(images, unfit)
        return None

    def _fault_of(self, images: Tensor, unfit: Unfit) -> Exception | None:
        """Return what is wrong with pixels, and go back to the source if the last batch spoiled the model."""
        if unfit.state:
            self._return_to_source()
        bad = int(images.isfinite().flatten(1).all(1).logical_not_().sum()) if unfit.pixels else 0
        if not bad:
            return None
        return ValueError(
            f"{bad} of {len(images)} images in batch {self.engine.batch} of visit {max(self.engine.visit, 0)} (counted "
            "from 0) have NaN or infinite pixels: repair them or take them away. Nothing was adapted to this batch"
        )

    def check_state(self) -> None:
        """Go back to the source if weights or statistics are not finite; one host synchronisation."""
        if self.engine.touched and not self.guard.is_finite():
            self._return_to_source()

    def _return_to_source(self) -> None:
        engine = self.engine
        warnings.warn(
            f"{type(engine.adapter).__name__} has left weights or statistics that are not finite, before batch "
            f"{engine.batch} of visit {max(engine.visit, 0)}: it goes on from the source, as after a reset. Is the "
            "learning rate too high?",
            stacklevel=2,
        )
        engine.recover()

    def close(self) -> None:
        """Look at what is still to be looked at, between two batches."""
        self._note(self.guard.close())

    def _note(self, window: Window | None) -> None:
        """Count the steps of a window, and say what was wrong with it."""
        if window is None:
            return
        engine = self.engine
        good = [all(map(is_finite, step)) and step[2] > 0 for step in window.steps]
        moved = 0 if window.taken_back else sum(good)
        engine.updates += moved
        engine.skipped += len(good) - moved
        engine.bad_batches += len(window.bad)
        if window.steps:
            engine.last = dict(zip(READ, window.steps[-1], strict=True))
        if window.taken_back and engine.descent is not None:
            engine.descent.reset()
        if window.bad or window.taken_back:
            named = ", ".join(f"{batch} of visit {visit}" for visit, batch in window.bad) or "none"
            kept = "goes on from what it was before the first of them" if window.taken_back else "has not moved by them"
            first, last = window.places[0], window.places[-1]
            warnings.warn(
                f"guard_every={engine.adapter.guard_every} looked at batches {first[1]} of visit {first[0]} to "
                f"{last[1]} of visit {last[0]} (counted from 0): with NaN or infinite pixels: {named}. The model "
                f"{kept}; predictions of these batches may not be finite",
                stacklevel=2,
            )

    # -- what becomes of them

    def repair(self, images: Tensor, fault: Exception) -> Tensor:
        """Return images that a prediction can be made from; the first time, warn.

        Raises:
            Exception: What is wrong with the batch, if that is to stop the stream.
        """
        policy = self.engine.adapter.on_bad_batch
        if policy == "error":
            raise fault
        if self.engine.bad_batches == 0:
            model = "the source model" if policy == "source" else "the model as it is"
            warnings.warn(
                f"{fault}: predicted with {model}, as on_bad_batch={policy!r} says; further such batches are counted "
                "and not named",
                stacklevel=2,
            )
        size = self.usual[1:] if self.usual is not None and self._is_new_size(images) else None
        return repaired(images, self._dtype(), size)

    def only_predict(self, images: Tensor) -> Tensor:
        """Return logits of the model as it is, or of the source model; nothing moves."""
        engine, net = self.engine, self.engine.net
        engine.bad_batches += 1
        self.check_state()
        source = engine.adapter.on_bad_batch == "source"
        with torch.no_grad(), engine.unmoved():
            if source and engine.live:
                torch._foreach_copy_(list(engine.live.values()), engine.source)
            with ExitStack() as layers:
                for norm in net.norms:
                    if source or norm.mode == "ema":  # of a bad batch no statistics are taken
                        layers.enter_context(norm.as_source())
                logits = net(images).logits
        net.readings = {steps: logits for steps in getattr(engine.adapter, "read_at", ())}
        return logits

    def _dtype(self) -> torch.dtype:
        floats = (tensor.dtype for tensor in self.engine.net.module.parameters() if tensor.is_floating_point())
        return next(floats, torch.get_default_dtype())


def check_batch_type(images: Tensor) -> TypeError | None:
    """Return what is wrong with the type of a batch; None if it is floating point.

    Raises:
        TypeError: If it is neither floating point nor uint8: nothing sensible could be predicted.
        ValueError: If there is no image in it.
    """
    if len(images) == 0 or images.numel() == 0:
        raise ValueError(f"a batch of shape {tuple(images.shape)} has no pixels: leave it out of the stream")
    if images.is_floating_point():
        return None
    fault = TypeError(
        f"images must be floating point, as the network expects them; got {images.dtype}: "
        + ("use images.float() / 255" if images.dtype == torch.uint8 else "convert them first")
    )
    if images.dtype != torch.uint8:
        raise fault
    return fault


def refusal(forward: Callable[[Tensor], object], images: Tensor, usual: tuple[int, ...]) -> ValueError | None:
    """Return why a network cannot take images of another size than usual; None if it can.

    Args:
        forward: The network's forward; it is tried on one image.
        images: (B, C, H, W).
        usual: (C, H, W) of the batches before.
    """
    try:
        with torch.no_grad():
            forward(images[:1])
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        fault = ValueError(
            f"images of shape {tuple(images.shape[1:])} came after those of {usual}, and the network does not take "
            f"them ({reason}): scale all images of the stream to one size"
        )
        fault.__cause__ = error
        return fault
    return None


def repaired(images: Tensor, dtype: torch.dtype, size: tuple[int, ...] | None = None) -> Tensor:
    """Return images that a prediction can be made from.

    Bytes become floats in [0, 1], pixels that are not finite become 0, and images are scaled to ``size``.

    Args:
        images: (B, C, H, W), floating point or uint8.
        dtype: Floating-point type that bytes become.
        size: (H, W) that the network takes; the images' own by default.
    """
    if not images.is_floating_point():
        images = images.to(dtype).div(255)
    images = images.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    if size is None:
        return images
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
