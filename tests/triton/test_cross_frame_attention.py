"""Cross-frame attention's Triton kernels: against the oracle, and properties."""

from __future__ import annotations

import math

import pytest
import torch

import zsvr_kernels as zk
from zsvr_kernels import _triton, testing
from zsvr_kernels.ops.cross_frame_attention import cross_frame_attention_reference as reference

# B, T, Tk, P, H, D, R. Tiles have 32 rows in the interpreter: frames of less and more than one tile, laid end to end
# and not, with and without a tail; head dims of one tile and two, with and without padding.
SHAPES = [
    (1, 1, 1, 1, 1, 8, 1),
    (2, 3, 3, 7, 2, 40, 2),
    (1, 1, 3, 35, 2, 64, 2),
    (1, 2, 2, 65, 1, 80, 2),
    (1, 2, 2, 33, 1, 160, 2),
    (1, 1, 2, 64, 2, 24, 2),
    (1, 1, 1, 130, 1, 72, 1),
    (1, 9, 9, 8, 1, 128, 2),
    (1, 1, 1, 32, 1, 256, 2),
]
if not _triton.is_interpreted:
    SHAPES += [
        (2, 5, 5, 64, 4, 64, 2),
        (1, 4, 4, 256, 3, 160, 2),
        (1, 3, 3, 1000, 2, 40, 3),
        (1, 3, 3, 1024, 2, 80, 2),
        (1, 2, 2, 1024, 2, 248, 1),
    ]


def inputs(shape, dtype, device, generator):
    B, T, Tk, P, H, D, R = shape
    q, k, v = (torch.randn(B, t, P, H, D, generator=generator).to(device, dtype) for t in (T, Tk, Tk))
    return q, k, v, testing.random_frames(T, Tk, R, generator).to(device)


def attend(q, k, v, frames, **keywords):
    return zk.cross_frame_attention(q, k, v, frames, backend="triton", **keywords)


def differentiate(function, tensors, weights):
    """Return outputs and gradients of sum(out * w0) + sum(lse * w1)."""
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    out, lse = function(*tensors)
    gradients = torch.autograd.grad((out, lse), tensors, (weights[0].to(out.dtype), weights[1].to(lse.dtype)))
    return (out.detach(), lse.detach(), *gradients)


def assert_matches(q, k, v, frames, scale, generator, what):
    """Hold outputs and gradients to the budget."""
    device, dtype = q.device, q.dtype
    weights = [torch.randn(s, generator=generator).to(device) for s in (q.shape, q.shape[:4])]
    weights[0] = weights[0].to(dtype).float()
    with testing.poisoned_allocations():
        ours = differentiate(lambda *x: attend(*x, frames, scale=scale, return_lse=True), (q, k, v), weights)
    wide = [x.double() for x in (q, k, v)]
    oracle = differentiate(lambda *x: reference(*x, frames, scale), wide, weights)
    eager = differentiate(lambda *x: testing.eager_cross_frame_attention(*x, frames, scale), (q, k, v), weights)
    for name, got, expected, plain in zip(("o", "lse", "dq", "dk", "dv"), ours, oracle, eager, strict=True):
        testing.assert_within_budget(got, expected, plain, f"{name}, {what}", gradient=name.startswith("d"))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward_match_the_oracle(shape, dtype, device, generator):
    q, k, v, frames = inputs(shape, dtype, device, generator)
    assert_matches(q, k, v, frames, 1.3 * shape[5] ** -0.5, generator, str(shape))


@pytest.mark.parametrize("scale", [-0.4, 0.0, 1e-40])
def test_any_finite_scale(scale, device, generator):
    q, k, v, frames = inputs((1, 2, 3, 20, 1, 24, 2), torch.float32, device, generator)
    assert_matches(q, k, v, frames, scale, generator, f"scale {scale}")


