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
    class_share_bound,
    clopper_pearson_upper,
    log_binomial_tail,
    running_lower_bound,
    upper_class_shares,
)
from ttalight.monitoring.observer import LateReads, Monitoring
from ttalight.monitoring.passes import adapted_outputs, source_outputs
from ttalight.monitoring.signals import prediction_counts

__all__ = ["Calibration", "RiskAlarm", "RiskMonitor", "calibrate", "error_bounds", "flag_threshold", "uncertainty"]

_LOG = logging.getLogger(__name__)


class RiskAlarm(NamedTuple):
    """The alarm of a ``RiskMonitor``.

    Args:
        batch: Number of the batch, from 1, whose predictions raised it.
        images: Images until then.
        lower_bound: Lower bound on the running risk.
        limit: What it exceeded: the upper bound on the source's risk plus the tolerance.
        signal: What the bound is made from: ``uncertainty`` or ``class_shares``.
    """

    batch: int
    images: int
    lower_bound: float
    limit: float
    signal: str


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


class Calibration(NamedTuple):
    """The bounds that labelled images give before a stream begins.

    Args:
        limit: Upper bound on the source's error plus the tolerance.
        threshold: Uncertainty above which a prediction is flagged, a scalar.
        shares: Upper bounds on the shares of the classes, (C,); None where the stream may have others.
        level: Level of the confidence sequence of each signal.
    """

    limit: float
    threshold: Tensor
    shares: Tensor | None
    level: float


def calibrate(
    logits: Tensor, labels: Tensor, level: float, tolerance: float, false_flags: float, label_shift: bool
) -> Calibration:
    """Return the bounds that the source's predictions of labelled images give.

    A quarter of the level is the source's error's. The rest is divided evenly among the signals: a third of each part
    is for what the labelled images say, two thirds for the confidence sequence.

    Args:
        logits: (N, C).
        labels: (N,).
        level: Bound on the probability of a false alarm.
        tolerance: See ``RiskMonitor``.
        false_flags: See ``RiskMonitor``.
        label_shift: Whether the classes of the stream may have other shares.
    """
    wrong, part = logits.argmax(1) != labels.to(logits.device), level * 3 / 4 / (1 if label_shift else 2)
    limit = clopper_pearson_upper(int(wrong.sum()), len(wrong), level / 4) + tolerance
    threshold = flag_threshold(uncertainty(logits), wrong, false_flags, part / 3)
    shares = None if label_shift else upper_class_shares(labels.cpu(), logits.shape[1], part / 3)
    return Calibration(limit, threshold, shares, part * 2 / 3)


def error_bounds(flags: Tensor, predicted: Tensor, calibration: Calibration, false_flags: float) -> dict[str, Tensor]:
    """Return lower bounds on the running error by signal, each (...,), which may be below 0.

    Args:
        flags: Numbers of flags among the first predictions, (...,).
        predicted: How many of these are of each class, (..., C).
        calibration: The bounds of the labelled images.
        false_flags: Share of flags that are no errors.
    """
    bounds = {"uncertainty": running_lower_bound(flags, predicted.sum(-1), calibration.level) - false_flags}
    if calibration.shares is not None:
        bounds["class_shares"] = class_share_bound(predicted, calibration.shares, calibration.level)
    return bounds


