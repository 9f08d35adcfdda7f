"""DPS: the gradient through the network, frame by frame."""

from __future__ import annotations

import pytest
import torch
from gaussian_prior import ABAR, GaussianPrior, differentiable_step, make_step, smooth_prior

from zsvr import hosts, operators, samplers


class Mixing(GaussianPrior):
    """A prior whose frames see each other, as with temporal attention."""

    def predict(self, x, step):
        return super().predict(x + 0.2 * x.roll(1, 0), step)


def test_dps_gradient_is_that_of_the_sum_of_norms():
    prior, operator = smooth_prior(4, 4), operators.make("sr_avg", scale=2)
    y = operator.A(torch.rand(3, 3, 4, 4, dtype=torch.float64))
    step = differentiable_step(prior, y)
    x, x0 = hosts.make("dps", zeta=0.7).advance(step, y, operator, None)

    def total(state):
        eps, _ = prior.predict(state, 300)
        clean = samplers.predict_x0(state, eps, float(ABAR[300])).clamp(-1, 1)
        return torch.linalg.vector_norm((y - operator.A(clean)).flatten(1), dim=1).sum()

    at, h = step.x.detach(), 1e-6
    gradient = torch.zeros_like(at)
    for index in ((0, 0, 1, 2), (2, 1, 3, 0), (1, 2, 0, 0)):  # central differences
        up, down = at.clone(), at.clone()
        up[index] += h
        down[index] -= h
        gradient[index] = (total(up) - total(down)) / (2 * h)
        free = samplers.ddpm(at, step.x0.detach(), step.eps, None, step.z, step.a, step.a_next)
        assert float(free[index] - x[index]) == pytest.approx(0.7 * float(gradient[index]), rel=1e-5, abs=1e-9)
    assert not x.requires_grad and not x0.requires_grad


def test_dps_frames_are_independent_when_the_network_keeps_them_apart():
    operator = operators.make("inpaint", ratio=0.5)
    y = operator.A(torch.rand(3, 3, 4, 4, dtype=torch.float64))
    prior, mixing = (cls(smooth_prior(4, 4).mean, smooth_prior(4, 4).covariance) for cls in (GaussianPrior, Mixing))
    gradient = hosts.make("dps").gradient
    other = torch.cat((y[:2], -y[2:]))
    steps = [differentiable_step(prior, y) for _ in range(2)]
    assert torch.equal(gradient(steps[0], y, operator)[:2], gradient(steps[1], other, operator)[:2])
    steps = [differentiable_step(mixing, y) for _ in range(2)]
    assert not torch.allclose(gradient(steps[0], y, operator)[:2], gradient(steps[1], other, operator)[:2])


def test_dps_leaves_held_frames_out():
    operator = operators.make("inpaint", ratio=0.5)
    y = operator.A(torch.rand(3, 3, 4, 4, dtype=torch.float64))
    prior = smooth_prior(4, 4)
    held = torch.tensor([True, False, False])
    gradient = hosts.make("dps").gradient(differentiable_step(prior, y, held), y, operator)
    assert torch.equal(gradient[0], torch.zeros(3, 4, 4).double()) and (gradient[1:] != 0).any()
    all_held = differentiable_step(prior, y, torch.ones(3, dtype=torch.bool))
    assert not hosts.make("dps").gradient(all_held, y, operator).any()


def test_dps_with_an_exact_measurement_is_finite():
    operator, prior = operators.make("denoise"), smooth_prior(4, 4)
    step = differentiable_step(prior, torch.zeros(2, 3, 4, 4))
    x, _ = hosts.make("dps").advance(step, step.x0.detach(), operator, None)
    assert torch.isfinite(x).all()
    with pytest.raises(ValueError, match="gradients on"):
        hosts.make("dps").advance(make_step((2, 3, 4, 4)), step.x0.detach(), operator, None)
