"""Trajectory attention: against the oracle, against grid_sample, and its properties."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import zsvr_kernels as zk
from zsvr_kernels import testing
from zsvr_kernels.ops.trajectory_attention import cpu
from zsvr_kernels.ops.trajectory_attention import trajectory_attention_reference as reference
from zsvr_kernels.sampling import bilinear_sample, sites

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# B, Bp, T, Tk, grid, H, D, L
SHAPES = [
    (1, 1, 1, 1, (1, 1), 1, 8, 1),
    (2, 1, 3, 3, (5, 7), 2, 40, 3),
    (4, 2, 2, 4, (1, 7), 3, 64, 5),
    (1, 1, 3, 3, (9, 1), 1, 80, 2),
    (1, 1, 2, 2, (13, 9), 9, 24, 3),
    (1, 1, 2, 2, (6, 10), 2, 160, 2),
    (1, 1, 2, 2, (4, 3), 1, 256, 17),
    (1, 1, 17, 17, (3, 4), 2, 128, 17),
]


def inputs(shape, dtype, generator, dead=0.3):
    B, Bp, T, Tk, grid, H, D, L = shape
    P = grid[0] * grid[1]
    q, k, v = (torch.randn(B, t, P, H, D, generator=generator).to(dtype) for t in (T, Tk, Tk))
    return q, k, v, testing.random_trajectories(Bp, T, Tk, L, grid, generator, dead=dead)


def with_positions(trajectories, positions):
    return zk.Trajectories.from_positions(positions, trajectories.valid, trajectories.frames, trajectories.grid)


def differentiate(function, tensors, weights):
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    out, lse = function(*tensors)
    gradients = torch.autograd.grad((out, lse), tensors, (weights[0].to(out.dtype), weights[1].to(lse.dtype)))
    return (out.detach(), lse.detach(), *gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward_match_the_oracle(isa, shape, dtype, generator):
    q, k, v, trajectories = inputs(shape, dtype, generator)
    grid, scale = trajectories.grid, 1.3 * shape[6] ** -0.5
    weights = torch.randn(q.shape, generator=generator), torch.randn(q.shape[:4], generator=generator)
    weights = weights[0].to(dtype).float(), weights[1]

    def kernel(q, k, v, positions):
        moved = with_positions(trajectories, positions)
        return zk.trajectory_attention(q, k, v, moved, scale=scale, return_lse=True, backend="cpu")

    def oracle(q, k, v, positions):
        return reference(q, k, v, positions, trajectories.valid, trajectories.frames, grid, scale)

    def eager(q, k, v, positions):
        moved = zk.Trajectories(positions, trajectories.valid, trajectories.frames, grid)
        return testing.eager_trajectory_attention(q, k, v, moved, scale)

    tensors = (q, k, v, trajectories.positions)
    with testing.poisoned_allocations():
        ours = differentiate(kernel, tensors, weights)
    exact = differentiate(oracle, [x.double() for x in tensors], weights)
    plain = differentiate(eager, tensors, weights)
    names = ("o", "lse", "dq", "dk", "dv", "dpositions")
    for name, got, expected, comparable in zip(names, ours, exact, plain, strict=True):
        gradient = name.startswith("d")
        testing.assert_within_budget(got, expected, comparable, f"{name} at {isa}", gradient=gradient)


def test_grid_sample_and_softmax_agree(isa, generator):
    q, k, v, trajectories = inputs((2, 2, 3, 3, (5, 8), 2, 16, 3), torch.float32, generator)
    got, lse = zk.trajectory_attention(q, k, v, trajectories, return_lse=True, backend="cpu")
    Hg, Wg = trajectories.grid
    norm = torch.tensor(((Wg - 1) / 2, (Hg - 1) / 2))
    for i in range(3):
        samples = []
        for x in (k, v):
            frames = trajectories.frames[i].clamp(min=0).long()
            source = x[:, frames].flatten(0, 1).reshape(-1, Hg, Wg, 32).permute(0, 3, 1, 2)
            where = trajectories.positions[:, i].flatten(0, 1) / norm - 1
            sampled = F.grid_sample(source, where[:, None], padding_mode="border", align_corners=True)
            samples.append(sampled[:, :, 0].mT.reshape(2, 3, Hg * Wg, 2, 16))
        logits = torch.einsum("bphd,blphd->blph", q[:, i], samples[0]) * 0.25
        live = trajectories.valid[:, i] & (trajectories.frames[i] >= 0)[:, None]
        logits = logits.masked_fill(~live[..., None], -torch.inf)
        expected = torch.einsum("blph,blphd->bphd", logits.softmax(1), samples[1])
        torch.testing.assert_close(got[:, i], expected, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(lse[:, i], logits.logsumexp(1), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_one_live_slot_returns_its_sample_exactly(isa, dtype, generator):
    grid, T, H, D = (4, 6), 2, 2, 40
    P = grid[0] * grid[1]
    q, k, v = (torch.randn(1, T, P, H, D, generator=generator).to(dtype) for _ in range(3))
    v[0, 1, 3] = torch.inf  # an integer position next to it must not notice
    whole = torch.stack([torch.randperm(P, generator=generator) for _ in range(T)])
    whole[whole == 3] = 4
    positions = sites(grid)[whole].reshape(1, T, 1, P, 2)
    valid = torch.ones(1, T, 1, P, dtype=torch.bool)
    frames = torch.tensor([[1], [0]], dtype=torch.int32)
    out = zk.trajectory_attention(
        q, k, v, zk.Trajectories.from_positions(positions, valid, frames, grid), backend="cpu"
    )
    for i, j in ((0, 1), (1, 0)):
        assert torch.equal(out[0, i], v[0, j, whole[i]])
    between = positions + torch.tensor((0.25, -0.5))
    v = v.nan_to_num(posinf=1.0)
    out = zk.trajectory_attention(q, k, v, zk.Trajectories.from_positions(between, valid, frames, grid), backend="cpu")
    flat = v.double().flatten(3)[0]
    for i, j in ((0, 1), (1, 0)):
        expected = bilinear_sample(flat[j : j + 1], between[:, i, 0].double(), grid).reshape(P, H, D)
        eps = torch.finfo(dtype).eps
        assert ((out[0, i].double() - expected).abs() <= 0.51 * eps * expected.abs() + 4e-7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_dead_slots_stay_dead_at_any_scale(isa, scale, dtype, generator):
    # Dead slots must not take part even where every live logit is 0 or the largest product gets the smallest logit.
    q, k, v, trajectories = inputs((1, 1, 3, 3, (5, 7), 2, 24, 4), dtype, generator, dead=0.5)
    weights = torch.randn(q.shape, generator=generator), torch.randn(q.shape[:4], generator=generator)
    weights = weights[0].to(dtype).float(), weights[1]
    where = (trajectories.valid, trajectories.frames, trajectories.grid, scale)

    def kernel(q, k, v, positions):
        moved = with_positions(trajectories, positions)
        return zk.trajectory_attention(q, k, v, moved, scale=scale, return_lse=True, backend="cpu")

    def eager(q, k, v, positions):
        return testing.eager_trajectory_attention(q, k, v, with_positions(trajectories, positions), scale)

    tensors = (q, k, v, trajectories.positions)
    ours = differentiate(kernel, tensors, weights)
    exact = differentiate(lambda *x: reference(*x, *where), [x.double() for x in tensors], weights)
    plain = differentiate(eager, tensors, weights)
    names = ("o", "lse", "dq", "dk", "dv", "dpositions")
    for name, got, expected, comparable in zip(names, ours, exact, plain, strict=True):
        gradient = name.startswith("d")
        testing.assert_within_budget(got, expected, comparable, f"{name} at {isa}", gradient=gradient)


def test_no_live_slot_gives_zero(isa, generator):
    q, k, v, trajectories = inputs((1, 1, 2, 2, (3, 5), 2, 24, 2), torch.float32, generator)
    trajectories.valid.fill_(False)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out, lse = zk.trajectory_attention(*leaves, trajectories, return_lse=True, backend="cpu")
    assert (out == 0).all() and torch.isneginf(lse).all()
    for gradient in torch.autograd.grad(out.sum(), leaves):
        assert (gradient == 0).all()


def test_all_but_the_own_slot_invalid(isa, generator):
    flow = torch.full((1, 3, 2, 24, 40), torch.nan)
    trajectories = zk.chain_links(zk.Links.from_flow(flow, flow, grid=(3, 5)))
    assert trajectories.valid.sum() == 4 * 15
    q, k, v = torch.randn(3, 1, 4, 15, 2, 16, generator=generator).unbind(0)
    assert torch.equal(zk.trajectory_attention(q, k, v, trajectories, backend="cpu"), v)


def test_integer_positions_are_a_gathered_softmax(isa, generator):
    q, k, v, trajectories = inputs((1, 1, 2, 3, (4, 5), 2, 16, 4), torch.float32, generator, dead=0.0)
    whole = trajectories.positions.round().clamp(min=0).minimum(torch.tensor((4.0, 3.0)))
    frames = trajectories.frames.clamp(min=0)
    trajectories = zk.Trajectories.from_positions(whole, trajectories.valid, frames, (4, 5))
    site = (whole[0, ..., 1] * 5 + whole[0, ..., 0]).long()  # [T, L, P]
    keys, values = (x[0, frames[:, :, None].long(), site] for x in (k, v))  # [T, L, P, H, D]
    weights = (torch.einsum("tphd,tlphd->tlph", q[0], keys) * 0.25).softmax(1)
    expected = torch.einsum("tlph,tlphd->tphd", weights, values)
    torch.testing.assert_close(zk.trajectory_attention(q, k, v, trajectories, backend="cpu")[0], expected)


def test_permuting_slots_changes_nothing_but_rounding(isa, generator):
    q, k, v, trajectories = inputs((1, 1, 3, 3, (4, 5), 2, 24, 5), torch.float32, generator)
    order = torch.randperm(5, generator=generator)
    moved = zk.Trajectories.from_positions(
        trajectories.positions[:, :, order],
        trajectories.valid[:, :, order],
        trajectories.frames[:, order],
        trajectories.grid,
    )
    torch.testing.assert_close(
        zk.trajectory_attention(q, k, v, moved, backend="cpu"),
        zk.trajectory_attention(q, k, v, trajectories, backend="cpu"),
    )


def test_shared_trajectories_equal_an_expanded_copy(isa, generator):
    q, k, v, shared = inputs((4, 2, 2, 2, (3, 5), 2, 24, 3), torch.float32, generator)
    copied = zk.Trajectories.from_positions(
        shared.positions.repeat(2, 1, 1, 1, 1), shared.valid.repeat(2, 1, 1, 1), shared.frames, shared.grid
    )
    leaves = [x.requires_grad_() for x in (q, k, v)]
    results = []
    for trajectories in (shared, copied):
        out = zk.trajectory_attention(*leaves, trajectories, backend="cpu")
        results.append((out, *torch.autograd.grad(out.square().sum(), leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_strides_do_not_matter_and_nothing_else_is_written(isa, layout, dtype, generator):
    q, k, v, trajectories = inputs((2, 1, 2, 3, (5, 7), 2, 24, 3), dtype, generator)
    expected = zk.trajectory_attention(q, k, v, trajectories, backend="cpu")
    views = [testing.guarded(x, layout) for x in (q, k, v)]
    out = testing.guarded(torch.zeros_like(q), layout)
    returned = zk.trajectory_attention(*(g.view for g in views), trajectories, backend="cpu", out=out.view)
    assert returned is out.view and torch.equal(out.view, expected)
    for guard in (*views, out):
        guard.assert_untouched(layout)
    gradients = []
    for tensors in ((q, k, v), [g.view for g in views]):
        leaves = [x.detach().requires_grad_() for x in tensors]
        result = zk.trajectory_attention(*leaves, trajectories, backend="cpu")
        gradients.append(torch.autograd.grad(result.float().square().sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_any_thread_count_and_any_run_give_the_same_bits(isa, dtype, generator):
    q, k, v, trajectories = inputs((2, 1, 3, 3, (9, 10), 2, 40, 3), dtype, generator)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    weight = torch.randn(q.shape, generator=generator).to(dtype)
    results = []
    for count in (1, 2, 3, 5, 2):
        with testing.threads(count):
            positions = trajectories.positions.clone().requires_grad_()
            moved = with_positions(trajectories, positions)
            out, lse = zk.trajectory_attention(*leaves, moved, return_lse=True, backend="cpu")
            gradients = torch.autograd.grad((out, lse), (*leaves, positions), (weight, torch.ones_like(lse)))
            results.append((out, lse, *gradients))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_only_wanted_gradients_are_computed(generator):
    q, k, v, trajectories = inputs((1, 1, 2, 2, (3, 5), 1, 16, 2), torch.float32, generator)
    full = [x.clone().requires_grad_() for x in (q, k, v)]
    expected = torch.autograd.grad(zk.trajectory_attention(*full, trajectories, backend="cpu").sum(), full)
    for n in range(3):
        tensors = [x.clone() for x in (q, k, v)]
        tensors[n].requires_grad_()
        (got,) = torch.autograd.grad(zk.trajectory_attention(*tensors, trajectories, backend="cpu").sum(), tensors[n])
        assert torch.equal(got, expected[n])


def test_inverse_index_lists_every_corner_once(generator):
    T, Tk, L, grid = 3, 4, 5, (6, 7)
    trajectories = testing.random_trajectories(2, T, Tk, L, grid, generator)
    offsets, samples, weights = trajectories.inverse(Tk)
    P = grid[0] * grid[1]
    matrix = torch.zeros(2, T * L * P, Tk * P)
    rows = torch.repeat_interleave(torch.arange(2 * Tk * P), offsets.diff())
    matrix.index_put_((rows // (Tk * P), samples.long(), rows % (Tk * P)), weights, accumulate=True)
    # Sampling the identity gives the same matrix.
    identity = torch.eye(P).expand(2 * L, P, P)
    expected = torch.zeros_like(matrix).reshape(2, T, L, P, Tk, P)
    for i in range(T):
        where = trajectories.positions[:, i].reshape(2 * L, P, 2)
        sampled = bilinear_sample(identity, where, grid).reshape(2, L, P, P)
        for slot in range(L):
            j = int(trajectories.frames[i, slot])
            if j >= 0:
                live = trajectories.valid[:, i, slot, :, None]
                expected[:, i, slot, :, j] = sampled[:, slot] * live
    torch.testing.assert_close(matrix, expected.reshape(matrix.shape))
    assert (weights > 0).all()
    for begin, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        assert (samples[begin:end].diff() >= 0).all()


def test_inverse_index_is_cached_until_positions_change(generator):
    q, k, v, trajectories = inputs((1, 1, 2, 2, (3, 5), 1, 16, 2), torch.float32, generator)
    first = trajectories.inverse(2)
    assert trajectories.inverse(2) is first
    k.requires_grad_()
    trajectories.positions.add_(0.5)
    assert trajectories.inverse(2) is not first
    out = zk.trajectory_attention(q, k, v, trajectories, backend="cpu")
    expected = zk.trajectory_attention(q, k, v, trajectories, backend="reference")
    weight = torch.randn(out.shape, generator=generator)
    gradients = [torch.autograd.grad(x, k, weight)[0] for x in (out, expected)]
    torch.testing.assert_close(*gradients)


def test_trajectories_cannot_be_exchanged_between_forward_and_backward(generator):
    q, k, v, trajectories = inputs((1, 1, 2, 2, (3, 5), 1, 16, 2), torch.float32, generator)
    out = zk.trajectory_attention(q, k.requires_grad_(), v, trajectories, backend="cpu")
    for name, other in (
        ("positions", trajectories.positions[:, :1, :1]),
        ("valid", trajectories.valid[:, :1]),
        ("frames", trajectories.frames[:1]),
        ("grid", (1, 1)),
    ):
        with pytest.raises(AttributeError):
            setattr(trajectories, name, other)
    trajectories.frames.fill_(0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_inverse_says_what_does_not_fit(generator):
    trajectories = testing.random_trajectories(1, 2, 2, 3, (3, 4), generator)
    for bad, error in ((-5, ValueError), (0, ValueError), (1.5, TypeError), (None, TypeError), (True, TypeError)):
        with pytest.raises(error, match="Tk must be"):
            trajectories.inverse(bad)
    with pytest.raises(ValueError, match="cpu"):
        trajectories.to("meta").inverse(2)
    with torch.inference_mode():
        moved = zk.Trajectories(trajectories.positions + 0, trajectories.valid, trajectories.frames, (3, 4))
    first = moved.inverse(2)
    with torch.inference_mode():
        moved.positions.fill_(0.0)
    assert not torch.equal(moved.inverse(2)[0], first[0])


def test_trajectories_survive_pickling_and_moving(generator):
    import copy

    trajectories = testing.random_trajectories(1, 2, 2, 3, (3, 4), generator)
    trajectories.inverse(2)
    for other in (copy.deepcopy(trajectories), trajectories.to("cpu"), trajectories.detach()):
        assert torch.equal(other.positions, trajectories.positions) and other.grid == (3, 4)
    assert "L=3" in repr(trajectories)


def test_native_inverse_refuses_what_int32_cannot_hold():
    from zsvr_kernels import _native

    p = _native.module().TrajectoryInverseParams()
    frames = torch.zeros(1024, 1, dtype=torch.int32)
    p.Bp, p.T, p.Tk, p.L, p.Hg, p.Wg = 1, 1024, 1, 1, 2048, 1024
    p.frames = frames.data_ptr()
    with pytest.raises(ValueError, match=r"2\^31"):
        _native.module().trajectory_inverse_count(p, 0, 1)
    assert cpu.inverse.__doc__


def test_gradcheck_of_the_reference(generator):
    B, T, P, H, D = 1, 2, 6, 1, 8
    q, k, v = torch.randn(3, B, T, P, H, D, generator=generator, dtype=torch.float64).unbind(0)
    fraction = torch.rand(B, T, 3, P, 2, generator=generator, dtype=torch.float64) * 0.8 + 0.1
    positions = fraction + torch.randint(-1, 3, (B, T, 3, P, 2), generator=generator)
    valid = torch.rand(B, T, 3, P, generator=generator) > 0.2
    frames = torch.tensor([[0, 1, -1], [1, 1, 0]], dtype=torch.int32)
    valid[:, 0, 0] = valid[:, 1, 0] = True
    leaves = [x.requires_grad_() for x in (q, k, v, positions)]
    assert torch.autograd.gradcheck(lambda *x: reference(*x, valid, frames, (2, 3), 0.3), leaves)
