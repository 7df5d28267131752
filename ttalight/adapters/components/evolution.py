"""CMA-ES whose whole state is in tensors, so that it is reset and saved with a network's weights."""

from __future__ import annotations

from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ttalight.errors import MissingPackageError

if TYPE_CHECKING:
    from cmaes import CMA

__all__ = ["Evolution", "require_cmaes"]

#: Vectors of the state by their names in the library.
_PATHS = {"path_sigma": "_p_sigma", "path_covariance": "_pc"}


def require_cmaes() -> None:
    """Raise an ImportError that says what to install, where cmaes is not."""
    if find_spec("cmaes") is None:
        raise MissingPackageError("FOA needs cmaes, which is not installed: pip install 'ttalight[forward-only]'")


class Evolution:
    """Minimises a function of a vector by CMA-ES, one generation after another.

    The library cmaes computes the updates. Between two generations everything it needs is in ``state``, in float64.
    Each generation takes one eigendecomposition on the CPU, and memory there for the K outer products of its
    candidates, (K, N, N).

    Source: N. Hansen, *The CMA Evolution Strategy: A Tutorial*, arXiv 1604.00772.

    Args:
        dimension: Length N of the vector.
        population: Candidates K of a generation, at least 4.
        sigma: Initial step size; the initial mean is zero.
        device: Where the state is. The count of generations is in host memory.
    """

    def __init__(self, dimension: int, population: int, sigma: float, device: torch.device) -> None:
        self.population = population
        self.mean = torch.zeros(dimension, dtype=torch.float64, device=device)
        self.sigma = torch.tensor(sigma, dtype=torch.float64, device=device)
        self.covariance = torch.eye(dimension, dtype=torch.float64, device=device)
        self.paths = {name: torch.zeros_like(self.mean) for name in _PATHS}
        self.generation = torch.zeros((), dtype=torch.int64)
        self._optimizer: CMA | None = None

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors that ``tell`` changes in place."""
        first = {"mean": self.mean, "sigma": self.sigma, "covariance": self.covariance}
        return first | self.paths | {"generation": self.generation}

    def draw(self, noise: Tensor) -> Tensor:
        """Return candidates of the present generation, float64 (M, N) in host memory.

        Args:
            noise: Standard normal numbers, (M, N).
        """
        self._optimizer = optimizer = self._at_state()
        basis, scales = optimizer._eigen_decomposition()
        steps = torch.from_numpy((noise.double().cpu().numpy() * scales) @ basis.T)
        return self.mean.cpu() + self.sigma.cpu() * steps

    def tell(self, candidates: Tensor, values: list[float]) -> None:
        """Update the state by the candidates of the generation that ``draw`` has begun.

        Args:
            candidates: (K, N), as many as the population, drawn or of another origin.
            values: What is minimised, K numbers. Infinity is the worst, and there is no NaN.
        """
        optimizer, self._optimizer = self._optimizer, None
        assert optimizer is not None, "draw comes before tell"
        optimizer.tell(list(zip(candidates.numpy(), values, strict=True)))
        self.mean.copy_(torch.from_numpy(optimizer.mean))
        self.sigma.fill_(float(optimizer._sigma))
        self.covariance.copy_(torch.from_numpy(optimizer._C))
        for name, attribute in _PATHS.items():
            self.paths[name].copy_(torch.from_numpy(getattr(optimizer, attribute)))
        self.generation.fill_(optimizer.generation)

    def _at_state(self) -> CMA:
        from cmaes import CMA

        arrays: dict[str, Any] = {name: value.detach().cpu().numpy().copy() for name, value in self.state.items()}
        options = {"cov": arrays["covariance"], "population_size": self.population}
        optimizer = CMA(arrays["mean"], float(arrays["sigma"]), **options)
        for name, attribute in _PATHS.items():
            setattr(optimizer, attribute, arrays[name])
        optimizer._g = int(arrays["generation"])
        return optimizer
