"""A normalising flow on feature maps: an invertible network with a known log-determinant."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import conv2d

from ttalight.errors import InputError

__all__ = ["ActNorm", "CheckerboardCoupling", "FeatureFlow", "InvertibleConv"]

#: Smallest standard deviation that ``ActNorm`` divides by, relative to the mean over channels: channels that are dead
#: in the first batch must not be blown up.
_SMALLEST_DEVIATION = 1e-2


class ActNorm(nn.Module):
    """A shift and a scale of each channel, initialised to zero mean and unit variance on the first batch.

    Source: D. P. Kingma, P. Dhariwal, *Glow: Generative Flow with Invertible 1x1 Convolutions*, NeurIPS 2018, arXiv
    1807.03039.

    Args:
        channels: Channels of the maps.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(1, channels, 1, 1))
        self.log_scale = nn.Parameter(torch.zeros(1, channels, 1, 1))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set shift and scale so that these maps, (B, C, H, W), leave with zero mean and unit variance."""
        variance, mean = torch.var_mean(x, (0, 2, 3), correction=0, keepdim=True)
        deviation = variance.sqrt()
        deviation = deviation.maximum(_SMALLEST_DEVIATION * deviation.mean()).clamp(min=1e-6)
        self.shift.copy_(-mean)
        self.log_scale.copy_(-deviation.log())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scaled maps and the log-determinant, (B,)."""
        log_det = self.log_scale.sum() * x[0, 0].numel()
        return (x + self.shift) * self.log_scale.exp(), log_det.expand(len(x))

    def inverse(self, z: Tensor) -> Tensor:
        """Return the maps that ``forward`` turns into these."""
        return z * (-self.log_scale).exp() - self.shift


