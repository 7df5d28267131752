"""Closed forms of entropy gradients against autograd, and what their alignment must not do."""

from __future__ import annotations

import math

import pytest
import torch

from ttalight.losses.structural import entropy_slopes, structural_alignment


def entropy_of(logits):
    p = logits.softmax(-1)
    return -(p * p.log()).sum(-1)


def gradient(function, at):
    at = at.detach().clone().requires_grad_()
    return torch.autograd.grad(function(at), at)[0]


@pytest.fixture
def draws():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def weight(draws):
    return torch.randn(5, 7, dtype=torch.float64, generator=draws)


@pytest.fixture
def bias(draws):
    return torch.randn(5, dtype=torch.float64, generator=draws)


@pytest.fixture
def features(draws):
    return torch.randn(4, 7, dtype=torch.float64, generator=draws)


def close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


class TestOnlineGradients:
    def test_of_the_entropy_by_the_feature(self, features, weight, bias):
        own = entropy_slopes(features @ weight.T + bias) @ weight
        for z, g in zip(features, own, strict=True):
            close(g, gradient(lambda z: entropy_of(weight @ z + bias), z))

    def test_is_minus_the_covariance_of_logits_and_rows(self, features, weight, bias):
        logits = features @ weight.T + bias
        own = entropy_slopes(logits) @ weight
        for values, g in zip(logits, own, strict=True):
            p = values.softmax(0)
            covariance = torch.zeros_like(g)
            for j in range(5):
                covariance += p[j] * (values[j] - (p * values).sum()) * (weight[j] - p @ weight)
            close(g, -covariance)

    def test_of_the_entropy_by_the_predicted_row(self, features, weight, bias):
        logits = features @ weight.T + bias
        slopes = entropy_slopes(logits)
        for z, values, slope in zip(features, logits, slopes, strict=True):
            k = int(values.argmax())
            close(slope[k] * z, gradient(lambda rows, z=z: entropy_of(rows @ z + bias), weight)[k])

    def test_do_not_change_when_all_logits_move(self, features, weight):
        logits = features @ weight.T
        close(entropy_slopes(logits + 700), entropy_slopes(logits))
        close(entropy_slopes(logits).sum(1), torch.zeros(4, dtype=torch.float64))

    @pytest.mark.parametrize("logits", [[[0.0, -1e4, -1e30]], [[0.0, -math.inf, 1.0]], [[2.0, 2.0, 2.0]]])
    def test_are_finite_where_probabilities_underflow(self, logits):
        logits = torch.tensor(logits, requires_grad=True)
        slopes = entropy_slopes(logits)
        slopes.square().sum().backward()
        assert slopes.isfinite().all()
        assert logits.grad.isfinite().all()


class TestAnchors:
    @pytest.mark.parametrize("with_bias", [False, True])
    def test_against_autograd(self, weight, bias, with_bias):
        b = bias if with_bias else torch.zeros_like(bias)
        own = entropy_slopes(weight @ weight.T + b) @ weight
        for k in range(5):
            close(own[k], gradient(lambda z: entropy_of(weight @ z + b), weight[k]))


class TestAlignment:
    def test_is_one_minus_the_cosine(self, features, draws):
        anchors = torch.randn(4, 7, dtype=torch.float64, generator=draws)
        expected = [1 - float(g @ a / (g.norm() * a.norm())) for g, a in zip(features, anchors, strict=True)]
        assert structural_alignment(features, anchors).tolist() == pytest.approx(expected)
        close(structural_alignment(3 * features, 0.1 * anchors), structural_alignment(features, anchors))
        close(structural_alignment(features, -features), torch.full((4,), 2.0, dtype=torch.float64))

    def test_leaves_out_what_has_no_direction(self, features):
        gradients = features.clone()
        gradients[1] = 0
        gradients[2] *= 1e-7 / gradients[2].norm()
        anchors = features.flip(0).clone()
        anchors[3] = 0
        gradients.requires_grad_()
        values = structural_alignment(gradients, anchors, smallest=1e-6)
        values.sum().backward()
        assert values[1:].tolist() == [0, 0, 0]
        assert not gradients.grad[1:].any()
        assert values[0] > 0
        assert gradients.grad[0].any()

    def test_has_a_gradient(self, features, weight):
        anchors = weight[:4]
        assert torch.autograd.gradcheck(
            lambda z: structural_alignment(entropy_slopes(z @ weight.T) @ weight, anchors), features.requires_grad_()
        )
