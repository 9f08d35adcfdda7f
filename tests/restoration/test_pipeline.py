"""What `restore` and its plan refuse, record and leave alone."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib

import pytest
import torch
from restoration_models import SIZE, moving, tiny_prior

import zsvr
from zsvr import degrading, hosts, operators, pipeline, planning, priors, runs, video
from zsvr import flow as flows
from zsvr.degrading import degrade
from zsvr.hosts.dps import DPS
from zsvr.hosts.gdp import GDP
from zsvr.restoration import NotFiniteError, Restoration, Sampling
from zsvr.temporal.guidance import ConsistencyGuidance
from zsvr.temporal.settings import Temporal

COMMON = {"task": "sr_avg", "operator": {"scale": 2}, "mode": "synthetic", "steps": 2}


@pytest.fixture(scope="module")
def prior():
    return tiny_prior()


def restoration(prior, operator, host, temporal, steps=3, **extra):
    clean = moving(3)
    flow = flows.estimate(clean, flows.estimator("dis"), temporal.flow)
    return Restoration(
        degrade(clean, operator).y, operator, prior, hosts.make(host, operator=operator), temporal, Sampling(steps),
        flow=flow, **extra,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (torch.zeros(2, 3, SIZE, SIZE, dtype=torch.uint8), "floating"),
        (torch.rand(2, 3, SIZE, SIZE) * 255, "within"),
        (torch.full((2, 3, SIZE, SIZE), torch.nan), "within"),
        (torch.rand(0, 3, SIZE, SIZE), "frames must be"),
        (torch.rand(3, SIZE, SIZE), "frames must be"),
    ],
)
def test_frames_that_are_none_are_refused(prior, frames, message):
    with pytest.raises(ValueError, match=message):
        zsvr.restore(frames, prior=prior, **COMMON)


def test_start_and_stop_choose_frames_of_a_tensor(prior):
    job = pipeline.open_job(moving(5), prior=prior, start=1, stop=4, **COMMON)
    assert torch.equal(job.clean, moving(5)[1:4]) and job.restoration.frames == 3
    with pytest.raises(ValueError, match="no frames"):
        pipeline.open_job(moving(2), prior=prior, start=2, **COMMON)


def test_measurements_that_are_not_finite_are_refused(prior):
    y = torch.zeros(2, 3, SIZE, SIZE)
    y[1, 0, 3, 3] = torch.inf
    with pytest.raises(ValueError, match=r"frames \[1\]"):
        Restoration(y, operators.make("inpaint", ratio=0.5), prior, hosts.make("ddnm"), Temporal.preset("none"))


def test_infinity_does_not_pass_for_white(prior, monkeypatch):
    predict = prior.predict
    monkeypatch.setattr(prior, "predict", lambda x, step: (torch.full_like(x, torch.inf), predict(x, step)[1]))
    with pytest.raises(NotFiniteError, match="prior's prediction"):
        restoration(prior, operators.make("sr_avg", scale=2), "gdp", Temporal.preset("none")).run()


def test_more_steps_than_the_prior_has_are_refused(prior):
    with pytest.raises(ValueError, match=r"1\.\.1000"):
        restoration(prior, operators.make("sr_avg", scale=2), "ddnm", Temporal.preset("none"), 1001)


@pytest.mark.parametrize("target", ["x0", "x"])
def test_guidance_scaled_by_the_variance_is_told_it(prior, monkeypatch, target):
    seen = []
    name = "shift" if target == "x0" else "shift_through"
    original = getattr(ConsistencyGuidance, name)

    def spy(self, *arguments, **keywords):
        seen.append(keywords["variance"])
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(ConsistencyGuidance, name, spy)
    temporal = Temporal.preset("paper", {"guidance.target": target, "guidance.scale_by_variance": True})
    run = restoration(prior, operators.make("sr_avg", scale=2), "ddnm", temporal)
    run.run()
    expected = []
    for now, after in zip(run.levels, [*run.levels[1:], 1.0], strict=True):
        expected.append((1 - now / after) * (1 - after) / (1 - now))
    assert seen == pytest.approx(expected)


def test_low_light_keeps_no_graph_of_the_network(prior, monkeypatch):
    states = []
    advance = GDP.advance

    def spy(self, step, y, operator, state):
        result = advance(self, step, y, operator, state)
        states.append(state.f.requires_grad or state.m.requires_grad)
        return result

    monkeypatch.setattr(GDP, "advance", spy)
    temporal = Temporal.preset("paper", {"guidance.target": "x"})
    restoration(prior, operators.make("lowlight", gain=0.5), "gdp", temporal).run()
    assert states == [False] * 3


def test_the_semantic_level_needs_no_flow(prior):
    def encoder(u):
        return torch.nn.functional.avg_pool2d(u, 8).flatten(1)

    operator, clean = operators.make("sr_avg", scale=2), moving(3)
    results = []
    for gain in (0.0, 1.0):
        temporal = Temporal.preset("batch_consistent", {"guidance.gain": 0.0, "guidance.clip": "an encoder is given",
                                                        "guidance.sem_gain": gain,
                                                        "guidance.sem_every": 1})  # fmt: skip
        assert not temporal.needs_flow
        run = Restoration(degrade(clean, operator).y, operator, prior, hosts.make("gdp"), temporal, Sampling(3),
                          encoder=encoder)  # fmt: skip
        results.append(run.run())
    assert not torch.equal(*results)


def test_dps_runs_where_gradients_are_off(prior):
    temporal = Temporal.preset("none")
    first = restoration(prior, operators.make("sr_avg", scale=2), "dps", temporal).run()
    with torch.no_grad():
        second = restoration(prior, operators.make("sr_avg", scale=2), "dps", temporal).run()
    assert torch.equal(first, second)


def test_flow_estimated_again_goes_where_the_clip_is(prior):
    moved = []

    class Elsewhere:
        def __init__(self, flow):
            self.flow = flow

        def to(self, device):
            moved.append(torch.device(device))
            return self.flow

    temporal = Temporal.preset("paper", {"flow.refresh_every": 1})
    restoration(
        prior, operators.make("sr_avg", scale=2), "ddnm", temporal, 4,
        reestimate=lambda u: Elsewhere(flows.estimate(u, flows.estimator("zero"), temporal.flow)),
    ).run()  # fmt: skip
    assert moved == [torch.device("cpu")]  # step 2 of 0..3
    with pytest.raises(ValueError, match="refresh_every"):
        Temporal.preset("paper", {"flow.estimator": "given", "flow.source": "given", "flow.refresh_every": 2})


def test_the_exact_measurement_is_cut_like_its_video(prior, tmp_path):
    path = tmp_path / "small.mkv"
    made = degrade(moving(5), operators.make("sr_avg", scale=2), noise_std=0.1)
    degrading.save(path, made, rate=12)
    job = pipeline.open_job(path, prior=prior, steps=2, start=1, stop=4)
    assert torch.equal(job.restoration.y, made.y[1:4]) and len(job.clip.frames) == 3
    assert job.config["options"]["noise_std"] == 0.1
    with pytest.raises(ValueError, match="noise_std"):
        pipeline.open_job(path, prior=prior, noise_std=0.2)
    for prepare in ("square", "none"):
        assert torch.equal(pipeline.open_job(path, prior=prior, steps=2, prepare=prepare).restoration.y, made.y)
    video.write(path, moving(4)[..., ::2, ::2], lossless=True, rate=12, overwrite=True)
    with pytest.raises(ValueError, match="4 frames"):
        pipeline.open_job(path, prior=prior)


def test_the_config_tells_runs_apart(prior, tmp_path):
    path = tmp_path / "small.mkv"
    configs = []
    made = degrade(moving(2), operators.make("sr_avg", scale=2), noise_std=0.1)
    for change in (0, 1e-4):
        degrading.save(path, dataclasses.replace(made, y=made.y + change), rate=12, overwrite=True)
        if not change:
            pictures = path.read_bytes()
        path.write_bytes(pictures)  # the same pictures, other values beside them
        configs.append(pipeline.open_job(path, prior=prior, steps=2).config)
    assert configs[0]["inputs"]["input"] == configs[1]["inputs"]["input"]
    assert configs[0]["inputs"]["measurement"] != configs[1]["inputs"]["measurement"]

    flow = flows.estimate(moving(2), flows.estimator("zero"))
    other = flows.estimate(moving(2), flows.estimator("dis"))
    hashes = {pipeline.open_job(moving(2), prior=prior, flow=f, **COMMON).config["inputs"]["flow"] for f in
              (flow, other)}  # fmt: skip
    assert len(hashes) == 2

    given = Temporal.preset("paper", {"flow.estimator": "given", "flow.source": "given"})
    hashes = set()
    for motion in (0.0, 1.0):
        folder = tmp_path / f"flow{motion}"
        flows.write_flow(folder, torch.full((1, 2, SIZE, SIZE), motion), torch.full((1, 2, SIZE, SIZE), -motion))
        job = pipeline.open_job(moving(2), prior=prior, temporal=given, flow_path=folder, **COMMON)
        hashes.add(job.config["weights"]["flow"])
    assert len(hashes) == 2 and json.dumps(job.config)


def test_frames_are_prepared_for_the_prior_and_a_note_says_so(prior):
    wide = torch.rand(2, 3, 40, 60)
    job = pipeline.open_job(wide, prior=prior, **COMMON)
    assert torch.equal(job.clean, degrading.prepare(wide, "square", SIZE)) and job.clean.shape[2:] == (SIZE, SIZE)
    assert any("60x40" in note and f"{SIZE}x{SIZE}" in note for note in job.notes)
    real = pipeline.open_job(wide, prior=prior, task="sr_avg", operator={"scale": 4}, steps=2)
    assert real.restoration.y.shape == (2, 3, SIZE // 4, SIZE // 4) and real.restoration.canvas == (SIZE, SIZE)
    kept = pipeline.open_job(wide, prior=prior, prepare="none", **COMMON)
    assert kept.restoration.canvas == (40, 60) and not any("cropped" in note for note in kept.notes)
    assert not any("cropped" in note for note in pipeline.open_job(moving(2), prior=prior, **COMMON).notes)


RECORDED = [  # name of METHOD's table, arguments that set it, where the configuration says so, value
    ("sampler.K", {"steps": 7}, ("options", "sampler.steps"), 7),
    ("sampler.spacing", {"sampling": Sampling(5, "linspace")}, ("options", "sampler.spacing"), "linspace"),
    ("sampler.travel", {"sampling": Sampling(5, travel=(2, 2))}, ("options", "sampler.travel"), [2, 2]),
    ("sampler.eta", {"host_options": {"eta": 0.5}}, ("options", "host", "eta"), 0.5),
    ("host", {"host": "gdp"}, ("options", "host", "name"), "gdp"),
    ("host.scale", {"host": "gdp", "host_options": {"scale": 5.0}}, ("options", "host", "scale"), 5.0),
    *(
        ("host.clip_x0", {"host": host, "host_options": {"clip_x0": value}}, ("options", "host", "clip_x0"), value)
        for host, value in (("ddnm", True), ("gdp", False), ("dps", False))
    ),
    ("noise_std", {"noise_std": 0.2}, ("options", "noise_std"), 0.2),
    ("ddnm.noise_mode", {"noise_std": 0.2, "host_options": {"noise_mode": "isotropic"}},
     ("options", "host", "noise_mode"), "isotropic"),
    *(
        (name, {"host": "gdp", "host_options": {field: value}}, ("options", "host", field), value)
        for name, field, value in (
            ("gdp.rescale", "rescale", False), ("gdp.max_gain", "max_gain", None), ("lowlight.f_scope", "f_scope",
             "frame"), ("lowlight.m_scope", "m_scope", "clip"), ("lowlight.lr", "lr", 0.5),
        )
    ),
    ("dps.zeta", {"host": "dps", "host_options": {"zeta": 0.4}}, ("options", "host", "zeta"), 0.4),
    ("dps.checkpoint", {"host": "dps", "host_options": {"checkpoint": False}}, ("options", "host", "checkpoint"),
     False),
    *(
        (f"operator.{field}", {"task": "blur_fft", "operator": {"kernel": "gaussian:5,1", field: value}},
         ("operator", field), value)
        for field, value in (("svd_tol", 0.1), ("pinv", "cg"), ("cg_iters", 9), ("fft_pad", "reflect"))
    ),
    ("mode", {}, ("options", "mode"), "synthetic"),
    ("data.prepare", {"prepare": "none"}, ("options", "data.prepare"), "none"),
    ("latent.host", {"sampling": Sampling(5, latent_host="none")}, ("options", "latent.host"), "none"),
    ("latent.every", {"sampling": Sampling(5, latent_every=3)}, ("options", "latent.every"), 3),
    ("expected_count", {"expected_count": 5}, ("options", "expected_count"), 5),
    ("seed", {"seed": 4}, ("seed",), 4),
]  # fmt: skip


@pytest.mark.parametrize(("name", "arguments", "where", "value"), RECORDED, ids=[r[0] for r in RECORDED])
def test_options_are_settable_and_recorded(prior, name, arguments, where, value):
    common = {"task": "sr_avg", "operator": {"scale": 2}, "mode": "synthetic"}
    others = {key: arguments[key] for key in ("host", "noise_std", "task") if key in arguments and key != name}
    others |= {"operator": {"kernel": "gaussian:5,1"}} if "task" in arguments else {}
    configs = [pipeline.open_job(moving(1), prior=prior, **(common | a)).config for a in (arguments, others)]
    found, default = (functools.reduce(lambda part, key: part[key], where, config) for config in configs)
    assert found == value and (default != value or name == "mode")


def test_an_expected_count_that_is_not_met_is_an_error(prior):
    job = pipeline.open_job(moving(2), prior=prior, expected_count=5, **COMMON)
    with pytest.raises(RuntimeError, match="expected 5"):
        job.start()
    some = Temporal.preset("paper", {"attention.layers": ["up_blocks*"]})
    with pytest.raises(RuntimeError, match="expected 7"):
        pipeline.open_job(moving(2), prior=prior, temporal=some, expected_count=7, **COMMON).start()


def test_the_config_names_the_device(prior, monkeypatch):
    found = pipeline.open_job(moving(1), prior=prior, **COMMON).config["device"]
    assert found == {"type": "cpu", "name": torch.backends.cpu.get_cpu_capability(), "threads": torch.get_num_threads()}
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda place: f"a GPU, {place}")
    assert runs.device(torch.device("cuda:1")) == {"type": "cuda", "name": "a GPU, cuda:1"}


def test_the_noise_of_a_frame_does_not_depend_on_where_restoring_starts(prior):
    common = {"prior": prior, "temporal": "none", **COMMON}
    whole = zsvr.restore(moving(4), **common)
    part = zsvr.restore(moving(4), start=2, stop=4, **common)
    torch.testing.assert_close(part.frames, whole.frames[2:], rtol=0, atol=1e-4)
    other = zsvr.restore(moving(4)[2:4], **common)
    assert float((other.frames - whole.frames[2:]).abs().max()) > 0.01


def test_the_estimator_is_opened_once(prior, monkeypatch):
    opened = []
    real = flows.estimator
    monkeypatch.setattr(flows, "estimator", lambda *a, **k: opened.append(a) or real(*a, **k))
    temporal = Temporal.preset("paper", {"flow.refresh_every": 1})
    zsvr.restore(moving(2), prior=prior, temporal=temporal, **(COMMON | {"steps": 5}))
    assert len(opened) == 1
    zsvr.restore(moving(2), prior=prior, temporal="none", **COMMON)
    assert len(opened) == 1


@pytest.mark.parametrize(
    ("frames", "changes"),
    [
        (torch.rand(2, 3, SIZE - 2, SIZE), {"prepare": "none"}),
        (moving(2), {"steps": 0}),
        (moving(2), {"sampling": Sampling(5, travel=(0, 2))}),
        (moving(2), {"task": "lowlight", "operator": {"gain": 0.5}, "host": "ddnm"}),
    ],
)
def test_what_does_not_fit_leaves_no_folder(prior, tmp_path, frames, changes):
    common = {"task": "sr_avg", "operator": {"scale": 2}, "mode": "synthetic"}
    with pytest.raises(ValueError):
        pipeline.open_job(frames, prior=prior, run=tmp_path / "run", **(common | changes))
    assert not list(tmp_path.iterdir())


def test_a_prior_that_is_open_stays_where_it_is(prior, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert pipeline.choose_device(prior, None) == torch.device("cpu")
    assert pipeline.choose_device("model.pt", None) == torch.device("cuda")
    with pytest.raises(ValueError, match="move it"):
        pipeline.choose_device(prior, "cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no GPU"):
        pipeline.choose_device("model.pt", "cuda")
    with pytest.raises(ValueError, match="open already"):
        pipeline.open_job(moving(2), prior=prior, prior_options={"qkv_order": "new"}, **COMMON)


def test_a_task_and_its_operator_may_both_be_named(prior):
    operator = operators.make("sr", scale=2)
    assert pipeline.open_job(moving(1), prior=prior, task="sr", operator=operator, mode="synthetic").config
    with pytest.raises(ValueError, match="different things"):
        pipeline.open_job(moving(1), prior=prior, task="colorize", operator=operator, mode="synthetic")


def test_recomputed_activations_need_less_than_kept_ones(prior):
    jobs = [
        pipeline.open_job(moving(2), prior=prior, host="dps", host_options={"checkpoint": checkpoint}, **COMMON)
        for checkpoint in (True, False)
    ]
    assert isinstance(jobs[0].restoration.host, DPS)
    recomputed, kept = (planning.needed_bytes(job)[0] for job in jobs)
    assert recomputed < kept, (recomputed, kept)
    assert not prior.model.is_gradient_checkpointing


def test_free_memory_counts_what_caches_hold():
    facts = pathlib.Path("/proc/meminfo")
    if not facts.is_file():
        pytest.skip("this system has no /proc/meminfo")
    lines = dict(line.split(":") for line in facts.read_text().splitlines())
    available = int(lines["MemAvailable"].split()[0]) * 1024
    assert planning.free_bytes(torch.device("cpu")) == pytest.approx(available, rel=0.3)


def test_the_memory_of_a_call_is_that_of_its_activations():
    class Linear(priors.Prior):
        model = torch.nn.Linear(1000, 1000)  # 4 MB, which its call views as its transpose

        def predict(self, x, step):
            y = x + 1
            return self.model(y), None

        def describe(self):
            return {}

    Linear.model.requires_grad_(False)
    found = planning.network_bytes(Linear(), 5, (10, 1000), torch.device("cpu"), gradient=False)
    assert found == 5 * 3 * 120_000  # x, y and the result: [1, 3, 10, 1000] in float32


def test_a_measurement_is_not_taken_for_that_of_another_video(prior, tmp_path):
    path = tmp_path / "small.mkv"
    made = degrade(moving(3), operators.make("sr_avg", scale=2), noise_std=0.1)
    degrading.save(path, made, rate=12)
    assert pipeline.open_job(path, prior=prior, steps=2)
    video.write(path, 0.95 * made.picture, lossless=True, rate=12, overwrite=True)
    with pytest.raises(ValueError, match="other pictures"):
        pipeline.open_job(path, prior=prior, steps=2)
    assert pipeline.open_job(path, prior=prior, steps=2, task="sr_avg", operator={"scale": 2}, noise_std=0.1)
