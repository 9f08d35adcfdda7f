"""slr_attention: every way to combine against its definition in plain PyTorch, and the method's invariants."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

import zsvr_kernels as zk
from zsvr_kernels import backends, testing
from zsvr_kernels.options import COMBINES
from zsvr_kernels.sampling import bilinear_sample, sites

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPATIAL_AT_ONE_FRAME = ("serial", "parallel", "joint", "cross")
every_combine = pytest.mark.parametrize("combine", COMBINES)


def chained(B, T, grid, generator, *, window=None, dead=0.2, still=False):
    """Trajectories of random links: moving, leaving the grid, some of them cut so that sites are isolated."""
    Hg, Wg = grid
    own = sites(grid)
    move = 0.0 if still else 1.0
    links = [own + move * torch.randn(B, T - 1, Hg * Wg, 2, generator=generator) for _ in range(2)]
    valid = [torch.rand(B, T - 1, Hg * Wg, generator=generator) >= dead for _ in range(2)]
    if not still and T > 1:
        for x in valid:
            x[:, :, : Wg + 1] = False  # the first sites of every frame reach nobody
    return zk.chain_links(zk.Links.from_positions(*links, *valid, grid), window=window)


def tokens(B, T, P, H, D, generator, dtype=torch.float32):
    return [torch.randn(B, T, P, H, D, generator=generator).to(dtype) for _ in range(3)]


def reaches_nobody(trajectories):
    """The isolated rule, slot by slot."""
    B, T, L, P = trajectories.valid.shape
    isolated = torch.ones(B, T, P, dtype=torch.bool)
    for i, slot in itertools.product(range(T), range(L)):
        j = int(trajectories.frames[i, slot])
        if j >= 0 and j != i:
            isolated[:, i] &= ~trajectories.valid[:, i, slot]
    return isolated


def naive(q, k, v, frames, trajectories, combine, blend=0.5, scale=None, prefix=0):
    """SLR attention in the inputs' dtype, one query frame after the other; joint is one softmax over listed keys."""
    B, T, P, H, D = q.shape
    scale = D**-0.5 if scale is None else scale
    L = trajectories.slots
    clones = B // trajectories.positions.shape[0]
    isolated = reaches_nobody(trajectories).repeat(clones, 1, 1)

    def short(i, rows=frames):  # logits [B, H, P, n], values [B, H, n, D]
        sources = [j for j in rows[i].tolist() if j >= 0]
        keys, values = (x[:, sources].flatten(1, 2).transpose(1, 2) for x in (k, v))
        return scale * q[:, i].transpose(1, 2) @ keys.mT, values

    def cross(i, rows=frames):
        logits, values = short(i, rows)
        return (logits.softmax(-1) @ values).transpose(1, 2)

    def long(i, u):  # logits [B, H, P', L], samples [B, L, P', H, D]
        row = trajectories.frames[i].long()
        where = trajectories.positions[:, i].repeat(clones, 1, 1, 1).flatten(0, 1)
        live = ((row >= 0)[:, None] & trajectories.valid[:, i]).repeat(clones, 1, 1).transpose(1, 2)[:, None]

        def sample(x):
            source = x[:, row.clamp(min=0), prefix:].flatten(0, 1).flatten(2)
            return bilinear_sample(source, where, trajectories.grid).reshape(B, L, P - prefix, H, D)

        logits = scale * torch.einsum("bphd,blphd->bhpl", q[:, i, prefix:], sample(k))
        return logits.masked_fill(~live, -torch.inf), sample(u)

    def along(i, u):
        logits, samples = long(i, u)
        return torch.einsum("bhpl,blphd->bphd", logits.softmax(-1), samples)

    if combine == "spatial":
        return torch.stack([cross(i, torch.arange(T)[:, None]) for i in range(T)], 1)
    X = torch.stack([cross(i) for i in range(T)], 1)
    if combine == "cross":
        return X
    outputs = []
    for i in range(T):
        if combine == "trajectory":
            outputs.append(along(i, v))
        elif combine == "serial":
            outputs.append(along(i, X))
        elif combine == "parallel":
            mixed = blend * X[:, i, prefix:] + (1 - blend) * along(i, v)
            outputs.append(torch.where(isolated[:, i, :, None, None], X[:, i, prefix:], mixed))
        else:
            near, values = short(i)
            far, samples = long(i, v)
            far = far.masked_fill(isolated[:, i][:, None, :, None], -torch.inf)
            weights = torch.cat((near[:, :, prefix:], far), -1).softmax(-1)
            n = near.shape[-1]
            y = (weights[..., :n] @ values).transpose(1, 2)
            outputs.append(y + torch.einsum("bhpl,blphd->bphd", weights[..., n:], samples))
    return torch.cat((X[:, :, :prefix], torch.stack(outputs, 1)), 2)


