"""The choice of ratio and delay, against closed forms."""

from __future__ import annotations

import heapq
import itertools

import pytest
import torch

from ttalight.distributed.slow_links import (
    Setting,
    choose_setting,
    compression_error,
    step_time,
    top_k,
    transfer_time,
)


def simulated_step_time(setting, compute, latency, transfer, steps=4000):
    """Mean time of a step by playing all of them: one link, and no step ends before its due sum has arrived."""
    now, link, arrivals = 0.0, 0.0, []
    for step in range(steps):
        now += compute
        link = max(link, now) + transfer
        arrivals.append(link + latency)
        if step >= setting.delay:
            now = max(now, arrivals[step - setting.delay])
    return now / steps


@pytest.mark.parametrize(
    ("setting", "latency", "bandwidth", "expected"),
    [
        (Setting(1.0, 0), 0.0, 1e6, 3.0),  # compute 1 s, then 2e6 bytes
        (Setting(1.0, 8), 0.5, 1e6, 2.0),  # the link is the bottleneck
        (Setting(0.25, 0), 0.5, 1e6, 2.5),  # values and indices: half of the bytes
        (Setting(0.25, 2), 0.5, 1e6, 1.0),  # all hidden
        (Setting(0.25, 1), 3.0, 1e6, 2.5),  # half of computation, latency and transfer
    ],
)
def test_step_time(setting, latency, bandwidth, expected):
    assert step_time(setting, 1.0, latency, bandwidth, 2_000_000) == pytest.approx(expected)
    transfer = transfer_time(setting.ratio, bandwidth, 2_000_000)
    assert simulated_step_time(setting, 1.0, latency, transfer) == pytest.approx(expected, rel=0.01)


def test_transfer_time_of_more_processes():
    assert transfer_time(1, 1e6, 4_000_000, ranks=4) == pytest.approx(6.0)
    assert transfer_time(0.1, 1e6, 4_000_000, ranks=4) == pytest.approx(2.4)


def test_error_is_zero_for_whole_gradients_and_grows_with_delay():
    assert compression_error(Setting(1.0, 5)) == 0
    assert compression_error(Setting(0.5, 0)) == 1
    assert compression_error(Setting(0.5, 2)) == pytest.approx(16 / 9)


def test_fast_links_get_plain_ddp():
    assert choose_setting(compute=1.0, latency=1e-3, bandwidth=1e9, size=10_000_000) == Setting(1.0, 0)


def test_latency_alone_is_hidden_by_delay():
    # Two steps of 1.1 s hold 1 s of computation and 1.05 s of latency with 0.01 s for the gradient.
    assert choose_setting(compute=1.0, latency=1.05, bandwidth=1e9, size=10_000_000) == Setting(1.0, 1)


def test_ratio_fills_the_link():
    # Of 1.1 s in each step; a delay of 1 leaves 2.2 - 1 - 0.1, so all of it.
    chosen = choose_setting(compute=1.0, latency=0.1, bandwidth=1e6, size=10_000_000)
    assert chosen == Setting(pytest.approx(1.1 / 20), 1)
    # The smallest ratio cannot be sent within a step either: the shortest step is its transfer of 2 s.
    chosen = choose_setting(compute=1.0, latency=0.1, bandwidth=1e5, size=10_000_000)
    assert chosen == Setting(pytest.approx(2.2 / 200), 1)


def test_choice_is_the_best_of_a_grid():
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        scale = torch.rand(3, generator=generator).mul(6).sub(3).exp().tolist()
        link = {"compute": scale[0], "latency": scale[1], "bandwidth": 1e6 * scale[2], "size": 3_000_000, "ranks": 3}
        chosen = choose_setting(**link, max_delay=4)
        longest = 1.1 * step_time(Setting(0.01, 4), **link)
        assert step_time(chosen, **link) <= longest * (1 + 1e-9)
        grid = itertools.product([*torch.linspace(0.01, 0.33, 200).tolist(), 1.0], range(5))
        fitting = [
            compression_error(Setting(*point)) for point in grid if step_time(Setting(*point), **link) <= longest
        ]
        assert compression_error(chosen) <= min(fitting) * (1 + 1e-9)


def test_out_of_range_measurements_are_refused():
    with pytest.raises(ValueError, match="needs positive compute"):
        choose_setting(compute=0.0, latency=0.1, bandwidth=1e6, size=1)


def test_top_k_keeps_the_largest_magnitudes():
    vector = torch.randn(50, generator=torch.Generator().manual_seed(0))
    values, indices = top_k(vector, 0.1)
    assert set(indices.tolist()) == set(heapq.nlargest(5, range(50), key=lambda i: abs(vector[i].item())))
    assert torch.equal(values, vector[indices])
    assert len(top_k(vector, 1e-6)[0]) == 1
