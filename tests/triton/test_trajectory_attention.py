"""Trajectory attention in Triton: against the oracle, and the properties that kernels could break."""

from __future__ import annotations

import weakref

import pytest
import torch

import zsvr_kernels as zk
from zsvr_kernels import _native, _triton, records, testing
from zsvr_kernels.inverse_index import inverse, inverse_by_sorting
from zsvr_kernels.ops.trajectory_attention import trajectory_attention_reference as reference
from zsvr_kernels.ops.trajectory_attention import triton_launch
from zsvr_kernels.sampling import bilinear_sample, sites

# B, Bp, T, Tk, grid, H, D, L
SHAPES = [
    (1, 1, 1, 1, (1, 1), 1, 8, 1),
    (2, 1, 2, 3, (5, 7), 2, 40, 2),
    (2, 2, 2, 1, (1, 9), 2, 64, 3),
    (1, 1, 2, 2, (6, 1), 1, 80, 2),
    (1, 1, 1, 2, (9, 5), 4, 24, 3),
    (1, 1, 1, 2, (3, 4), 2, 160, 5),
    (1, 1, 1, 1, (2, 3), 1, 256, 2),
]
NAMES = ("o", "lse", "dq", "dk", "dv", "dpositions")
needs_native = pytest.mark.skipif(not _native.is_available(), reason="the native module is not built")


def inputs(shape, dtype, device, generator, dead=0.3):
    B, Bp, T, Tk, grid, H, D, L = shape
    P = grid[0] * grid[1]
    q, k, v = (torch.randn(B, t, P, H, D, generator=generator).to(dtype).to(device) for t in (T, Tk, Tk))
    return q, k, v, testing.random_trajectories(Bp, T, Tk, L, grid, generator, dead=dead).to(device)


def upstream(q, generator):
    """Gradients of the output and of lse, as float32 that q's dtype can hold."""
    weights = torch.randn(q.shape, generator=generator), torch.randn(q.shape[:4], generator=generator)
    return weights[0].to(q.dtype).float().to(q.device), weights[1].to(q.device)


def differentiate(function, tensors, weights):
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    out, lse = function(*tensors)
    gradients = torch.autograd.grad((out, lse), tensors, (weights[0].to(out.dtype), weights[1].to(lse.dtype)))
    return (out.detach(), lse.detach(), *gradients)


def attend(trajectories, scale=None):
    def function(q, k, v, positions):
        moved = zk.Trajectories(positions, trajectories.valid, trajectories.frames, trajectories.grid)
        return zk.trajectory_attention(q, k, v, moved, scale=scale, return_lse=True, backend="triton")

    return function


def compare(q, k, v, trajectories, scale, weights):
    """Hold outputs and all gradients to the budget."""
    where = (trajectories.valid, trajectories.frames, trajectories.grid)

    def eager(q, k, v, positions):
        return testing.eager_trajectory_attention(q, k, v, zk.Trajectories(positions, *where), scale)

    tensors = (q, k, v, trajectories.positions)
    with testing.poisoned_allocations():
        ours = differentiate(attend(trajectories, scale), tensors, weights)
    exact = differentiate(lambda *x: reference(*x, *where, scale), [x.double() for x in tensors], weights)
    plain = differentiate(eager, tensors, weights)
    for name, got, expected, comparable in zip(NAMES, ours, exact, plain, strict=True):
        testing.assert_within_budget(got, expected, comparable, name, gradient=name.startswith("d"))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_backward_match_the_oracle(shape, dtype, device, generator):
    q, k, v, trajectories = inputs(shape, dtype, device, generator)
    compare(q, k, v, trajectories, 1.3 * shape[6] ** -0.5, upstream(q, generator))


@pytest.mark.parametrize("scale", [0.0, -0.5])
def test_dead_slots_stay_dead_at_any_scale(scale, dtype, device, generator):
    q, k, v, trajectories = inputs((1, 1, 2, 2, (3, 5), 2, 24, 4), dtype, device, generator, dead=0.5)
    compare(q, k, v, trajectories, scale, upstream(q, generator))


