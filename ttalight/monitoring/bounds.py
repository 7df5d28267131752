"""Bounds on shares and running means that hold with a stated probability, in float64."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from ttalight.errors import InputError

__all__ = [
    "betting_log_wealth", "class_share_bound", "clopper_pearson_upper", "log_binomial_tail", "log_chernoff_tail",
    "running_lower_bound", "upper_class_shares",
]  # fmt: skip

#: Halvings of an interval of length 1, enough for float64.
_HALVINGS = 55


@lru_cache(4096)
def log_binomial_tail(hits: int, count: int, share: float) -> float:
    """Return the logarithm of the probability of at least so many hits in independent trials.

    Args:
        hits: Number of hits k, between 0 and n.
        count: Number of trials n.
        share: Probability p of a hit, between 0 and 1.
    """
    if hits <= 0:
        return 0.0
    if share <= 0 or share >= 1:
        return 0.0 if share >= 1 else -math.inf
    k = torch.arange(hits, count + 1, dtype=torch.float64)
    ways = math.lgamma(count + 1) - torch.lgamma(k + 1) - torch.lgamma(count - k + 1)
    return min(0.0, float((ways + k * math.log(share) + (count - k) * math.log1p(-share)).logsumexp(0)))


def log_chernoff_tail(hits: float, count: int, share: float) -> float:
    """Return an upper bound on ``log_binomial_tail`` in closed form: -n KL(k / n || p) above the mean, 0 below.

    H. Chernoff, *A Measure of Asymptotic Efficiency for Tests of a Hypothesis Based on the Sum of Observations*, Annals
    of Mathematical Statistics 23, 1952.

    Args:
        hits: Number of hits k.
        count: Number of trials n, at least 1.
        share: Probability p of a hit, above 0 and below 1.
    """
    seen = hits / count
    if seen <= share:
        return 0.0
    misses = 0.0 if seen >= 1 else (1 - seen) * math.log((1 - seen) / (1 - share))
    return -count * (seen * math.log(seen / share) + misses)


@lru_cache(4096)
def clopper_pearson_upper(hits: int, count: int, level: float) -> float:
    """Return the upper bound on a share that independent trials give with probability 1 - level.

    C. J. Clopper and E. S. Pearson, *The Use of Confidence or Fiducial Limits Illustrated in the Case of the Binomial*,
    Biometrika 26, 1934. The bound is the share for which at most so many hits have the probability ``level``.

    Args:
        hits: Number of hits.
        count: Number of trials, at least 1.
        level: Between 0 and 1.
    """
    if hits >= count:
        return 1.0
    low, high = hits / count, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        # At most k hits are at least n - k misses.
        if log_binomial_tail(count - hits, count, 1 - middle) > math.log(level):
            low = middle
        else:
            high = middle
    return high


def betting_log_wealth(hits: Tensor, count: Tensor, mean: Tensor | float, prior: float = 0.5) -> Tensor:
    """Return the logarithm of what a gambler has made of 1 by betting that the running mean is not ``mean``.

    The gambler bets on each of x_1, ..., x_t in [0, 1] as if its distribution were binary, with a share of hits that a
    Beta(a, a) mixture learns:

        wealth = B(a + S, a + t - S) / B(a, a) / (m^S (1 - m)^(t - S)),  S = x_1 + ... + x_t.

    If m is the mean of the conditional expectations of x_1, ..., x_t given what came before each, whatever these are,
    the wealth exceeds 1 / level at any time with a probability of at most ``level``: for every share of hits the
    factors of 0/1 values have expectation 1, the logarithm of the expectation of exp(lambda x) is concave in the mean,
    values between 0 and 1 have a smaller one (convexity), and a mixture of supermartingales is one (Ville).

    H. Robbins, *Statistical Methods Related to the Law of the Iterated Logarithm*, Annals of Mathematical Statistics
    41, 1970; S. R. Howard et al., *Time-uniform, nonparametric, nonasymptotic confidence sequences*, Annals of
    Statistics 49, 2021, arXiv 1810.08240; I. Waudby-Smith and A. Ramdas, *Estimating means of bounded random variables
    by betting*, JRSS-B 86, 2024, arXiv 2010.09686.

    Args:
        hits: Sums S, of any shape.
        count: Numbers t of values, at least 1, of the same shape.
        mean: Hypothetical means m, between 0 and 1.
        prior: The mixture's a.
    """
    hits, count = hits.double(), count.double()
    mean = torch.as_tensor(mean, dtype=torch.float64, device=hits.device)
    misses = count - hits
    mixture = _log_beta(prior + hits, prior + misses) - _log_beta(*(torch.tensor(prior, dtype=torch.float64),) * 2)
    return mixture - torch.xlogy(hits, mean) - torch.xlogy(misses, 1 - mean)


def running_lower_bound(hits: Tensor, count: Tensor, level: float) -> Tensor:
    """Return lower bounds on running means that hold at all times together with probability 1 - level.

    It is the smallest mean that ``betting_log_wealth`` has not made 1 / level of 1 against. The running mean at time t
    is that of the conditional expectations of the first t values, which may drift in any way.

    Args:
        hits: Sums of the first t values in [0, 1], of any shape.
        count: Numbers t of values, at least 1, of the same shape.
        level: Between 0 and 1.
    """
    target = -math.log(level)
    low, high = torch.zeros_like(hits, dtype=torch.float64), hits.double() / count
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        excluded = betting_log_wealth(hits, count, middle) > target
        low, high = torch.where(excluded, middle, low), torch.where(excluded, high, middle)
    return low


def upper_class_shares(labels: Tensor, classes: int, level: float) -> Tensor:
    """Return upper bounds on the shares of all classes, (C,), that hold together with probability 1 - level.

    They are those of ``clopper_pearson_upper``, each at level / C (Bonferroni).

    Args:
        labels: Labels of independent draws, (N,), between 0 and C - 1.
        classes: Number of classes C.
        level: Between 0 and 1.

    Raises:
        ValueError: If a label is no class.
    """
    labels = labels.long()
    if labels.min() < 0 or labels.max() >= classes:
        raise InputError(f"labels must be classes from 0 to {classes - 1}, got {int(labels.min())} to {labels.max()}")
    hits = torch.bincount(labels, minlength=classes).tolist()
    bounds = [clopper_pearson_upper(count, len(labels), level / classes) for count in hits]
    return torch.tensor(bounds, dtype=torch.float64)


def class_share_bound(predicted: Tensor, shares: Tensor, level: float) -> Tensor:
    """Return lower bounds on the running error that the shares of predicted classes give, with probability 1 - level.

    Predictions of a class beyond its share of the labels are errors. For every set A of classes

        P(predicted in A) - P(label in A) <= P(predicted in A, label not in A) <= P(error),

    and the largest value of the left side is the total variation distance of predicted and true classes. The bound is
    its estimate from below: the sum over classes of what ``running_lower_bound`` at level / C (Bonferroni) of the
    class's share of the predictions exceeds its share of the labels by. It holds at all times together, whatever
    predictions do, if the running mean of the conditional probabilities of each class is at most its share.

    Args:
        predicted: How many of the first t predictions are of each class, (..., C), at least one in all.
        shares: Shares of the labels, or upper bounds on them, (..., C).
        level: Between 0 and 1.
    """
    count = predicted.sum(-1, keepdim=True).expand_as(predicted)
    lower = running_lower_bound(predicted, count, level / predicted.shape[-1])
    return (lower - shares).clamp(min=0).sum(-1)


def _log_beta(a: Tensor, b: Tensor) -> Tensor:
    return torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
