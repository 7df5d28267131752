"""The flow on feature maps: inverses and log-determinants, against autograd."""

from __future__ import annotations

import pytest
import torch
from torch.autograd.functional import jacobian

from ttalight.losses import flow_likelihood_loss
from ttalight.models.flow import ActNorm, CheckerboardCoupling, FeatureFlow, InvertibleConv

LAYERS = {
    "act_norm": lambda: ActNorm(3),
    "conv": lambda: InvertibleConv(3),
    "even": lambda: CheckerboardCoupling(3, 5, odd=False),
    "odd": lambda: CheckerboardCoupling(3, 5, odd=True),
    "flow": lambda: FeatureFlow(3, steps=3, hidden=5),
}
#: Odd sides, and maps of one row.
SHAPES = [(2, 3, 3, 2), (2, 3, 1, 2)]


@pytest.fixture(params=list(LAYERS))
def layer(request):
    """A layer away from its start, where couplings are the identity."""
    torch.manual_seed(0)
    layer = LAYERS[request.param]().double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    return layer


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("shape", SHAPES)
def test_inverse(layer, shape):
    x = draw(*shape)
    z, _ = layer(x)
    assert not torch.allclose(z, x)
    torch.testing.assert_close(layer.inverse(z), x)
    torch.testing.assert_close(layer(layer.inverse(x))[0], x)


@pytest.mark.parametrize("shape", SHAPES)
def test_log_determinant_is_that_of_the_jacobian(layer, shape):
    x = draw(*shape)
    _, log_det = layer(x)
    size = x[0].numel()
    for image, own in zip(x, log_det, strict=True):
        matrix = jacobian(lambda flat: layer(flat.view(1, *shape[1:]))[0].flatten(), image.flatten())
        assert matrix.shape == (size, size)
        torch.testing.assert_close(own, torch.linalg.slogdet(matrix)[1])


def test_likelihood_is_that_of_the_transformed_gaussian():
    """A flow without couplings is linear: its density is a Gaussian's with covariance (A' A)^-1."""
    torch.manual_seed(0)
    norm, conv, x = ActNorm(3).double(), InvertibleConv(3).double(), draw(4, 3, 1, 1)
    norm.initialize(3 * draw(9, 3, 2, 2) + 1)
    hidden, first = norm(x)
    z, second = conv(hidden)
    matrix = conv.weight * norm.log_scale.exp().flatten()
    gaussian = torch.distributions.MultivariateNormal(-norm.shift.flatten(), precision_matrix=matrix.T @ matrix)
    expected = -gaussian.log_prob(x.flatten(1)) / 3
    torch.testing.assert_close(flow_likelihood_loss(z, first + second), expected)
    # In half precision the squares are taken in float32.
    assert flow_likelihood_loss(100 * z.half(), first.half()).dtype == torch.float32
    with pytest.raises(ValueError, match=r"latents \(B, D\) and log-determinants \(B,\), got .*\(4,\) and \(3,\)"):
        flow_likelihood_loss(z.sum((1, 2, 3)), first[:3])


def test_initialisation_normalises_every_step():
    torch.manual_seed(0)
    flow, x = FeatureFlow(4, steps=2, hidden=3), 3 * torch.randn(16, 4, 5, 5) + 2
    x[:, 3] = 0.0  # a dead channel
    flow.initialize(x)
    assert bool(flow.initialized)
    seen = []
    for layer in flow.layers:
        if isinstance(layer, ActNorm):
            layer.register_forward_hook(lambda module, inputs, output: seen.append(output[0]))
    flow(x)
    for values in seen:
        deviation, mean = torch.std_mean(values, (0, 2, 3), correction=0)
        torch.testing.assert_close(mean, torch.zeros(4), atol=1e-4, rtol=0)
        assert (deviation < 1.01).all()
    torch.testing.assert_close(seen[0].std((0, 2, 3), correction=0)[:3], torch.ones(3), atol=1e-4, rtol=0)
    x[:, 3] = 0.1  # not so dead on other images
    assert flow(x)[0].abs().max() < 100


def test_initialisation_travels_with_the_weights():
    """A flow that was loaded must not be initialised again, on test images."""
    flow, other = (FeatureFlow(2, steps=1, hidden=2) for _ in range(2))
    flow.initialize(torch.randn(4, 2, 3, 3))
    other.load_state_dict(flow.state_dict())
    assert bool(other.initialized)


def test_flow_stays_in_float32_under_autocast():
    flow = FeatureFlow(2, steps=1, hidden=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, log_det = flow(torch.randn(2, 2, 4, 4).bfloat16())
        assert z.dtype == log_det.dtype == flow.inverse(z).dtype == torch.float32


def test_sizes_are_checked():
    with pytest.raises(ValueError, match="1 step and 1 hidden channel at least, got 0 and 4"):
        FeatureFlow(2, steps=0, hidden=4)