def test_a_site_that_every_sample_reads_gets_its_whole_gradient(dtype, device, generator):
    q, k, v, trajectories = inputs((1, 1, 2, 1, (4, 5), 2, 16, 3), dtype, device, generator, dead=0.0)
    # Far outside and in one cell: the longest rows that an index can have, beside empty ones.
    trajectories.positions[0, 0] = -9.0
    trajectories.positions[0, 1] = torch.tensor((2.25, 1.5))
    trajectories.frames.fill_(0)
    compare(q, k, v, trajectories, 0.25, upstream(q, generator))


def test_one_live_slot_returns_its_sample_exactly(dtype, device, generator):
    grid, T, H, D = (4, 6), 2, 2, 40
    P = grid[0] * grid[1]
    q, k, v = (torch.randn(1, T, P, H, D, generator=generator).to(dtype) for _ in range(3))
    # An integer position next to these must not notice.
    v[0, 1, 3], k[0, 1, 3] = torch.inf, torch.nan
    whole = torch.stack([torch.randperm(P, generator=generator) for _ in range(T)])
    whole[whole == 3] = 4
    positions = sites(grid)[whole].reshape(1, T, 1, P, 2)
    valid = torch.ones(1, T, 1, P, dtype=torch.bool)
    frames = torch.tensor([[1], [0]], dtype=torch.int32)
    trajectories = zk.Trajectories.from_positions(positions, valid, frames, grid).to(device)
    leaves = [x.to(device).requires_grad_() for x in (q, k, v)]
    out, lse = zk.trajectory_attention(*leaves, trajectories, return_lse=True, backend="triton")
    for i, j in ((0, 1), (1, 0)):
        assert torch.equal(out[0, i].cpu(), v[0, j, whole[i]])
    assert torch.isfinite(lse).all()
    for gradient in torch.autograd.grad(out.float().sum(), leaves):
        assert torch.isfinite(gradient).all()
    # Halves and quarters are exact in records too.
    between = (positions + torch.tensor((0.25, -0.5))).clamp(min=0)
    v, k = v.nan_to_num(posinf=1.0), k.nan_to_num()
    moved = zk.Trajectories.from_positions(between, valid, frames, grid).to(device)
    out = zk.trajectory_attention(*(x.to(device) for x in (q, k, v)), moved, backend="triton").cpu()
    flat = v.double().flatten(3)[0]
    for i, j in ((0, 1), (1, 0)):
        expected = bilinear_sample(flat[j : j + 1], between[:, i, 0].double(), grid).reshape(P, H, D)
        eps = torch.finfo(dtype).eps
        assert ((out[0, i].double() - expected).abs() <= 0.51 * eps * expected.abs() + 4e-7).all()


def test_no_live_slot_gives_zero(dtype, device, generator):
    q, k, v, trajectories = inputs((1, 1, 2, 2, (3, 5), 2, 24, 2), dtype, device, generator)
    trajectories.valid.fill_(False)
    trajectories.positions.fill_(torch.nan)
    leaves = [x.requires_grad_() for x in (q, k, v, trajectories.positions)]
    out, lse = attend(trajectories)(*leaves)
    assert (out == 0).all() and torch.isneginf(lse).all()
    for gradient in torch.autograd.grad(out.float().sum(), leaves):
        assert (gradient == 0).all()


def test_no_clip_at_all(device, generator):
    q, k, v, trajectories = inputs((0, 1, 2, 2, (3, 5), 2, 24, 2), torch.float32, device, generator)
    with testing.poisoned_allocations():
        results = differentiate(attend(trajectories), (q, k, v, trajectories.positions), upstream(q, generator))
    assert all(x.numel() == 0 for x in results[:5]) and (results[5] == 0).all()
    out = zk.trajectory_attention(q.requires_grad_(), k, v, trajectories, backend="triton")
    assert torch.autograd.grad(out.sum(), q)[0].shape == q.shape


def test_frames_that_32_bits_do_not_reach_are_refused(device):
    grid = (1 << 11, 1 << 11)
    q = torch.zeros(64, dtype=torch.float16, device=device).as_strided((1, 1, 1 << 22, 8, 64), (0, 0, 0, 0, 1))
    positions = torch.zeros(2, device=device).expand(1, 1, 1, 1 << 22, 2)
    valid = torch.ones(1, dtype=torch.bool, device=device).expand(1, 1, 1, 1 << 22)
    fields = positions, valid, torch.zeros(1, 1, dtype=torch.int32, device=device), grid
    triton_launch._check(*[q[..., :56]] * 3, *fields)
    with pytest.raises(ValueError, match=r"P\*H\*D"):
        triton_launch._check(q, q, q, *fields)