@pytest.mark.parametrize("D", [40, 64])
def test_gradients_of_sharp_attention(D, device, generator):
    # Where one key takes all, P is the exponential of a small difference of large numbers: the backward's scores must
    # be the forward's, and lse must not be rounded on its way.
    q, k, v, weights = (x.to(device) for x in torch.randn(4, 3, 2, 31, 3, D, generator=generator).unbind(0))
    q, frames = 8 * q, torch.arange(2, dtype=torch.int32, device=device)[:, None]

    def gradients(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(function(*leaves), leaves, weights.to(dtype))

    ours = gradients(lambda *x: attend(*x, frames), torch.float32)
    oracle = gradients(lambda *x: reference(*x, frames, D**-0.5)[0], torch.float64)
    eager = gradients(lambda *x: testing.eager_cross_frame_attention(*x, frames, D**-0.5)[0], torch.float32)
    for name, x, o, e in zip(("dq", "dk", "dv"), ours, oracle, eager, strict=True):
        testing.assert_within_budget(x, o, e, name, gradient=True)
        error = [torch.linalg.vector_norm(y - o) for y in (x, e)]
        assert error[0] < 1.3 * error[1], f"{name}: {error[0]:.2e}, eager {error[1]:.2e}"


@pytest.mark.parametrize("P", [7, 32])
def test_empty_rows_and_frames_nobody_lists(P, device, generator):
    q, k, v, _ = inputs((1, 3, 3, P, 1, 24, 2), torch.float32, device, generator)
    frames = torch.tensor([[1, -1], [-1, -1], [-1, 0]], dtype=torch.int32, device=device)
    k[:, 2], v[:, 2] = torch.nan, torch.nan
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with testing.poisoned_allocations():
        out, lse = attend(*leaves, frames, return_lse=True)
        dq, dk, dv = torch.autograd.grad((out, lse), leaves, (torch.ones_like(out), torch.ones_like(lse)))
    assert (out[:, 1] == 0).all() and torch.isneginf(lse[:, 1]).all()
    assert torch.isfinite(lse[:, [0, 2]]).all()
    assert (dq[:, 1] == 0).all() and (dk[:, 2] == 0).all() and (dv[:, 2] == 0).all()
    assert all(torch.isfinite(x).all() for x in (out, dq, dk, dv)) and dv.abs().sum() > 0


@pytest.mark.parametrize("P", [20, 32])
def test_absent_entries_weigh_nothing_whatever_they_point_to(P, device, generator):
    q, k, v, _ = inputs((1, 2, 3, P, 1, 16, 2), torch.float32, device, generator)
    frames = torch.tensor([[1, -1], [-1, 1]], dtype=torch.int32, device=device)
    expected = attend(q, k, v, torch.ones_like(frames[:, :1]), return_lse=True)
    for x in (k, v):
        x[:, 0], x[:, 2] = torch.nan, torch.nan
    got = attend(q, k, v, frames, return_lse=True)
    torch.testing.assert_close(got, expected)


def test_absent_keys_beside_scores_far_below_zero(device, generator):
    # The backward's weight of a score of 0 would be exp(100).
    q, k, v, _ = inputs((1, 1, 2, 32, 1, 16, 2), torch.float32, device, generator)
    leaves = [x.requires_grad_() for x in (torch.full_like(q, -5.0), torch.full_like(k, 5.0), v)]
    for row in ([0, -1], [-1, -1]):
        frames = torch.tensor([row], dtype=torch.int32, device=device)
        gradients = torch.autograd.grad(attend(*leaves, frames).square().sum(), leaves)
        assert all(torch.isfinite(x).all() for x in gradients)


@pytest.mark.parametrize("P", [20, 32])
def test_entries_outside_the_frames_are_refused_and_never_followed(P, device, generator):
    from zsvr_kernels.ops.cross_frame_attention.triton_launch import plan_bwd, plan_fwd

    q, k, v, _ = inputs((1, 2, 3, P, 1, 16, 3), torch.float32, device, generator)
    bad = torch.tensor([[1, 3, 2**31 - 1], [-2, -(2**31), 1]], dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="frames holds"):
        attend(q, k, v, bad)
    results = []
    for frames in (bad, torch.where((bad < 0) | (bad >= 3), -1, bad)):
        launches, out, lse = plan_fwd(q, k, v, frames, 0.3, None, _triton.target(device))
        _triton.run(launches)
        launches, gradients = plan_bwd(
            q, None, q, k, v, out, lse, frames, 0.3, (True, True, True), None, _triton.target(device)
        )
        _triton.run(launches)
        results.append((out, lse, *gradients))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_table_is_checked_again_once_it_changed(device, generator):
    q, k, v, frames = inputs((1, 2, 2, 8, 1, 16, 2), torch.float32, device, generator)
    attend(q, k, v, frames)
    frames[1, 0] = 2
    with pytest.raises(ValueError, match="frames holds 2"):
        attend(q, k, v, frames)


def test_duplicates_count(device, generator):
    q, k, v, _ = inputs((1, 1, 2, 20, 1, 16, 2), torch.float32, device, generator)
    once, twice = (torch.tensor([row], dtype=torch.int32, device=device) for row in ([0, -1], [0, 0]))
    out1, lse1 = attend(q, k, v, once, return_lse=True)
    out2, lse2 = attend(q, k, v, twice, return_lse=True)
    torch.testing.assert_close(out1, out2)
    torch.testing.assert_close(lse2, lse1 + math.log(2))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    gradients = [torch.autograd.grad(attend(*leaves, x).square().sum(), leaves) for x in (once, twice)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


def test_constant_values_and_permuted_frames(device, generator):
    q, k, v, frames = inputs((1, 3, 3, 10, 1, 40, 2), torch.float32, device, generator)
    torch.testing.assert_close(attend(q, k, torch.full_like(v, 0.75), frames), torch.full_like(v, 0.75))
    order = torch.tensor([2, 0, 1], device=device)
    moved = attend(
        q[:, order], k[:, order], v[:, order], torch.where(frames < 0, -1, order.argsort().int()[frames.long()])[order]
    )
    assert torch.equal(moved, attend(q, k, v, frames)[:, order])


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_strides_do_not_matter_and_nothing_else_is_written(layout, device, generator):
    shape = (1, 2, 2, 11, 2, 24, 1) if layout in ("heads_first", "padded") else (2, 2, 2, 11, 1, 24, 1)
    q, k, v, frames = inputs(shape, torch.float16, torch.device("cpu"), generator)
    views = [testing.guarded(x, layout) for x in (q, k, v)]
    out = testing.guarded(torch.zeros_like(q), layout)
    frames = frames.to(device)

    def on_device(guard):
        buffer = guard.buffer.to(device)
        return buffer, buffer.as_strided(guard.view.shape, guard.view.stride(), guard.view.storage_offset())

    plain = [x.to(device).requires_grad_() for x in (q, k, v)]
    strided = [on_device(g)[1].detach().requires_grad_() for g in views]
    outs = [attend(*x, frames) for x in (plain, strided)]
    gradients = [torch.autograd.grad(o.float().square().sum(), x) for o, x in zip(outs, (plain, strided), strict=True)]
    assert torch.equal(*outs) and all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    buffer, target = on_device(out)
    with torch.no_grad():
        assert attend(*strided, frames, out=target) is target and torch.equal(target, outs[0])
    out.buffer.copy_(buffer)
    out.assert_untouched(layout)


def test_expanded_inputs_and_gradients(device, generator):
    q, k, v, frames = inputs((1, 1, 2, 9, 1, 16, 2), torch.float32, device, generator)
    wide = [x.expand(2, -1, 9, 2, 16).detach().requires_grad_() for x in (q, k, v)]
    dense = [x.detach().contiguous().requires_grad_() for x in wide]
    outs = [attend(*x, frames) for x in (wide, dense)]
    assert torch.equal(*outs)
    gradients = [torch.autograd.grad(o.sum(), x) for o, x in zip(outs, (wide, dense), strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_rows_too_far_apart_for_32_bits(device):
    from zsvr_kernels.ops.cross_frame_attention.triton_launch import plan_fwd

    x = torch.empty((1, 1, 3, 1, 16), dtype=torch.float16, device="meta")
    frames = torch.zeros((1, 1), dtype=torch.int32, device="meta")
    far = torch.empty_strided(x.shape, (1, 1, 2**30, 1, 1), dtype=x.dtype, device="meta")
    wide = [plan_fwd(q, x, x, frames, 1.0, x, "cpu")[0][0].arguments["WIDE"] for q in (x, far)]
    assert wide == [False, True]


@pytest.mark.parametrize("needs", [(True, False, False), (False, True, False), (False, False, True)], ids=str)
def test_gradients_one_by_one(needs, device, generator):
    q, k, v, frames = inputs((1, 2, 2, 17, 1, 24, 1), torch.float32, device, generator)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    every = torch.autograd.grad(attend(*leaves, frames).square().sum(), leaves)
    some = [x.detach().requires_grad_(n) for x, n in zip((q, k, v), needs, strict=True)]
    attend(*some, frames).square().sum().backward()
    for x, gradient, needed in zip(some, every, needs, strict=True):
        assert torch.equal(x.grad, gradient) if needed else x.grad is None


def test_gradients_that_are_added(dtype, device, generator):
    q, k, v, frames = inputs((1, 2, 3, 19, 1, 40, 2), dtype, device, generator)
    o, lse = attend(q, k, v, frames, return_lse=True)
    call = (q, q, k, v, o, lse, frames, 0.2, "triton")
    fresh = torch.ops.zsvr.cross_frame_attention_bwd(q, None, *call[1:8], [True, True, True], "triton")
    before = [torch.randn(x.shape, generator=generator).to(device, dtype) for x in (q, k)]
    targets = [x.clone() for x in before]
    dv = torch.ops.zsvr.cross_frame_attention_bwd_add(*call, *targets)
    assert torch.equal(dv, fresh[2])
    for target, start, gradient in zip(targets, before, fresh, strict=False):
        eps = torch.finfo(dtype).eps
        # One rounding of the sum where two would be: half an eps of it, and half of what was added.
        torch.testing.assert_close(
            target.double(), start.double() + gradient.double(), rtol=eps, atol=eps * float(gradient.abs().max())
        )
        assert not torch.equal(target, start)


def test_any_run_gives_the_same_bits(dtype, device, generator):
    q, k, v, frames = inputs((1, 2, 2, 19, 1, 40, 2), dtype, device, generator)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    weight = torch.randn(q.shape, generator=generator).to(device, dtype)
    results = []
    for _ in range(2):
        out, lse = attend(*leaves, frames, return_lse=True)
        results.append((out, lse, *torch.autograd.grad((out, lse), leaves, (weight, torch.ones_like(lse)))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_batch_of_none(device, generator):
    q, k, v, frames = inputs((0, 2, 2, 8, 1, 16, 2), torch.float32, device, generator)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attend(*leaves, frames)
    assert out.shape == q.shape
    assert all(x.shape == q.shape for x in torch.autograd.grad(out.sum(), leaves))


def test_what_it_refuses(device, generator):
    q, k, v, frames = inputs((1, 2, 2, 8, 1, 12, 2), torch.float32, device, generator)
    with pytest.raises(RuntimeError, match="head dim 12"):
        attend(q, k, v, frames)
    with pytest.raises(ValueError, match="multiple of 8"):
        torch.ops.zsvr.cross_frame_attention_fwd(q, k, v, frames, 1.0, "triton")
    with pytest.raises(TypeError, match="float64"):
        torch.ops.zsvr.cross_frame_attention_fwd(q.double(), k.double(), v.double(), frames, 1.0, "triton")


def test_every_head_dim_and_frame_size_has_tiles():
    from zsvr_kernels.ops.cross_frame_attention.triton_configs import split, tiles

    for D in range(8, 257, 8):
        first, second = split(D)
        assert first + second >= D and (second == 0 or first < D)
        for target in (*_triton.SHARED_MEMORY, "cpu"):
            for kernel in ("fwd", "dq", "dkv"):
                for products in ((2, "ieee"), (4, "ieee"), (4, "tf32")):
                    for P in (1, 64, 256, 4096):
                        assert all(n & (n - 1) == 0 for n in tiles(kernel, target, *products, D, P)[:3])
