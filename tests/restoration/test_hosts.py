"""Hosts: data consistency, noise balance, gradients, and sampling from a Gaussian whose posterior is known."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from zsvr import hosts, noise, operators, samplers, schedule
from zsvr.hosts import Step, gdp
from zsvr.hosts.ddnm import weights
from zsvr.operators import Flat, Spectral
from zsvr.priors.base import Prior

ABAR = schedule.alphas_bar(schedule.linear_betas())


class GaussianPrior(Prior):
    """The exact denoiser of ``x0 ~ N(mean, C)``: ``E[x0 | x]`` in closed form.

    Args:
        mean: ``[3, H, W]``. covariance: ``[3HW, 3HW]``, or ``[]`` for a multiple of the identity.
    """

    channels, multiple = 3, 1

    def __init__(self, mean, covariance):
        self.alphas_bar = ABAR
        self.size = tuple(mean.shape[1:])
        self.mean = mean
        self.covariance = (
            covariance.expand(1, 1) * torch.eye(mean.numel()).to(mean) if not covariance.ndim else covariance
        )
        self.values, self.vectors = torch.linalg.eigh(self.covariance)

    def predict(self, x, step):
        a = float(self.alphas_bar[step])
        centred = x.flatten(1) - a**0.5 * self.mean.flatten()
        gain = a**0.5 * self.values / (a * self.values + 1 - a)
        x0 = self.mean + ((centred @ self.vectors * gain) @ self.vectors.T).reshape(x.shape)
        return samplers.predict_eps(x, x0, a), None

    def posterior(self, matrix, y, variance):
        """Return mean and covariance of x0 given ``y = matrix x0 + N(0, variance)``."""
        gain = self.covariance @ matrix.T
        system = matrix @ gain + variance * torch.eye(len(matrix)).to(matrix)
        solve = torch.linalg.pinv(system, rtol=1e-9, hermitian=True)
        mean = self.mean.flatten() + gain @ solve @ (y.flatten() - matrix @ self.mean.flatten())
        return mean.reshape(self.mean.shape), self.covariance - gain @ solve @ gain.T

    def describe(self):
        return {}


def restore(prior, host, operator, y, *, steps=100, stop_step=0, seed=0, travel=(1, 1), quiet=False):
    """The sampler without anything temporal; every frame has noise of its own.

    With a Gaussian prior the states of ddnm and ddnm+ are affine in the noise, so without any (``quiet``) the result
    is exactly the mean of all samples.
    """
    T, canvas, dtype = len(y), prior.size, y.dtype
    fields = noise.FrameNoise(seed, (3, *canvas), T, noise.Sharing("none"))
    if quiet:

        def fields(kind, frames, **of_step):
            return torch.zeros(T, 3, *canvas, dtype=dtype)

    S = schedule.spaced_steps(steps)
    ks = schedule.last_index(S, stop_step)
    state = host.start(y, operator, seed)
    x = fields("initial", range(T), dtype=dtype)
    x0_raw = x
    for op in schedule.plan_operations(steps, ks, *travel):
        a = float(prior.alphas_bar[S[op.k]])
        if op.back:
            x = samplers.add_noise(x0_raw, fields("travel", range(T), step=S[op.k], visit=op.visit, dtype=dtype), a)
            continue
        with torch.set_grad_enabled(host.needs_network_gradient):
            x = x.detach().requires_grad_(host.needs_network_gradient)
            eps, frac = prior.predict(x, S[op.k])
            x0_raw = samplers.predict_x0(x, eps, a)
            x0 = x0_raw.clamp(-1, 1) if host.clips_x0 else x0_raw
            last = op.k == ks
            a_full = float(prior.alphas_bar[S[op.k + 1]]) if op.k + 1 < steps else 1.0
            z = torch.zeros_like(x) if last else fields("step", range(T), step=S[op.k], visit=op.visit, dtype=dtype)
            step = Step(
                k=op.k, K=steps, N=1000, training_step=S[op.k], a=a, a_next=1.0 if last else a_full, a_schedule=a_full,
                is_last=last, x=x, x0=x0, eps=eps.detach(), frac=frac, z=z, shift=torch.zeros_like(x),
                held=torch.zeros(T, dtype=torch.bool),
            )  # fmt: skip
            x, result = host.advance(step, y, operator, state)
        x0_raw = x0_raw.detach()
    return result


def make_step(shape, seed=0, *, k=50, K=100, last=False, stop=False, dtype=torch.float64, **changes):
    """A step with random contents."""
    generator = torch.Generator().manual_seed(seed)
    x, x0, eps, z = (torch.randn(shape, dtype=dtype, generator=generator) for _ in range(4))
    S = schedule.spaced_steps(K)
    a, a_full = float(ABAR[S[k]]), float(ABAR[S[k + 1]]) if k + 1 < K else 1.0
    last = last or stop
    known = dict(
        k=k, K=K, N=1000, training_step=S[k], a=a, a_next=1.0 if last else a_full, a_schedule=a_full, is_last=last,
        x=x, x0=x0, eps=eps, frac=None, z=torch.zeros_like(z) if last else z, shift=torch.zeros_like(x),
        held=torch.zeros(shape[0], dtype=torch.bool),
    )  # fmt: skip
    return Step(**{**known, **changes})


def dense(operator, canvas):
    n = 3 * canvas[0] * canvas[1]
    return operator.A(torch.eye(n, dtype=torch.float64).reshape(n, 3, *canvas)).reshape(n, -1).T


def smooth_prior(H, W, seed=0, dtype=torch.float64):
    """A Gaussian over frames with a random mean, smooth in space and correlated between channels."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    at = torch.stack((y, x), -1).reshape(-1, 2).to(dtype)
    space = 0.25 * torch.exp(-0.5 * torch.cdist(at, at).square() / 1.5**2) + 0.02 * torch.eye(H * W).to(dtype)
    colour = torch.tensor([[1.0, 0.7, 0.5], [0.7, 1.0, 0.7], [0.5, 0.7, 1.0]]).to(dtype)
    mean = 0.3 * torch.randn(3, H, W, dtype=dtype, generator=generator)
    return GaussianPrior(mean, torch.kron(colour, space))


