"""The sdpa backend: the error budget in every dtype, its two ways through torch's kernel, and any strides."""

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
