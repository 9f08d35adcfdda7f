"""Hosts on latent priors: in pixel space, through the decoder."""

from __future__ import annotations

import pytest
import torch
from saved_folders import latent_folder

from zsvr import hosts, operators, pipeline, planning, priors, samplers
from zsvr.degrading import degrade
from zsvr.hosts.dps import DPS
from zsvr.restoration import Restoration, Sampling, _Window
from zsvr.temporal.settings import Temporal


@pytest.fixture(scope="module")
def prior(tmp_path_factory):
    return priors.open(latent_folder(tmp_path_factory.mktemp("latents") / "sd"), prompt="a")


def restoration(prior, host, *, temporal="batch_consistent", frames=2, **arguments):
    operator = operators.make("sr_avg", scale=2)
    clean = torch.rand(frames, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    settings = Temporal.preset(temporal) if isinstance(temporal, str) else temporal
    sampling = Sampling(**{"steps": 6, "latent_every": 1, **arguments})
    return Restoration(degrade(clean, operator).y, operator, prior, hosts.make(host), settings, sampling)


@pytest.mark.parametrize("checkpoint", [True, False])
def test_dps_differentiates_through_the_decoder(prior, checkpoint):
    clip = restoration(prior, "dps")
    clip.host = hosts.make("dps", zeta=0.7, checkpoint=checkpoint)
    window = _Window(clip, range(2), None)
    x = torch.randn(2, 4, *clip.size, generator=torch.Generator().manual_seed(1))
    after, _, _ = window._step(x, 2, 0)

    x.requires_grad_()
    eps, _ = prior.predict(x, clip.steps[2])
    x0 = samplers.predict_x0(x, eps, clip.levels[2])
    seen = prior.decode(x0).clamp(-1, 1)
    norms = torch.linalg.vector_norm((clip.y - clip.operator.A(seen)).flatten(1), dim=1)
    (gradient,) = torch.autograd.grad(norms.sum(), x)
    z = window._noise("step", clip.steps[2])
    free = samplers.ddpm(x.detach(), x0.detach(), eps.detach(), None, z, clip.levels[2], clip.levels[3])
    torch.testing.assert_close(after, free - 0.7 * gradient, rtol=1e-4, atol=1e-5)
    assert float(gradient.abs().max()) > 1e-3


def test_dps_acts_at_every_nth_step_and_at_the_last(prior, monkeypatch):
    acted = []
    gradient = DPS.gradient
    monkeypatch.setattr(
        DPS, "gradient", staticmethod(lambda step, *rest: acted.append(step.k) or gradient(step, *rest))
    )
    restoration(prior, "dps", latent_every=2).run()
    assert acted == [0, 2, 4, 5]
    acted.clear()
    predict, differentiable = prior.predict, []
    monkeypatch.setattr(prior, "predict", lambda x, step: differentiable.append(x.requires_grad) or predict(x, step))
    restoration(prior, "dps", latent_host="none").run()
    assert acted == [] and differentiable == [False] * 6


def test_dps_comes_nearer_to_the_measurement(prior):
    def error(zeta):
        clip = restoration(prior, "dps", steps=20)
        clip.host = hosts.make("dps", zeta=zeta)
        last = []
        clip.run(lambda report: last.append(report.x0))
        seen = prior.decode(last[-1]).clamp(-1, 1)
        return float((clip.operator.A(seen) - clip.y).square().mean())

    with torch.no_grad():
        errors = [error(zeta) for zeta in (0.0, 3.0, 10.0, 30.0)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.7 * errors[0], errors


def test_one_frame_with_every_part_on_is_dps_alone(prior):
    whole = restoration(prior, "dps", temporal="paper", frames=1).run()
    torch.testing.assert_close(whole, restoration(prior, "dps", frames=1).run(), rtol=1e-4, atol=1e-5)


def test_the_decoder_counts_in_the_plan(prior):
    common = {"task": "sr_avg", "operator": {"scale": 2}, "mode": "synthetic", "steps": 2, "temporal": "none"}
    clean = torch.rand(6, 3, 16, 16)
    decoder = planning.decoder_bytes(prior, 1, (8, 8), torch.device("cpu"), gradient=False)
    network = planning.network_bytes(prior, 6, (8, 8), torch.device("cpu"), gradient=False)
    assert decoder > 3 * 4 * 16 * 16  # more than the picture itself
    needed = planning.needed_bytes(pipeline.open_job(clean, prior=prior, **common))[0]
    assert needed >= max(network, decoder * min(6, prior.vae_frames))
    with_gradient = [
        planning.needed_bytes(
            pipeline.open_job(clean, prior=prior, host="dps", host_options={"checkpoint": flag}, **common)
        )[0]
        for flag in (True, False)
    ]
    assert with_gradient[0] < with_gradient[1]
