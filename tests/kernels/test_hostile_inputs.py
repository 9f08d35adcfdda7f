"""Whatever Python throws at the operators, they answer like the reference or raise a useful error."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import zsvr_kernels as zk
from zsvr_kernels import _native

ERRORS = (TypeError, ValueError, RuntimeError)
BACKENDS = ["reference", "sdpa"] + (["cpu"] if _native.is_available() else [])


def qkv(shape=(1, 2, 6, 2, 16), **options):
    return tuple(torch.randn(shape, **options) for _ in range(3))


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        (lambda q, k, v: (q.tolist(), k, v), TypeError, "torch.Tensor"),
        (lambda q, k, v: (q[0], k, v), ValueError, "5 axes"),
        (lambda q, k, v: (q, k[:, :, :3], v), ValueError, "shape"),
        (lambda q, k, v: (q, k, v[..., :8]), ValueError, "shape"),
        (lambda q, k, v: (q, k.half(), v), TypeError, "float16"),
        (lambda q, k, v: (q.int(), k.int(), v.int()), TypeError, "int32"),
        (lambda q, k, v: (q.to("meta"), k, v), ValueError, "device|on meta"),
        (lambda q, k, v: (q[:, :0], k, v), ValueError, "at least 1"),
        (lambda q, k, v: (q[:, :, :0], k[:, :, :0], v[:, :, :0]), ValueError, "at least 1"),
        (lambda q, k, v: (q.mT.contiguous().mT, k, v), ValueError, "dense"),
        (lambda q, k, v: (q.to_sparse(), k, v), TypeError, "dense"),
    ],
)
def test_what_does_not_fit_is_named(change, error, match):
    with pytest.raises(error, match=match):
        zk.cross_frame_attention(*change(*qkv()), zk.neighbors(2))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "frames",
    [
        torch.zeros(3, 1, dtype=torch.int32),
        torch.zeros(2, 0, dtype=torch.int32),
        torch.zeros(2, dtype=torch.int32),
        torch.zeros(2, 1, dtype=torch.int64),
        torch.tensor([[0], [2]], dtype=torch.int32),
        torch.tensor([[0], [-2]], dtype=torch.int32),
        torch.full((2, 1), 2**31 - 1, dtype=torch.int32),
        [[0], [1]],
    ],
    ids=["rows", "empty", "rank", "dtype", "high", "low", "huge", "list"],
)
def test_bad_tables_are_refused(frames, backend):
    with pytest.raises(ERRORS):
        zk.cross_frame_attention(*qkv(), frames, backend=backend)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "1", torch.ones(())])
def test_bad_scales_are_refused(scale):
    with pytest.raises(ValueError, match="scale"):
        zk.cross_frame_attention(*qkv(), zk.neighbors(2), scale=scale)


def test_no_clips_give_no_output():
    for backend in BACKENDS:
        out, lse = zk.cross_frame_attention(*qkv((0, 2, 6, 2, 16)), zk.neighbors(2), return_lse=True, backend=backend)
        assert out.shape == (0, 2, 6, 2, 16) and lse.shape == (0, 2, 6, 2)


def test_huge_tables_work():
    q, k, v = qkv((1, 2, 3, 1, 8))
    frames = torch.tensor([[0], [1]], dtype=torch.int32).repeat(1, 5000)
    got = zk.cross_frame_attention(q, k, v, frames)
    torch.testing.assert_close(got, zk.cross_frame_attention(q, k, v, frames[:, :1]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_bad_values_spread_only_to_their_own_queries(bad):
    if not _native.is_available():
        pytest.skip("the native module is not built")
    q, k, v = qkv((1, 2, 70, 2, 24))
    q[0, 1, 5, 1, 3] = bad
    out = zk.cross_frame_attention(q, k, v, zk.neighbors(2), backend="cpu")
    clean = torch.ones(out.shape, dtype=torch.bool)
    clean[0, 1, 5, 1] = False
    assert torch.isfinite(out[clean]).all()
    if bad != bad:
        assert out[0, 1, 5, 1].isnan().all()


@pytest.mark.skipif(not _native.is_available(), reason="the native module is not built")
@settings(deadline=None, max_examples=40, derandomize=True)
@given(data=st.data())
def test_hostile_positions_never_crash(data):
    grid = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 6)))
    P, T, L = grid[0] * grid[1], 2, data.draw(st.integers(1, 4))
    wild = st.sampled_from([float("nan"), float("inf"), -float("inf"), 3e38, -3e38, -0.0, 1e-40, 0.5, 2.0, 2.0**31])
    values = data.draw(st.lists(wild, min_size=8, max_size=8))
    positions = torch.tensor(values).repeat(T * L * P * 2 // 8 + 1)[: T * L * P * 2].reshape(1, T, L, P, 2)
    valid = torch.ones(1, T, L, P, dtype=torch.bool)
    frames = torch.zeros(T, L, dtype=torch.int32)
    # Past from_positions, which would refuse: the kernels must stand on their own.
    trajectories = zk.Trajectories(positions.requires_grad_(), valid, frames, grid)
    leaves = [x.requires_grad_() for x in qkv((1, T, P, 1, 8))]
    out = zk.trajectory_attention(*leaves, trajectories, backend="cpu")
    assert torch.isfinite(out).all()
    for gradient in torch.autograd.grad(out.sum(), (*leaves, positions)):
        assert torch.isfinite(gradient).all()


@settings(deadline=None, max_examples=150, derandomize=True)
@given(data=st.data())
def test_random_calls_agree_with_the_reference_or_raise(data):
    sizes = [data.draw(st.integers(0, n)) for n in (3, 3, 9, 3)]
    D = data.draw(st.sampled_from([1, 4, 8, 12, 16, 40, 256, 264, 512]))
    Tk = data.draw(st.integers(0, 3))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    B, T, P, H = sizes
    q = torch.randn(B, T, P, H, D).to(dtype)
    k, v = torch.randn(2, B, Tk, P, H, D).to(dtype).unbind(0)
    rows, columns = data.draw(st.sampled_from([T, T, T, T + 1])), data.draw(st.integers(0, 3))
    frames = torch.randint(-1, max(Tk, 1) + data.draw(st.sampled_from([0, 0, 0, 1])), (rows, columns)).int()
    if data.draw(st.booleans()):
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    outcomes = []
    for backend in ("reference", data.draw(st.sampled_from([*BACKENDS, "auto"]))):
        try:
            outcomes.append(zk.cross_frame_attention(q, k, v, frames, backend=backend))
        except ERRORS as error:
            assert len(str(error)) > 15
            outcomes.append(error)
    if isinstance(outcomes[1], torch.Tensor):
        tolerance = {torch.float32: 2e-5, torch.float64: 1e-10}.get(dtype, 3e-2)
        torch.testing.assert_close(outcomes[1], outcomes[0], atol=tolerance, rtol=tolerance)
    elif isinstance(outcomes[0], torch.Tensor):
        assert "backend" in str(outcomes[1])


def test_trajectories_that_do_not_fit_are_named():
    q, k, v = qkv((2, 2, 6, 2, 16))
    positions = torch.zeros(1, 2, 1, 6, 2)
    valid, frames = torch.ones(1, 2, 1, 6, dtype=torch.bool), torch.zeros(2, 1, dtype=torch.int32)
    good = zk.Trajectories.from_positions(positions, valid, frames, (2, 3))
    zk.trajectory_attention(q, k, v, good)
    with pytest.raises(TypeError, match="Trajectories"):
        zk.trajectory_attention(q, k, v, positions)
    with pytest.raises(ValueError, match="6 sites"):
        zk.trajectory_attention(*(x[:, :, :4] for x in (q, k, v)), good)
    with pytest.raises(ValueError, match="T = 1"):
        zk.trajectory_attention(q[:, :1], k, v, good)
    with pytest.raises(ValueError, match="does not divide"):
        three = zk.Trajectories.from_positions(
            positions.repeat(3, 1, 1, 1, 1), valid.repeat(3, 1, 1, 1), frames, (2, 3)
        )
        zk.trajectory_attention(q, k, v, three)
    beyond = zk.Trajectories.from_positions(positions, valid, frames + 2, (2, 3))
    for backend in ("auto", "reference"):
        with pytest.raises(ValueError, match=r"0\.\.1|-1\.\.1"):
            zk.trajectory_attention(q, k, v, beyond, backend=backend)
    with pytest.raises(ValueError, match=r"sites|grid"):
        zk.Trajectories.from_positions(positions, valid, frames, (2, 4))
    with pytest.raises(TypeError, match="bool"):
        zk.Trajectories.from_positions(positions, valid.float(), frames, (2, 3))


def test_explicit_backends_never_fall_back():
    q, k, v = qkv((1, 2, 6, 2, 12))
    if _native.is_available():
        with pytest.raises(RuntimeError, match=r"head dim 12.*What would work: reference, sdpa"):
            zk.cross_frame_attention(q, k, v, zk.neighbors(2), backend="cpu")
    with pytest.raises(RuntimeError, match="no such kernel"):
        zk.cross_frame_attention(q, k, v, zk.neighbors(2), backend="cuda")
    with pytest.raises(RuntimeError, match=r"only under TRITON_INTERPRET=1|triton is not installed|head dim 12"):
        zk.cross_frame_attention(q, k, v, zk.neighbors(2), backend="triton")
    with pytest.raises(ValueError, match="backend must be one of"):
        zk.cross_frame_attention(q, k, v, zk.neighbors(2), backend="fast")
    leaves = [x.requires_grad_() for x in qkv()]
    with pytest.raises(RuntimeError, match="no gradient of lse"):
        zk.cross_frame_attention(*leaves, zk.neighbors(2), return_lse=True, backend="sdpa")