def differentiate(function, tensors, weight):
    leaves = [x.detach().clone().requires_grad_() for x in tensors]
    y = function(*leaves)
    gradients = torch.autograd.grad(y, leaves, weight.to(y.dtype), allow_unused=True)
    return [y.detach(), *(torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True))]


def check(inputs, frames, trajectories, generator, what, **options):
    """Hold output and gradients of slr_attention to the budget."""
    weight = torch.randn(inputs[0].shape, generator=generator).to(inputs[0].dtype)
    ours = differentiate(lambda *x: zk.slr_attention(*x, frames, trajectories, **options), inputs, weight)
    plain = differentiate(lambda *x: naive(*x, frames, trajectories, **options), inputs, weight)
    wide = [x.double() for x in inputs]
    exact = differentiate(lambda *x: naive(*x, frames, trajectories, **options), wide, weight.double())
    for name, a, b, c in zip(("o", "dq", "dk", "dv"), ours, exact, plain, strict=True):
        testing.assert_within_budget(a, b, c, f"{name} of {what}", gradient=name != "o")


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@every_combine
def test_every_mode_is_its_definition(combine, dtype, generator):
    grid, T = (3, 7), 3
    trajectories = chained(1, T, grid, generator)
    assert 0.2 < float(trajectories.isolated().float().mean()) < 0.8
    inputs = tokens(2, T, 21, 2, 40, generator, dtype)  # twice the clips of the trajectories
    check(inputs, zk.neighbors(T), trajectories, generator, combine, combine=combine, blend=0.3, scale=0.2)


@pytest.mark.parametrize(
    ("shape", "frames"),
    [
        ((1, 5, (3, 3), 1, 8), zk.all_frames(5)),
        ((2, 3, (1, 7), 3, 64), zk.first_and_previous(3)),
        ((1, 2, (5, 3), 2, 80), zk.neighbors(2, include_self=True)),
        ((1, 7, (3, 5), 1, 160), zk.previous(7)),
        ((1, 3, (3, 4), 2, 12), zk.neighbors(3, (-2, 1), border="drop")),
    ],
    ids=lambda x: str(x) if isinstance(x, tuple) else "",
)
@pytest.mark.parametrize("combine", ["serial", "parallel", "joint"])
def test_shapes_tables_and_head_dims(combine, shape, frames, generator):
    B, T, grid, H, D = shape
    trajectories = chained(1, T, grid, generator, window=2)
    inputs = tokens(B, T, grid[0] * grid[1], H, D, generator)
    check(inputs, frames, trajectories, generator, f"{combine}, {shape}", combine=combine)


