"""merge_attention over the operators' own outputs: parts of the keys make the whole, with gradients through lse."""

from __future__ import annotations

import pytest
import torch

import zsvr_kernels as zk
from zsvr_kernels import testing
from zsvr_kernels.ops.cross_frame_attention import cross_frame_attention_reference as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
GRID = (4, 5)


def tensors(dtype, generator, T=3):
    return [torch.randn(2, T, 20, 2, 24, generator=generator).to(dtype) for _ in range(3)]


def merged(q, k, v, trajectories, at, backend):
    """Attend to slots before ``at`` and from ``at`` on separately, and merge."""
    parts = []
    for slots in (slice(0, at), slice(at, None)):
        part = zk.Trajectories.from_positions(
            trajectories.positions[:, :, slots],
            trajectories.valid[:, :, slots],
            trajectories.frames[:, slots],
            trajectories.grid,
        )
        parts += zk.trajectory_attention(q, k, v, part, return_lse=True, backend=backend)
    return zk.merge_attention(*parts)


def test_slots_of_trajectories_merge_to_the_whole(isa, generator):
    inputs = tensors(torch.float32, generator)
    trajectories = testing.random_trajectories(1, 3, 3, 5, GRID, generator)
    results = []
    for function in (
        lambda *x: merged(*x, trajectories, 2, "cpu"),
        lambda *x: zk.trajectory_attention(*x, trajectories, return_lse=True, backend="cpu"),
    ):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out, lse = function(*leaves)
        results.append((out, lse, *torch.autograd.grad(out.square().sum() + lse.sin().sum(), leaves)))
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_gradients_through_the_merge_stay_within_the_budget(isa, dtype, generator):
    inputs, scale = tensors(dtype, generator, T=2), 0.25
    whole = torch.tensor([[0, 1], [1, 0]], dtype=torch.int32)
    weight = torch.randn(inputs[0].shape, generator=generator).to(dtype)

    def differentiate(function, tensors):
        leaves = [x.detach().clone().requires_grad_() for x in tensors]
        out, lse = function(*leaves)
        return (out.detach(), lse.detach(), *torch.autograd.grad((out, lse), leaves, (weight.to(out.dtype), lse.sin())))

    def split(attend):
        return lambda *x: zk.merge_attention(*attend(*x, whole[:, :1]), *attend(*x, whole[:, 1:]))

    def kernel(q, k, v, frames):
        return zk.cross_frame_attention(q, k, v, frames, scale=scale, return_lse=True, backend="cpu")

    def eager(q, k, v, frames):
        out, lse = testing.eager_cross_frame_attention(q, k, v, frames, scale)
        return out, lse.float()

    got = differentiate(split(kernel), inputs)
    oracle = differentiate(lambda *x: reference(*x, whole, scale), [x.double() for x in inputs])
    plain = differentiate(split(eager), inputs)
    for name, ours, expected, theirs in zip(("o", "lse", "dq", "dk", "dv"), got, oracle, plain, strict=True):
        testing.assert_within_budget(ours, expected, theirs, f"{name} at {isa}", gradient=name.startswith("d"))


def test_neighbours_and_trajectories_merge_into_one_softmax(isa, generator):
    inputs = tensors(torch.float32, generator)
    trajectories = testing.random_trajectories(1, 3, 3, 2, GRID, generator)
    frames = zk.neighbors(3)
    outs = []
    for backend in ("cpu", "reference"):
        near = zk.cross_frame_attention(*inputs, frames, return_lse=True, backend=backend)
        far = zk.trajectory_attention(*inputs, trajectories, return_lse=True, backend=backend)
        outs.append(zk.merge_attention(*near, *far))
    torch.testing.assert_close(*outs)
    # An isolated side counts for nothing, whatever it holds.
    nothing = torch.full_like(outs[0][1], -torch.inf)
    assert torch.equal(zk.merge_attention(*outs[0], torch.full_like(outs[0][0], torch.nan), nothing)[0], outs[0][0])


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda o, m: (o, m, o.half(), m), TypeError, "out2 is torch.float16"),
        (lambda o, m: (o, m.half(), o, m), TypeError, "lse1"),
        (lambda o, m: (o, m, o[:, :1], m), ValueError, "out2 must have shape"),
        (lambda o, m: (o[0], m, o, m), ValueError, "5 axes"),
        (lambda o, m: (o, None, o, m), TypeError, "lse1 must be a torch.Tensor"),
        (lambda o, m: (o, m, o, m.double()), TypeError, "lse2 must be float32, got float64"),
        (lambda o, m: (o, m.double(), o, m.double()), TypeError, "lse1 must be float32, got float64"),
        (lambda o, m: (o.double(), m, o.double(), m), TypeError, "lse1 must be float64, got float32"),
        (lambda o, m: (o, m, o.to("meta"), m), ValueError, "out2 is on meta"),
        (lambda o, m: (o, m, o, m.to("meta")), ValueError, "lse2 is on meta"),
    ],
)
def test_what_does_not_fit_is_named(change, error, match):
    out, lse = torch.zeros(1, 2, 3, 1, 8), torch.zeros(1, 2, 3, 1)
    with pytest.raises(error, match=match):
        zk.merge_attention(*change(out, lse))