EXACT = {
    "inpaint": lambda: operators.make("inpaint", ratio=0.5),
    "gray": lambda: operators.make("gray"),
    "sr_avg": lambda: operators.make("sr_avg", scale=2),
    "sr_bicubic": lambda: operators.make("sr_bicubic", scale=2),
    "gray_sr": lambda: operators.make("compose", operators=[operators.make("gray"), operators.make("sr_avg", scale=2)]),
    "sr_inpaint": lambda: operators.make(
        "compose", operators=[operators.make("sr_avg", scale=2), operators.make("inpaint", ratio=0.3)]
    ),
}
EVERY = {
    **EXACT,
    "denoise": lambda: operators.make("denoise"),
    "blur_sep": lambda: operators.make("blur_sep", kernel="gaussian:5,1.5"),
    "blur_fft": lambda: operators.make("blur_fft", kernel="motion:5,30"),
    "blur_reflect": lambda: operators.make("blur_fft", kernel="gaussian:3,0.7", fft_pad="reflect", pinv="cg"),
}


# DDNM


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


# A Gaussian prior: what sampling theory gives.


def moments(prior, advance, steps):
    """Return the exact mean and covariance of what an affine sampler draws.

    Args:
        advance: function of a `Step` for many states that returns the next ones.
    """
    n = prior.mean.numel()
    S = schedule.spaced_steps(steps)
    mean, covariance = torch.zeros(n, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    nothing, unit = torch.zeros(1 + n, n, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    # Frames: the mean, then unit changes of the state, then unit changes of the noise.
    z = torch.cat((nothing, unit)).reshape(-1, *prior.mean.shape)
    for k in range(steps):
        states = torch.cat((mean[None], mean + unit, mean.expand(n, n)))
        last = k + 1 == steps
        x = states.reshape(z.shape)
        eps, _ = prior.predict(x, S[k])
        x0 = samplers.predict_x0(x, eps, float(ABAR[S[k]]))
        fresh = torch.zeros_like(z) if last else z
        after = advance(make_step(x.shape, k=k, K=steps, last=last, x=x, x0=x0, eps=eps, z=fresh)).flatten(1)
        mean, of_state, of_noise = after[0], after[1 : 1 + n] - after[0], after[1 + n :] - after[0]
        covariance = of_state.T @ covariance @ of_state + of_noise.T @ of_noise
    return mean.reshape(prior.mean.shape), covariance


def by_rule(rule):
    return lambda step: rule(step.x, step.x0, step.eps, None, step.z, step.a, step.a_next)


def distance(a, b):
    return float((a - b).norm() / b.norm())


RULES = {"ddpm": samplers.ddpm, "ddim_0": samplers.ddim(0.0), "ddim_1": samplers.ddim(1.0)}


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
def test_unconditional_samples_have_the_priors_mean_and_covariance(rule):
    prior = smooth_prior(3, 4)
    errors = []
    for steps in (20, 125):
        mean, covariance = moments(prior, by_rule(rule), steps)
        errors.append((distance(mean, prior.mean), distance(covariance, prior.covariance)))
    assert errors[1][0] < 0.01 and errors[1][1] < 0.06, errors
    assert errors[1][1] < 0.5 * errors[0][1], errors


def test_the_rule_of_ddnm_keeps_the_mean_and_loses_variance():
    # A fixed share of its noise is fresh however short the step is, so it is no discretization of the reverse process.
    prior = smooth_prior(3, 4)
    mean, covariance = moments(prior, by_rule(samplers.ddnm()), 100)
    assert distance(mean, prior.mean) < 0.02
    assert 0.5 < float(covariance.trace() / prior.covariance.trace()) < 0.9


def test_drawn_samples_have_the_moments_of_the_rule():
    prior, n = smooth_prior(3, 4), 600
    drawn = samplers.sample(prior, n, steps=20, clip=False, seed=1).double()
    mean, covariance = moments(prior, by_rule(samplers.ddpm), 20)
    error = (drawn.mean(0) - mean).flatten() / (covariance.diagonal() / n).sqrt()
    assert float(error.abs().max()) < 4.5  # 36 values: 3e-4 to exceed by chance
    # Relative errors of a sample covariance: sqrt((tr C^2 + (tr C)^2) / n) / |C|.
    expected = math.sqrt((float(covariance.square().sum()) + float(covariance.trace()) ** 2) / n)
    assert float((torch.cov(drawn.flatten(1).T) - covariance).norm()) < 1.5 * expected


def some_measurement(operator, prior, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return operator.A(prior.mean + 0.5 * torch.randn(1, *prior.mean.shape, dtype=torch.float64, generator=generator))


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


# GDP


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


def measured_error(operator, frames, y):
    return float((operator.A(frames) - y).square().mean())


@pytest.mark.parametrize("name", ["sr_avg", "inpaint", "blur_sep"])
@pytest.mark.parametrize("host", ["gdp", "gdp_xt", "dps"])
def test_guidance_moves_samples_towards_the_posterior(name, host):
    # Theory promises no posterior for either. It does promise less error in the measurement with more guidance, and
    # the direction in which the posterior mean lies.
    operator, prior = EVERY[name](), smooth_prior(6, 6)
    prior.mean *= 0.3
    prior = GaussianPrior(prior.mean, 0.3 * prior.covariance)  # inside [-1, 1], where clipping does nothing
    factor = torch.linalg.cholesky(prior.covariance)
    generator = torch.Generator().manual_seed(5)
    truth = prior.mean + (torch.randn(1, 108, dtype=torch.float64, generator=generator) @ factor.T).reshape(1, 3, 6, 6)
    y = operator.A(truth).expand(16, -1, -1, -1)
    mean, _ = prior.posterior(dense(operator, (6, 6)), y[0], 1e-6)
    errors = []
    strengths = {"gdp": (0.0, 0.02, 0.2), "gdp_xt": (0.0, 0.02, 0.1), "dps": (0.0, 0.03, 0.3)}[host]
    for strength in strengths:
        if host == "dps":
            method = hosts.make("dps", zeta=strength)
        else:
            scale = strength * 2 * y[0].numel() / operator.rho
            method = hosts.make("gdp", scale=scale, rescale=False, form="xt" if host == "gdp_xt" else "x0")
        result = restore(prior, method, operator, y, steps=100)
        errors.append(measured_error(operator, result, y))
    assert errors[2] < 0.5 * errors[1] < 0.5 * errors[0] * 1.0001, errors
    direction = torch.nn.functional.cosine_similarity(
        (result.mean(0) - prior.mean).flatten(), (mean - prior.mean).flatten(), 0
    )
    assert float(direction) > 0.8


# Low light


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


def test_low_light_updates_are_gradients_taken_once():
    step, _ = light_step(T=2)
    operator = operators.make("lowlight")
    y = torch.randn(2, 3, 8, 8, dtype=torch.float64) * 0.3 - 0.6
    host = hosts.make("gdp", f_scope="frame", scale=100.0, rescale=False)
    state = host.start(y, operator, seed=1)
    f, m, x0 = (t.clone().requires_grad_() for t in (state.f, state.m, step.x0))
    per_frame = (f * (x0 + 1) / 2 + m - (y + 1) / 2).square().mean((1, 2, 3))
    df, dm, dx = torch.autograd.grad(per_frame.sum(), (f, m, x0))
    _, corrected = host.advance(step, y, operator, state)
    assert torch.allclose(state.f, f - df) and torch.allclose(state.m, m - dm)
    assert torch.allclose(corrected, step.x0 - 100 * dx, atol=1e-14)


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


# DPS


class Mixing(GaussianPrior):
    """A prior whose frames see each other, as with temporal attention."""

    def predict(self, x, step):
        return super().predict(x + 0.2 * x.roll(1, 0), step)


def dps_step(prior, y, held=None, seed=0):
    x = torch.randn(len(y), *prior.mean.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x.requires_grad_()
    eps, _ = prior.predict(x, 300)
    x0 = samplers.predict_x0(x, eps, float(ABAR[300])).clamp(-1, 1)
    changes = {} if held is None else {"held": held}
    return make_step(tuple(x.shape), x=x, x0=x0, eps=eps.detach(), **changes)


def test_dps_gradient_is_that_of_the_sum_of_norms():
    prior, operator = smooth_prior(4, 4), operators.make("sr_avg", scale=2)
    y = operator.A(torch.rand(3, 3, 4, 4, dtype=torch.float64))
    step = dps_step(prior, y)
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
    steps = [dps_step(prior, y) for _ in range(2)]
    assert torch.equal(gradient(steps[0], y, operator)[:2], gradient(steps[1], other, operator)[:2])
    steps = [dps_step(mixing, y) for _ in range(2)]
    assert not torch.allclose(gradient(steps[0], y, operator)[:2], gradient(steps[1], other, operator)[:2])


def test_dps_leaves_held_frames_out():
    operator = operators.make("inpaint", ratio=0.5)
    y = operator.A(torch.rand(3, 3, 4, 4, dtype=torch.float64))
    prior = smooth_prior(4, 4)
    held = torch.tensor([True, False, False])
    gradient = hosts.make("dps").gradient(dps_step(prior, y, held), y, operator)
    assert torch.equal(gradient[0], torch.zeros(3, 4, 4).double()) and (gradient[1:] != 0).any()
    all_held = dps_step(prior, y, torch.ones(3, dtype=torch.bool))
    assert not hosts.make("dps").gradient(all_held, y, operator).any()


def test_dps_with_an_exact_measurement_is_finite():
    operator, prior = operators.make("denoise"), smooth_prior(4, 4)
    step = dps_step(prior, torch.zeros(2, 3, 4, 4))
    x, _ = hosts.make("dps").advance(step, step.x0.detach(), operator, None)
    assert torch.isfinite(x).all()
    with pytest.raises(ValueError, match="gradients on"):
        hosts.make("dps").advance(make_step((2, 3, 4, 4)), step.x0.detach(), operator, None)


# Every host


@pytest.mark.parametrize("host", hosts.REGISTRY)
@pytest.mark.parametrize("stop_step", [0, 30, 999])
@pytest.mark.parametrize("travel", [(1, 1), (2, 2)])
def test_results_are_finite_wherever_sampling_stops(host, stop_step, travel):
    operator, prior = operators.make("blur_sep", kernel="gaussian:3,1"), smooth_prior(5, 6, dtype=torch.float32)
    arguments = {"noise_std": 0.05} if host == "ddnm+" else {}
    y = operator.A(torch.rand(2, 3, 5, 6))
    result = restore(prior, hosts.make(host, **arguments), operator, y, steps=10, stop_step=stop_step, travel=travel)
    assert result.shape == (2, 3, 5, 6) and result.dtype == torch.float32 and torch.isfinite(result).all()


@pytest.mark.parametrize("host", hosts.REGISTRY)
def test_the_last_state_is_the_corrected_prediction(host):
    operator = operators.make("sr_avg", scale=2)
    y = operator.A(torch.rand(2, 3, 4, 4, dtype=torch.float64))
    step = dps_step(smooth_prior(4, 4), y)
    step.is_last, step.a_next, step.z = True, 1.0, torch.zeros_like(step.z)
    x, x0 = hosts.make(host).advance(step, y, operator, None)
    assert torch.allclose(x, x0, atol=1e-14)


@pytest.mark.parametrize("host", ["ddnm", "ddnm+", "gdp", "dps"])
def test_descriptions_make_the_same_host(host):
    made = hosts.make(host, noise_std=0.1 if host == "ddnm+" else 0.0)
    description = made.describe()
    assert hosts.make(**description).describe() == description and description["name"] == host


def test_auto_chooses_by_operator_and_noise():
    def chosen(task, noise_std=0.0, **arguments):
        return hosts.make("auto", operator=operators.make(task, **arguments), noise_std=noise_std).name

    assert chosen("sr") == "ddnm" and chosen("sr", 0.1) == "ddnm+" and chosen("denoise", 0.1) == "ddnm+"
    assert chosen("lowlight") == "gdp" and chosen("lowlight", 0.1) == "gdp"
    with pytest.raises(ValueError, match="noise_std > 0"):
        chosen("denoise")


def test_a_composition_takes_the_smallest_scale():
    chain = EXACT["sr_inpaint"]()
    assert gdp.of_task(gdp.SCALES, chain, 0.0) == 2000


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: hosts.make("ddrm"), ValueError, "unknown host 'ddrm': expected auto or one of ddnm"),
        (lambda: hosts.make("auto"), ValueError, "chosen by the operator"),
        (lambda: hosts.make("ddnm", zeta=1), TypeError, "ddnm does not take zeta: it takes eta"),
        (lambda: hosts.make("ddnm", noise_std=0.1), ValueError, "use 'ddnm.'"),
        (lambda: hosts.make("ddnm+", noise_std=-1), ValueError, "noise_std must be"),
        (lambda: hosts.make("ddnm+", noise_mode="flat"), ValueError, "ddnm.noise_mode"),
        (lambda: hosts.make("ddnm", eta=2), ValueError, "eta must be"),
        (lambda: hosts.make("gdp", form="eps"), ValueError, "gdp.form"),
        (lambda: hosts.make("gdp", f_scope="video"), ValueError, "lowlight.f_scope"),
        (lambda: hosts.make("gdp", scale=-1), ValueError, "host.scale"),
        (lambda: hosts.make("dps", zeta=math.nan), ValueError, "dps.zeta"),
        *(
            (
                lambda name=name: hosts.make(name).start(torch.zeros(1, 3, 4, 4), operators.make("lowlight"), 0),
                ValueError,
                "use host 'gdp'",
            )
            for name in ("ddnm", "ddnm+", "dps")
        ),
    ],
)
def test_faults_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
