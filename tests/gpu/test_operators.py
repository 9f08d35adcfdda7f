"""Every operator in every dtype and head dim against the oracle in float64, and at the sizes of real networks."""

from __future__ import annotations

import calls
import pytest
import torch

import zsvr_kernels as zk
from zsvr_kernels import testing
from zsvr_kernels.ops.chain_links.reference import chain_links_reference
from zsvr_kernels.ops.correspondence_search.reference import correspondence_search_reference, link_score_reference
from zsvr_kernels.sampling import nearest_site

attentions = pytest.mark.parametrize("name", calls.ATTENTIONS)
NAMES = ("o", "lse", "dq", "dk", "dv")


def compare(attention, inputs):
    weights = calls.weights(inputs[0])
    with testing.poisoned_allocations():
        got = calls.differentiate(lambda *x: attention(*x, return_lse=True), inputs, weights)
    oracle = calls.differentiate(attention.reference, [x.double() for x in inputs], weights)
    eager = calls.differentiate(attention.eager, inputs, weights)
    for what, ours, expected, plain in zip(NAMES, got, oracle, eager, strict=True):
        testing.assert_within_budget(ours, expected, plain, what, gradient=what[0] == "d")


@attentions
@pytest.mark.parametrize("D", [8, 40, 64, 80, 128, 160, 256])
def test_attention_and_its_gradients(name, D, dtype, device):
    if device.type == "cpu" and D not in (40, 64):
        pytest.skip("the interpreter is slow: tests/triton has the other head dims")
    compare(*calls.case(name, device, dtype, D))


@attentions
@pytest.mark.parametrize(("grid", "H", "D"), [((64, 64), 8, 40), ((32, 32), 8, 64), ((8, 8), 16, 64)])
def test_attention_of_real_networks(name, grid, H, D, device):
    """16 frames, in bfloat16; heads do not mix, so the oracle takes one."""
    if device.type == "cpu":
        grid, H, T, dtype = (6, 8), 2, 3, torch.float16
    else:
        T, dtype = 16, torch.bfloat16
    attention = calls.attention(name, device, T, grid, L=5)
    inputs = calls.tokens(device, dtype, (1, T, grid[0] * grid[1], H, D))
    weight = calls.weights(inputs[0])[0]
    got = calls.step(attention, inputs, weight)
    part, some = [x[..., -1:, :].contiguous() for x in inputs], weight[..., -1:, :].contiguous()
    oracle = calls.step(lambda *x: attention.reference(*x)[0], [x.double() for x in part], some.double())
    eager = calls.step(lambda *x: attention.eager(*x)[0], part, some)
    for what, ours, expected, plain in zip(("o", "dq", "dk", "dv"), got, oracle, eager, strict=True):
        testing.assert_within_budget(ours[..., -1:, :], expected, plain, what, gradient=what != "o")


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("rounding", ["bilinear", "nearest"])
def test_chaining(window, rounding, device):
    T, grid = (4, (5, 6)) if device.type == "cpu" else (16, (48, 40))
    links = calls.clip(device, T, grid)
    got = zk.chain_links(links, window=window, rounding=rounding, backend="triton")
    fields = (links.forward, links.backward, links.valid_forward, links.valid_backward)
    wide = (fields[0].double(), fields[1].double(), *fields[2:])
    positions, valid = chain_links_reference(*wide, grid, window, rounding == "nearest", False)
    plain = chain_links_reference(*fields, grid, window, rounding == "nearest", False)[0]
    assert torch.equal(got.valid, valid)
    testing.assert_within_budget(got.positions, positions, plain, "positions")


@pytest.mark.parametrize("radius", [1, 2, 4])
@pytest.mark.parametrize("C", [64, 320])
def test_search_and_score(radius, C, dtype, device):
    pairs, grid = (1, (4, 5)) if device.type == "cpu" else (3, (24, 20))
    features = calls.tokens(device, dtype, (pairs + 1, grid[0] * grid[1], C), 1)[0]
    f_src, f_dst = features[:-1], features[1:]
    positions = calls.clip(device, pairs + 1, grid).forward[0]
    site = nearest_site(positions, grid)
    centre = torch.stack((site % grid[1], site // grid[1]), -1).int()
    wide, plain = (f_src.double(), f_dst.double()), (f_src.float(), f_dst.float())
    found, score = zk.correspondence_search(f_src, f_dst, centre, grid=grid, radius=radius, backend="triton")
    best = correspondence_search_reference(*wide, centre, grid, radius)[1]
    where = torch.stack((found % grid[1], found // grid[1]), -1)
    assert bool(((where - centre).abs() <= radius).all())
    own = link_score_reference(*wide, where.float(), grid)
    testing.assert_within_budget(score, own, link_score_reference(*plain, where.float(), grid), "score")
    testing.assert_within_budget(score, best, correspondence_search_reference(*plain, centre, grid, radius)[1], "best")
    scored = zk.link_score(f_src, f_dst, positions, grid=grid, backend="triton")
    oracle = link_score_reference(*wide, positions, grid)
    testing.assert_within_budget(scored, oracle, link_score_reference(*plain, positions, grid), "link score")


@attentions
def test_offsets_beyond_two_to_the_31(name, device):
    """Frames lie 2^29 elements apart, so the last one is at 5 * 2^29; the memory between is never touched."""
    T, grid, H, D, gap = 6, (3, 3), 2, 16, 2**29
    P = grid[0] * grid[1]
    if device.type == "cuda" and torch.cuda.mem_get_info(device)[0] < 12 << 30:
        pytest.skip("it takes 12 GiB of GPU memory")
    base = torch.empty(T * gap, dtype=torch.float16, device=device)
    small = calls.tokens(device, torch.float16, (1, T, P, H, D))
    views = []
    for n in range(3):
        view = base.as_strided((1, T, P, H, D), (T * gap, gap, H * D, D, 1), n * P * H * D)
        views.append(view.copy_(small[n]))
    attention = calls.attention(name, device, T, grid)
    weight = calls.weights(small[0])[0]
    far, near = (calls.step(attention, list(inputs), weight) for inputs in (views, small))
    assert all(torch.equal(a, b) for a, b in zip(far, near, strict=True))


def test_the_whole_layer_is_its_reference(device):
    T, grid = (3, (4, 4)) if device.type == "cpu" else (8, (16, 16))
    links = calls.clip(device, T, grid)
    results = []
    for backend in ("triton", "reference"):
        q, k, v = (x.requires_grad_() for x in calls.tokens(device, torch.float32, (1, T, grid[0] * grid[1], 2, 40)))
        trajectories = zk.chain_links(links, window=1, backend=backend)
        outs = [
            zk.slr_attention(q, k, v, zk.neighbors(T).to(device), trajectories, combine=combine, backend=backend)
            for combine in ("serial", "parallel", "joint")
        ]
        gradients = torch.autograd.grad(sum(o.sin().sum() for o in outs), (q, k, v))
        results.append([*outs, *gradients])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
