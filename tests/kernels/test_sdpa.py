"""The sdpa backend: the error budget in every dtype, its two ways through torch's kernel, and any strides.

The GPU's kernels are called here on tensors without data, which know their signatures and shapes; everything around
them is the same code as on the CPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch

import zsvr_kernels as zk
from zsvr_kernels import testing
from zsvr_kernels.ops.cross_frame_attention import cross_frame_attention_reference as reference
from zsvr_kernels.ops.cross_frame_attention import sdpa, sdpa_kernels
from zsvr_kernels.ops.cross_frame_attention.sdpa import _gathered

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TABLES = {
    "window": [[0, 1], [0, 2], [1, 3], [2, 3]],
    "holes": [[2, -1], [-1, -1], [0, 3], [1, 1]],
}


def tensors(dtype, generator, shape=(2, 4, 13, 2, 24)):
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]


def differentiate(function, inputs, weight):
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    return (out.detach(), *torch.autograd.grad(out, leaves, weight.to(out.dtype)))


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "bf16", "fp16"])
def test_forward_and_backward_stay_within_the_budget(dtype, generator):
    inputs, scale = tensors(dtype, generator), 0.3
    frames = torch.tensor(TABLES["window"], dtype=torch.int32)
    weight = torch.randn(inputs[0].shape, generator=generator).to(dtype)
    with testing.poisoned_allocations():
        got = differentiate(
            lambda *x: zk.cross_frame_attention(*x, frames, scale=scale, backend="sdpa"), inputs, weight
        )
    oracle = differentiate(lambda *x: reference(*x, frames, scale)[0], [x.double() for x in inputs], weight)
    eager = differentiate(lambda *x: testing.eager_cross_frame_attention(*x, frames, scale)[0], inputs, weight)
    for name, ours, expected, plain in zip(("o", "dq", "dk", "dv"), got, oracle, eager, strict=True):
        testing.assert_within_budget(ours, expected, plain, name, gradient=name != "o")


@pytest.mark.parametrize("table", list(TABLES))
@pytest.mark.parametrize("layout", testing.LAYOUTS)
def test_strides_do_not_matter_and_nothing_else_is_touched(table, layout, generator):
    inputs = tensors(torch.float64, generator)
    frames = torch.tensor(TABLES[table], dtype=torch.int32)
    expected = reference(*inputs, frames, 24**-0.5)[0]
    views = [testing.guarded(x, layout) for x in inputs]
    out = testing.guarded(torch.zeros_like(inputs[0]), layout)
    zk.cross_frame_attention(*(g.view for g in views), frames, backend="sdpa", out=out.view)
    torch.testing.assert_close(out.view, expected)
    for guard in (*views, out):
        guard.assert_untouched(layout)
    wide = [x[:, :, :, :1].expand(2, 4, 13, 3, 24) for x in inputs]
    torch.testing.assert_close(
        zk.cross_frame_attention(*wide, frames, backend="sdpa"), reference(*wide, frames, 24**-0.5)[0]
    )


@pytest.mark.parametrize("table", list(TABLES))
def test_gathering_as_under_a_compiler_gives_the_same(table, generator):
    inputs = tensors(torch.float64, generator)
    frames = torch.tensor(TABLES[table], dtype=torch.int32)
    weight = torch.randn(inputs[0].shape, generator=generator, dtype=torch.float64)
    gathered = differentiate(lambda *x: _gathered(*x, frames, 0.3), inputs, weight)
    expected = differentiate(lambda *x: reference(*x, frames, 0.3)[0], inputs, weight)
    torch.testing.assert_close(gathered, expected)


@pytest.mark.slow
def test_sdpa_and_reference_compile_without_a_break(tmp_path):
    script = """
        import torch
        import zsvr_kernels as zk

        q, k, v = (torch.randn(1, 3, 7, 2, 12).requires_grad_() for _ in range(3))
        frames = zk.neighbors(3)
        for backend in ("sdpa", "reference"):
            def layer(q, k, v):
                return zk.cross_frame_attention(q, k, v, frames, backend=backend).sin().sum()
            loss = torch.compile(layer, fullgraph=True)(q, k, v)
            expected = layer(q, k, v)
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(torch.autograd.grad(loss, (q, k, v)), torch.autograd.grad(expected, (q, k, v)))
        print("compiled")
    """
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0 and "compiled" in done.stdout, done.stderr[-3000:]


MANY = {
    "neighbors": zk.neighbors(6),
    "dropped": zk.neighbors(6, border="drop"),
    "previous": zk.previous(6),
    "three": zk.neighbors(6, (-1, 1), include_self=True),
    "two apart": zk.neighbors(6, (-2, 2)),
    "anchors": zk.first_and_previous(6),
    "all": zk.all_frames(6),
    "repeats": torch.tensor([[1, 1], [-1, -1], [3, 2], [2, 3], [5, 1], [0, 4]], dtype=torch.int32),
}


@pytest.mark.parametrize("table", list(MANY))
def test_every_kind_of_table_has_its_gradients(table, generator):
    frames = MANY[table]
    inputs = tensors(torch.float64, generator, (2, 6, 5, 2, 8))
    weight = torch.randn(inputs[0].shape, generator=generator, dtype=torch.float64)
    got = differentiate(lambda *x: zk.cross_frame_attention(*x, frames, scale=0.3, backend="sdpa"), inputs, weight)
    expected = differentiate(lambda *x: reference(*x, frames, 0.3)[0], inputs, weight)
    torch.testing.assert_close(got, expected)


def test_a_gradient_without_strides_is_taken(generator):
    inputs = tensors(torch.float64, generator)
    frames = torch.tensor(TABLES["window"], dtype=torch.int32)
    results = []
    for backend in ("sdpa", "reference"):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = zk.cross_frame_attention(*leaves, frames, backend=backend)
        results.append(torch.autograd.grad(out.sum(), leaves))  # its gradient is one number, expanded
    torch.testing.assert_close(*results)


def test_a_tables_values_are_read_once(generator):
    q, k, v = tensors(torch.float32, generator)
    frames = torch.tensor(TABLES["window"], dtype=torch.int32)
    zk.cross_frame_attention(q, k, v, frames, backend="sdpa")
    kept = sdpa._plans[frames]
    before = zk.cross_frame_attention(q, k, v, frames, backend="sdpa")
    assert sdpa._plans[frames] is kept
    frames.copy_(torch.tensor(TABLES["holes"], dtype=torch.int32))
    after = zk.cross_frame_attention(q, k, v, frames, backend="sdpa")
    assert sdpa._plans[frames] is not kept and not torch.equal(before, after)
    torch.testing.assert_close(after, reference(q, k, v, frames, 24**-0.5)[0])
    with pytest.raises(ValueError, match="frames holds 3"):  # the same table for fewer key frames is another plan
        zk.cross_frame_attention(q, k[:, :3], v[:, :3], frames, backend="sdpa")
    held = len(sdpa._plans)
    del frames
    assert len(sdpa._plans) == held - 1


def test_tables_of_inference_mode_are_read_every_time(generator):
    q, k, v = tensors(torch.float32, generator)
    with torch.inference_mode():
        frames = torch.tensor(TABLES["window"], dtype=torch.int32)
        before = zk.cross_frame_attention(q, k, v, frames, backend="sdpa")
        frames.copy_(torch.tensor(TABLES["holes"], dtype=torch.int32))
        after = zk.cross_frame_attention(q, k, v, frames, backend="sdpa")
    assert frames not in sdpa._plans and not torch.equal(before, after)


@pytest.mark.parametrize("name", ["FLASH", "EFFICIENT"])
def test_the_kernels_of_gpus_are_called_as_torch_declares_them(name):
    kernel = getattr(sdpa_kernels, name)
    T, P, H, D = 5, 33, 2, 40
    dtype = torch.float32 if name == "EFFICIENT" else torch.bfloat16
    q, k, v, d_o = (torch.empty(1, T, P, H, D, dtype=dtype, device="meta") for _ in range(4))
    groups = sdpa.plan(zk.neighbors(T).tolist(), T)
    o, lse, rests = sdpa._forward(q, k, v, groups, 0.3, kernel)
    assert o.shape == q.shape and lse.shape == (1, T, P, H) and lse.dtype == torch.float32
    keys = sdpa._Stores(k)
    for group, rest in zip(groups, rests, strict=True):
        view = keys.windows(group, 0)
        parts = kernel.backward(
            sdpa._query_view(d_o, group)[0],
            sdpa._query_view(q, group)[0],
            view,
            view,
            sdpa._query_view(o, group)[0],
            sdpa._query_view(lse[..., None], group)[0, ..., 0],
            rest,
            0.3,
        )
        assert [x.shape for x in parts] == [sdpa._query_view(q, group)[0].shape, view.shape, view.shape]
        total = torch.zeros(T, P, H, D, device="meta")
        sdpa._add_windows(total, parts[1], group)


def test_an_lse_on_a_gpu_is_refused_where_its_kernels_do_not_go():
    from zsvr_kernels import backends

    def refusal(dtype, D, **fields):
        return backends.refusal("sdpa", backends.Call("cross_frame_attention", "cuda", dtype, D, **fields))

    lse = {"return_lse": True}
    assert refusal(torch.bfloat16, 64, **lse) is None and refusal(torch.float32, 64, **lse) is None
    assert refusal(torch.float64, 64) is None and "dtype" in refusal(torch.float64, 64, **lse)
    assert "head dim 20" in refusal(torch.bfloat16, 20, **lse) and refusal(torch.bfloat16, 20) is None
    assert "no gradient of lse" in refusal(torch.bfloat16, 64, needs_grad=True, **lse)
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        assert "switches" in refusal(torch.bfloat16, 64, **lse)
    finally:
        torch.backends.cuda.enable_flash_sdp(True)