class RiskMonitor(Monitoring):
    """Raises an alarm when the running error of a model that adapts exceeds the source's by more than a tolerance.

    No label of the stream is needed. Two signals bound the error from below at all times together, by confidence
    sequences (``running_lower_bound``), and there is an alarm when either bound exceeds the upper bound on the source's
    error plus ``tolerance``:

    - *Uncertainty.* A prediction is flagged where its uncertainty (in the order of one minus the largest probability)
      lies above a threshold. Source images with labels set the threshold, so that at most ``false_flags`` of all images
      are flagged though predicted right. The share of flags beyond these is a lower bound on the error.
    - *Class shares.* Predictions of a class beyond its share of the labels are errors, so that the error is at least
      the total variation distance of predicted and true class shares (``class_share_bound``). This finds a model that
      has collapsed to few classes, and is sure of them.

    **What is guaranteed.** The probability of ever raising a false alarm is at most ``level``, if

    1. the labelled images and what the source's error means are independent draws of one distribution, and the labelled
       images were not used for training,
    2. at every time, at most ``false_flags`` of the stream's images so far are, in the mean of their conditional
       expectations, flagged though predicted right,
    3. at every time, no class has a larger share of the stream's images so far than it has in that distribution, in the
       mean of its conditional probabilities. The classes of a stream that come in runs have, and so have those of a
       stream with other shares: set ``label_shift`` there, which leaves the class shares out.

    On a stream that is like the labelled images and is predicted by the source model, 2 and 3 follow from 1 and are
    part of ``level`` (a quarter of it is the source's error's, the rest is divided evenly between the two signals).
    Elsewhere they are assumptions, which no unlabelled stream can prove. 2 holds where a shift makes predictions wrong
    as it makes them uncertain, and it fails where right predictions become uncertain too, as under batch statistics of
    few images. Images need not be independent: the bounds are on means of conditional expectations, whatever adaptation
    and stream do.

    **What is not.** Errors that are sure of themselves and leave the class shares as they are raise no alarm, and with
    ``label_shift`` a model that has collapsed is for a ``Watch`` to find. With ``every`` the present model sets the
    threshold on the labelled images again every so many batches (passes of all of them, which change nothing), and
    more of such errors are flagged. The level of each later threshold holds for it alone.

    After M. Schirmer, M. Jazbec, C. A. Naesseth, E. Nalisnick, *Monitoring Risks in Test-Time Adaptation*, NeurIPS
    2025, arXiv 2507.08721, and A. Podkopaev and A. Ramdas, *Tracking the Risk of a Deployed Model and Detecting Harmful
    Distribution Shifts*, ICLR 2022, arXiv 2110.06177. Differences: the loss is the error; the threshold of the
    uncertainty is chosen by its false flags; class shares are a signal too; and the sequence is that of a Beta mixture
    of bets, made for flags.

    Args:
        images: Labelled source images, (N, 3, H, W), as the network expects them.
        labels: Their labels, (N,).
        level: Bound on the probability of a false alarm.
        tolerance: Excess of the error over the source's that is tolerated, a share of images.
        false_flags: Share of images that may be flagged though predicted right. More flags find more errors.
        every: Batches from one threshold to the next; by default the first stays.
        batch_size: Labelled images a pass, as many as the stream's batches have where statistics are of the batch.
        label_shift: Whether the stream's classes may have other shares than the labelled images', or come in runs. The
            uncertainty is then the only signal, and has the whole level.
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
        label_shift: bool = False,
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
        self.every, self.batch_size, self.label_shift = every, batch_size, label_shift
        self._forget()

    def _forget(self) -> None:
        #: The first alarm, None before it.
        self.alarm: RiskAlarm | None = None
        #: Images and flags that were read so far, and predictions by class, (C,).
        self.count, self.flags = 0, 0.0
        self.predicted: Tensor | None = None
        self._calibration: Calibration | None = None
        self._late, self._pending = LateReads(), (0, 0)

    def begin(self, engine: Engine) -> None:
        """Forget an earlier stream."""
        self._forget()

    def see(self, engine: Engine, logits: Tensor) -> None:
        """Flag and count the predictions of the batch, and test with those of the one before."""
        if logits.ndim > 2:
            raise InputError(f"RiskMonitor watches predictions of images, (B, C), got {tuple(logits.shape)}")
        if self._calibration is None:
            self._calibration = self._calibrate(engine, source=True)
        flags = (uncertainty(logits) > self._calibration.threshold).sum().view(1)
        place, self._pending = self._pending, (engine.batches, len(logits))
        seen = self._late.exchange(torch.cat([flags, prediction_counts(logits.double())]))
        if seen is not None:
            self._test(*place, seen[0], torch.tensor(seen[1:], dtype=torch.float64), self._calibration)
        if self.every is not None and engine.batches % self.every == 0:  # of the next batch: it is fixed before that
            threshold = self._calibrate(engine, source=False).threshold
            self._calibration = self._calibration._replace(threshold=threshold)

    @property
    def limit(self) -> float | None:
        """Upper bound on the source's error plus the tolerance; None before the first batch."""
        return None if self._calibration is None else self._calibration.limit

    @property
    def lower_bounds(self) -> dict[str, float]:
        """Lower bounds on the running error by signal, at least 0; empty before the second batch."""
        if self._calibration is None or self.predicted is None:
            return {}
        bounds = error_bounds(torch.tensor(self.flags), self.predicted, self._calibration, self.false_flags)
        return {signal: max(0.0, float(bound)) for signal, bound in bounds.items()}

    @property
    def lower_bound(self) -> float:
        """Lower bound on the running error, the largest of ``lower_bounds``; 0 without one."""
        return max(self.lower_bounds.values(), default=0.0)

    def _calibrate(self, engine: Engine, source: bool) -> Calibration:
        outputs, device = source_outputs if source else adapted_outputs, engine.net.device
        parts = torch.split(self.images, self.batch_size)
        logits = torch.cat([outputs(engine, part.to(device)).logits for part in parts])
        return calibrate(logits, self.labels, self.level, self.tolerance, self.false_flags, self.label_shift)

    def _test(self, batch: int, images: int, flags: float, predicted: Tensor, calibration: Calibration) -> None:
        self.count, self.flags = self.count + images, self.flags + flags
        self.predicted = predicted if self.predicted is None else self.predicted + predicted
        largest = [self.flags / self.count - self.false_flags]  # no bound exceeds these, which cost nothing
        if calibration.shares is not None:
            largest.append(float((self.predicted / self.count - calibration.shares).clamp(min=0).sum()))
        if self.alarm is not None or max(largest) <= calibration.limit:
            return
        bounds = self.lower_bounds
        signal = max(bounds, key=bounds.__getitem__)
        if bounds[signal] > calibration.limit:
            self.alarm = RiskAlarm(batch, self.count, bounds[signal], calibration.limit, signal)
            _LOG.warning(
                "batch %d: the error is above %.3f by its %s, the source's and the tolerance together %.3f",
                batch, bounds[signal], signal.replace("_", " "), calibration.limit,
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
