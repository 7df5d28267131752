"""Bounds on shares and running means, against slow references, closed forms and simulated streams."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch

from ttalight.monitoring.bounds import (
    betting_log_wealth,
    class_share_bound,
    clopper_pearson_upper,
    log_binomial_tail,
    log_chernoff_tail,
    running_lower_bound,
    upper_class_shares,
)
from ttalight.monitoring.risk import flag_threshold

RUNS, IMAGES, LEVEL = 1000, 600, 0.05


def tail(hits, count, share):
    return sum(math.comb(count, k) * share**k * (1 - share) ** (count - k) for k in range(hits, count + 1))


@pytest.mark.parametrize(("hits", "count", "share"), [(3, 10, 0.2), (10, 10, 0.5), (0, 5, 0.1), (60, 80, 0.55)])
def test_binomial_tail_against_its_sum(hits, count, share):
    exact = tail(hits, count, share)
    assert math.exp(log_binomial_tail(hits, count, share)) == pytest.approx(exact, rel=1e-9)
    assert math.exp(log_chernoff_tail(hits, count, share)) >= exact


def test_chernoff_bound_of_hits_alone():
    assert log_chernoff_tail(20, 20, 0.5) == pytest.approx(20 * math.log(0.5))  # which is the tail itself
    assert log_chernoff_tail(4, 10, 0.5) == 0


def test_upper_bound_of_a_share_is_where_so_few_hits_are_unlikely():
    assert clopper_pearson_upper(0, 50, 0.05) == pytest.approx(1 - 0.05 ** (1 / 50))
    bound = clopper_pearson_upper(7, 60, 0.01)
    assert 1 - tail(8, 60, bound) == pytest.approx(0.01)
    assert clopper_pearson_upper(9, 9, 0.05) == 1


def test_wealth_is_that_of_a_mixture_of_bets():
    # Each bet multiplies by p / m after a hit and by (1 - p) / (1 - m) after a miss; p from Beta(1/2, 1/2), by angle.
    values, m, steps = [1, 0, 1, 1, 0, 1, 0, 0, 1, 1], 0.3, 20_000
    wealth = 0.0
    for i in range(steps):
        p = math.sin((i + 0.5) / steps * math.pi / 2) ** 2
        product = 1.0
        for value in values:
            product *= p / m if value else (1 - p) / (1 - m)
        wealth += product / steps
    seen = betting_log_wealth(torch.tensor(sum(values)), torch.tensor(len(values)), m)
    assert seen.item() == pytest.approx(math.log(wealth), abs=1e-6)


def test_lower_bound_is_the_least_mean_that_no_bet_has_excluded():
    assert running_lower_bound(torch.tensor(1), torch.tensor(1), 0.05).item() == pytest.approx(0.025)  # 0.5 / m = 20
    hits, count = torch.tensor([0, 5, 30, 40]), torch.tensor([10, 10, 40, 40])
    bounds = running_lower_bound(hits, count, 0.1)
    for k, n, bound in zip(hits, count, bounds, strict=True):
        grid = torch.linspace(0, float(k) / float(n), 100_001, dtype=torch.float64)[1:]
        allowed = grid[betting_log_wealth(k.expand(len(grid)), n.expand(len(grid)), grid) <= -math.log(0.1)]
        assert bound.item() == pytest.approx(0.0 if k == 0 else allowed.min().item(), abs=2e-5)


def test_bounds_approach_the_mean():
    count = torch.tensor([100, 1000, 10_000])
    gaps = 0.3 - running_lower_bound(0.3 * count, count, 0.05)
    assert (gaps[1:] < gaps[:-1]).all()
    assert 0 < gaps[-1] < 0.02


def streams(kind):
    """Return 0/1 values of many streams, and the means of their conditional expectations until each time."""
    generator = torch.Generator().manual_seed(0)
    if kind == "stationary":
        means = torch.full((RUNS, IMAGES), 0.12, dtype=torch.float64)
    elif kind == "drifting":
        means = torch.linspace(0.02, 0.5, IMAGES, dtype=torch.float64).expand(RUNS, IMAGES)
    else:  # long stretches, each with a mean of its own that depends on what came before
        means = torch.rand(RUNS, IMAGES // 50, generator=generator, dtype=torch.float64).repeat_interleave(50, 1) * 0.4
    values = (torch.rand(RUNS, IMAGES, generator=generator, dtype=torch.float64) < means).double()
    count = torch.arange(1, IMAGES + 1, dtype=torch.float64).expand(RUNS, IMAGES)
    return values.cumsum(1), count, means.cumsum(1) / count


@pytest.mark.parametrize("kind", ["stationary", "drifting", "in stretches"])
def test_few_streams_ever_exclude_their_own_running_mean(kind):
    hits, count, means = streams(kind)
    excluded = (betting_log_wealth(hits, count, means) > -math.log(LEVEL)) & (hits / count > means)
    assert excluded.any(1).double().mean() <= LEVEL
    assert (running_lower_bound(hits[:20], count[:20], LEVEL) > means[:20])[~excluded[:20]].sum() == 0


def test_upper_shares_are_bounds_of_each_class_at_a_part_of_the_level():
    labels = torch.tensor([0] * 30 + [2] * 10)
    expected = [clopper_pearson_upper(hits, 40, 0.06 / 3) for hits in (30, 0, 10)]
    assert upper_class_shares(labels, 3, 0.06).tolist() == expected
    with pytest.raises(ValueError, match="labels must be classes from 0 to 1, got 0 to 2"):
        upper_class_shares(labels, 2, 0.05)


def test_class_share_bound_is_the_largest_excess_of_any_set_of_classes():
    predicted, shares = torch.tensor([70, 5, 60, 15]), torch.tensor([0.25, 0.25, 0.3, 0.25])
    lower = [float(running_lower_bound(hits, predicted.sum(), 0.1 / 4)) for hits in predicted]
    sets = [chosen for size in range(5) for chosen in combinations(range(4), size)]
    largest = max(sum(lower[c] - float(shares[c]) for c in chosen) for chosen in sets)
    assert class_share_bound(predicted, shares, 0.1).item() == pytest.approx(largest)
    assert class_share_bound(torch.stack([predicted, predicted.flip(0)]), shares, 0.1)[0].item() == pytest.approx(
        largest
    )


def test_class_share_bound_approaches_the_total_variation_distance():
    predicted, shares = torch.tensor([0.5, 0.3, 0.2, 0.0]), torch.tensor([0.2, 0.2, 0.3, 0.3])
    count = torch.tensor([[100], [1000], [100_000]])
    gaps = 0.4 - class_share_bound(predicted * count, shares, 0.05)
    assert (gaps[1:] < gaps[:-1]).all()
    assert 0 < gaps[-1] < 0.02


def test_few_streams_ever_have_class_shares_that_exclude_their_own_error():
    # All errors are predictions of class 0, so that the error is what its share is exceeded by.
    generator = torch.Generator().manual_seed(2)
    shares, error = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64), 0.15
    labels = torch.multinomial(shares, RUNS * IMAGES, replacement=True, generator=generator).view(RUNS, IMAGES)
    turned = torch.rand(RUNS, IMAGES, generator=generator) < error / 0.6
    predicted = torch.nn.functional.one_hot(labels.masked_fill(turned, 0), 4).cumsum(1)[:, 9::10]
    possible = (predicted / predicted.sum(-1, keepdim=True) - shares).clamp(min=0).sum(-1) > error
    assert possible.any(1).double().mean() > 0.5  # shares without a bound exceed the error in most streams
    excluded = torch.zeros_like(possible)
    excluded[possible] = class_share_bound(predicted[possible], shares, LEVEL) > error
    assert excluded.any(1).double().mean() <= LEVEL


def test_few_right_predictions_lie_above_the_threshold():
    generator = torch.Generator().manual_seed(1)
    misses = []
    for _ in range(200):
        doubts = torch.rand(400, generator=generator, dtype=torch.float64)
        wrong = torch.rand(400, generator=generator) < 0.5 * doubts
        threshold = float(flag_threshold(doubts, wrong, 0.05, 0.1))
        # Share of right predictions above: the integral of 1 - u / 2 from the threshold to 1.
        misses.append((1 - threshold) - (1 - threshold**2) / 4 > 0.05)
    assert sum(misses) / 200 <= 0.16  # 0.1 but for the chance of 200 runs
    with pytest.raises(ValueError, match="give at least 59"):
        flag_threshold(torch.rand(20), torch.zeros(20, dtype=torch.bool), 0.05, 0.05)


def test_threshold_flags_everything_where_few_predictions_are_right():
    wrong = torch.ones(400, dtype=torch.bool)
    assert flag_threshold(torch.rand(400), wrong, 0.05, 0.1) == -math.inf
