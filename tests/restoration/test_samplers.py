"""The plain sampling loop: schedule, callbacks, noise, refusals."""

from __future__ import annotations

import math

import pytest
import torch
from gaussian_prior import distance, moments, smooth_prior

from zsvr import noise, samplers, schedule
from zsvr.priors.base import Prior


class Shrinking(Prior):
    """Says that everything is noise."""

    alphas_bar = schedule.alphas_bar(schedule.linear_betas())
    size = (8, 16)
    multiple = 8

    def __init__(self, factor=1, channels=3):
        self.factor, self.channels = factor, channels
        self.seen = []

    def predict(self, x, step):
        self.seen.append((step, tuple(x.shape)))
        return x, None

    def describe(self):
        return {}


class Silent(Shrinking):
    """Says that nothing is noise."""

    def predict(self, x, step):
        return torch.zeros_like(x), None


def test_the_schedule_is_followed_and_reported():
    prior, calls = Shrinking(), []
    result = samplers.sample(
        prior, 2, steps=10, stop_step=300, callback=lambda k, step, x, x0: calls.append((k, step, x, x0))
    )
    steps = [900, 800, 700, 600, 500, 400, 300]
    assert [step for step, _ in prior.seen] == steps and {shape for _, shape in prior.seen} == {(2, 3, 8, 16)}
    assert [(k, step) for k, step, _, _ in calls] == list(enumerate(steps))
    assert torch.equal(calls[-1][2], result) and torch.equal(calls[-1][3], result)  # the last step returns x0
    assert float(result.abs().max()) <= 1


def test_frames_have_their_own_noise_unless_they_share():
    prior = Shrinking()
    own = samplers.sample(prior, 3, steps=5, clip=False, rule=samplers.ddpm)
    again = samplers.sample(prior, 3, steps=5, clip=False, rule=samplers.ddpm)
    assert torch.equal(own, again) and not torch.equal(own[0], own[1])
    assert torch.equal(samplers.sample(prior, 1, steps=5, clip=False)[0], own[0])
    assert not torch.equal(samplers.sample(prior, 3, steps=5, clip=False, seed=1), own)
    shared = samplers.sample(prior, 3, steps=5, clip=False, noise=noise.NoiseOptions("share"))
    assert torch.equal(shared[0], shared[2])


def test_a_latent_is_smaller_and_never_clipped():
    prior = Shrinking(factor=8, channels=4)
    result = samplers.sample(prior, 1, size=(64, 128), steps=2)
    assert result.shape == (1, 4, 8, 16)
    still = [Silent(factor=8, channels=4), Silent()]
    latent, pixels = (samplers.sample(prior, 1, size=(64, 128), steps=2) for prior in still)
    assert float(latent.abs().max()) > 1 and float(pixels.abs().max()) == 1


def test_a_bar_is_shown_when_asked(capfd):
    pytest.importorskip("tqdm")
    samplers.sample(Shrinking(), 1, steps=3)
    assert capfd.readouterr().err == ""
    samplers.sample(Shrinking(), 1, steps=3, progress=True)
    assert "3/3" in capfd.readouterr().err


def test_faults_are_named():
    with pytest.raises(ValueError, match="multiples of 8"):
        samplers.sample(Shrinking(), 1, size=(12, 16))
    with pytest.raises(ValueError, match=r"within 1\.\.1000"):
        samplers.sample(Shrinking(), 1, steps=0)
    for rule in (samplers.ddim, samplers.ddnm):
        with pytest.raises(ValueError, match="eta"):
            rule(1.5)


def by_rule(rule):
    return lambda step: rule(step.x, step.x0, step.eps, None, step.z, step.a, step.a_next)


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
