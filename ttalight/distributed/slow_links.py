"""Compression and delay of gradients on slow links: their cost in time, their error, and the choice of both."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ttalight.errors import InputError

__all__ = ["Setting", "choose_setting", "compression_error", "step_time", "top_k", "transfer_time"]


class Setting(NamedTuple):
    """Ratio and delay of the messages that carry gradients.

    Attributes:
        ratio: Kept fraction of the values, in (0, 1].
        delay: Number of steps after which the sum over processes is applied.
    """

    ratio: float
    delay: int


def top_k(vector: Tensor, ratio: float) -> tuple[Tensor, Tensor]:
    """Return the values of largest magnitude and their indices, in no particular order.

    Args:
        vector: (N,).
        ratio: Fraction of the values to keep; at least one is kept.

    Returns:
        Values and indices, (k,) each.
    """
    kept = min(len(vector), max(1, round(ratio * len(vector))))
    indices = vector.abs().topk(kept, sorted=False).indices
    return vector[indices], indices


def transfer_time(ratio: float, bandwidth: float, size: int, ranks: int = 2) -> float:
    """Return for how many seconds the gradients of a step occupy the link of a process.

    All values travel by a ring all-reduce, which sends 2 (n - 1) / n times the gradient. A part of them travels by an
    all-gather of values with their indices, each of four bytes, so it is smaller only if the ratio is below 1 / n.

    Args:
        ratio: Kept fraction of the values.
        bandwidth: Bytes per second.
        size: Bytes of the whole gradient in float32.
        ranks: Number of processes, n.
    """
    sent = 2 * (ranks - 1) / ranks if ratio * ranks >= 1 else 2 * (ranks - 1) * ratio
    return sent * size / bandwidth


def step_time(setting: Setting, compute: float, latency: float, bandwidth: float, size: int, ranks: int = 2) -> float:
    """Return the mean seconds of a training step whose messages overlap with the computation of later steps.

    A step takes no less than its computation, no less than its message occupies the link, and no less than its share
    of the delay + 1 steps within which a message has to be computed, sent and received.

    Args:
        setting: Ratio and delay.
        compute: Seconds of a step without communication.
        latency: Seconds of a message without content.
        bandwidth: Bytes per second.
        size: Bytes of the whole gradient in float32.
        ranks: Number of processes.
    """
    transfer = transfer_time(setting.ratio, bandwidth, size, ranks)
    return max(compute, transfer, (compute + latency + transfer) / (setting.delay + 1))


def compression_error(setting: Setting) -> float:
    """Return (1 - r) / (r (1 - r / 2)^d), the noise that compression by r adds where sums are applied d steps late.

    Zero without compression, and growing exponentially with the delay, as R. Lu, J. Jiang, C. Li, X. Wei and Z. Wang,
    *Taming Latency and Bandwidth: A Theoretical Framework and Adaptive Algorithm for Communication-Constrained
    Training*, arXiv:2507.17346, show. The base 1 - r / 2 is the contraction of error feedback and ours: it ranks
    settings, and is no bound of theirs.
    """
    error = (1 - setting.ratio) / setting.ratio
    for _ in range(setting.delay):  # no power, whose last digit may differ between the machines of a run
        error /= 1 - setting.ratio / 2
    return error


def choose_setting(
    compute: float,
    latency: float,
    bandwidth: float,
    size: int,
    ranks: int = 2,
    max_delay: int = 8,
    min_ratio: float = 0.01,
    slack: float = 0.1,
) -> Setting:
    """Return the setting of least error among those that cost almost no time.

    DeCo-SGD (see ``compression_error``) hides all communication behind computation: for each delay it takes the largest
    ratio that still fits, and of these pairs the one of least error. Ours differs in two points. A step may be
    ``slack`` longer than the shortest possible one, so fast links keep whole gradients without delay. And where no
    setting hides the communication, the shortest possible step takes the place of the computation.

    Args:
        compute: Seconds of a step without communication, positive.
        latency: Seconds of a message without content.
        bandwidth: Bytes per second, positive.
        size: Bytes of the whole gradient in float32.
        ranks: Number of processes, at least 2.
        max_delay: Longest delay.
        min_ratio: Smallest ratio, in (0, 1].
        slack: Fraction by which a step may be longer than the shortest possible one, positive.

    Raises:
        ValueError: If an argument is out of its range.
    """
    if min(compute, bandwidth, slack, min_ratio) <= 0 or min_ratio > 1 or min(latency, max_delay) < 0 or ranks < 2:
        raise InputError(
            "choose_setting needs positive compute, bandwidth and slack, no negative latency or delay, a min_ratio in "
            f"(0, 1] and 2 ranks or more, got compute={compute}, latency={latency}, bandwidth={bandwidth}, "
            f"slack={slack}, max_delay={max_delay}, min_ratio={min_ratio}, ranks={ranks}"
        )
    fastest = Setting(min_ratio, max_delay)
    longest = (1 + slack) * step_time(fastest, compute, latency, bandwidth, size, ranks)
    whole = transfer_time(1, bandwidth, size, ranks)
    found = [fastest]
    for delay in range(max_delay + 1):
        available = min(longest, (delay + 1) * longest - compute - latency)  # for the transfer
        ratio = 1.0 if available >= whole else available / (ranks * whole)
        if ratio >= min_ratio:
            found.append(Setting(ratio, delay))
    return min(found, key=lambda setting: (compression_error(setting), setting.delay))
