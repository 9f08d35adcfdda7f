"""Memory: the workspace of every call against the op READMEs, the inverse index, and the process's own peak."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import textwrap
from unittest import mock

import pytest
import torch

import zsvr_kernels as zk
from zsvr_kernels import _native, testing

LANES = {"portable": 8, "avx2": 16}  # of a block; every AVX-512 level: 64
WIDTH = {"portable": 4, "avx2": 8}  # of a vector; every AVX-512 level: 16
THREADS, KEYS, T, H, D, L = 3, 96, 4, 3, 40, 3
GRID = (16, 20)
P = GRID[0] * GRID[1]


def up(size, unit):
    """Return ``size`` rounded up to a multiple of ``unit``."""
    return -(-size // unit) * unit


def bytes_asked_for(call):
    """Return what ``call`` asks of `_native.workspace`, in all."""
    sizes = []
    original = _native.workspace

    def record(size):
        sizes.append(size)
        return original(size)

    with mock.patch.object(_native, "workspace", record):
        result = call()
    return sum(sizes), result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_workspaces_stay_below_the_formulas(isa, dtype, generator):
    q, k, v = (torch.randn(2, T, P, H, D, generator=generator).to(dtype).requires_grad_() for _ in range(3))
    trajectories = testing.random_trajectories(1, T, T, L, GRID, generator)
    lanes = LANES.get(isa, 64)
    span = min(up(P, lanes), 256)
    panel, half_panel = (up(d, 16) + (16 if up(d, 16) % 32 == 0 else 0) for d in (D, D // 2))
    packed = 0
    forward = 4 * (2 * D * span + 2 * span + KEYS * lanes + 2 * KEYS * panel)
    if isa == "avx512_bf16" and dtype == torch.bfloat16:
        forward = 4 * ((up(D, 32) // 2 + D + 2) * span + KEYS * lanes + KEYS * half_panel + KEYS // 2 * panel)
    if isa == "amx" and dtype == torch.bfloat16:
        forward = 4 * 128 * 64 + 384 * up(D, 32) + 256 * up(D, 16)
        packed = 2 * 2 * T * H * up(D, 16) * up(P, 32)
    spans = -(-P // span)
    per_head = 4 * (T * P * up(D, WIDTH.get(isa, 16)) + 2 * T * spans * span * D)
    heads = min(2 * H, max(2**23 // per_head, -(-8 * THREADS // (T * spans))))
    backward = 4 * (2 * D * span + (span + 2 * KEYS) * panel + 2 * KEYS * lanes)
    if isa in ("avx512_bf16", "amx") and dtype == torch.bfloat16:
        floats = up(D, 32) * span + span // 2 * panel + 2 * KEYS * half_panel + KEYS * panel + 2 * KEYS * lanes
        backward = 4 * floats
    shared = 8 * 2 * T * P * H + 4 * 2 * T + 4 * T + heads * per_head
    tile = 16 * L * H
    expected = {
        "cross": (packed + THREADS * forward, shared + THREADS * backward),
        "trajectory": (
            THREADS * (4 * tile + 56 * 16 * L),
            8 * T * L * P * H + THREADS * (8 * tile + 8 * H * up(D, 32) + 56 * 16 * L),
        ),
    }
    padding = 64 * 16 * THREADS  # each array begins on a cache line
    with testing.threads(THREADS):
        for name, call in {
            "cross": lambda: zk.cross_frame_attention(q, k, v, zk.neighbors(T), backend="cpu"),
            "trajectory": lambda: zk.trajectory_attention(q, k, v, trajectories, backend="cpu"),
        }.items():
            used, out = bytes_asked_for(call)
            assert 0 < used <= expected[name][0] + padding, f"{name} forward"
            used, _ = bytes_asked_for(lambda out=out: torch.autograd.grad(out.float().sum(), (q, k, v)))
            assert 0 < used <= expected[name][1] + padding, f"{name} backward"


def test_the_inverse_index_stays_below_its_formula(isa, generator):
    trajectories = testing.random_trajectories(2, T, T, L, GRID, generator)
    offsets, samples, weights = trajectories.inverse(T)
    live = int((trajectories.valid & (trajectories.frames >= 0)[:, :, None]).sum())
    assert offsets.nbytes == 8 * (2 * T * P + 1)
    assert live <= samples.numel() == weights.numel() == int(offsets[-1]) <= 4 * live
    assert samples.nbytes + weights.nbytes == 8 * int(offsets[-1])


PEAK = """
    import torch
    import zsvr_kernels as zk

    def status(name):
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))

    torch.set_num_threads(2)
    T, Hg, Wg, H, D = 8, 16, 32, 4, 64
    x = torch.randn(3, 1, T, Hg * Wg, H, D)
    flow = torch.zeros(1, T - 1, 2, Hg, Wg) + 0.25
    trajectories = zk.chain_links(zk.Links.from_flow(flow, -flow, grid=(Hg, Wg)))
    frames = zk.all_frames(T)

    def call(q, k, v, t, n):
        if "{op}" == "cross":
            return zk.cross_frame_attention(q, k, v, zk.all_frames(n), backend="{backend}")
        return zk.trajectory_attention(q, k, v, t, backend="{backend}")

    small = zk.Trajectories(*(y[:, :2, :2] for y in (trajectories.positions, trajectories.valid)),
                            trajectories.frames[:2, :2], (Hg, Wg))
    with torch.no_grad():
        call(*x[:, :, :2], small, 2)  # the thread pool and the libraries
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")
        before = status("VmRSS")
        out = call(*x, trajectories, T)
    print(status("VmHWM") - before, out.nbytes)
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak-memory counter")
@pytest.mark.parametrize("op", ["cross", "trajectory"])
def test_the_process_grows_by_the_output_only(op):
    grown = {}
    for backend in ("cpu", "reference"):
        code = textwrap.dedent(PEAK).replace("{op}", op).replace("{backend}", backend)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        grown[backend], output = map(int, done.stdout.split())
    # K and V are 4 MiB each; with 8 frames a gathered copy of either takes 32 MiB, as the reference shows.
    assert grown["cpu"] <= 2 * output, grown
    assert grown["reference"] > 6 * output, grown