@pytest.mark.parametrize("backend", ["reference", "auto"])
@every_combine
def test_two_runs_and_a_broadcast_give_the_same_bits(combine, backend, generator):
    trajectories = chained(2, 3, (3, 5), generator)
    expanded = zk.Trajectories.from_positions(
        trajectories.positions.repeat(2, 1, 1, 1, 1), trajectories.valid.repeat(2, 1, 1, 1), trajectories.frames, (3, 5)
    )
    inputs = tokens(4, 3, 15, 2, 40, generator)
    weight = torch.randn(inputs[0].shape, generator=generator)
    options = {"combine": combine, "backend": backend}
    runs = [
        differentiate(lambda *x, t=t: zk.slr_attention(*x, zk.neighbors(3), t, **options), inputs, weight)
        for t in (trajectories, trajectories, expanded)
    ]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))
    changed = chained(2, 3, (3, 5), generator)
    different = zk.slr_attention(*inputs, zk.neighbors(3), changed, **options)
    assert torch.equal(runs[0][0], different) == (combine in ("cross", "spatial"))


PRESETS = {
    "neighbors": zk.neighbors(1),
    "with self": zk.neighbors(1, include_self=True),
    "reflect": zk.neighbors(1, border="reflect"),
    "drop": zk.neighbors(1, border="drop"),
    "previous": zk.previous(1),
    "first and previous": zk.first_and_previous(1),
    "all frames": zk.all_frames(1),
    "anchors": zk.anchors(1, [0, -1]),
}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("combine", SPATIAL_AT_ONE_FRAME)
def test_one_frame_is_spatial_self_attention(combine, preset, generator):
    trajectories = chained(1, 1, (5, 3), generator)
    inputs = tokens(3, 1, 15, 2, 40, generator)
    got = zk.slr_attention(*inputs, PRESETS[preset], trajectories, combine=combine)
    plain = F.scaled_dot_product_attention(*(x.transpose(2, 3) for x in inputs)).transpose(2, 3)
    exact = F.scaled_dot_product_attention(*(x.double().transpose(2, 3) for x in inputs)).transpose(2, 3)
    testing.assert_within_budget(got, exact, plain, combine)
    assert torch.equal(got, zk.slr_attention(*inputs, PRESETS[preset], trajectories, combine="spatial"))


@every_combine
def test_identical_frames_without_motion_give_identical_frames(combine, generator):
    inputs = [x.expand(-1, 4, -1, -1, -1) for x in tokens(1, 1, 15, 2, 24, generator)]
    trajectories = chained(1, 4, (3, 5), generator, dead=0.0, still=True)
    frames = zk.neighbors(4, include_self=True)
    exact = naive(*(x.double() for x in inputs), frames, trajectories, combine)
    torch.testing.assert_close(exact, exact[:, :1].expand_as(exact), rtol=0, atol=1e-12)
    plain = naive(*inputs, frames, trajectories, combine)
    got = zk.slr_attention(*inputs, frames, trajectories, combine=combine)
    testing.assert_within_budget(got, exact[:, :1].expand_as(exact), plain, combine)


def test_serial_over_identical_frames_without_motion_is_the_short_range(generator):
    inputs = [x.expand(-1, 3, -1, -1, -1) for x in tokens(2, 1, 15, 2, 40, generator)]
    trajectories = chained(1, 3, (5, 3), generator, dead=0.0, still=True)
    frames = zk.neighbors(3)
    got = zk.slr_attention(*inputs, frames, trajectories)
    exact = naive(*(x.double() for x in inputs), frames, trajectories, "cross")
    testing.assert_within_budget(got, exact, naive(*inputs, frames, trajectories, "cross"), "Tr(X)")


def test_serial_without_live_neighbours_is_exactly_the_short_range(generator):
    inputs = tokens(1, 3, 15, 2, 40, generator)
    trajectories = chained(1, 3, (5, 3), generator, dead=1.0)
    assert bool(trajectories.isolated().all())
    X = zk.cross_frame_attention(*inputs, zk.neighbors(3))
    for combine in ("serial", "parallel", "joint"):
        assert torch.equal(zk.slr_attention(*inputs, zk.neighbors(3), trajectories, combine=combine), X), combine


