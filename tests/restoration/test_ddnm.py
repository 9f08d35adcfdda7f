"""DDNM and DDNM+: data consistency, the balance of noise, and exact moments on Gaussian priors."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian_prior import (
    ABAR,
    EVERY,
    EXACT,
    GaussianPrior,
    dense,
    distance,
    make_step,
    moments,
    restore,
    smooth_prior,
    some_measurement,
)

from zsvr import hosts, operators, schedule
from zsvr.hosts.ddnm import weights
from zsvr.operators import Flat, Spectral


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("host", ["ddnm", "ddnm+"])
@pytest.mark.parametrize("stop_step", [0, 40])
def test_exact_measurements_are_reproduced(name, host, stop_step):
    operator, prior = EXACT[name](), smooth_prior(8, 8, dtype=torch.float32)
    truth = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(4)) * 2 - 1
    y = operator.A(truth)
    result = restore(prior, hosts.make(host), operator, y, steps=20, stop_step=stop_step)
    assert float((operator.A(result) - y).abs().max()) < 1e-4
    assert float((result - truth).abs().max()) > 0.1  # the null space is the prior's


@pytest.mark.parametrize("name", ["blur_sep", "blur_fft"])
def test_blurred_measurements_are_reproduced_where_nothing_is_dropped(name):
    operator, prior = EVERY[name](), smooth_prior(8, 8, dtype=torch.float32)
    y = operator.A(torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(4)) * 2 - 1)
    kept = operator.A(operator.pinv(y))
    result = restore(prior, hosts.make("ddnm"), operator, y, steps=20)
    assert float((operator.A(operator.pinv(operator.A(result))) - kept).abs().max()) < 1e-4


@pytest.mark.parametrize("name", EVERY)
def test_ddnm_plus_without_noise_is_ddnm(name):
    operator = EVERY[name]()
    step = make_step((2, 3, 8, 8))
    y = operator.A(torch.randn(2, 3, 8, 8, dtype=torch.float64))
    plain = hosts.make("ddnm").advance(step, y, operator, None)
    isotropic = hosts.make("ddnm+", noise_mode="isotropic").advance(step, y, operator, None)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(plain, isotropic, strict=True))
    # By singular values, the range takes fresh noise only; x0 is the same.
    assert torch.allclose(hosts.make("ddnm+").advance(step, y, operator, None)[1], plain[1], atol=1e-12)


@pytest.mark.parametrize("k", [0, 50, 90, 98, 99])
@pytest.mark.parametrize("noise_std", [0.0, 1e-3, 0.05, 0.5])
def test_noise_of_every_component_adds_up(k, noise_std):
    S = [*schedule.spaced_steps(100)]
    a = float(ABAR[S[k + 1]]) if k < 99 else 1.0
    g, s_n, sigma_y = math.sqrt(a), math.sqrt(1 - a), 2 * noise_std
    s = torch.tensor([1.0, 0.5, 0.25, 0.03, 0.0], dtype=torch.float64)
    lam, d1, d2 = weights(s, g, s_n, sigma_y, 0.85)
    measured = (g * lam * sigma_y / s.masked_fill(s == 0, 1)).masked_fill(s == 0, 0)
    assert torch.allclose(measured.square() + d1.square() + d2.square(), torch.tensor(s_n**2).double(), atol=1e-14)
    assert (lam[:-1] >= 0).all() and (lam <= 1).all() and (lam[:-1].diff() <= 0).all()
    assert noise_std or torch.equal(lam, torch.ones(5).double())


@pytest.mark.parametrize("name", [n for n in EVERY if isinstance(EVERY[n]().spectrum(), Flat)])
@pytest.mark.parametrize("k", [20, 97])
def test_projector_form_is_the_form_by_singular_vectors(name, k):
    operator, canvas = EVERY[name](), (6, 4)
    matrix = dense(operator, canvas)
    _u, s, vt = torch.linalg.svd(matrix, full_matrices=True)
    s = torch.nn.functional.pad(s, (0, vt.shape[0] - len(s)))
    s = s.masked_fill(s < 1e-9, 0.0)

    class BySVD(Spectral):
        def values(self, canvas):
            return s.float()[None]

        def analyze(self, x):
            return x.flatten(1) @ vt.T

        def synthesize(self, c):
            return (c @ vt).reshape(-1, 3, *canvas)

    step = make_step((2, 3, *canvas), k=k)
    y = operator.A(torch.randn(2, 3, *canvas, dtype=torch.float64))
    host = hosts.make("ddnm+", noise_std=0.1)
    flat = host.advance(step, y, operator, None)
    operator.spectrum = BySVD
    spectral = host.advance(step, y, operator, None)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(flat, spectral, strict=True))  # values are float32


def test_early_stopping_weighs_by_the_true_next_level():
    operator = operators.make("denoise")
    step = make_step((1, 3, 4, 4), k=97, stop=True)
    y = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    host = hosts.make("ddnm+", noise_std=0.25)
    x, x0 = host.advance(step, y, operator, None)
    g, s_n = math.sqrt(step.a_schedule), math.sqrt(1 - step.a_schedule)
    lam = s_n * math.sqrt(1 - 0.85**2) / (g * 0.5)
    assert 0 < lam < 1 and torch.equal(x, x0)
    assert torch.allclose(x0, step.x0 + lam * (y - step.x0))


def test_shift_comes_before_the_projection():
    operator = operators.make("inpaint", ratio=0.5)
    y = operator.A(torch.randn(2, 3, 8, 8, dtype=torch.float64))
    step = make_step((2, 3, 8, 8), shift=torch.randn(2, 3, 8, 8, dtype=torch.float64))
    for name in ("ddnm", "ddnm+"):
        _, x0 = hosts.make(name).advance(step, y, operator, None)
        assert torch.allclose(operator.A(x0), y)
        assert torch.allclose(x0 - operator.A(x0), (step.x0 + step.shift) - operator.A(step.x0 + step.shift))


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.parametrize("host", ["ddnm", "ddnm+"])
def test_ddnm_has_the_posterior_mean_where_range_and_null_space_are_independent(name, host):
    # C a multiple of the identity: the range is known, and the null space keeps its prior.
    operator = EXACT[name]()
    prior = GaussianPrior(smooth_prior(4, 4).mean, torch.tensor(0.2, dtype=torch.float64))
    y = some_measurement(operator, prior)
    expected, _ = prior.posterior(dense(operator, (4, 4)), y, 0.0)
    result = restore(prior, hosts.make(host), operator, y, quiet=True)[0]
    if operator.name == "compose":
        assert distance(operator.A(result[None]), y) < 1e-12  # its product is no Moore-Penrose inverse
    else:
        assert distance(result, expected) < 0.02


@pytest.mark.parametrize("name", ["sr_avg", "gray", "inpaint"])
def test_ddnm_approaches_the_posterior_mean_of_a_correlated_prior(name):
    # The denoiser sees the measured part through noise, so the null space lags behind what the measurement says
    # about it; the lag shrinks with the noise level at which sampling still moves.
    operator, prior = EXACT[name](), smooth_prior(4, 4)
    y = some_measurement(operator, prior)
    expected, _ = prior.posterior(dense(operator, (4, 4)), y, 0.0)
    unrelated = operator.pinv(y)[0] + prior.mean - operator.pinv(operator.A(prior.mean))  # null space of the mean
    errors = []
    for steps in (10, 100, 1000):
        result = restore(prior, hosts.make("ddnm"), operator, y, steps=steps, quiet=True)[0]
        errors.append(float((result - expected).norm() / (unrelated - expected).norm()))
    assert 0.8 > errors[0] > errors[1] > errors[2] and errors[2] < 0.2, errors


def scalar_ddnm_plus(s, y, mean, variance, noise_std, steps, eta=0.85):
    """Mean and variance of DDNM+ for one component ``y = s x0 + noise``, propagated through its linear steps."""
    S, sigma_y = schedule.spaced_steps(steps), 2 * noise_std
    m, v = 0.0, 1.0
    for k in range(steps):
        a = float(ABAR[S[k]])
        a_next = float(ABAR[S[k + 1]]) if k + 1 < steps else 1.0
        gain = math.sqrt(a) * variance / (a * variance + 1 - a)  # x0 = gain x + offset
        offset = mean - gain * math.sqrt(a) * mean
        g, s_n = math.sqrt(a_next), math.sqrt(1 - a_next)
        threshold = g * sigma_y / s
        if s_n >= threshold:
            lam, d1 = 1.0, math.sqrt(s_n**2 - threshold**2)
        else:
            lam, d1 = s * s_n * math.sqrt(1 - eta**2) / (g * sigma_y), s_n * eta
        slope = g * (1 - lam) * gain
        m = slope * m + g * ((1 - lam) * offset + lam * y / s)
        v = slope**2 * v + d1**2
    return m, v


@pytest.mark.parametrize(("name", "s"), [("denoise", 1.0), ("sr_avg", 0.5), ("gray", 3**-0.5)])
@pytest.mark.parametrize("noise_std", [0.05, 0.25])
def test_ddnm_plus_has_the_mean_and_variance_its_recursion_gives(name, s, noise_std):
    operator, steps = EVERY[name](), 50
    prior = GaussianPrior(smooth_prior(4, 4).mean, torch.tensor(0.2, dtype=torch.float64))
    y = some_measurement(operator, prior)
    host = hosts.make("ddnm+", noise_std=noise_std)
    mean, covariance = moments(
        prior, lambda step: host.advance(step, y.expand(len(step.x), -1, -1, -1), operator, None)[0], steps
    )
    # Components along right singular vectors: A / s has orthonormal rows.
    rows = dense(operator, (4, 4)) / s
    centre, target = (rows @ prior.mean.flatten()), y.flatten() / s
    expected = [
        scalar_ddnm_plus(s, float(t) * s, float(c), 0.2, noise_std, steps) for t, c in zip(target, centre, strict=True)
    ]
    for component, (m, v) in enumerate(expected):
        assert float(rows[component] @ mean.flatten()) == pytest.approx(m, abs=1e-9)
        assert float(rows[component] @ covariance @ rows[component]) == pytest.approx(v, rel=1e-9)
    # The measurement's noise is reduced: nearer to the posterior mean than y itself is.
    gain = 0.2 * s**2 / (0.2 * s**2 + 4 * noise_std**2)
    posterior = centre + gain * (target - centre)
    found = torch.tensor([m for m, _ in expected], dtype=torch.float64)
    assert float((found - posterior).norm()) < float((target - posterior).norm())


def test_ddnm_plus_removes_noise_from_clips_of_the_prior():
    prior, operator = smooth_prior(6, 6), operators.make("denoise")
    generator = torch.Generator().manual_seed(3)
    factor = torch.linalg.cholesky(prior.covariance)
    truth = prior.mean + (torch.randn(200, 108, dtype=torch.float64, generator=generator) @ factor.T).reshape(
        -1, 3, 6, 6
    )
    y = truth + 0.4 * torch.randn(truth.shape, dtype=torch.float64, generator=generator)
    result = restore(prior, hosts.make("ddnm+", noise_std=0.2), operator, y, steps=50)
    exact = torch.stack([prior.posterior(torch.eye(108).double(), one, 0.16)[0] for one in y])
    errors = [float((r - truth).square().mean()) for r in (y, result, exact)]
    assert errors[2] < errors[1] < 0.5 * errors[0], errors