def test_what_no_launch_can_check_is_absent(device, generator):
    q, k, v, trajectories = inputs((1, 1, 2, 2, (3, 5), 2, 16, 3), torch.float16, device, generator, dead=0.0)
    trajectories.frames.fill_(1)
    positions, valid = trajectories.positions, trajectories.valid
    for name, bad in (("frames", 2), ("frames", 10**9), ("frames", -7), ("base", 11), ("base", 2**31 - 1)):
        frames = trajectories.frames.clone()
        base, fractions = (x.clone() for x in trajectories.records(False))
        expected_valid = valid.clone()
        if name == "frames":
            frames[0, 1] = bad
            expected_valid[:, 0, 1] = False
        else:
            base[:, 0, 1] = bad
            expected_valid[:, 0, 1] = False
        where = (positions, valid, frames, 3, 5, 0.25, "triton", base, fractions)
        got = torch.ops.zsvr.trajectory_attention_fwd(q, k, v, *where)
        frames = trajectories.frames
        expected = torch.ops.zsvr.trajectory_attention_fwd(
            q, k, v, positions, expected_valid, frames, 3, 5, 0.25, "triton"
        )
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), (name, bad)


def test_shared_trajectories_equal_an_expanded_copy(device, generator):
    q, k, v, shared = inputs((4, 2, 1, 2, (3, 5), 2, 24, 2), torch.float32, device, generator)
    positions, valid = shared.positions.repeat(2, 1, 1, 1, 1), shared.valid.repeat(2, 1, 1, 1)
    copied = zk.Trajectories.from_positions(positions, valid, shared.frames, shared.grid)
    weights = upstream(q, generator)
    ours = differentiate(attend(shared), (q, k, v, shared.positions), weights)
    expected = differentiate(attend(copied), (q, k, v, copied.positions), weights)
    assert all(torch.equal(a, b) for a, b in zip(ours[:5], expected[:5], strict=True))
    torch.testing.assert_close(ours[5], expected[5][:2] + expected[5][2:], atol=1e-5, rtol=1e-5)


def test_clips_taken_in_turn_give_the_same(device, generator, monkeypatch):
    q, k, v, trajectories = inputs((3, 1, 1, 2, (3, 5), 2, 24, 3), torch.float32, device, generator)
    weights = upstream(q, generator)
    expected = differentiate(attend(trajectories), (q, k, v, trajectories.positions), weights)
    monkeypatch.setattr(triton_launch, "PAIR_BYTES", 2 * 8 * 3 * 15 * 2)  # two clips, then one
    got = differentiate(attend(trajectories), (q, k, v, trajectories.positions), weights)
    assert all(torch.equal(a, b) for a, b in zip(got[:5], expected[:5], strict=True))
    torch.testing.assert_close(got[5], expected[5], atol=1e-5, rtol=1e-5)  # a sum over clips


@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_strides_do_not_matter_and_nothing_else_is_written(layout, dtype, device, generator):
    q, k, v, trajectories = inputs((2, 1, 1, 2, (3, 7), 2, 24, 2), dtype, device, generator)
    expected = zk.trajectory_attention(q, k, v, trajectories, backend="triton")
    views = [testing.guarded(x, layout) for x in (q, k, v)]
    out = testing.guarded(torch.zeros_like(q), layout)
    returned = zk.trajectory_attention(*(g.view for g in views), trajectories, backend="triton", out=out.view)
    assert returned is out.view and torch.equal(out.view, expected)
    for guard in (*views, out):
        guard.assert_untouched(layout)