@every_combine
def test_permuted_frames_permute_the_output(combine, generator):
    T, grid, perm = 4, (3, 5), torch.tensor([2, 0, 3, 1])
    inputs = tokens(1, T, 15, 2, 40, generator)
    frames = zk.neighbors(T, include_self=True)
    t = chained(1, T, grid, generator)
    where = perm.argsort()  # frame j is now where[j]

    def renamed(x):
        return torch.where(x >= 0, where[x.clamp(min=0).long()].to(torch.int32), -1)[perm]

    moved = zk.Trajectories.from_positions(t.positions[:, perm], t.valid[:, perm], renamed(t.frames), grid)
    got = zk.slr_attention(*(x[:, perm] for x in inputs), renamed(frames), moved, combine=combine)
    exact = naive(*(x.double() for x in inputs), frames, t, combine)[:, perm]
    testing.assert_within_budget(got, exact, naive(*inputs, frames, t, combine)[:, perm], combine)


def test_isolated_sites_reach_no_other_frame(generator):
    for trajectories in (
        chained(2, 4, (3, 5), generator),
        chained(1, 4, (3, 5), generator, window=1),
        testing.random_trajectories(2, 3, 3, 3, (3, 5), generator, dead=0.7),  # own slots elsewhere, twice or dead
    ):
        expected = reaches_nobody(trajectories)
        assert torch.equal(trajectories.isolated(), expected)
        assert 0 < int(expected.sum()) < expected.numel()
    frames = torch.tensor([[0, -1], [1, 0]], dtype=torch.int32)  # an absent slot reaches nobody, whatever it holds
    absent = zk.Trajectories.from_positions(
        torch.zeros(1, 2, 2, 4, 2), torch.ones(1, 2, 2, 4, dtype=torch.bool), frames, (2, 2)
    )
    assert absent.isolated().tolist() == [[[True] * 4, [False] * 4]]


@pytest.mark.parametrize("combine", ["parallel", "joint"])
def test_only_isolated_sites_take_the_short_range_alone(combine, generator):
    inputs = tokens(2, 3, 35, 2, 40, generator)
    trajectories = chained(1, 3, (5, 7), generator)
    isolated = trajectories.isolated().expand(2, -1, -1)
    X = zk.cross_frame_attention(*inputs, zk.neighbors(3))
    same = (zk.slr_attention(*inputs, zk.neighbors(3), trajectories, combine=combine) == X).all(-1).all(-1)
    assert torch.equal(same, isolated) and 0 < int(isolated.sum()) < isolated.numel()


@pytest.mark.parametrize("prefix", [1, 5])
@pytest.mark.parametrize("combine", ["serial", "parallel", "joint", "cross", "spatial"])
def test_prefix_tokens_attend_but_have_no_trajectory(combine, prefix, generator):
    trajectories = chained(1, 3, (3, 5), generator)
    inputs = tokens(2, 3, 15 + prefix, 2, 40, generator)
    check(inputs, zk.neighbors(3), trajectories, generator, combine, combine=combine, prefix=prefix)


@pytest.mark.parametrize("blend", [0, 0.25, 0.75, 1])
def test_blend_is_the_share_of_the_short_range(blend, generator):
    inputs = tokens(1, 2, 15, 2, 40, generator)
    trajectories = chained(1, 2, (3, 5), generator, dead=0.0, still=True)
    parts = [zk.slr_attention(*inputs, zk.neighbors(2), trajectories, combine=c) for c in ("cross", "trajectory")]
    got = zk.slr_attention(*inputs, zk.neighbors(2), trajectories, combine="parallel", blend=blend)
    exact = blend * parts[0].double() + (1 - blend) * parts[1].double()
    testing.assert_within_budget(got, exact, blend * parts[0] + (1 - blend) * parts[1], "parallel")


