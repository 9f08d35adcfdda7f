"""GDP: gradients of its losses, scales, learned variance, low light."""

from __future__ import annotations

import itertools

import pytest
import torch
from gaussian_prior import EVERY, GaussianPrior, make_step, restore, smooth_prior

from zsvr import hosts, noise, operators, samplers, schedule
from zsvr.hosts import gdp


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("form", gdp.FORMS)
def test_gdp_shift_is_the_gradient_of_its_loss(name, form):
    operator = EVERY[name]()
    step = make_step((2, 3, 8, 8))
    y = operator.A(torch.randn(2, 3, 8, 8, dtype=torch.float64))
    x, x0 = hosts.make("gdp", form=form, scale=7.0, rescale=False).advance(step, y, operator, None)
    at = (step.x0 if form == "x0" else step.x).clone().requires_grad_()
    loss = ((operator.A(at) - y) / 2).square().mean((1, 2, 3)).sum()
    total = 7.0 * loss
    if "gray" in name:
        total = total + 500 * gdp.color_loss(at).sum()
    (gradient,) = torch.autograd.grad(total, at)
    expected = samplers.ddpm(step.x, step.x0, step.eps, None, step.z, step.a, step.a_next) - gradient
    assert torch.allclose(x, expected, atol=1e-12) and torch.allclose(x0, step.x0 - gradient, atol=1e-12)


def test_colour_gradient_is_that_of_its_formula():
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64).requires_grad_()
    u = (x + 1) / 2
    r, g, b = u.mean((2, 3)).T
    loss = ((r - g) ** 4 + (r - b) ** 4 + (g - b) ** 4 + 1e-12).sqrt()
    assert torch.allclose(gdp.color_loss(x), loss)
    (expected,) = torch.autograd.grad(loss.sum(), x)
    assert torch.allclose(gdp.color_gradient(x.detach()), expected, atol=1e-15)


def test_gdp_rescales_with_the_number_of_steps_and_limits_its_gain():
    operator = operators.make("denoise")
    elements = 3 * 8 * 8
    y = torch.zeros(1, 3, 8, 8, dtype=torch.float64)

    def gain(**arguments):
        """s / (2 N_el), seen on a constant."""
        step = make_step((1, 3, 8, 8), k=2, K=10, x0=torch.ones(1, 3, 8, 8, dtype=torch.float64))
        _, x0 = hosts.make("gdp", **arguments).advance(step, y, operator, None)
        return 1 - float(x0[0, 0, 0, 0])

    assert gain(scale=3.0, rescale=False) == pytest.approx(3 / (2 * elements))
    assert gain(scale=3.0) == pytest.approx(3 * 1000 / 10 / (2 * elements))
    assert gain(scale=1e9) == pytest.approx(1)
    assert gain(scale=1e9, max_gain=0.25) == pytest.approx(0.25)
    assert gain(scale=1e4, rescale=False, max_gain=None) == pytest.approx(1e4 / (2 * elements))
    # Published scales at 256 x 256 and 1000 steps are below the limit.
    for name, (scale, rho, n) in {
        "sr_avg": (2000, 1 / 16, 3 * 64**2), "blur_sep": (6000, 1, 3 * 256**2), "inpaint": (4000, 1, 3 * 256**2),
        "gray": (6000, 1 / 3, 256**2), "lowlight": (160000, 1.5**2, 3 * 256**2),
    }.items():  # fmt: skip
        assert gdp.SCALES[name] == scale and scale * rho / (2 * n) <= 1


def test_gdp_takes_the_learned_variance():
    operator = operators.make("denoise")
    frac = torch.rand(1, 3, 4, 4, dtype=torch.float64)
    step = make_step((1, 3, 4, 4), frac=frac, shift=torch.randn(1, 3, 4, 4, dtype=torch.float64))
    x, _ = hosts.make("gdp", scale=0.0).advance(step, step.x0, operator, None)
    expected = samplers.ddpm(step.x, step.x0, step.eps, frac, step.z, step.a, step.a_next) + step.shift
    assert torch.allclose(x, expected)
    y = torch.zeros_like(step.x0)
    plain, scaled = (
        hosts.make("gdp", scale=5.0, scale_by_variance=flag).advance(step, y, operator, None)[1] - step.x0 - step.shift
        for flag in (False, True)
    )
    assert torch.allclose(scaled, plain * schedule.coefficients(step.a, step.a_next).variance(frac))


