"""An alarm on the risk of a model that adapts, with a stated rate of false alarms."""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

import torch
from torch import Tensor

from ttalight.engine import Engine
from ttalight.errors import InputError
from ttalight.monitoring.bounds import (
    betting_log_wealth,
    clopper_pearson_upper,
    log_binomial_tail,
    running_lower_bound,
)
from ttalight.monitoring.observer import LateReads, Monitoring
from ttalight.monitoring.passes import adapted_outputs, source_outputs

__all__ = ["RiskAlarm", "RiskMonitor", "flag_threshold", "uncertainty"]

_LOG = logging.getLogger(__name__)


class RiskAlarm(NamedTuple):
    """The alarm of a ``RiskMonitor``.

    Args:
        batch: Number of the batch, from 1, whose flags raised it.
        images: Images until then.
        lower_bound: Lower bound on the running risk.
        limit: What it exceeded: the upper bound on the source's risk plus the tolerance.
    """

    batch: int
    images: int
    lower_bound: float
    limit: float


def uncertainty(logits: Tensor) -> Tensor:
    """Return the negative log-odds of the likeliest class of each prediction, (B,).

    They are in the order of one minus the largest probability, also where that is 0 in floating point.

    Args:
        logits: (B, C).
    """
    logits = logits.double()
    largest, place = logits.max(1, keepdim=True)
    return logits.scatter(1, place, -math.inf).logsumexp(1) - largest[:, 0]


def flag_threshold(uncertainties: Tensor, wrong: Tensor, share: float, level: float) -> Tensor:
    """Return a threshold above which few right predictions are uncertain, a scalar.

    Of images like those given, at most ``share`` are predicted right with an uncertainty above the threshold, with
    probability 1 - level: it is the order statistic of the uncertainties of right predictions whose exceedance
    probability, which has a Beta distribution whatever that of the uncertainties, is at most ``share`` with that
    probability (S. S. Wilks, *Determination of Sample Sizes for Setting Tolerance Limits*, Annals of Mathematical
    Statistics 12, 1941).

    Args:
        uncertainties: (N,).
        wrong: Whether each prediction is wrong, boolean (N,).
        share: Between 0 and 1.
        level: Between 0 and 1.

    Raises:
        ValueError: If there are too few images for such a threshold.
    """
    count, allowed = len(uncertainties), -1
    low, high = 0, count - 1  # the number of right predictions that may lie above it
    while low <= high:
        middle = (low + high) // 2
        if log_binomial_tail(count - middle, count, 1 - share) <= math.log(level):  # as many misses or more
            allowed, low = middle, middle + 1
        else:
            high = middle - 1
    if allowed < 0:
        raise InputError(
            f"{count} images are too few for a share of false flags of {share} at level {level:.3g}: give at least "
            f"{math.ceil(math.log(level) / math.log1p(-share))}, or allow a larger share"
        )
    right = uncertainties.masked_fill(wrong, -math.inf)
    return right.topk(allowed + 1).values[-1]