@every_combine
def test_gradcheck(combine, generator):
    trajectories = chained(1, 2, (2, 2), generator, dead=0.3)
    inputs = [x.double().requires_grad_() for x in tokens(1, 2, 5, 1, 2, generator)]
    prefix = 0 if combine == "trajectory" else 1
    if not prefix:
        inputs = [x.detach()[:, :, 1:].requires_grad_() for x in inputs]
    options = {"combine": combine, "blend": 0.3, "prefix": prefix}
    assert torch.autograd.gradcheck(lambda *x: zk.slr_attention(*x, zk.neighbors(2), trajectories, **options), inputs)


@every_combine
def test_positions_get_their_gradient(combine, generator):
    inputs = tokens(1, 2, 15, 2, 40, generator)
    t = chained(1, 2, (3, 5), generator)
    positions = t.positions.clone().requires_grad_()
    moved = zk.Trajectories.from_positions(positions, t.valid, t.frames, t.grid)
    y = zk.slr_attention(*(x.requires_grad_() for x in inputs), zk.neighbors(2), moved, combine=combine)
    (gradient,) = torch.autograd.grad(y.square().sum(), positions, allow_unused=True)
    if combine in ("cross", "spatial"):
        assert gradient is None
    else:
        assert float(gradient.abs().max()) > 0 and bool(torch.isfinite(gradient).all())