def light_step(T=3, size=(8, 8), seed=0, **changes):
    u = 0.2 + 0.6 * torch.rand(T, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return make_step((T, 3, *size), x0=2 * u - 1, **changes), u


@pytest.mark.parametrize("f_scope", gdp.SCOPES)
@pytest.mark.parametrize("m_scope", gdp.SCOPES)
def test_gain_and_offset_descend_when_the_frames_are_right(f_scope, m_scope):
    step, u = light_step()
    operator = operators.make("lowlight", gain=0.3, offset=0.05)
    y = operator.A(2 * u - 1)
    host = hosts.make("gdp", f_scope=f_scope, m_scope=m_scope, rescale=False)
    state = host.start(y, operators.make("lowlight"), seed=0)
    errors = []
    for _ in range(300):
        errors.append(float((state.f * u + state.m - (y + 1) / 2).square().mean()))
        host.advance(step, y, operator, state)
    assert all(b < a for a, b in itertools.pairwise(errors))
    assert errors[-1] < 1e-2 * errors[0]


@pytest.mark.parametrize("rate", [1, 10])
def test_low_light_updates_are_gradients_taken_once(rate):
    step, _ = light_step(T=2)
    operator = operators.make("lowlight")
    y = torch.randn(2, 3, 8, 8, dtype=torch.float64) * 0.3 - 0.6
    host = hosts.make("gdp", f_scope="frame", scale=100.0, rescale=rate > 1)
    state = host.start(y, operator, seed=1)
    f, m, x0 = (t.clone().requires_grad_() for t in (state.f, state.m, step.x0))
    per_frame = (f * (x0 + 1) / 2 + m - (y + 1) / 2).square().mean((1, 2, 3))
    df, dm, dx = torch.autograd.grad(per_frame.sum(), (f, m, x0))
    _, corrected = host.advance(step, y, operator, state)
    assert torch.allclose(state.f, f - df) and torch.allclose(state.m, m - rate * dm)  # f would diverge
    assert torch.allclose(corrected, step.x0 - rate * 100 * dx, atol=1e-14)


def test_low_light_starts_from_keyed_noise():
    operator = operators.make("lowlight")
    y = torch.zeros(4, 3, 6, 5)
    state = hosts.make("gdp").start(y, operator, seed=9)
    assert state.f.shape == (4, 1, 1, 1) and state.m.shape == (4, 1, 6, 5)
    assert torch.equal(state.f, (0.01 * noise.normal(9, "light_gain", (1,))).expand(4, 1, 1, 1))
    assert torch.equal(state.m[2, 0], 1e-4 * noise.uniform(9, "light_offset", (6, 5)))


def test_exposure_of_a_clip_is_one():
    step, u = light_step(T=4)
    operator = operators.make("lowlight", gain=0.3)
    y = operator.A(2 * u - 1)
    host = hosts.make("gdp")
    first = host.start(y, operator, seed=0)
    gains = []
    for _ in range(20):
        gains.append(float(first.f[0]))
        host.advance(step, y, operator, first)
        assert float(first.f.std()) == 0
    # A later window, darker: it replays f, step by step.
    second = host.start(0.5 * y - 0.5, operator, 0, first)
    for gain in gains:
        host.advance(step, 0.5 * y - 0.5, operator, second)
        assert float(second.history[second.position - 1]) == gain
    assert second.history is first.history and len(first.history) == 20
    own = hosts.make("gdp", f_scope="frame")
    state = own.start(y, operator, 0)
    own.advance(step, y, operator, state)
    assert float(state.f.std()) > 0 and not own.start(y, operator, 0, state).replays


def test_low_light_is_brightened():
    prior = smooth_prior(6, 6, dtype=torch.float64)
    prior = GaussianPrior(0.5 * prior.mean, 0.1 * prior.covariance)
    operator = operators.make("lowlight", gain=0.2)
    factor = torch.linalg.cholesky(prior.covariance)
    truth = prior.mean + (torch.randn(4, 108, dtype=torch.float64) @ factor.T).reshape(4, 3, 6, 6)
    y = operator.A(truth)
    result = restore(prior, hosts.make("gdp"), operators.make("lowlight"), y, steps=200)
    assert torch.isfinite(result).all()
    assert abs(float(result.mean() - truth.mean())) < 0.25 * abs(float(y.mean() - truth.mean()))