class RiskMonitor(Monitoring):
    """Raises an alarm when the running error of a model that adapts exceeds the source's by more than a tolerance.

    No label of the stream is needed. A prediction is flagged where its uncertainty (in the order of one minus the
    largest probability) lies above a threshold. Source images with labels set the threshold, so that at most
    ``false_flags`` of all images are flagged though predicted right. The share of flags beyond these is a lower bound
    on the error. A confidence sequence bounds the running share of flags from below at all times together
    (``running_lower_bound``), and there is an alarm when that bound, less ``false_flags``, exceeds the upper bound on
    the source's error plus ``tolerance``.

    **What is guaranteed.** The probability of ever raising a false alarm is at most ``level``, if

    1. the labelled images and what the source's error means are independent draws of one distribution, and the labelled
       images were not used for training,
    2. at every time, at most ``false_flags`` of the stream's images so far are, in the mean of their conditional
       expectations, flagged though predicted right.

    On a stream that is like the labelled images and is predicted by the source model, 2 follows from 1 and is part of
    ``level`` (a quarter of it, another is the source's error, half the sequence). Elsewhere it is an assumption, which
    no unlabelled stream can prove: it holds where a shift makes predictions wrong as it makes them uncertain, and it
    fails where right predictions become uncertain too, as under batch statistics of few images. Images need not be
    independent: the bound is on the mean of conditional expectations, whatever adaptation and stream do.

    **What is not.** Errors that are sure of themselves are not flagged, so that an alarm may come late or never: a
    model that has collapsed is sure, and is for a ``Watch`` to find. With ``every`` the present model sets the
    threshold on the labelled images again every so many batches (passes of all of them, which change nothing), and
    more of such errors are flagged. The level of each later threshold holds for it alone.

    After M. Schirmer, M. Jazbec, C. A. Naesseth, E. Nalisnick, *Monitoring Risks in Test-Time Adaptation*, NeurIPS
    2025, arXiv 2507.08721, and A. Podkopaev and A. Ramdas, *Tracking the Risk of a Deployed Model and Detecting Harmful
    Distribution Shifts*, ICLR 2022, arXiv 2110.06177. Differences: the loss is the error; the threshold of the
    uncertainty is chosen by its false flags; and the sequence is that of a Beta mixture of bets, made for flags.

    Args:
        images: Labelled source images, (N, 3, H, W), as the network expects them.
        labels: Their labels, (N,).
        level: Bound on the probability of a false alarm.
        tolerance: Excess of the error over the source's that is tolerated, a share of images.
        false_flags: Share of images that may be flagged though predicted right. More flags find more errors.
        every: Batches from one threshold to the next; by default the first stays.
        batch_size: Labelled images a pass, as many as the stream's batches have where statistics are of the batch.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        level: float = 0.05,
        tolerance: float = 0.05,
        false_flags: float = 0.05,
        every: int | None = None,
        batch_size: int = 200,
    ) -> None:
        for name, value in {"level": level, "false_flags": false_flags}.items():
            if not 0 < value < 1:
                raise InputError(f"{name} must be above 0 and below 1, got {value}")
        if not 0 <= tolerance < 1:
            raise InputError(f"tolerance must be at least 0 and below 1, got {tolerance}")
        for name, count in {"every": 1 if every is None else every, "batch_size": batch_size}.items():
            if count < 1:
                raise InputError(f"{name} must be at least 1, got {count}")
        if labels.ndim != 1 or len(images) != len(labels) or not len(labels):
            raise InputError(
                f"RiskMonitor needs a label for each image, got images {tuple(images.shape)}, labels "
                f"{tuple(labels.shape)}"
            )
        self.images, self.labels = images, labels
        self.level, self.tolerance, self.false_flags = level, tolerance, false_flags
        self.every, self.batch_size = every, batch_size
        self._forget()

    def _forget(self) -> None:
        #: The first alarm, None before it; what the running share of flags is compared with.
        self.alarm: RiskAlarm | None = None
        self.limit: float | None = None
        #: Images and flags that were read so far.
        self.count, self.flags = 0, 0.0
        self._threshold: Tensor | None = None
        self._late, self._pending = LateReads(), (0, 0)

    def begin(self, engine: Engine) -> None:
        """Forget an earlier stream."""
        self._forget()

    def see(self, engine: Engine, logits: Tensor) -> None:
        """Flag the batch, and test with the flags of the one before."""
        if logits.ndim > 2:
            raise InputError(f"RiskMonitor watches predictions of images, (B, C), got {tuple(logits.shape)}")
        threshold = self._calibrate(engine) if self._threshold is None else self._threshold
        flags = (uncertainty(logits) > threshold).sum().view(1)
        place, self._pending = self._pending, (engine.batches, len(logits))
        seen = self._late.exchange(flags)
        if seen is not None:
            self._test(place[0], place[1], seen[0])
        if self.every is not None and engine.batches % self.every == 0:  # of the next batch: it is fixed before that
            wrong, doubts = self._predict(engine, source=False)
            self._threshold = flag_threshold(doubts, wrong, self.false_flags, self.level / 4)

    @property
    def lower_bound(self) -> float:
        """Lower bound on the running error: that of the share of flags less the false ones; at least 0."""
        if not self.count:
            return 0.0
        flags, count = torch.tensor(self.flags), torch.tensor(self.count)
        return max(0.0, float(running_lower_bound(flags, count, self.level / 2)) - self.false_flags)

    def _calibrate(self, engine: Engine) -> Tensor:
        wrong, doubts = self._predict(engine, source=True)
        source = clopper_pearson_upper(int(wrong.sum()), len(wrong), self.level / 4)
        self.limit = source + self.tolerance
        self._threshold = flag_threshold(doubts, wrong, self.false_flags, self.level / 4)
        return self._threshold

    def _predict(self, engine: Engine, source: bool) -> tuple[Tensor, Tensor]:
        """Return which labelled images are predicted wrong, and how uncertain each prediction is."""
        outputs, device = source_outputs if source else adapted_outputs, engine.net.device
        parts = torch.split(self.images, self.batch_size)
        logits = torch.cat([outputs(engine, part.to(device)).logits for part in parts])
        return logits.argmax(1) != self.labels.to(device), uncertainty(logits)

    def _test(self, batch: int, images: int, flags: float) -> None:
        self.count, self.flags = self.count + images, self.flags + flags
        assert self.limit is not None, "flags come after calibration"
        mean = min(1.0, self.limit + self.false_flags)
        if self.alarm is not None or self.flags <= mean * self.count:
            return
        wealth = betting_log_wealth(torch.tensor(self.flags), torch.tensor(self.count), mean)
        if float(wealth) > -math.log(self.level / 2):
            self.alarm = RiskAlarm(batch, self.count, self.lower_bound, self.limit)
            _LOG.warning(
                "batch %d: the error is above %.3f, the source's and the tolerance together %.3f",
                batch, self.alarm.lower_bound, self.limit,
            )  # fmt: skip

    def curves(self) -> dict[str, float]:
        """Return bound, limit and alarm, for a logger."""
        if not self.count or self.limit is None:
            return {}
        return {
            "risk/lower_bound": self.lower_bound,
            "risk/limit": self.limit,
            "risk/alarm": float(self.alarm is not None),
        }
