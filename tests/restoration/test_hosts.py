"""What all hosts have in common, how one is chosen, and what guidance gives on a Gaussian prior."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian_prior import EVERY, EXACT, GaussianPrior, dense, differentiable_step, restore, smooth_prior

from zsvr import hosts, operators
from zsvr.hosts import gdp


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
    step = differentiable_step(smooth_prior(4, 4), y)
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


@pytest.mark.parametrize("host", ["ddnm", "ddnm+", "gdp", "dps"])
def test_every_host_has_the_posterior_mean_where_pixels_are_independent(host):
    # Then what is measured says nothing of the rest, and the approximations of gdp and dps have no effect on it.
    generator = torch.Generator().manual_seed(0)
    mean, change = (0.2 * torch.randn(3, 4, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    prior = GaussianPrior(mean, torch.tensor(0.04, dtype=torch.float64))
    operator = operators.make("inpaint", ratio=0.5)
    n = 256
    y = operator.A((mean + change)[None]).expand(n, -1, -1, -1)
    truth, _ = prior.posterior(dense(operator, (4, 4)), y[0], 1e-12)
    seen = operator.A(torch.ones(1, 3, 4, 4, dtype=torch.float64))[0] > 0.5
    samples = restore(prior, hosts.make(host), operator, y, steps=100)
    error, deviation = samples.mean(0) - truth, samples.std(0)
    z = error[~seen] / (deviation[~seen] / n**0.5)
    assert 0.5 < float(z.square().mean().sqrt()) < 1.5  # 24 values: chance gives 1 +- 0.14
    assert 0.14 < float(deviation[~seen].mean()) < 0.22  # 0.2, less what 100 steps lose
    prior_error = float(change[seen].square().mean().sqrt())
    if host == "dps":  # whose steps have a fixed length: it goes around the truth
        assert float(error[seen].square().mean().sqrt()) < 0.1 * prior_error
        assert 0 < float(deviation[seen].mean()) < 0.1
    else:
        assert float(error[seen].abs().max()) < 1e-6 and float(deviation[seen].max()) < 1e-6


@pytest.mark.parametrize("host", ["gdp", "dps"])
def test_the_measurements_error_falls_over_the_whole_run(host):
    prior = smooth_prior(6, 6)
    prior = GaussianPrior(0.3 * prior.mean, 0.3 * prior.covariance)
    factor = torch.linalg.cholesky(prior.covariance)
    drawn = torch.randn(1, 108, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    truth = prior.mean + (drawn @ factor.T).reshape(1, 3, 6, 6)
    total = torch.zeros(10, dtype=torch.float64)
    for name in ("sr_avg", "inpaint", "blur_sep"):
        operator, method, errors = EVERY[name](), hosts.make(host), []
        y = operator.A(truth).expand(4, -1, -1, -1)
        advance = method.advance
        method.advance = lambda step, *rest: (  # of the network's estimate, before it is corrected
            errors.append(measured_error(operator, step.x0.detach(), y)) or advance(step, *rest)  # noqa: B023
        )
        restore(prior, method, operator, y, steps=500)
        total += torch.tensor(errors).reshape(10, -1).mean(1)
    assert (total.diff() < 0).all() and total[-1] < 0.05 * total[0], total.tolist()
