"""Cross-frame attention: against the oracle, against peers, and its properties."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import zsvr_kernels as zk
from zsvr_kernels import testing
from zsvr_kernels.ops.cross_frame_attention import cross_frame_attention_reference as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# B, T, Tk, P, H, D, R
SHAPES = [
    (1, 1, 1, 1, 1, 8, 1),
    (2, 3, 3, 7, 2, 40, 2),
    (1, 2, 5, 63, 3, 64, 3),
    (1, 3, 3, 65, 1, 80, 2),
    (1, 2, 2, 117, 2, 72, 2),
    (1, 2, 2, 96, 1, 160, 2),
    (1, 2, 2, 33, 1, 256, 2),
    (1, 17, 17, 16, 2, 128, 2),
    (1, 2, 2, 256, 2, 24, 3),
]


def inputs(shape, dtype, generator, requires_grad=False):
    B, T, Tk, P, H, D, R = shape
    q, k, v = (torch.randn(B, t, P, H, D, generator=generator).to(dtype) for t in (T, Tk, Tk))
    for x in (q, k, v):
        x.requires_grad_(requires_grad)
    return q, k, v, testing.random_frames(T, Tk, R, generator)


def differentiate(function, tensors, weights):
    """Return outputs and gradients of sum(out * w0) + sum(lse * w1)."""
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    out, lse = function(*tensors)
    gradients = torch.autograd.grad((out, lse), tensors, (weights[0].to(out.dtype), weights[1].to(lse.dtype)))
    return (out.detach(), lse.detach(), *gradients)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward_match_the_oracle(isa, shape, dtype, generator):
    q, k, v, frames = inputs(shape, dtype, generator)
    scale = 1.3 * shape[5] ** -0.5
    weights = torch.randn(q.shape, generator=generator), torch.randn(q.shape[:4], generator=generator)
    weights = weights[0].to(dtype).float(), weights[1]

    def kernel(*x):
        return zk.cross_frame_attention(*x, frames, scale=scale, return_lse=True, backend="cpu")

    with testing.poisoned_allocations():
        ours = differentiate(kernel, (q, k, v), weights)
    wide = [x.double() for x in (q, k, v)]
    oracle = differentiate(lambda *x: reference(*x, frames, scale), wide, weights)
    eager = differentiate(lambda *x: testing.eager_cross_frame_attention(*x, frames, scale), (q, k, v), weights)
    for name, got, expected, plain in zip(("o", "lse", "dq", "dk", "dv"), ours, oracle, eager, strict=True):
        gradient = name.startswith("d")
        testing.assert_within_budget(got, expected, plain, f"{name} at {isa}", gradient=gradient)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_reference_matches_the_oracle(dtype, generator):
    q, k, v, frames = inputs((2, 3, 3, 9, 2, 16, 2), dtype, generator)
    got = zk.cross_frame_attention(q, k, v, frames, backend="reference")
    oracle = reference(q.double(), k.double(), v.double(), frames, 0.25)[0]
    eager = testing.eager_cross_frame_attention(q, k, v, frames, 0.25)[0]
    testing.assert_within_budget(got, oracle, eager, "reference")


def test_sdpa_on_concatenated_keys_agrees(isa, generator):
    q, k, v, frames = inputs((1, 4, 4, 65, 2, 40, 2), torch.float32, generator)
    frames = zk.neighbors(4)
    got = zk.cross_frame_attention(q, k, v, frames, backend="cpu")
    for i, (a, b) in enumerate([(0, 1), (0, 2), (1, 3), (2, 3)]):
        keys, values = (torch.cat((x[0, a], x[0, b])).transpose(0, 1) for x in (k, v))
        expected = F.scaled_dot_product_attention(q[0, i].transpose(0, 1), keys, values)
        torch.testing.assert_close(got[0, i], expected.transpose(0, 1))


@pytest.mark.slow
def test_flex_attention_agrees(generator):
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    T, P, H, D = 4, 128, 2, 16
    q, k, v = (torch.randn(1, T, P, H, D, generator=generator) for _ in range(3))
    frames = zk.neighbors(T)
    allowed = torch.zeros(T, T, dtype=torch.bool)
    for i, row in enumerate(frames.tolist()):
        allowed[i, row] = True

    def mask(b, h, n, m):
        return allowed[n // P, m // P]

    block = create_block_mask(mask, None, None, T * P, T * P, device="cpu")
    flat = [x.reshape(1, T * P, H, D).transpose(1, 2) for x in (q, k, v)]
    expected = torch.compile(flex_attention)(*flat, block_mask=block).transpose(1, 2).reshape(q.shape)
    torch.testing.assert_close(zk.cross_frame_attention(q, k, v, frames, backend="cpu"), expected)


@pytest.mark.parametrize("backend", ["reference", "cpu", "sdpa"])
def test_one_frame_is_spatial_self_attention(backend, generator):
    q, k, v, _ = inputs((2, 1, 1, 24, 2, 16, 1), torch.float32, generator)
    expected = F.scaled_dot_product_attention(*(x[:, 0].transpose(1, 2) for x in (q, k, v)))
    for frames in (zk.neighbors(1), zk.first_and_previous(1), zk.all_frames(1)):
        got = zk.cross_frame_attention(q, k, v, frames, backend=backend)
        torch.testing.assert_close(got[:, 0], expected.transpose(1, 2))


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_empty_rows_give_zero_and_no_gradient(backend, generator):
    q, k, v, _ = inputs((1, 3, 3, 70, 2, 24, 2), torch.float32, generator, requires_grad=True)
    frames = torch.tensor([[1, -1], [-1, -1], [-1, 0]], dtype=torch.int32)
    out, lse = zk.cross_frame_attention(q, k, v, frames, return_lse=True, backend=backend)
    assert (out[:, 1] == 0).all() and torch.isneginf(lse[:, 1]).all()
    assert torch.isfinite(lse[:, [0, 2]]).all()
    dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
    assert (dq[:, 1] == 0).all() and (dk[:, 2] == 0).all() and (dv[:, 2] == 0).all()
    assert all(torch.isfinite(x).all() for x in (dq, dk, dv)) and dv.abs().sum() > 0


def test_an_absent_frame_may_hold_nan(generator):
    for backend in ("reference", "cpu", "sdpa"):
        q, k, v, _ = inputs((1, 2, 3, 20, 1, 16, 2), torch.float32, generator)
        k[:, 0], v[:, 0], k[:, 2], v[:, 2] = torch.nan, torch.nan, torch.nan, torch.nan
        frames = torch.tensor([[1, -1], [-1, 1]], dtype=torch.int32)
        assert torch.isfinite(zk.cross_frame_attention(q, k, v, frames, backend=backend)).all()


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_duplicates_count(backend, generator):
    q, k, v, _ = inputs((1, 1, 2, 30, 2, 16, 2), torch.float32, generator)
    once = torch.tensor([[0, -1]], dtype=torch.int32)
    twice = torch.tensor([[0, 0]], dtype=torch.int32)
    out1, lse1 = zk.cross_frame_attention(q, k, v, once, return_lse=True, backend=backend)
    out2, lse2 = zk.cross_frame_attention(q, k, v, twice, return_lse=True, backend=backend)
    torch.testing.assert_close(out1, out2)
    torch.testing.assert_close(lse2, lse1 + math.log(2))


def test_constant_values_and_permutations(isa, generator):
    q, k, v, frames = inputs((1, 3, 3, 50, 2, 40, 2), torch.float32, generator)
    constant = zk.cross_frame_attention(q, k, torch.full_like(v, 0.75), frames, backend="cpu")
    torch.testing.assert_close(constant, torch.full_like(v, 0.75))
    whole = zk.cross_frame_attention(q, k, v, frames, backend="cpu")
    sites = torch.randperm(50, generator=generator)
    assert torch.equal(zk.cross_frame_attention(q[:, :, sites], k, v, frames, backend="cpu"), whole[:, :, sites])
    order = torch.randperm(3, generator=generator)
    inverse = order.argsort().int()
    moved = zk.cross_frame_attention(
        q[:, order], k[:, order], v[:, order], torch.where(frames < 0, -1, inverse[frames.long()])[order], backend="cpu"
    )
    torch.testing.assert_close(moved, whole[:, order])


def test_merging_parts_of_the_keys_gives_the_whole(isa, generator):
    q, k, v, _ = inputs((1, 2, 4, 40, 2, 24, 2), torch.float32, generator)
    table = torch.tensor([[0, 1, 2], [3, 1, 0]], dtype=torch.int32)
    options = {"return_lse": True, "backend": "cpu"}
    whole, lse = zk.cross_frame_attention(q, k, v, table, **options)
    left = zk.cross_frame_attention(q, k, v, table[:, :1].contiguous(), **options)
    right = zk.cross_frame_attention(q, k, v, table[:, 1:], **options)
    merged, merged_lse = zk.merge_attention(*left, *right)
    torch.testing.assert_close(merged, whole)
    torch.testing.assert_close(merged_lse, lse)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_strides_do_not_matter_and_nothing_else_is_written(isa, layout, dtype, generator):
    q, k, v, frames = inputs((2, 3, 3, 37, 2, 24, 2), dtype, generator)
    expected = zk.cross_frame_attention(q, k, v, frames, backend="cpu")
    views = [testing.guarded(x, layout) for x in (q, k, v)]
    out = testing.guarded(torch.zeros_like(q), layout)
    returned = zk.cross_frame_attention(*(g.view for g in views), frames, backend="cpu", out=out.view)
    assert returned is out.view and torch.equal(out.view, expected)
    for guard in (*views, out):
        guard.assert_untouched(layout)
    gradients = []
    for tensors in ((q, k, v), [g.view for g in views]):
        leaves = [x.detach().requires_grad_() for x in tensors]
        result = zk.cross_frame_attention(*leaves, frames, backend="cpu")
        gradients.append(torch.autograd.grad(result.float().square().sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_expanded_inputs(isa, generator):
    q, k, v, frames = inputs((1, 3, 3, 20, 1, 16, 2), torch.float32, generator)
    wide = [x.expand(2, 3, 20, 4, 16) for x in (q, k, v)]
    got = zk.cross_frame_attention(*wide, frames, backend="cpu")
    expected = zk.cross_frame_attention(*(x.contiguous() for x in wide), frames, backend="cpu")
    assert torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_any_thread_count_and_any_run_give_the_same_bits(isa, dtype, generator):
    q, k, v, frames = inputs((2, 3, 3, 70, 2, 40, 2), dtype, generator, requires_grad=True)
    weight = torch.randn(q.shape, generator=generator).to(dtype)
    results = []
    for count in (1, 2, 3, 5, 2):
        with testing.threads(count):
            out, lse = zk.cross_frame_attention(q, k, v, frames, return_lse=True, backend="cpu")
            gradients = torch.autograd.grad((out, lse), (q, k, v), (weight, torch.ones_like(lse)))
            results.append((out, lse, *gradients))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("D", [40, 64, 160])
def test_scores_are_sums_of_short_chains(isa, D, generator):
    # With one key lse is the score itself. A score summed channel by channel errs more the larger it is, and the error
    # of the largest one moves its whole row of o.
    q, k = torch.randn(2, 1, 1, 4096, 1, D, generator=generator).unbind(0)
    q, k = (x.transpose(1, 2).flatten(0, 1)[:, None] for x in (q, k))  # [4096, 1, 1, 1, D]
    frames = torch.zeros(1, 1, dtype=torch.int32)
    lse = zk.cross_frame_attention(q, k, k, frames, scale=1.0, return_lse=True, backend="cpu")[1].flatten()
    products = q.double() * k.double()  # exact
    exact = products.sum(-1).flatten()
    one_chain = torch.zeros(())
    for c in range(D):
        one_chain = (one_chain.double() + products[..., c].flatten()).float()

    def error(x):
        return float((x.double() - exact).square().mean().sqrt())

    assert error(lse) < 0.9 * error(one_chain)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("D", [40, 64])
def test_gradients_of_sharp_attention(isa, D, dtype, generator):
    # Where one key takes all, P is the exponential of a small difference of large numbers: the backward's scores must
    # be the forward's, bit by bit.
    q, k, v, weights = torch.randn(4, 4, 3, 31, 4, D, generator=generator).to(dtype).float().unbind(0)
    for name, ours, eager in compare_gradients(4 * q, k, v, weights, dtype):
        assert ours < 1.3 * eager, f"{name}: {ours:.2e}, eager {eager:.2e}"


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_gradients_where_all_scores_are_far_below_zero(isa, dtype, generator):
    # The exponential of what lies beside the keys of a block is infinite then.
    q, k, v, weights = torch.randn(4, 2, 3, 31, 2, 16, generator=generator).unbind(0)
    q, k = 0.5 * q + 6, 0.5 * k - 6
    compare_gradients(*(x.to(dtype).float() for x in (q, k, v, weights)), dtype)


def compare_gradients(q, k, v, weights, dtype):
    """Check gradients, every frame attending to itself; return their names, errors, and errors of eager attention."""
    frames, scale = torch.arange(q.shape[1], dtype=torch.int32)[:, None], q.shape[-1] ** -0.5

    def gradients(function, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
        return torch.autograd.grad(function(*leaves), leaves, weights.to(dtype))

    ours = gradients(lambda *x: zk.cross_frame_attention(*x, frames, backend="cpu"), dtype)
    oracle = gradients(lambda *x: reference(*x, frames, scale)[0], torch.float64)
    eager = gradients(lambda *x: testing.eager_cross_frame_attention(*x, frames, scale)[0], dtype)
    errors = []
    for name, x, o, e in zip(("dq", "dk", "dv"), ours, oracle, eager, strict=True):
        testing.assert_within_budget(x, o, e, name, gradient=True)
        errors.append((name, *(float(torch.linalg.vector_norm(y - o)) for y in (x, e))))
    return errors


@pytest.mark.parametrize("rows", ["neighbors", "window", "mixed", "anchors", "gather"])
def test_sdpa_backend_for_every_kind_of_table(rows, generator):
    T = 7
    tables = {
        "neighbors": zk.neighbors(T),
        "window": zk.neighbors(T, (-1, 0, 1), border="drop"),
        "mixed": torch.tensor([[0, 3], [-1, -1], [2, 2], [5, 6], [6, 4], [1, -1], [0, 2]], dtype=torch.int32),
        "anchors": zk.anchors(T, (0, -1)),
        "gather": zk.index_list(T, [zk.absolute(0), zk.relative(-3), zk.relative(2)]),
    }
    frames = tables[rows]
    q, k, v = (torch.randn(2, T, 12, 3, 16, generator=generator, dtype=torch.float64) for _ in range(3))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    weight = torch.randn(q.shape, generator=generator, dtype=torch.float64)
    expected = zk.cross_frame_attention(*leaves, frames, backend="reference")
    got = zk.cross_frame_attention(*leaves, frames, backend="sdpa")
    torch.testing.assert_close(got, expected)
    gradients = [torch.autograd.grad(x, leaves, weight) for x in (got, expected)]
    torch.testing.assert_close(gradients[0], gradients[1])
    with torch.no_grad():
        lses = [zk.cross_frame_attention(*leaves, frames, return_lse=True, backend=b)[1] for b in ("sdpa", "reference")]
    torch.testing.assert_close(lses[0], lses[1])


def test_sdpa_windows_share_memory_with_the_keys(generator):
    from zsvr_kernels.ops.cross_frame_attention.sdpa import _Stores, plan

    k = torch.randn(1, 6, 10, 2, 8, generator=generator)
    (group, *_) = plan(zk.neighbors(6, (-1, 0), border="drop").tolist()[1:], 6)
    window = _Stores(k).windows(group, 0)
    assert window.shape == (5, 2, 20, 8)
    assert window.untyped_storage().data_ptr() == k.untyped_storage().data_ptr()
    assert len(plan(zk.neighbors(64).tolist(), 64)) == 4  # two windows and the two borders


def test_gradcheck_of_the_reference(generator):
    q, k, v, _ = inputs((1, 2, 2, 4, 1, 8, 2), torch.float64, generator, requires_grad=True)
    frames = torch.tensor([[0, 1], [1, -1]], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda *x: reference(*x, frames, 0.3), (q, k, v))
