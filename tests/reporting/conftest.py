"""Small results of runs that never took place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ttalight.reporting import DomainResult, Results, summarize, write_results


def domain(name: str, accuracy: float, severity: int = 5, visit: int = 0, samples: int = 100) -> DomainResult:
    return {
        "name": name,
        "severity": severity,
        "visit": visit,
        "samples": samples,
        "accuracy": accuracy,
        "error": 1 - accuracy,
        "top5": None,
        "nll": 2 - accuracy,
        "ece": accuracy / 10,
        "seconds": 2.0,
        "images_per_second": samples / 2,
    }


def fake_results(
    method: str = "Tent",
    accuracies: Sequence[float] | None = None,
    domains: Sequence[DomainResult] | None = None,
    seed: int = 0,
    complete: bool = True,
    weights: str = "a",
    extra: dict[str, Any] | None = None,
    **protocol: Any,
) -> Results:
    pairs = zip(("noise", "blur"), accuracies or (0.5, 0.7), strict=True)
    rows = [domain(name, accuracy) for name, accuracy in pairs] if domains is None else list(domains)
    mean, weighted_mean = summarize(rows)
    settings: Any = {
        "stream": "PerDomain",
        "stream_hash": "1234567890abcdef",
        "severity": 5,
        "samples": 200,
        "reset": "domain",
        "prediction": "before",
        "batch_size": 64,
        "steps": 1,
        "optimizer": "Adam",
        "lr": 0.001,
        "norm": "batch",
        "sharding": None,
    }
    results: Any = {
        "schema": 1,
        "complete": complete,
        "method": method,
        "seed": seed,
        "protocol": settings | protocol,
        "domains": rows,
        "mean": mean,
        "weighted_mean": weighted_mean,
        "cost": {
            "forwards_per_batch": 1.0,
            "backwards_per_batch": 1.0,
            "peak_memory_bytes": None,
            "images_per_second": 50.0 + seed,
            "adapted_parameters": 12,
        },
        "source": {"file": f"{weights}.pt", "sha256": weights * 64},
        "environment": {"torch": "2.6"},
    }
    return results | (extra or {})


@pytest.fixture
def make_domain() -> Callable[..., DomainResult]:
    return domain


@pytest.fixture
def make_results() -> Callable[..., Results]:
    return fake_results


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., str]:
    """Write a run's folder below ``tmp_path / "runs"`` and return its path."""

    def make(name: str, *args: Any, **kwargs: Any) -> str:
        folder = tmp_path / "runs" / name
        write_results(folder, fake_results(*args, **kwargs))
        return str(folder)

    return make