@pytest.mark.parametrize("layout", ["fused", "frames apart", "not aligned"])
def test_gradients_from_views_are_those_from_copies(layout, dtype, device, generator):
    q, k, v, trajectories = inputs((2, 1, 2, 2, (3, 5), 2, 24, 2), dtype, device, generator)
    weight = upstream(q, generator)[0].to(dtype)
    views = {
        "fused": lambda x: torch.stack((x, x), 3)[:, :, :, 1],  # aligned rows, every other one
        "frames apart": lambda x: torch.cat((x, x), 2)[:, :, :15],  # and so not at one distance through a clip
        "not aligned": lambda x: testing.guarded(x, "padded").view,
    }
    results = []
    for view in (torch.clone, views[layout]):
        leaves = [view(x).detach().requires_grad_() for x in (q, k, v)]
        out = zk.trajectory_attention(*leaves, trajectories, backend="triton")
        results.append((out, *torch.autograd.grad(out, leaves, view(weight))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_any_run_gives_the_same_bits(dtype, device, generator):
    q, k, v, trajectories = inputs((2, 1, 1, 2, (5, 6), 2, 40, 3), dtype, device, generator)
    weights = upstream(q, generator)
    tensors = (q, k, v, trajectories.positions)
    first, second = (differentiate(attend(trajectories), tensors, weights) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_only_wanted_gradients_are_computed(device, generator):
    q, k, v, trajectories = inputs((1, 1, 2, 2, (3, 5), 1, 16, 2), torch.float32, device, generator)
    tensors = (q, k, v, trajectories.positions)
    weights = upstream(q, generator)
    expected = differentiate(attend(trajectories), tensors, weights)[2:]
    for n in range(4):
        leaves = [x.detach().clone() for x in tensors]
        leaves[n].requires_grad_()
        out = attend(trajectories)(*leaves)
        (got,) = torch.autograd.grad(out, leaves[n], weights)
        assert torch.equal(got, expected[n])


def test_a_neighbour_that_is_not_finite_bounds_no_derivative(device, generator):
    # At an integer position the right neighbour has weight zero, but the derivative along x is taken towards it. So has
    # the left one on the right border, in a record's cell.
    grid = (3, 4)
    q, k, v = torch.randn(3, 1, 1, 12, 1, 8, generator=generator).to(device).unbind(0)
    positions = sites(grid).reshape(1, 1, 1, 12, 2).repeat(1, 1, 2, 1, 1).to(device)
    positions[:, :, 1] += 0.25
    v[0, 0, 2] = torch.inf
    valid = torch.ones(1, 1, 2, 12, dtype=torch.bool, device=device)
    valid[..., 2] = valid[:, :, 1, 1] = False  # whoever reads site 2 with a weight
    frames = torch.zeros(1, 2, dtype=torch.int32, device=device)
    got, expected = (
        torch.autograd.grad(zk.trajectory_attention(q, k, v, moved, backend=backend).sum(), moved.positions)[0]
        for backend in ("triton", "reference")
        for moved in [zk.Trajectories(positions.clone().requires_grad_(), valid, frames, grid)]
    )
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=2e-5)


@needs_native
@pytest.mark.parametrize("grid", [(5, 7), (1, 9), (6, 1), (1, 1)], ids=str)
def test_the_sorted_index_is_the_native_one(grid, generator):
    trajectories = testing.random_trajectories(2, 3, 4, 5, grid, generator)
    fields = (trajectories.positions, trajectories.valid, trajectories.frames, grid)
    offsets, samples, weights = inverse(*fields, 4)
    expected = (offsets, samples, weights)
    got = inverse_by_sorting(*fields, 4)
    count = int(offsets[-1])
    assert got[1].numel() == 4 * trajectories.valid.numel() >= count
    for a, b in zip((got[0], got[1][:count], got[2][:count]), expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_records_are_the_cell_and_its_fractions(device, generator):
    Hg, Wg = grid = (5, 7)
    trajectories = testing.random_trajectories(2, 2, 3, 4, grid, generator).to(device)
    trajectories.positions[0, 0, 0, 0, 0] = torch.nan
    positions = trajectories.positions.cpu()
    x, y = positions[..., 0].clamp(0, Wg - 1), positions[..., 1].clamp(0, Hg - 1)
    x0, y0 = x.floor().clamp(max=Wg - 2), y.floor().clamp(max=Hg - 2)
    alive = trajectories.valid.cpu() & ~positions.isnan().any(-1)
    base, fractions = (t.cpu() for t in trajectories.records(True))
    assert torch.equal(base, torch.where(alive, y0 * Wg + x0, -1.0).int())
    exact = torch.stack((x - x0, y - y0), -1)
    assert torch.equal(fractions[alive], exact[alive])
    again, packed = (t.cpu() for t in trajectories.records(False))
    assert torch.equal(again, base)
    unpacked = torch.stack((packed & 0xFFFF, packed >> 16 & 0xFFFF), -1) / 32768
    assert ((unpacked - exact)[alive].abs() <= 2.0**-16).all()
    whole = (exact * 4 == (exact * 4).floor()) & alive[..., None]
    assert torch.equal(unpacked[whole], exact[whole]) and (unpacked[whole] == 1).any()


def test_records_are_kept_until_positions_change(device, generator):
    q, k, v, trajectories = inputs((1, 1, 2, 2, (3, 5), 1, 16, 2), torch.float16, device, generator)
    first = trajectories.records(False)
    assert trajectories.records(False) is first and trajectories.records(True) is not first
    zk.trajectory_attention(q, k, v, trajectories, backend="triton")
    assert trajectories.records(False) is first
    held = sum(x.numel() * x.element_size() for x in trajectories.kept())
    assert held == (8 + 12) * trajectories.valid.numel()
    trajectories.positions.add_(0.5)
    assert trajectories.records(False) is not first
    out = zk.trajectory_attention(q, k, v, trajectories, backend="triton")
    fresh = zk.Trajectories(trajectories.positions, trajectories.valid, trajectories.frames, (3, 5))
    assert torch.equal(out, zk.trajectory_attention(q, k, v, fresh, backend="triton"))


def test_what_a_graph_was_captured_with_stays_in_memory(device, generator, monkeypatch):
    trajectories = inputs((1, 1, 2, 2, (3, 5), 1, 16, 2), torch.float16, device, generator)[3]
    kept = trajectories.records(False)
    alive = weakref.ref(kept[0])
    with monkeypatch.context() as patch:
        patch.setattr(zk.trajectories, "_is_captured", lambda x: True)
        assert trajectories.records(False) is kept and trajectories.records(False) is kept
        exact = weakref.ref(trajectories.records(True)[0])
    assert exact() is None, "what a capture builds is not kept"
    del kept
    trajectories.positions.add_(0.5)
    trajectories.records(False)
    assert alive() is not None, "a replay would read freed memory"


def test_a_score_that_is_not_a_number_shows_in_lse(dtype, device, generator):
    q, k, v, trajectories = inputs((1, 1, 2, 2, (3, 5), 1, 16, 2), dtype, device, generator, dead=0.0)
    clean = zk.trajectory_attention(q, k, v, trajectories, return_lse=True, backend="triton")
    q[0, 0, 4] = float("nan")
    for got, expected in zip(
        zk.trajectory_attention(q, k, v, trajectories, return_lse=True, backend="triton"), clean, strict=True
    ):
        assert got[0, 0, 4].isnan().all()
        got[0, 0, 4] = expected[0, 0, 4]
        assert torch.equal(got, expected)


def test_records_that_do_not_fit_are_refused(device, generator):
    q, k, v, trajectories = inputs((1, 1, 2, 2, (3, 5), 1, 16, 2), torch.float32, device, generator)
    fields = (trajectories.positions, trajectories.valid, trajectories.frames, 3, 5, 0.25)
    op = torch.ops.zsvr.trajectory_attention_fwd
    base, fractions = trajectories.records(True)
    packed = trajectories.records(False)[1]
    for bad, error in (
        ((base, packed), TypeError),
        ((base, None), ValueError),
        ((base[:, :1], fractions), ValueError),
        ((base.long(), fractions), TypeError),
        ((base, fractions[..., :1]), ValueError),
        ((base, fractions.flip(-1).mT.contiguous().mT), ValueError),
    ):
        with pytest.raises(error, match=r"base|fractions"):
            op(q, k, v, *fields, "triton", *bad)
    with pytest.raises(ValueError, match="triton"):
        op(q, k, v, *fields, "cpu", base, fractions)
    assert records.is_exact(torch.float32) and _triton.why_missing == ""


def test_compiled_calls_make_records_and_index_for_themselves(device, generator):
    q, k, v, trajectories = inputs((1, 1, 2, 2, (3, 5), 1, 16, 2), torch.float32, device, generator)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    weights = upstream(q, generator)
    call = attend(trajectories)
    positions = trajectories.positions
    compiled = torch.compile(lambda *x: call(*x, positions), fullgraph=True, backend="aot_eager")
    expected = torch.autograd.grad(call(*leaves, positions), leaves, weights)
    got = torch.autograd.grad(compiled(*leaves), leaves, weights)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