@every_combine
def test_compile_fullgraph(combine, generator):
    trajectories = chained(1, 3, (3, 5), generator)
    inputs = tokens(1, 3, 15, 2, 40, generator)
    weight = torch.randn(inputs[0].shape, generator=generator)

    def function(q, k, v):
        return zk.slr_attention(q, k, v, zk.neighbors(3), trajectories, combine=combine, blend=0.25)

    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(*(differentiate(f, inputs, weight) for f in (function, compiled)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_without_trajectories_it_is_the_short_range(generator):
    inputs = tokens(1, 3, 15, 2, 40, generator)
    X = zk.cross_frame_attention(*inputs, zk.neighbors(3))
    for combine in ("serial", "parallel", "joint", "cross"):
        assert torch.equal(zk.slr_attention(*inputs, zk.neighbors(3), None, combine=combine, prefix=2), X)
    own = torch.arange(3, dtype=torch.int32)[:, None]
    spatial = zk.slr_attention(*inputs, zk.neighbors(3), None, combine="spatial")
    assert torch.equal(spatial, zk.cross_frame_attention(*inputs, own))


def test_autocast_takes_what_the_operators_take(generator):
    q, k, v = tokens(1, 3, 15, 2, 40, generator)
    trajectories = chained(1, 3, (3, 5), generator)
    for combine in COMBINES:
        low = [x.bfloat16() for x in (q, k, v)]
        expected = zk.slr_attention(*low, zk.neighbors(3), trajectories, combine=combine)
        with torch.autocast("cpu", dtype=torch.bfloat16):  # a norm after the projection leaves q and k in float32
            got = zk.slr_attention(q, k, v.bfloat16(), zk.neighbors(3), trajectories, combine=combine)
        assert torch.equal(got, expected), combine


def test_an_explicit_backend_is_used(generator, monkeypatch):
    inputs = tokens(1, 3, 15, 2, 40, generator)
    trajectories = chained(1, 3, (3, 5), generator)
    seen = []
    choose = backends.choose
    monkeypatch.setattr(backends, "choose", lambda name, call: seen.append((call.op, name)) or choose(name, call))
    zk.slr_attention(*inputs, zk.neighbors(3), trajectories, backend="reference")
    assert seen == [("cross_frame_attention", "reference"), ("trajectory_attention", "reference")]
    with pytest.raises(RuntimeError, match="trajectory_attention: backend 'sdpa' cannot run"):
        zk.slr_attention(*inputs, zk.neighbors(3), trajectories, backend="sdpa")


def test_errors(generator):
    q, k, v = tokens(1, 3, 15, 2, 40, generator)
    trajectories = chained(1, 3, (3, 5), generator)
    frames = zk.neighbors(3)
    cases = [
        (ValueError, "combine must be one of serial", {"combine": "both"}),
        (ValueError, "blend must be within 0..1, got 1.5", {"blend": 1.5}),
        (ValueError, "blend must be finite", {"blend": float("nan")}),
        (TypeError, "blend must be a number", {"blend": "half"}),
        (ValueError, "prefix must be at least 0", {"prefix": -1}),
        (ValueError, r"3x5 grid \(15 sites\), but q has P = 14", {"prefix": 1}),
        (ValueError, "needs trajectories, got None", {"combine": "trajectory", "trajectories": None}),
        (ValueError, "nothing to give the prefix tokens", {"combine": "trajectory", "prefix": 1}),
        (ValueError, "scale must be a finite number", {"scale": float("inf")}),
        (TypeError, "trajectories must be zsvr_kernels.Trajectories", {"trajectories": "none"}),
        (ValueError, "frames must be", {"frames": zk.neighbors(4)}),
    ]
    for error, message, change in cases:
        arguments = {"frames": frames, "trajectories": trajectories, **change}
        with pytest.raises(error, match=message):
            zk.slr_attention(q, k, v, arguments.pop("frames"), arguments.pop("trajectories"), **arguments)
    with pytest.raises(ValueError, match="takes one clip"):
        zk.slr_attention(q, k[:, :2], v[:, :2], frames, trajectories)
    with pytest.raises(TypeError, match=r"q must be a torch.Tensor"):
        zk.slr_attention([1.0], k, v, frames, trajectories)


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("D", [8, 40, 72, 256])
def test_serial_in_one_step_of_autograd_is_the_two_operators(isa, D, dtype, generator):
    grid = (5, 7)
    trajectories = chained(1, 4, grid, generator)
    weights = torch.randn(2, 4, 35, 3, D, generator=generator).to(dtype)
    inputs = tokens(2, 4, 35, 3, D, generator, dtype)
    frames = torch.tensor([[0, 2], [-1, 2], [2, 2], [1, -1]], dtype=torch.int32)  # nobody reads frame 3

    def gradients(function, dtype=dtype):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in inputs]
        out = function(*leaves)
        return out, (out.detach(), *torch.autograd.grad(out, leaves, weights.to(dtype)))

    def two(q, k, v):
        x = zk.cross_frame_attention(q, k, v, frames, backend="cpu")
        return zk.trajectory_attention(q, k, x, trajectories, backend="cpu")

    with testing.poisoned_allocations():
        out, ours = gradients(lambda *x: zk.slr_attention(*x, frames, trajectories, backend="cpu"))
        assert type(out.grad_fn).__name__ == "SerialFunctionBackward"
        _, separate = gradients(two)
    _, oracle = gradients(lambda *x: zk.slr_attention(*x, frames, trajectories, backend="reference"), torch.float64)
    _, eager = gradients(lambda *x: naive(*x, frames, trajectories, "serial"))
    for n, name in enumerate(("out", "dq", "dk", "dv")):
        if dtype == torch.float32:
            assert torch.equal(ours[n], separate[n]), name
        testing.assert_within_budget(ours[n], oracle[n], eager[n], name, gradient=name != "out")


def test_gradients_are_added_to_what_fits_only(generator):
    q, k, v = tokens(1, 3, 20, 2, 16, generator)
    frames = zk.neighbors(3)
    o, lse = torch.ops.zsvr.cross_frame_attention_fwd(q, k, v, frames, 0.25, "cpu")

    def add(dq, dk):
        torch.ops.zsvr.cross_frame_attention_bwd_add(o, q, k, v, o, lse, frames, 0.25, "cpu", dq, dk)

    for wrong in (q[:, :2], q.mT.contiguous().mT, q.expand(2, -1, -1, -1, -1), q[..., :8], q[0]):
        with pytest.raises(ValueError):
            add(wrong, torch.zeros_like(k))
        with pytest.raises(ValueError):
            add(torch.zeros_like(q), wrong)
    with pytest.raises(TypeError):
        add(torch.zeros_like(q).double(), torch.zeros_like(k))