class InvertibleConv(nn.Module):
    """A 1x1 convolution with a square matrix that stays invertible, W = P L (U + diag(s)).

    P is a fixed permutation, L has ones on its diagonal, U zeros on and below it, and s a fixed sign and a trained
    logarithm, so that the log-determinant is a sum. It begins as a random rotation.

    Source: D. P. Kingma, P. Dhariwal, *Glow: Generative Flow with Invertible 1x1 Convolutions*, NeurIPS 2018, arXiv
    1807.03039, section 3.2.

    Args:
        channels: Channels of the maps.
    """

    permutation: Tensor
    sign: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        rotation = torch.linalg.qr(torch.randn(channels, channels))[0]
        permutation, lower, upper = torch.linalg.lu(rotation)
        diagonal = upper.diagonal()
        self.register_buffer("permutation", permutation)
        self.register_buffer("sign", diagonal.sign())
        self.log_diagonal = nn.Parameter(diagonal.abs().log())
        self.lower = nn.Parameter(lower.tril(-1))
        self.upper = nn.Parameter(upper.triu(1))

    @property
    def weight(self) -> Tensor:
        """The matrix, (C, C)."""
        lower = self.lower.tril(-1) + torch.eye(len(self.lower), dtype=self.lower.dtype, device=self.lower.device)
        upper = self.upper.triu(1) + torch.diag(self.sign * self.log_diagonal.exp())
        return self.permutation @ lower @ upper

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the convolved maps and the log-determinant, (B,)."""
        log_det = self.log_diagonal.sum() * x[0, 0].numel()
        return conv2d(x, self.weight[:, :, None, None]), log_det.expand(len(x))

    def inverse(self, z: Tensor) -> Tensor:
        """Return the maps that ``forward`` turns into these."""
        return conv2d(z, torch.linalg.inv(self.weight)[:, :, None, None])


class CheckerboardCoupling(nn.Module):
    """An affine transformation of every second position, computed by a small network from the other positions.

    The transformed positions become x * exp(s * tanh(a)) + b, with maps a and b from the network and a trained
    scalar s. The last layer of the network begins at zero, so that the coupling begins as the identity.

    Source: L. Dinh, J. Sohl-Dickstein, S. Bengio, *Density estimation using Real NVP*, ICLR 2017, arXiv 1605.08803.

    Args:
        channels: Channels of the maps.
        hidden: Channels inside the network.
        odd: Transform the positions whose row and column add up to an odd number; else the even ones.
    """

    def __init__(self, channels: int, hidden: int, odd: bool) -> None:
        super().__init__()
        self.odd = odd
        last = nn.Conv2d(hidden, 2 * channels, 1)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)  # type: ignore[arg-type]
        self.network = nn.Sequential(
            nn.Conv2d(channels, hidden, 3, padding=1), nn.ReLU(), nn.Conv2d(hidden, hidden, 1), nn.ReLU(), last
        )
        self.scale = nn.Parameter(torch.ones(1))

    def _affine(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return logarithm of the scale and shift, both zero at the positions that stay."""
        rows, columns = (torch.arange(side, device=x.device) for side in x.shape[2:])
        changed = ((rows[:, None] + columns) % 2 == self.odd).to(x.dtype)
        raw, shift = self.network(x * (1 - changed)).chunk(2, dim=1)
        return changed * self.scale * raw.tanh(), changed * shift

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the transformed maps and the log-determinant, (B,)."""
        log_scale, shift = self._affine(x)
        return x * log_scale.exp() + shift, log_scale.flatten(1).sum(1)

    def inverse(self, z: Tensor) -> Tensor:
        """Return the maps that ``forward`` turns into these."""
        log_scale, shift = self._affine(z)
        return (z - shift) * (-log_scale).exp()


class FeatureFlow(nn.Module):
    """Steps of ``ActNorm``, ``InvertibleConv`` and ``CheckerboardCoupling``, one after the other.

    The form of a step is that of D. P. Kingma, P. Dhariwal, *Glow: Generative Flow with Invertible 1x1 Convolutions*,
    NeurIPS 2018, arXiv 1807.03039. The coupling is over positions instead of channels, even and odd ones in turn. All
    layers work on maps of any size. Autocast is off inside: a log-determinant is a sum of many numbers.

    Args:
        channels: Channels of the maps.
        steps: Number of steps.
        hidden: Channels inside the networks of the couplings.

    Raises:
        ValueError: If a number is below 1.
    """

    initialized: Tensor

    def __init__(self, channels: int, steps: int, hidden: int) -> None:
        super().__init__()
        if steps < 1 or hidden < 1:
            raise InputError(f"a flow needs 1 step and 1 hidden channel at least, got {steps} and {hidden}")
        self.layers = nn.ModuleList(
            layer
            for step in range(steps)
            for layer in (
                ActNorm(channels),
                InvertibleConv(channels),
                CheckerboardCoupling(channels, hidden, step % 2 == 1),
            )
        )
        # A buffer, so that a flow that was trained is not initialised again on other images.
        self.register_buffer("initialized", torch.tensor(False))

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Initialise all ``ActNorm`` layers on maps, (B, C, H, W), each on what the layers before it make of them."""
        with torch.autocast(x.device.type, enabled=False):
            x = _full(x)
            for layer in self.layers:
                if isinstance(layer, ActNorm):
                    layer.initialize(x)
                x, _ = layer(x)
        self.initialized.fill_(True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Transform maps.

        Args:
            x: (B, C, H, W).

        Returns:
            The latents z, of the shape of ``x``, and the log-determinant of dz/dx, (B,), in float32 or float64.
        """
        with torch.autocast(x.device.type, enabled=False):
            x = _full(x)
            total = x.new_zeros(len(x))
            for layer in self.layers:
                x, log_det = layer(x)
                total = total + log_det
        return x, total

    def inverse(self, z: Tensor) -> Tensor:
        """Return the maps that ``forward`` turns into these latents, (B, C, H, W)."""
        with torch.autocast(z.device.type, enabled=False):
            z = _full(z)
            for layer in reversed(self.layers):
                z = layer.inverse(z)  # type: ignore[operator]
        return z


def _full(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
