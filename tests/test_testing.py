"""The testing helpers themselves: seeded faults must be caught, correct results must pass."""

from __future__ import annotations

import pytest
import torch

import zsvr_kernels as zk
from zsvr_kernels import testing
from zsvr_kernels.ops.cross_frame_attention import cross_frame_attention_reference as reference

B, T, P, H, D = 1, 3, 35, 2, 16


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def case(request, generator):
    q, k, v = (torch.randn(B, T, P, H, D, generator=generator).to(request.param) for _ in range(3))
    frames = zk.neighbors(T)
    scale = D**-0.5
    good = reference(q, k, v, frames, scale)[0]
    oracle = reference(q.double(), k.double(), v.double(), frames, scale)[0]
    eager = testing.eager_cross_frame_attention(q, k, v, frames, scale)[0]
    return q, k, v, frames, scale, good, oracle, eager


def fails(kernel, oracle, eager, **options):
    with pytest.raises(AssertionError, match="what"):
        testing.assert_within_budget(kernel, oracle, eager, "what", **options)


def test_a_correct_result_passes(case):
    *_, good, oracle, eager = case
    testing.assert_within_budget(good, oracle, eager, "good", gradient=True)
    testing.assert_within_budget(eager, oracle, eager, "eager", gradient=True)


def test_wrong_scale_is_caught(case):
    q, k, v, frames, scale, _, oracle, eager = case
    fails(reference(q, k, v, frames, scale * 1.05)[0], oracle, eager)


def test_swapped_heads_are_caught(case):
    *_, good, oracle, eager = case
    fails(good.flip(3), oracle, eager)


def test_wrong_frame_is_caught(case):
    q, k, v, frames, scale, _, oracle, eager = case
    fails(reference(q, k, v, frames.roll(1, 0), scale)[0], oracle, eager)


def test_dropped_key_is_caught(case):
    q, k, v, frames, scale, _, oracle, eager = case
    k, v = k.clone(), v.clone()
    dropped = reference(q, k, v.index_fill(2, torch.tensor([P - 1]), 0.0), frames, scale)[0]
    fails(dropped, oracle, eager)


def test_one_corrupted_element_is_caught(case):
    *_, good, oracle, eager = case
    bad = good.clone()
    bad[0, 1, 7, 0, 3] += 0.1
    fails(bad, oracle, eager)


def test_sign_flip_and_nan_are_caught(case):
    *_, good, oracle, eager = case
    fails(-good, oracle, eager)
    bad = good.clone()
    bad[0, 0, 0, 0, 0] = torch.nan
    fails(bad, oracle, eager)


def test_wrong_shape_and_misplaced_infinity_are_caught(case):
    *_, good, oracle, eager = case
    fails(good[:, :2], oracle, eager)
    expected = oracle.clone()
    expected[0, 0, 0, 0, 0] = -torch.inf
    fails(good, expected, eager)


def test_a_gradient_one_percent_too_long_is_caught(case):
    *_, good, oracle, eager = case
    fails((good.double() * 1.01).to(good.dtype), oracle, eager, gradient=True)


def test_a_rotated_gradient_is_caught(case, generator):
    *_, good, oracle, eager = case
    noise = torch.randn(good.shape, generator=generator, dtype=torch.float64)
    bad = (good.double() + 0.05 * noise * good.double().std()).to(good.dtype)
    fails(bad, oracle, eager, gradient=True)


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_guarded_views_hold_the_values_and_notice_writes(layout, generator):
    x = torch.randn(2, 3, 5, 2, 8, generator=generator)
    guard = testing.guarded(x, layout)
    assert torch.equal(guard.view, x)
    guard.view.fill_(1.0)
    guard.assert_untouched()
    guard.buffer[guard.outside.nonzero()[3]] = 0.0
    with pytest.raises(AssertionError, match="1 elements outside"):
        guard.assert_untouched()


def test_layouts_differ_in_strides(generator):
    x = torch.randn(2, 3, 5, 2, 8, generator=generator)
    assert len({testing.guarded(x, layout).view.stride() for layout in testing.LAYOUTS}) == len(testing.LAYOUTS)


def test_poison_reaches_every_allocation():
    with testing.poisoned_allocations():
        assert torch.empty(3).isnan().all()
        assert torch.ones(2).new_empty(4).isnan().all()
        assert torch.empty_like(torch.ones(2)).isnan().all()
        assert (torch.empty(3, dtype=torch.uint8) == 255).all()
    assert torch.empty(0).numel() == 0


def test_random_trajectories_cover_the_special_positions(generator):
    grid = (9, 13)
    trajectories = testing.random_trajectories(2, 5, 4, 3, grid, generator)
    x, y = trajectories.positions.unbind(-1)
    assert (x == x.round()).logical_and(y == y.round()).any()
    assert ((x == grid[1] - 0.5) & (y == grid[0] - 0.5)).any() and (x == -0.5).any()
    assert (x.abs() > 1e5).any() and not trajectories.valid.all() and trajectories.valid[:, :, 0].all()
    assert (trajectories.frames == -1).any()


def test_contexts_restore_what_they_changed():
    before = torch.get_num_threads()
    with testing.threads(before + 1):
        assert torch.get_num_threads() == before + 1
    assert torch.get_num_threads() == before
    names = testing.instruction_sets()
    if names:
        with testing.instruction_set(names[0]):
            assert zk.build_info()["cpu_capability"] == names[0]
        with pytest.raises(ValueError, match="not compiled"):
            testing.instruction_set("z80").__enter__()
