"""Operators together on Triton: SLR attention, a layer with a context, what chaining leaves for attention."""

from __future__ import annotations

import pytest
import torch

import zsvr_kernels as zk
from zsvr_kernels import testing
from zsvr_kernels.combination import serial

GRID = (4, 6)
T = 3


def clip(device, generator):
    flow = torch.rand(1, T - 1, 2, 16, 24, generator=generator) * 4 - 2
    links = zk.Links.from_flow(flow, -flow, grid=GRID, check="none")
    return links, links.to(device)


@pytest.mark.parametrize("combine", ["serial", "parallel", "joint", "cross", "trajectory"])
def test_forward_and_backward(combine, device, dtype, generator):
    links, moved = clip(device, generator)
    q, k, v, d_o = (torch.randn(1, T, 24, 2, 16, generator=generator).to(dtype) for _ in range(4))
    frames = zk.neighbors(T)

    def gradients(tensors, table, trajectories, backend):
        leaves = [x.clone().requires_grad_() for x in tensors]
        out = zk.slr_attention(*leaves, table, trajectories, combine=combine, backend=backend)
        return (out, *torch.autograd.grad(out, leaves, d_o.to(out)))

    trajectories = zk.chain_links(links)
    oracle = gradients([x.double() for x in (q, k, v)], frames, trajectories, "reference")
    eager = gradients((q, k, v), frames, trajectories, "reference")
    ours = gradients(
        [x.to(device) for x in (q, k, v)], frames.to(device), zk.chain_links(moved, backend="triton"), "triton"
    )
    for name, x, o, e in zip(("out", "dq", "dk", "dv"), ours, oracle, eager, strict=True):
        testing.assert_within_budget(x.cpu(), o, e, name, gradient=name != "out")


def test_serial_is_one_step_of_autograd(device, generator):
    _, links = clip(device, generator)
    q, k, v = (torch.randn(1, T, 24, 2, 16, generator=generator).to(device).requires_grad_() for _ in range(3))
    trajectories = zk.chain_links(links, backend="triton")
    assert serial.takes(q, k, v, trajectories, "triton") == "triton"
    out = zk.slr_attention(q, k, v, zk.neighbors(T).to(device), trajectories, backend="triton")
    assert type(out.grad_fn).__name__ == "SerialFunctionBackward"


def test_chaining_leaves_the_records_that_attention_reads(device, generator):
    _, links = clip(device, generator)
    chained = zk.chain_links(links, backend="triton")
    held = chained.kept()
    assert len(held) == 2  # base and fractions, before anybody asked
    plain = zk.Trajectories(chained.positions, chained.valid, chained.frames, GRID)
    for ours, expected in zip(chained.records(exact=False), plain.records(exact=False), strict=True):
        live = chained.valid if ours is chained.records(exact=False)[1] else torch.ones_like(chained.valid)
        assert torch.equal(ours[live], expected[live])
    assert all(x is y for x, y in zip(chained.records(exact=False), held, strict=True))
    chained.positions[:, 0, 1] += 0.25  # written to: what is held is no longer true
    assert not torch.equal(chained.records(exact=False)[1], held[1])


def test_a_layer_with_a_context_and_correction(device, generator):
    flow = torch.rand(1, T - 1, 2, 16, 24, generator=generator).to(device)
    context = zk.VideoContext(flow, -flow, options=zk.SLROptions(backend="triton", check="none"))
    layer = zk.SLRAttention(32, 2, name="layer").to(device)
    x = torch.randn(T, 32, *GRID, generator=generator).to(device)
    with context.step(1, 2), torch.no_grad():
        ours = layer(x, context)
    reference = zk.VideoContext(flow, -flow, options=zk.SLROptions(backend="reference", check="none"))
    with reference.step(1, 2), torch.no_grad():
        expected = layer(x, reference)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-5)
    assert context.history() and context.history().keys() == reference.history().keys()
