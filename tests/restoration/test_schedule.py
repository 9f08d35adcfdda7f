"""Schedules, spacings, time travel and windows against published formulas, diffusers, and their own invariants."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from zsvr import schedule
from zsvr.schedule import coefficients, plan_operations, plan_windows, spaced_steps

N = 1000


def test_the_linear_schedule_has_its_published_values():
    betas = schedule.linear_betas()
    assert len(betas) == N and float(betas[0]) == 1e-4 and float(betas[-1]) == pytest.approx(0.02, abs=1e-15)
    a = schedule.alphas_bar(betas)
    assert a.dtype == torch.float64
    assert float(a[-1]) == pytest.approx(4.0358e-5, rel=1e-4)  # Ho et al.: x_T is nearly pure noise
    exact = 1.0
    for n in range(N):
        exact *= 1 - (1e-4 + (0.02 - 1e-4) * n / (N - 1))
        assert float(a[n]) == pytest.approx(exact, rel=1e-12)


def test_the_cosine_schedule_follows_its_formula():
    a = schedule.alphas_bar(schedule.cosine_betas())

    def f(t):
        return math.cos((t / N + 0.008) / 1.008 * math.pi / 2) ** 2

    for n in (0, 10, 500, 990):
        assert float(a[n]) == pytest.approx(f(n + 1) / f(0), rel=1e-9)
    assert float(schedule.cosine_betas().max()) == 0.999


CONFIGS = [
    {},
    {"beta_schedule": "linear", "beta_start": 2e-4, "beta_end": 0.01, "num_train_timesteps": 500},
    {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "sigmoid"},
    {"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3},
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_configurations_mean_what_they_mean_in_diffusers(config, zero_snr):
    diffusers = pytest.importorskip("diffusers")
    config = {**config, "rescale_betas_zero_snr": zero_snr}
    expected = diffusers.DDPMScheduler.from_config(config).alphas_cumprod.double()
    got = schedule.alphas_bar_from_config(config)
    assert got.shape == expected.shape
    assert torch.allclose(got[:-1], expected[:-1], rtol=2e-4, atol=1e-7)  # theirs are float32
    assert zero_snr or float(got[-1]) == pytest.approx(float(expected[-1]), rel=1e-3, abs=1e-7)
    if zero_snr:
        assert float(got[-1]) == 2**-24 and abs(float(expected[-1])) < 1e-6


def test_spacings_have_the_published_steps():
    assert spaced_steps(100)[:3] == [990, 980, 970] and spaced_steps(100)[-1] == 0
    assert spaced_steps(20, spacing="trailing")[:2] == [999, 949]
    assert spaced_steps(50, spacing="linspace")[0] == 999 and spaced_steps(50, spacing="linspace")[-1] == 0
    for spacing in schedule.SPACINGS:
        assert spaced_steps(N, spacing=spacing) == list(range(N - 1, -1, -1))
    assert spaced_steps(1) == [0] and spaced_steps(1, spacing="trailing") == [999]


@pytest.mark.parametrize("K", [7, 10, 25, 50, 100, 250])
def test_spacings_equal_those_of_diffusers(K):
    diffusers = pytest.importorskip("diffusers")
    for spacing in schedule.SPACINGS:
        scheduler = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=0)
        scheduler.set_timesteps(K)
        theirs, ours = scheduler.timesteps.tolist(), spaced_steps(K, spacing=spacing)
        # They round halves to even, we round them up.
        assert max(abs(a - b) for a, b in zip(theirs, ours, strict=True)) <= (spacing != "leading")
        assert N % K or spacing == "linspace" or theirs == ours


@given(K=st.integers(1, 60), extra=st.integers(0, 300), spacing=st.sampled_from(schedule.SPACINGS))
@settings(deadline=None, max_examples=200)
def test_steps_decrease_within_range(K, extra, spacing):
    total = K + extra
    steps = spaced_steps(K, total, spacing)
    assert len(steps) == K and min(steps) >= 0 and max(steps) < total
    assert all(a > b for a, b in itertools.pairwise(steps))
    for stop in range(0, total, 7):
        ks = schedule.last_index(steps, stop)
        assert ks == K - 1 or (steps[ks] <= stop and all(step > stop for step in steps[:ks]))


def test_early_stopping_ends_with_the_first_step_at_or_below():
    steps = spaced_steps(100)
    assert schedule.last_index(steps) == 99 and schedule.last_index(steps, 9) == 99
    assert schedule.last_index(steps, 10) == 98 and schedule.last_index(steps, 25) == 97
    assert schedule.last_index(spaced_steps(10, spacing="trailing"), 0) == 9  # ends at 99: never below


def plain(operations):
    return [(op.back, op.k) for op in operations]


@pytest.mark.parametrize("length", [1, 3, 10])
def test_a_single_repeat_is_no_time_travel(length):
    assert plain(plan_operations(10, 7, length, 1)) == [(False, k) for k in range(8)]
    assert plain(plan_operations(10, 7)) == [(False, k) for k in range(8)]


def test_time_travel_of_a_small_schedule_by_hand():
    # K = 5, jumps of 2, everything twice: (4 - k) % 2 == 0 at k = 2 and 4.
    step, back = False, True
    assert plain(plan_operations(5, 4, 2, 2)) == [
        (step, 0), (step, 1), (back, 0), (step, 0), (step, 1),
        (step, 2), (step, 3), (back, 2), (step, 2), (step, 3), (step, 4),
    ]  # fmt: skip


@given(K=st.integers(1, 40), share=st.floats(0, 1), length=st.integers(1, 12), repeat=st.integers(1, 4))
@settings(deadline=None, max_examples=200)
def test_time_travel_is_consistent(K, share, length, repeat):
    ks = int(share * (K - 1))
    operations = plan_operations(K, ks, length, repeat)
    at = 0
    visits: dict[tuple[bool, int], int] = {}
    for op in operations:
        assert op.visit == visits.get((op.back, op.k), 0)
        visits[op.back, op.k] = op.visit + 1
        if op.back:
            assert op.k == at - length and op.visit < repeat - 1
            at = op.k
        else:
            assert op.k == at
            at += 1
    assert at == ks + 1
    assert set(visits) >= {(False, k) for k in range(ks + 1)}
    runs = [visits[False, k] for k in range(ks + 1)]
    assert max(runs) <= repeat and sum(op.back for op in operations) * length == sum(runs) - (ks + 1)


@given(T=st.integers(1, 120), window=st.integers(1, 20), carry=st.integers(0, 4), lookahead=st.integers(0, 3))
@settings(deadline=None, max_examples=300)
def test_windows_cover_the_clip_once(T, window, carry, lookahead):
    if window <= carry + lookahead:
        with pytest.raises(ValueError, match="window"):
            plan_windows(T, window, carry, lookahead)
        return
    windows = plan_windows(T, window, carry, lookahead)
    assert [f for w in windows for f in w.new] == list(range(T))
    for n, w in enumerate(windows):
        assert w.ids == list(range(w.ids[0], w.ids[-1] + 1))
        assert len(w.frozen) == min(carry, w.new[0]) and len(w.ahead) == min(lookahead, T - w.new[-1] - 1)
        assert len(w.ids) <= max(window, window + 2 - lookahead)
        assert len(w.new) >= min(T, schedule.SHORTEST_TAIL) or n < len(windows) - 1


def test_a_clip_within_the_window_is_one():
    for T in range(1, 17):
        (only,) = plan_windows(T)
        assert only.ids == list(range(T)) and not only.frozen and not only.ahead
    assert [(len(w.frozen), len(w.new), len(w.ahead)) for w in plan_windows(40)] == [
        (0, 15, 1), (2, 13, 1), (2, 12, 0)
    ]  # fmt: skip


@given(a=st.floats(1e-6, 0.9), share=st.floats(1e-3, 1))
@settings(deadline=None, max_examples=200)
def test_coefficients_are_those_of_the_gaussian_posterior(a, share):
    # q(x' | x, x0): x' ~ N(sqrt(a') x0, 1 - a'), x | x' ~ N(sqrt(alpha) x', beta): multiply the two Gaussians.
    a_next = a + (1 - a) * share * 0.999
    alpha = a / a_next
    c = coefficients(a, a_next)
    precision = 1 / (1 - a_next) + alpha / (1 - alpha)
    assert c.var_small == pytest.approx(1 / precision, rel=1e-6)
    assert c.c1 == pytest.approx(math.sqrt(a_next) / (1 - a_next) / precision, rel=1e-6)
    assert c.c2 == pytest.approx(math.sqrt(alpha) / (1 - alpha) / precision, rel=1e-6)


def test_the_last_step_returns_x0():
    c = coefficients(0.7, 1.0)
    assert (c.c1, c.c2, c.var_small) == (pytest.approx(1, abs=1e-15), 0, 0)
    assert c.variance(torch.rand(2)) == 0


def test_learned_variance_runs_between_its_bounds():
    c = coefficients(0.3, 0.5)
    ends = c.variance(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert ends.tolist() == [pytest.approx(c.var_small), pytest.approx(c.beta)]
    middle = float(c.variance(torch.tensor(0.5, dtype=torch.float64)))
    assert middle == pytest.approx(math.sqrt(c.var_small * c.beta))
    assert c.variance() == c.var_small


def test_ddpm_equals_diffusers_with_a_learned_variance():
    diffusers = pytest.importorskip("diffusers")
    from zsvr import samplers

    scheduler = diffusers.DDPMScheduler(
        variance_type="learned_range", clip_sample=False, timestep_spacing="leading", steps_offset=0
    )
    scheduler.set_timesteps(50)
    steps, a = spaced_steps(50), schedule.alphas_bar_from_config(scheduler.config)
    generator = torch.Generator().manual_seed(0)
    x, eps, v = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(3))
    v = v.clamp(-1, 1)
    for k in (0, 20, 48):
        there = scheduler.step(torch.cat((eps, v), 1), steps[k], x, generator=torch.Generator().manual_seed(5))
        z = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
        levels = float(a[steps[k]]), float(a[steps[k + 1]])
        x0 = samplers.predict_x0(x, eps, levels[0])
        here = samplers.ddpm(x, x0, eps, (v + 1) / 2, z, *levels)
        assert torch.allclose(x0, there.pred_original_sample, rtol=1e-4, atol=1e-4)
        assert torch.allclose(here, there.prev_sample, rtol=1e-3, atol=1e-4), k


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_equals_diffusers(eta):
    diffusers = pytest.importorskip("diffusers")
    from zsvr import samplers

    scheduler = diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=True)
    scheduler.set_timesteps(50)
    steps, a = spaced_steps(50), schedule.alphas_bar_from_config(scheduler.config)
    generator = torch.Generator().manual_seed(0)
    x, eps, z = (torch.randn(2, 3, 4, 4, generator=generator) for _ in range(3))
    for k in (0, 25, 49):
        levels = float(a[steps[k]]), float(a[steps[k + 1]]) if k < 49 else 1.0
        there = scheduler.step(eps, steps[k], x, eta=eta, variance_noise=z)
        here = samplers.ddim(eta)(x, samplers.predict_x0(x, eps, levels[0]), eps, None, z, *levels)
        assert torch.allclose(here, there.prev_sample, rtol=1e-4, atol=1e-4), k


def test_rules_agree_where_they_must():
    from zsvr import samplers

    generator = torch.Generator().manual_seed(1)
    x0, eps, z = (torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=generator) for _ in range(3))
    a, a_next = 0.3, 0.6
    x = samplers.add_noise(x0, eps, a)
    assert torch.allclose(samplers.predict_x0(x, eps, a), x0) and torch.allclose(samplers.predict_eps(x, x0, a), eps)
    # eta = 1 is ancestral sampling with the small variance; eta = 0 of both implicit rules is the same.
    assert torch.allclose(
        samplers.ddim(1.0)(x, x0, eps, None, z, a, a_next), samplers.ddpm(x, x0, eps, None, z, a, a_next)
    )
    assert torch.allclose(
        samplers.ddim(0.0)(x, x0, eps, None, z, a, a_next), samplers.ddnm(0.0)(x, x0, eps, None, z, a, a_next)
    )
    for rule in (samplers.ddpm, samplers.ddim(0.5), samplers.ddnm()):
        assert torch.allclose(rule(x, x0, eps, torch.rand_like(x), z, a, 1.0), x0)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spaced_steps(0), "within 1..1000"),
        (lambda: spaced_steps(1001), "within 1..1000"),
        (lambda: spaced_steps(5, spacing="even"), "sampler.spacing"),
        (lambda: schedule.last_index([1, 0], -1), "sampler.stop_step"),
        (lambda: plan_operations(5, 5), "last index"),
        (lambda: plan_operations(5, 4, 0, 2), "sampler.travel"),
        (lambda: plan_windows(0), "at least one frame"),
        (lambda: coefficients(0.5, 0.5), "a < a_next"),
        (lambda: coefficients(0.5, 1.1), "a < a_next"),
        (lambda: schedule.alphas_bar_from_config({"beta_schedule": "cubic"}), "beta_schedule"),
        (lambda: schedule.alphas_bar(torch.tensor([0.5, 1.5])), "within 0..1"),
    ],
)
def test_faults_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()
