"""Chaining: the kernel is bit-equal to the reference; the reference follows the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import zsvr_kernels as zk
from zsvr_kernels import _native
from zsvr_kernels.ops.chain_links.reference import chain_links_reference, slot_frames
from zsvr_kernels.sampling import sites


def random_links(B, T, grid, generator, motion=1.5, occluded=0.1):
    P = grid[0] * grid[1]
    positions = sites(grid) + motion * torch.randn(2, B, T - 1, P, 2, generator=generator)
    valid = torch.rand(2, B, T - 1, P, generator=generator) >= occluded
    return zk.Links.from_positions(*positions, *valid, grid)


def constant_links(T, grid, d):
    P = grid[0] * grid[1]
    step = torch.tensor(d, dtype=torch.float32)
    forward = (sites(grid) + step).expand(1, T - 1, P, 2)
    backward = (sites(grid) - step).expand(1, T - 1, P, 2)
    valid = torch.ones(1, T - 1, P, dtype=torch.bool)
    return zk.Links.from_positions(forward, backward, valid, valid, grid)


@pytest.mark.parametrize("rounding", ["bilinear", "nearest"])
@pytest.mark.parametrize("link_rule", ["nearest", "corners"])
@pytest.mark.parametrize("window", [None, 0, 2, 9])
@pytest.mark.parametrize("size", [(1, 1, (3, 4)), (2, 2, (1, 9)), (2, 5, (7, 5)), (1, 4, (40, 33))], ids=str)
def test_kernel_is_bit_equal_to_the_reference(size, window, link_rule, rounding, generator):
    links = random_links(*size, generator)
    results = [
        zk.chain_links(links, window=window, rounding=rounding, link_rule=link_rule, backend=backend)
        for backend in ("cpu", "reference")
    ]
    for name in ("positions", "valid", "frames"):
        assert torch.equal(getattr(results[0], name), getattr(results[1], name)), name


def test_the_mask_is_that_of_float64(generator):
    links = random_links(2, 6, (13, 17), generator)
    fields = (links.forward.double(), links.backward.double(), links.valid_forward, links.valid_backward)
    positions, valid = chain_links_reference(*fields, links.grid, None, False, False)
    got = zk.chain_links(links, backend="cpu")
    assert torch.equal(got.valid, valid)
    assert (got.positions[valid].double() - positions[valid]).abs().max() < 1e-4


def test_zero_flow_is_straight():
    links = constant_links(5, (4, 6), (0.0, 0.0))
    trajectories = zk.chain_links(links)
    assert trajectories.valid.all()
    assert torch.equal(trajectories.positions, sites((4, 6)).expand_as(trajectories.positions))


@pytest.mark.parametrize("d", [(0.3, -0.7), (2.0, 1.0), (-1.25, 0.5)])
def test_constant_flow_moves_by_a_multiple_and_ends_at_the_border(d):
    T, (Hg, Wg) = 6, (9, 11)
    trajectories = zk.chain_links(constant_links(T, (Hg, Wg), d), backend="cpu")
    own = sites((Hg, Wg))
    for i in range(T):
        for j in range(T):
            expected = own + (j - i) * torch.tensor(d)
            inside = (expected >= -0.5).all(-1) & (expected <= torch.tensor((Wg - 0.5, Hg - 0.5))).all(-1)
            clear = ((expected + 0.5).abs() > 1e-3).all(-1) & (
                (expected - torch.tensor((Wg - 0.5, Hg - 0.5))).abs() > 1e-3
            ).all(-1)
            valid = trajectories.valid[0, i, j]
            assert torch.equal(valid[clear], inside[clear])
            error = (trajectories.positions[0, i, j] - expected)[valid].abs().max() if valid.any() else 0.0
            assert error <= 1e-5 * max(abs(j - i), 1)


def test_one_occluded_link_ends_that_direction_only():
    links = constant_links(5, (3, 4), (0.0, 0.0))
    links.valid_forward[0, 2, 5] = False  # from frame 2 to 3
    valid = zk.chain_links(links, backend="cpu").valid[0, :, :, 5]
    for i in range(5):
        assert valid[i].tolist() == [not (i <= 2 < j) for j in range(5)]


def test_a_window_is_a_part_of_the_whole(generator):
    links = random_links(1, 7, (6, 8), generator)
    whole, part = zk.chain_links(links), zk.chain_links(links, window=2)
    for i in range(7):
        for slot, j in enumerate(part.frames[i].tolist()):
            if j >= 0:
                assert torch.equal(part.positions[0, i, slot], whole.positions[0, i, j])
                assert torch.equal(part.valid[0, i, slot], whole.valid[0, i, j])
            else:
                assert not part.valid[0, i, slot].any()


def test_a_window_beyond_the_clip_has_absent_slots(generator):
    links = random_links(1, 4, (6, 8), generator)
    whole = zk.chain_links(links, window=3)
    for backend in ("cpu", "reference"):
        got = zk.chain_links(links, window=20, backend=backend)
        assert got.positions.shape == (1, 4, 41, 48, 2)
        inside = slice(17, 24)  # slot l is frame i - 20 + l
        assert torch.equal(got.positions[:, :, inside], whole.positions)
        assert torch.equal(got.valid[:, :, inside], whole.valid)
        assert torch.equal(got.frames[:, inside], whole.frames)
        outside = [n for n in range(41) if not 17 <= n < 24]
        assert bool((got.frames[:, outside] == -1).all()) and not bool(got.valid[:, :, outside].any())
    for window in (65536, 2**62, 2**200):
        with pytest.raises(ValueError, match="window must be at most 65535"):
            zk.chain_links(links, window=window)


@pytest.mark.skipif(not _native.is_available(), reason="the native module is not built")
@pytest.mark.parametrize("window", [None, 1, 9])
def test_compile_fullgraph_chains_and_attends(window, generator):
    links = random_links(1, 3, (4, 5), generator)
    q, k, v = torch.randn(3, 1, 3, 20, 2, 16, generator=generator).unbind(0)

    def layer(q, k, v):
        trajectories = zk.chain_links(links, window=window)
        return zk.trajectory_attention(q, k, v, trajectories), trajectories.positions

    expected = layer(q, k, v)
    torch._dynamo.reset()
    got = torch.compile(layer, fullgraph=True, backend="aot_eager")(q, k, v)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    chained = torch.compile(lambda x: zk.chain_links(x, window=window), fullgraph=True, backend="aot_eager")(links)
    assert torch.equal(chained.positions, expected[1]) and chained.grid == (4, 5)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    # What the graph returned is an ordinary object: its inverse index can be built and kept.
    torch.autograd.grad(zk.trajectory_attention(*leaves, chained).sum(), leaves)
    assert chained.inverse(3) is chained.inverse(3)


def test_nearest_equals_bilinear_for_whole_links(generator):
    links = random_links(1, 5, (6, 8), generator)
    whole = zk.Links.from_positions(
        links.forward.round(), links.backward.round(), links.valid_forward, links.valid_backward, links.grid
    )
    a, b = zk.chain_links(whole), zk.chain_links(whole, rounding="nearest")
    assert torch.equal(a.positions, b.positions) and torch.equal(a.valid, b.valid)
    assert torch.equal(b.positions, b.positions.round())


def test_slots(generator):
    assert slot_frames(3, None).tolist() == [[0, 1, 2]] * 3
    assert slot_frames(3, 1).tolist() == [[-1, 0, 1], [0, 1, 2], [1, 2, -1]]


def test_thread_counts_agree(generator):
    from zsvr_kernels import testing

    links = random_links(2, 5, (35, 40), generator)
    results = []
    for count in (1, 2, 5):
        with testing.threads(count):
            results.append(zk.chain_links(links, backend="cpu").positions)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_arguments_are_checked(generator):
    links = random_links(1, 3, (3, 4), generator)
    with pytest.raises(TypeError, match="Links"):
        zk.chain_links(torch.zeros(3))
    with pytest.raises(ValueError, match="window"):
        zk.chain_links(links, window=-1)
    with pytest.raises(TypeError, match="window"):
        zk.chain_links(links, window=1.5)
    with pytest.raises(TypeError, match="window"):
        zk.chain_links(links, window=True)
    assert zk.chain_links(links, window=np.int64(1)).slots == 3
    with pytest.raises(ValueError, match="rounding"):
        zk.chain_links(links, rounding="up")
    with pytest.raises(ValueError, match="link_rule"):
        zk.chain_links(links, link_rule="all")
    with pytest.raises(RuntimeError, match="What would work"):
        zk.chain_links(links, backend="sdpa")