LAYER = """
    import torch
    import zsvr_kernels as zk

    def status(name):
        with open("/proc/self/status") as lines:
            return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))

    torch.set_num_threads(2)
    T, Hg, Wg, C = 8, 32, 32, 512
    layer = zk.SLRAttention(C, 8)
    x = torch.randn(T, C, Hg, Wg)
    flow = torch.zeros(1, T - 1, 2, Hg, Wg) + 0.25
    context = zk.VideoContext(flow, -flow, options=zk.SLROptions(window=2))
    context.trajectories((Hg, Wg))  # built once for all layers and steps
    given = context if {with_context} else None
    with torch.no_grad():
        layer(x[:, :, :4, :4].contiguous(), given)
        with open("/proc/self/clear_refs", "w") as reset:
            reset.write("5")
        before = status("VmRSS")
        out = layer(x, given) if given else layer.attention(x)
    print(status("VmHWM") - before, out.nbytes)
"""


@pytest.mark.skipif(not pathlib.Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak-memory counter")
@pytest.mark.skipif(not _native.is_available(), reason="the native module is not built")
def test_the_layer_takes_no_more_than_the_spatial_one():
    grown = {}
    for with_context in (True, False):
        code = textwrap.dedent(LAYER).replace("{with_context}", str(with_context))
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        grown[with_context], output = map(int, done.stdout.split())
    # q, k and v are three outputs, both attentions' results two more; kernels need a little for themselves.
    assert grown[True] <= 5.5 * output, grown
    assert grown[True] <= 1.2 * grown[False], grown
