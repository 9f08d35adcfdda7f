"""The operators inside PyTorch: opcheck, compile, autocast, checkpointing, no_grad, determinism, memory."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import zsvr_kernels as zk
from zsvr_kernels import _native, testing

pytestmark = pytest.mark.skipif(not _native.is_available(), reason="the native module is not built")


def cross_frame(generator, dtype=torch.float32):
    q, k, v = (torch.randn(1, 3, 20, 2, 16, generator=generator).to(dtype) for _ in range(3))
    return (q, k, v), zk.neighbors(3)


def trajectory(generator, dtype=torch.float32):
    (q, k, v), _ = cross_frame(generator, dtype)
    return (q, k, v), testing.random_trajectories(1, 3, 3, 3, (4, 5), generator)


OPERATORS = {
    "cross_frame_attention": (zk.cross_frame_attention, cross_frame),
    "trajectory_attention": (zk.trajectory_attention, trajectory),
}
both = pytest.mark.parametrize("name", list(OPERATORS))


def registered_ops():
    names = {str(op).split(".")[0] for op in torch._C._dispatch_get_all_op_names() if op.startswith("zsvr::")}
    return sorted(name.removeprefix("zsvr::") for name in names)


def opcheck_arguments(generator):
    (q, k, v), frames = cross_frame(generator)
    _, t = trajectory(generator)
    o, lse = torch.ops.zsvr.cross_frame_attention_fwd(q, k, v, frames, 0.25, "cpu")
    three, four = [True, False, True], [True, True, False, True]
    where = (t.positions, t.valid, t.frames)
    links = torch.randn(4, 1, 2, 20, 2, generator=generator)
    valid = torch.rand(2, 1, 2, 20, generator=generator) > 0.2
    features = torch.randn(3, 20, 6, generator=generator)
    sites = torch.randint(0, 4, (2, 20, 2), dtype=torch.int32, generator=generator)
    return {
        "cross_frame_attention_fwd": (q, k, v, frames, 0.25, "cpu"),
        "cross_frame_attention_out": (q, k, v, frames, 0.25, "cpu", torch.empty_like(q)),
        "cross_frame_attention_bwd": (o, lse, q, k, v, o, lse, frames, 0.25, three, "cpu"),
        "cross_frame_attention_bwd_add": (
            o, q, k, v, o, lse, frames, 0.25, "cpu", torch.zeros_like(q), torch.zeros_like(k),
        ),
        "trajectory_attention_fwd": (q, k, v, *where, 4, 5, 0.25, "cpu"),
        "trajectory_attention_out": (q, k, v, *where, 4, 5, 0.25, "cpu", torch.empty_like(q)),
        "trajectory_attention_bwd": (
            o, None, q, k, v, lse, *where, *t.inverse(3), 4, 5, 0.25, four, "cpu",
        ),
        "chain_links": (links[0], links[1], valid[0], valid[1], 4, 5, 1, False, False, "cpu"),
        "correspondence_search": (features[:2], features[1:], sites, 4, 5, 1, "cpu"),
        "link_score": (features[:2], features[1:], links[0, 0], 4, 5, "cpu"),
    }  # fmt: skip


def test_every_registered_op_passes_opcheck(generator):
    arguments = opcheck_arguments(generator)
    assert sorted(name.split(".")[0] for name in registered_ops()) == sorted(arguments)
    for name, values in arguments.items():
        torch.library.opcheck(getattr(torch.ops.zsvr, name).default, values)


@both
def test_compile_fullgraph_is_the_first_call_of_a_process(name, tmp_path):
    script = f"""
        import torch
        import zsvr_kernels as zk
        from zsvr_kernels import testing

        g = torch.Generator().manual_seed(0)
        tensors = [torch.randn(1, 3, 20, 2, 16, generator=g).requires_grad_() for _ in range(3)]
        extra = zk.neighbors(3) if "{name}"[0] == "c" else testing.random_trajectories(1, 3, 3, 3, (4, 5), g)

        def layer(q, k, v):
            out, lse = zk.{name}(q * 2, k, v, extra, return_lse=True, backend="cpu")
            return out.sin().sum() + lse.sin().sum()

        loss = torch.compile(layer, fullgraph=True)(*tensors)
        got = torch.autograd.grad(loss, tensors)
        expected_loss = layer(*tensors)
        expected = torch.autograd.grad(expected_loss, tensors)
        torch.testing.assert_close(loss, expected_loss)
        torch.testing.assert_close(got, expected)
        with torch.no_grad():
            torch.compile(lambda q, k, v: zk.{name}(q, k, v, extra), fullgraph=True)(*tensors)
        print("compiled")
    """
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "compiled" in done.stdout, done.stderr[-3000:]


@both
def test_autocast_computes_in_its_dtype(name, generator):
    function, make = OPERATORS[name]
    tensors, extra = make(generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = function(*tensors, extra)
    assert got.dtype == torch.bfloat16
    assert torch.equal(got, function(*(x.bfloat16() for x in tensors), extra))
    for backend in ("cpu", "reference"):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, lse = function(*tensors, extra, return_lse=True, backend=backend)
        plain = function(*(x.bfloat16() for x in tensors), extra, return_lse=True, backend=backend)
        assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
        assert torch.equal(out, plain[0]) and torch.equal(lse, plain[1]), backend
        with torch.autocast("cpu", dtype=torch.bfloat16):
            compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
            again = compiled(*tensors, extra, return_lse=True, backend=backend)
        assert [x.dtype for x in again] == [torch.bfloat16, torch.float32]
        torch.testing.assert_close(again, plain)
    with (
        torch.autocast("cpu", dtype=torch.bfloat16),
        pytest.raises(TypeError, match=r"out is torch\.float32, but q is torch\.bfloat16 under autocast"),
    ):
        function(*tensors, extra, out=torch.empty_like(tensors[0]))
    leaves = [x.requires_grad_() for x in tensors]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = function(*leaves, extra).float().sum()
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(loss, leaves))


@pytest.mark.parametrize("occ_pool", ["max", "mean"])
@pytest.mark.parametrize("resize", ["area", "antialias", "nearest"])
def test_autocast_leaves_links_alone(resize, occ_pool, generator):
    flow, back = 3 * torch.randn(2, 1, 2, 2, 40, 60, generator=generator)
    options = {"grid": (4, 5), "resize": resize, "occ_pool": occ_pool, "alpha": 0.5, "beta": 4.0}
    results = []
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            links = zk.Links.from_flow(flow, back, **options)
            results.append((links, zk.chain_links(links, backend="cpu"), zk.chain_links(links, backend="reference")))
    for plain, cast in zip(*results, strict=True):
        for name in ("forward", "backward", "valid_forward", "valid_backward", "positions", "valid"):
            if hasattr(plain, name):
                assert torch.equal(getattr(plain, name), getattr(cast, name)), name
    assert results[0][0].forward.dtype == torch.float32


@both
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(name, reentrant, generator):
    function, make = OPERATORS[name]
    tensors, extra = make(generator)
    leaves = [x.requires_grad_() for x in tensors]

    def layer(q, k, v):
        return function(q.sin(), k, v, extra)

    gradients = []
    for out in (layer(*leaves), checkpoint(layer, *leaves, use_reentrant=reentrant)):
        for x in leaves:
            x.grad = None
        out.square().sum().backward()
        gradients.append([x.grad.clone() for x in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@both
def test_nothing_is_saved_without_gradient(name, generator):
    function, make = OPERATORS[name]
    tensors, extra = make(generator)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        assert function(*tensors, extra).grad_fn is None
        leaves = [x.requires_grad_() for x in tensors]
        with torch.no_grad():
            assert function(*leaves, extra).grad_fn is None
        with torch.inference_mode():
            function(*leaves, extra)
        assert not saved
        assert function(*leaves, extra).grad_fn is not None and saved


@both
def test_double_backward_is_refused(name, generator):
    function, make = OPERATORS[name]
    tensors, extra = make(generator)
    leaves = [x.requires_grad_() for x in tensors]
    with pytest.raises(RuntimeError, match="double backward"):
        torch.autograd.grad(function(*leaves, extra, backend="cpu").sum(), leaves, create_graph=True)
    out = function(*leaves, extra, backend="reference")
    (first, *_) = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
    assert torch.isfinite(torch.autograd.grad(first.square().sum(), leaves[0])[0]).all()


@both
def test_deterministic_algorithms_are_no_obstacle(name, generator):
    function, make = OPERATORS[name]
    tensors, extra = make(generator)
    leaves = [x.requires_grad_() for x in tensors]
    torch.use_deterministic_algorithms(True)
    try:
        torch.autograd.grad(function(*leaves, extra).sum(), leaves)
    finally:
        torch.use_deterministic_algorithms(False)


@both
def test_lse_has_a_gradient(name, generator):
    function, make = OPERATORS[name]
    tensors, extra = make(generator)
    results = []
    for backend in ("cpu", "reference"):
        leaves = [x.clone().requires_grad_() for x in tensors]
        _, lse = function(*leaves, extra, return_lse=True, backend=backend)
        results.append(torch.autograd.grad(lse.sin().sum(), leaves[:2]))
    torch.testing.assert_close(*results)


@both
def test_out_is_refused_where_a_gradient_is_needed(name, generator):
    function, make = OPERATORS[name]
    tensors, extra = make(generator)
    out = torch.empty_like(tensors[0])
    assert function(*tensors, extra, out=out) is out
    with pytest.raises(ValueError, match="out= does not record"):
        function(tensors[0].requires_grad_(), *tensors[1:], extra, out=out)
    with pytest.raises(ValueError, match="overlaps itself"):
        function(*(x.detach() for x in tensors), extra, out=out[:, :1].expand(1, 3, 20, 2, 16))
    with pytest.raises(ValueError, match="shape"):
        function(*(x.detach() for x in tensors), extra, out=out[:, :2])


def test_offsets_beyond_two_to_the_31(generator):
    # Frames lie 2^29 elements apart in untouched (never committed) memory, so the last one is at 5 * 2^29.
    T, P, H, D, gap = 6, 9, 2, 16, 2**29
    base = torch.empty(T * gap, dtype=torch.bfloat16)
    small = torch.randn(3, 1, T, P, H, D, generator=generator).bfloat16()
    views = []
    for n in range(3):
        view = base.as_strided((1, T, P, H, D), (T * gap, gap, H * D, D, 1), n * P * H * D)
        views.append(view.copy_(small[n]))
    frames = zk.neighbors(T, (-1, 1))
    got = zk.cross_frame_attention(*views, frames, backend="cpu")
    assert torch.equal(got, zk.cross_frame_attention(*small, frames, backend="cpu"))
    trajectories = testing.random_trajectories(1, T, T, 2, (3, 3), generator)
    got = zk.trajectory_attention(*views, trajectories, backend="cpu")
    assert torch.equal(got, zk.trajectory_attention(*small, trajectories, backend="cpu"))
    gradients = []
    for tensors in (views, small.unbind(0)):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = zk.cross_frame_attention(*leaves, frames, backend="cpu")
        out = out + zk.trajectory_attention(*leaves, trajectories, backend="cpu")
        gradients.append(torch.autograd.grad(out.float().square().sum(), leaves))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_merge_attention_gradients_and_empty_sides(generator):
    shape = (1, 2, 3, 2, 4)
    outs = [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    lses = [torch.randn(shape[:4], generator=generator, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(zk.merge_attention, (outs[0], lses[0], outs[1], lses[1]))
    nothing = torch.full(shape[:4], -torch.inf, dtype=torch.float64, requires_grad=True)
    out, lse = zk.merge_attention(outs[0], lses[0], torch.full_like(outs[1], torch.nan), nothing)
    assert torch.equal(out, outs[0]) and torch.equal(lse, lses[0])
    out, lse = zk.merge_attention(outs[0], nothing, outs[1], nothing)
    assert (out == 0).all() and torch.isneginf(lse).all()
    gradients = torch.autograd.grad(out.sum(), (outs[0], outs[1]))
    assert all(torch.isfinite(g).all() for g in gradients)
    with pytest.raises(ValueError, match="shape"):
        zk.merge_attention(outs[0], lses[0], outs[1], lses[1][:, :1])
