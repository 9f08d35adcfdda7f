"""The kernels inside PyTorch on a GPU: torch.compile, checkpointing, autocast, memory, SDPA's windows."""

from __future__ import annotations

import calls
import pytest
import torch
from torch.utils.checkpoint import checkpoint

import zsvr_kernels as zk
from zsvr_kernels import testing
from zsvr_kernels.ops.cross_frame_attention import sdpa

attentions = pytest.mark.parametrize("name", calls.ATTENTIONS)


@attentions
def test_compile_fullgraph(name, cuda):
    attention, inputs = calls.case(name, cuda, torch.float32)

    def layer(q, k, v):
        o, lse = attention(q * 2, k, v, return_lse=True)
        return o.sin().sum() + lse.sin().sum()

    results = []
    for function in (layer, torch.compile(layer, fullgraph=True)):
        leaves = [x.clone().requires_grad_() for x in inputs]
        loss = function(*leaves)
        results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


@attentions
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_nothing(name, reentrant, device):
    attention, inputs = calls.case(name, device, torch.float16)
    gradients = []
    for wrapped in (False, True):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = checkpoint(attention, *leaves, use_reentrant=reentrant) if wrapped else attention(*leaves)
        out.square().sum().backward()
        gradients.append([x.grad for x in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@attentions
def test_autocast_computes_in_its_dtype(name, device):
    attention, inputs = calls.case(name, device, torch.float32)
    with torch.autocast(device.type, dtype=torch.float16):
        got = attention(*inputs)
    assert got.dtype == torch.float16
    assert torch.equal(got, attention(*(x.half() for x in inputs)))


@attentions
def test_opcheck(name, cuda):
    attention, (q, k, v) = calls.case(name, cuda, torch.float32)
    if name == "cross_frame_attention":
        arguments = (q, k, v, attention.extra, 0.125, "triton")
    else:
        t = attention.extra
        arguments = (q, k, v, t.positions, t.valid, t.frames, *t.grid, 0.125, "triton")
    torch.library.opcheck(getattr(torch.ops.zsvr, f"{name}_fwd").default, arguments)


def test_auto_takes_the_kernels(cuda):
    for name in calls.ATTENTIONS:
        attention, inputs = calls.case(name, cuda, torch.bfloat16)
        assert zk.explain(name, *inputs, attention.extra).choice == "triton"
        assert torch.equal(attention(*inputs, backend="auto"), attention(*inputs))


@attentions
def test_a_forward_takes_no_more_than_its_result(name, cuda):
    """No frame is copied, no sample materialised: beyond the output there is lse and what the READMEs name."""
    T, grid, H, D = 16, (32, 32), 8, 64
    attention = calls.attention(name, cuda, T, grid)
    inputs = calls.tokens(cuda, torch.bfloat16, (1, T, 1024, H, D))
    attention(*inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    out = attention(*inputs)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - out.nbytes
    assert extra <= 4 * T * 1024 * H + (2 << 20)


@attentions
def test_a_backward_takes_what_the_readme_says(name, cuda):
    T, grid, H, D, L = 16, (32, 32), 8, 64, 5
    P = grid[0] * grid[1]
    attention = calls.attention(name, cuda, T, grid, L)
    inputs = [x.requires_grad_() for x in calls.tokens(cuda, torch.bfloat16, (1, T, P, H, D))]
    weight = calls.weights(inputs[0])[0].detach()
    torch.autograd.grad(attention(*inputs), inputs, weight)  # records and index are kept
    out = attention(*inputs)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = torch.autograd.grad(out, inputs, weight)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - sum(g.nbytes for g in gradients)
    expected = 8 * T * P * H if name == "cross_frame_attention" else T * P * H * (8 * L + 4)
    assert extra <= expected + (2 << 20)


# ---- torch's own kernels on windows ----

TABLES = {
    "neighbors": lambda T: zk.neighbors(T),
    "previous": lambda T: zk.previous(T),
    "anchors": lambda T: zk.first_and_previous(T),
    "holes": lambda T: torch.tensor([[(i + 2) % T, -1] for i in range(T)], dtype=torch.int32),
}


@pytest.mark.parametrize("D", [40, 64, 128])
@pytest.mark.parametrize("table", list(TABLES))
def test_sdpa_on_windows(table, D, dtype, cuda):
    T, P, H = 7, 96, 3
    frames = TABLES[table](T).to(cuda)
    inputs = calls.tokens(cuda, dtype, (2, T, P, H, D))
    weight = calls.weights(inputs[0])[0]
    attention = calls.Attention("cross_frame_attention", frames)
    got = calls.step(lambda *x: attention(*x, backend="sdpa"), inputs, weight)
    oracle = calls.step(lambda *x: attention.reference(*x)[0], [x.double() for x in inputs], weight.double())
    eager = calls.step(lambda *x: attention.eager(*x)[0], inputs, weight)
    for what, ours, expected, other in zip(("o", "dq", "dk", "dv"), got, oracle, eager, strict=True):
        testing.assert_within_budget(ours, expected, other, what, gradient=what != "o")
    o, lse = attention(*inputs, backend="sdpa", return_lse=True)
    assert torch.equal(o, got[0])
    expected_lse = attention.reference(*(x.double() for x in inputs))[1]
    testing.assert_within_budget(lse, expected_lse, attention.eager(*inputs)[1], "lse")


def test_sdpa_waits_for_the_device_once_per_table(cuda):
    frames = zk.neighbors(6).to(cuda)
    inputs = calls.tokens(cuda, torch.float16, (1, 6, 64, 2, 64))
    call = calls.Attention("cross_frame_attention", frames)
    expected = call(*inputs, backend="sdpa")
    torch.cuda.set_sync_debug_mode("error")
    try:
        got = call(*inputs, backend="sdpa")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(got, expected)


@pytest.mark.parametrize("is_seen", [False, True])
def test_sdpa_under_capture(is_seen, cuda):
    frames = zk.neighbors(6).to(cuda)
    inputs = calls.tokens(cuda, torch.float16, (1, 6, 64, 2, 64))
    call = calls.Attention("cross_frame_attention", frames)
    expected = call(*inputs, backend="reference")
    if is_seen:
        call(*inputs, backend="sdpa")
    else:  # what torch sets up at a kernel's first call (cuDNN's handle) no graph captures
        sdpa._gathered(*inputs, frames, inputs[0].shape[-1] ** -0.5)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = call(*inputs, backend="sdpa")
    graph.replay()
    torch.cuda.synchronize()
    torch.testing.assert_close(got, expected, rtol=1e-2, atol=1e-2)
