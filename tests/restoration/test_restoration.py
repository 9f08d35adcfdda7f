"""The whole loop with tiny networks of random weights: invariants, all tasks, faults."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from restoration_models import SIZE, moving, tiny_prior

import zsvr
from zsvr import flow as flows
from zsvr import hosts, operators
from zsvr.degrading import degrade
from zsvr.operators.base import to_model
from zsvr.restoration import NotFiniteError, Restoration, Sampling
from zsvr.temporal.settings import Temporal


@pytest.fixture(scope="module")
def prior():
    return tiny_prior()


def restoration(prior, clean, operator, host="auto", temporal="paper", steps=5, noise_std=0.0, seed=3, **extra):
    measured = degrade(clean, operator, noise_std=noise_std, seed=seed)
    settings = Temporal.preset(temporal) if isinstance(temporal, str) else temporal
    flow = None
    if settings.needs_flow and len(clean) > 1:
        flow = flows.estimate(clean, flows.estimator("dis"), settings.flow)
    method = hosts.make(host, operator=operator, noise_std=noise_std)
    sampling = extra.pop("sampling", None) or Sampling(steps)
    return Restoration(measured.y, operator, prior, method, settings, sampling, flow=flow, seed=seed, **extra)


TASKS = {
    "denoise": (operators.make("denoise"), "auto", 0.1),
    "sr": (operators.make("sr", scale=4), "auto", 0.0),
    "sr_avg": (operators.make("sr_avg", scale=2), "auto", 0.02),
    "deblur": (operators.make("deblur", kernel="uniform"), "auto", 0.0),
    "inpaint": (operators.make("inpaint", ratio=0.5), "gdp", 0.0),
    "colorize": (operators.make("colorize"), "dps", 0.0),
    "lowlight": (operators.make("lowlight", gain=0.2), "auto", 0.0),
}


@pytest.mark.parametrize("task", TASKS)
def test_every_task_runs_with_every_temporal_part(prior, task):
    operator, host, noise_std = TASKS[task]
    run = restoration(prior, moving(3), operator, host, "paper", 3, noise_std)
    out = run.run()
    assert out.shape == (3, 3, SIZE, SIZE) and out.min() >= 0 and out.max() <= 1 and torch.isfinite(out).all()
    assert len(run.patch.patched) > 2
    assert task == "lowlight" or out.std() > 0.01  # three steps of a random network leave it black


@pytest.mark.parametrize("combine", ["serial", "parallel", "joint", "cross"])
@pytest.mark.parametrize("host", ["ddnm", "gdp", "dps"])
def test_one_frame_with_every_part_on_is_the_host_alone(prior, host, combine):
    clean, operator = moving(1), operators.make("sr_avg", scale=4)
    whole = restoration(prior, clean, operator, host, Temporal.preset("paper", {"attention.combine": combine}), 4).run()
    alone = restoration(prior, clean, operator, host, "none", 4).run()
    # "none" draws frame 0's own noise, "paper" the shared one: share it, and leave everything else off.
    shared = restoration(prior, clean, operator, host, "batch_consistent", 4).run()
    torch.testing.assert_close(whole, shared, rtol=1e-4, atol=1e-5)
    assert not torch.equal(alone, shared)


@pytest.mark.parametrize("combine", ["serial", "parallel", "joint", "cross", "trajectory"])
def test_identical_frames_stay_identical(prior, combine):
    clean, operator = moving(1).expand(4, -1, -1, -1), operators.make("sr_avg", scale=4)
    temporal = Temporal.preset("paper", {"attention.combine": combine, "flow.estimator": "zero"})
    measured = degrade(clean, operator)
    flow = flows.estimate(clean, flows.estimator("zero"), temporal.flow)
    host = hosts.make("ddnm")
    out = Restoration(measured.y, operator, prior, host, temporal, Sampling(5), flow=flow).run()
    torch.testing.assert_close(out, out[:1].expand_as(out), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["sr", "sr_avg", "inpaint", "colorize"])
def test_ddnm_fulfils_the_measurement(prior, name):
    operator = TASKS[name][0]
    clean = moving(3)
    run = restoration(prior, clean, operator, "ddnm", "paper", 6)
    kept = []
    run.run(lambda report: kept.append(report.x0))
    torch.testing.assert_close(operator.A(kept[-1]), run.y, rtol=0, atol=1e-4)


def test_same_seed_same_bytes_and_other_seed_other_bytes(prior):
    operator = operators.make("sr_avg", scale=4)
    first, second = (restoration(prior, moving(3), operator, steps=4).run() for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, restoration(prior, moving(3), operator, steps=4, seed=4).run())


def test_the_parts_change_the_result(prior):
    operator, clean = operators.make("sr_avg", scale=4), moving(3)
    results = {
        name: restoration(prior, clean, operator, "ddnm", temporal, 4).run()
        for name, temporal in {
            "none": "none",
            "noise": "batch_consistent",
            "attention": Temporal.preset("batch_consistent", {"attention": True}),
            "guidance": Temporal.preset("batch_consistent", {"guidance": True}),
            "paper": "paper",
            "best": "best",
            "early": Temporal.preset("paper", {"sampler.stop_step": 300}),
            "refreshed": Temporal.preset("paper", {"flow.refresh_every": 1}),
        }.items()
        if name != "refreshed"
    }
    for a in results:
        for b in results:
            assert a == b or not torch.equal(results[a], results[b]), (a, b)


def test_flow_that_is_estimated_again_is_used(prior):
    operator, clean = operators.make("sr_avg", scale=4), moving(3)
    temporal = Temporal.preset("paper", {"flow.refresh_every": 1})
    seen = []

    def reestimate(u):
        seen.append(u.shape)
        return flows.estimate(u, flows.estimator("zero"), temporal.flow)

    changed = restoration(prior, clean, operator, "ddnm", temporal, 6, reestimate=reestimate).run()
    assert len(seen) == 2  # steps 3 and 4 of 0..5: the second half, but for the last
    assert not torch.equal(changed, restoration(prior, clean, operator, "ddnm", "paper", 6).run())


def test_nothing_crosses_a_cut(prior):
    operator = operators.make("sr_avg", scale=4)
    one, other = moving(3), 1 - moving(3).flip(-1).flip(1)
    run = restoration(prior, torch.cat((one, other)), operator, "ddnm", "paper", 4)
    run.flow = flows.fields.cut(run.flow, torch.tensor([False, False, True, False, False]))
    assert run.shots == [range(0, 3), range(3, 6)]
    spoilt = torch.cat((one, torch.rand(other.shape, generator=torch.Generator().manual_seed(9))))
    second = restoration(prior, spoilt, operator, "ddnm", "paper", 4)
    second.flow = flows.Flow(**{
        name: torch.cat((x[:3], y[3:])) for (name, x), y in
        zip(run.flow.tensors().items(), second.flow.tensors().values(), strict=True)
    })  # fmt: skip
    assert torch.equal(run.run()[:3], second.run()[:3])


def test_time_travel_and_callbacks(prior):
    operator = operators.make("sr_avg", scale=4)
    reports = []
    run = restoration(prior, moving(2), operator, "ddnm", "paper", sampling=Sampling(6, travel=(2, 2)))
    run.run(reports.append)
    assert len(reports) == len(run.operations) > 6 and reports[-1].done == reports[-1].total == len(reports)


def test_a_prior_that_gives_nan_is_an_error_that_says_where(prior, monkeypatch):
    run = restoration(prior, moving(2), operators.make("sr_avg", scale=4), "ddnm", "paper", 4)
    predict = prior.predict

    def broken(x, step):
        eps, frac = predict(x, step)
        return (torch.full_like(eps, math.nan) if step < 600 else eps), frac

    monkeypatch.setattr(prior, "predict", broken)
    with pytest.raises(NotFiniteError, match="training step 500"):
        run.run()


def test_parts_that_do_not_fit_are_named(prior):
    operator = operators.make("sr_avg", scale=4)
    host = hosts.make("ddnm")
    with pytest.raises(ValueError, match="follow optical flow"):
        Restoration(torch.zeros(3, 3, 8, 8), operator, prior, host)
    with pytest.raises(ValueError, match="multiples of 4"):
        Restoration(to_model(torch.rand(1, 3, 30, 30)), operators.make("denoise"), prior, host)
    with pytest.raises(ValueError, match="measures"):
        Restoration(torch.zeros(1, 1, 8, 8), operator, prior, host, Temporal.preset("none"))
    with pytest.raises(ValueError, match=r"latent\.host"):
        Sampling(latent_host="magic")


def test_blended_estimates_are_functions_of_the_state(prior):
    operator, clean = operators.make("sr_avg", scale=4), moving(3)
    blended = Temporal.preset("paper", {"guidance.x0_blend": 0.5})
    assert not torch.equal(
        restoration(prior, clean, operator, "ddnm", blended, 4).run(),
        restoration(prior, clean, operator, "ddnm", "paper", 4).run(),
    )
    through = Temporal.preset("paper", {"guidance.target": "x"})
    for host, temporal in (("dps", Temporal.preset("paper")), ("ddnm", through)):
        assert not torch.equal(
            restoration(prior, clean, operator, host, temporal.with_({"guidance.x0_blend": 0.5}), 4).run(),
            restoration(prior, clean, operator, host, temporal, 4).run(),
        )


def test_a_choice_of_layers_is_no_wrong_count(prior, monkeypatch):
    monkeypatch.setattr(prior, "expected_count", 7)
    some = Temporal.preset("paper", {"attention.layers": ["up_blocks*"]})
    run = restoration(prior, moving(2), operators.make("sr_avg", scale=4), "ddnm", some, 2)
    run.run()
    assert 0 < len(run.patch.patched) < 7
    monkeypatch.setattr(prior, "expected_count", 16)
    with pytest.raises(RuntimeError, match="expected 16"):
        restoration(prior, moving(2), operators.make("sr_avg", scale=4), "ddnm", "paper", 2).run()


def test_errors_fall_on_average(prior):
    operator, clean = operators.make("sr_avg", scale=4), moving(2)
    for host in ("gdp", "dps"):
        run = restoration(prior, clean, operator, host, "none", 20)
        errors = []
        run.run(lambda report: errors.append(float((operator.A(report.x0) - run.y).square().mean())))  # noqa: B023
        quarters = [sum(errors[i : i + 5]) / 5 for i in range(0, 20, 5)]
        assert quarters[-1] < quarters[0], (host, quarters)


def test_the_public_function(prior, tmp_path):
    out = zsvr.restore(moving(3), prior=prior, task="sr_avg", operator={"scale": 2}, mode="synthetic", steps=3,
                       run=tmp_path / "run", device="cpu")  # fmt: skip
    assert out.frames.shape == (3, 3, SIZE, SIZE) and out.clean is not None and "patched" in out.patch
    assert (tmp_path / "run" / "config.json").is_file() and len(list((tmp_path / "run" / "frames").iterdir())) == 3
    again = zsvr.restore(moving(3), prior=prior, task="sr_avg", operator={"scale": 2}, mode="synthetic", steps=3,
                         run=tmp_path / "run", device="cpu")  # fmt: skip
    assert torch.equal(out.frames, again.frames)
    with pytest.raises(FileExistsError, match="another run"):
        zsvr.restore(moving(3), prior=prior, task="sr_avg", operator={"scale": 2}, mode="synthetic", steps=4,
                     run=tmp_path / "run", device="cpu")  # fmt: skip


def test_flow_from_files_and_clip_from_a_folder(prior, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8,
        projection_dim=12,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.CLIPVisionModelWithProjection(config).save_pretrained(tmp_path / "clip")
    flow = torch.zeros(2, 2, SIZE, SIZE)
    flow[:, 0] = -2.0
    flows.write_flow(tmp_path / "flow", flow, -flow)
    common = {"prior": prior, "task": "sr_avg", "operator": {"scale": 2}, "mode": "synthetic", "device": "cpu"}
    given = {"flow.estimator": "given", "flow.source": "given"}
    results = [
        zsvr.restore(
            moving(3), temporal=Temporal.preset("paper", changes), steps=4, flow_path=tmp_path / "flow", **common
        )
        for changes in (given, {**given, "guidance.clip": str(tmp_path / "clip"), "guidance.sem_every": 1})
    ]
    assert not torch.equal(results[0].frames, results[1].frames)
    assert not any("cut" in note for note in results[0].notes)
    with pytest.raises((ValueError, FileNotFoundError), match="path"):
        zsvr.restore(moving(3), temporal=Temporal.preset("paper", given), steps=2, **common)
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        zsvr.restore(moving(2), temporal=Temporal.preset("paper", {"guidance.clip": str(tmp_path / "no")}), steps=2,
                     **common)  # fmt: skip


def test_a_compiled_network_gives_the_same(monkeypatch):
    # Everything but the code generator, which takes minutes.
    monkeypatch.setattr(
        torch.nn.Module, "compile", functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    )
    common = {"task": "sr_avg", "operator": {"scale": 2}, "mode": "synthetic", "device": "cpu", "steps": 2}
    plain = zsvr.restore(moving(2), prior=tiny_prior(), **common)
    compiled = zsvr.restore(moving(2), prior=tiny_prior(), compile=True, **common)
    torch.testing.assert_close(plain.frames, compiled.frames, rtol=1e-3, atol=1e-4)
