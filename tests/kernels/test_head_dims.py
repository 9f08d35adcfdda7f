"""Every head dim from 8 to 256, both operators, every instruction set; float32 results of 16-bit inputs are float32.

The budget compares two samples of rounding errors, so the tensors here are large enough for their maxima to mean
something; with fewer than about 16 keys the softmax gradient cancels to a fraction of its terms, and torch's own SDPA
leaves the budget there as well.
"""

from __future__ import annotations

import pytest
import torch

import zsvr_kernels as zk
from zsvr_kernels import testing
from zsvr_kernels.ops.cross_frame_attention import cross_frame_attention_reference
from zsvr_kernels.ops.trajectory_attention import trajectory_attention_reference

dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
HEAD_DIMS = range(8, 257, 8)
FRAMES = torch.tensor([[0, 1], [1, -1]], dtype=torch.int32)


def differentiate(function, tensors, weight):
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    out, lse = function(*tensors)
    gradients = torch.autograd.grad((out, lse), tensors, (weight.to(out.dtype), torch.ones_like(lse)))
    return (out.detach(), lse.detach(), *gradients)


def compare(names, got, oracle, plain, exact_plain, what):
    """Hold every result to the budget; results in float32 to that of a float32 computation."""
    for name, ours, expected, theirs, wide in zip(names, got, oracle, plain, exact_plain, strict=True):
        comparable = wide if ours.dtype == torch.float32 else theirs
        gradient = name.startswith("d")
        testing.assert_within_budget(ours, expected, comparable, f"{name} {what}", gradient=gradient)


@dtypes
def test_cross_frame_attention(isa, dtype, generator):
    for D in HEAD_DIMS:
        # Fewer and more sites than a block of lanes.
        q, k, v = (torch.randn(1, 2, 31 + D % 71, 2, D, generator=generator).to(dtype) for _ in range(3))
        weight, scale = torch.randn(q.shape, generator=generator).to(dtype), D**-0.5

        def kernel(q, k, v, scale=scale):
            return zk.cross_frame_attention(q, k, v, FRAMES, scale=scale, return_lse=True, backend="cpu")

        def eager(q, k, v, scale=scale):
            return testing.eager_cross_frame_attention(q, k, v, FRAMES, scale)

        def oracle(q, k, v, scale=scale):
            return cross_frame_attention_reference(q, k, v, FRAMES, scale)

        with testing.poisoned_allocations():
            got = differentiate(kernel, (q, k, v), weight)
        exact = differentiate(oracle, [x.double() for x in (q, k, v)], weight)
        plain = differentiate(eager, (q, k, v), weight)
        wide = differentiate(eager, [x.float() for x in (q, k, v)], weight)
        compare(("o", "lse", "dq", "dk", "dv"), got, exact, plain, wide, f"D={D} at {isa}")


@dtypes
def test_trajectory_attention(isa, dtype, generator):
    for D in HEAD_DIMS:
        grid = (5 + D // 8 % 4, 7 + D // 8 % 3)
        P = grid[0] * grid[1]
        q, k, v = (torch.randn(1, 2, P, 3, D, generator=generator).to(dtype) for _ in range(3))
        weight, scale = torch.randn(q.shape, generator=generator).to(dtype), D**-0.5
        t = testing.random_trajectories(1, 2, 2, 5, grid, generator)

        def kernel(q, k, v, positions, t=t, scale=scale):
            moved = zk.Trajectories(positions, t.valid, t.frames, t.grid)
            return zk.trajectory_attention(q, k, v, moved, scale=scale, return_lse=True, backend="cpu")

        def eager(q, k, v, positions, t=t, scale=scale):
            moved = zk.Trajectories(positions, t.valid, t.frames, t.grid)
            return testing.eager_trajectory_attention(q, k, v, moved, scale)

        def oracle(q, k, v, positions, t=t, scale=scale):
            return trajectory_attention_reference(q, k, v, positions, t.valid, t.frames, t.grid, scale)

        tensors = (q, k, v, t.positions)
        with testing.poisoned_allocations():
            got = differentiate(kernel, tensors, weight)
        exact = differentiate(oracle, [x.double() for x in tensors], weight)
        plain = differentiate(eager, tensors, weight)
        wide = differentiate(eager, [x.float() for x in tensors], weight)
        compare(("o", "lse", "dq", "dk", "dv", "dpositions"), got, exact, plain, wide, f"D={D} at {isa}")


@dtypes
def test_a_bad_value_spreads_only_to_its_own_query(isa, dtype, generator):
    for bad in (torch.nan, torch.inf):
        q, k, v = (torch.randn(1, 2, 70, 2, 24, generator=generator).to(dtype) for _ in range(3))
        q[0, 1, 5, 1, 3] = bad
        touched = torch.zeros(q.shape, dtype=torch.bool)
        touched[0, 1, 5, 1] = True
        trajectories = testing.random_trajectories(1, 2, 2, 3, (7, 10), generator)
        for out in (
            zk.cross_frame_attention(q, k, v, zk.neighbors(2), backend="cpu"),
            zk.trajectory_attention(q, k, v, trajectories, backend="cpu"),
        ):
            assert torch.isfinite(out[~touched]).all() and out[touched].isnan().all()
