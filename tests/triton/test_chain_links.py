"""Chaining by Triton: bit-equal to the reference, records as defined."""

from __future__ import annotations

import pytest
import torch

import zsvr_kernels as zk
from zsvr_kernels import _triton, testing
from zsvr_kernels.ops.chain_links.reference import chain_links_reference
from zsvr_kernels.sampling import is_inside, sites

# The interpreter computes with NumPy, which warns of NaN and infinity.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


def random_links(B, T, grid, generator, motion=1.5, occluded=0.1):
    P = grid[0] * grid[1]
    positions = sites(grid) + motion * torch.randn(2, B, T - 1, P, 2, generator=generator)
    valid = torch.rand(2, B, T - 1, P, generator=generator) >= occluded
    return zk.Links.from_positions(*positions, *valid, grid)


def constant_links(T, grid, d):
    P = grid[0] * grid[1]
    step = torch.tensor(d, dtype=torch.float32)
    forward, backward = ((sites(grid) + s * step).expand(1, T - 1, P, 2) for s in (1, -1))
    valid = torch.ones(1, T - 1, P, dtype=torch.bool)
    return zk.Links.from_positions(forward, backward, valid, valid, grid)


def chained(fields, grid, window, nearest, corners, device):
    """Return positions and validity of the op on raw tensors, which nothing has made finite."""
    with testing.poisoned_allocations():
        found = torch.ops.zsvr.chain_links(*(x.to(device) for x in fields), *grid, window, nearest, corners, "triton")
    return [x.cpu() for x in found]


def assert_same(found, expected, what):
    assert torch.equal(found[1], expected[1]), (
        f"{what}: {int((found[1] != expected[1]).sum())} slots differ in validity"
    )
    assert torch.equal(found[0], expected[0]), f"{what}: positions differ by {(found[0] - expected[0]).abs().max():.3e}"


SIZES = [(1, 1, (3, 4), None), (2, 2, (1, 9), 1), (2, 5, (7, 5), None), (1, 4, (9, 1), 2), (1, 3, (33, 32), None)]


@pytest.mark.parametrize("nearest", [False, True], ids=["bilinear", "nearest"])
@pytest.mark.parametrize("corners", [False, True], ids=["site", "corners"])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_kernel_is_bit_equal_to_the_reference(size, corners, nearest, device, generator):
    B, T, grid, window = size
    fields = tuple(random_links(B, T, grid, generator).tensors().values())
    expected = chain_links_reference(*fields, grid, window, nearest, corners)
    assert_same(chained(fields, grid, window, nearest, corners, device), expected, f"{size}")


@pytest.mark.parametrize("window", [0, 2, 7])
def test_slots_outside_the_clip_hold_the_own_site(window, device, generator):
    links = random_links(1, 4, (4, 6), generator)
    expected = zk.chain_links(links, window=window, backend="reference")
    with testing.poisoned_allocations():
        got = zk.chain_links(links.to(device), window=window, backend="triton")
    assert_same((got.positions.cpu(), got.valid.cpu()), (expected.positions, expected.valid), f"window {window}")
    assert torch.equal(got.frames.cpu(), expected.frames)
    absent = expected.frames < 0
    assert torch.equal(got.positions.cpu()[:, absent], sites((4, 6)).expand(1, int(absent.sum()), 24, 2))
    assert not bool(got.valid.cpu()[:, absent].any())


@pytest.mark.parametrize("corners", [False, True], ids=["site", "corners"])
def test_links_that_are_no_numbers_end_a_chain(corners, device, generator):
    """A link from a site that is read with weight zero may hold anything; a NaN position gives no bad address."""
    grid, (B, T) = (6, 7), (2, 4)
    forward, backward, valid_forward, valid_backward = (
        random_links(B, T, grid, generator, motion=1.0).tensors().values()
    )
    for x in (forward, backward):
        whole = torch.rand(B, T - 1, 42, 1, generator=generator) < 0.6
        x.copy_(torch.where(whole, x.round(), x))
        hit = torch.rand(x.shape, generator=generator) < 0.1
        bad = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e30, -3e38])
        x[hit] = bad[torch.randint(0, 5, (int(hit.sum()),), generator=generator)]
    fields = forward, backward, valid_forward, valid_backward
    for nearest in (False, True):
        expected = chain_links_reference(*fields, grid, None, nearest, corners)
        assert bool(expected[1][:, 0, 2].any()) and torch.isfinite(expected[0]).all()
        assert_same(chained(fields, grid, None, nearest, corners, device), expected, f"nearest={nearest}")


def test_constant_flow_moves_by_a_multiple_and_ends_at_the_border(device):
    T, grid = 5, (5, 8)
    for d in ((0.0, 0.0), (2.0, 1.0), (-1.25, 0.5)):
        got = zk.chain_links(constant_links(T, grid, d).to(device), backend="triton")
        for i in range(T):
            for j in range(T):
                expected = sites(grid) + (j - i) * torch.tensor(d)
                inside = is_inside(expected, grid)  # exact: the motions are dyadic
                assert torch.equal(got.valid[0, i, j].cpu(), inside)
                assert torch.equal(got.positions[0, i, j].cpu()[inside], expected[inside])


def test_the_first_failure_ends_that_direction_only(device):
    links = constant_links(5, (3, 4), (0.0, 0.0))
    links.valid_forward[0, 2, 5] = False  # from frame 2 to 3
    valid = zk.chain_links(links.to(device), backend="triton").valid[0, :, :, 5].cpu()
    for i in range(5):
        assert valid[i].tolist() == [not (i <= 2 < j) for j in range(5)]


@pytest.mark.parametrize("exact", [False, True], ids=["packed", "exact"])
@pytest.mark.parametrize("grid", [(5, 7), (1, 6), (6, 1), (1, 1)], ids=str)
def test_records_are_the_cells_of_positions(grid, exact, device, generator):
    from zsvr_kernels.ops.chain_links import triton_launch

    links = random_links(2, 3, grid, generator, motion=0.7)
    fields = [x.to(device) for x in links.tensors().values()]
    for window in (None, 2):
        with testing.poisoned_allocations():
            launches, (positions, valid, base, fractions) = triton_launch.plan_chain(
                *fields, grid, window, False, False, _triton.target(device), records=True, exact=exact
            )
            _triton.run(launches)
        expected = chain_links_reference(*links.tensors().values(), grid, window, False, False)
        assert_same((positions.cpu(), valid.cpu()), expected, f"{grid}")
        last = torch.tensor((grid[1] - 1.0, grid[0] - 1.0))
        clamped = expected[0].clamp(min=0).minimum(last)
        cell = clamped.floor().minimum((last - 1).clamp(min=0))
        x, y = (clamped - cell).unbind(-1)
        site = (cell[..., 1] * grid[1] + cell[..., 0]).to(torch.int32)
        assert torch.equal(base.cpu(), torch.where(expected[1], site, -1))
        if exact:
            assert torch.equal(fractions.cpu(), torch.stack((x, y), -1))
        else:
            parts = [torch.floor(f * 2**15 + 0.5).to(torch.int32) for f in (x, y)]
            assert torch.equal(fractions.cpu(), parts[0] | (parts[1] << 16))


def test_strides_do_not_matter_and_runs_repeat(device, generator):
    links = random_links(2, 4, (5, 6), generator).to(device)
    first, again = (zk.chain_links(links, backend="triton") for _ in range(2))
    strided = [x.transpose(0, 2).contiguous().transpose(0, 2) for x in links.tensors().values()]
    assert not strided[0].is_contiguous()
    moved = zk.chain_links(zk.Links(*strided, links.grid), backend="triton")
    for other in (again, moved):
        assert torch.equal(first.positions, other.positions) and torch.equal(first.valid, other.valid)


def test_no_clips(device):
    shape = (0, 2, 12)
    fields = [torch.zeros(*shape, 2)] * 2 + [torch.zeros(shape, dtype=torch.bool)] * 2
    positions, valid = chained(fields, (3, 4), None, False, False, device)
    assert positions.shape == (0, 3, 3, 12, 2) and valid.shape == (0, 3, 3, 12)


def test_the_op_checks_again_and_passes_opcheck(device, generator):
    fields = [x.to(device) for x in random_links(1, 3, (3, 4), generator).tensors().values()]
    op = torch.ops.zsvr.chain_links
    for broken, error in (
        ((fields[0].double(), *fields[1:], 3, 4), TypeError),
        ((*fields, 3, 5), ValueError),
        ((*fields[:2], fields[2][:, :1], fields[3], 3, 4), ValueError),
        ((fields[0].to("meta"), *fields[1:], 3, 4), ValueError),
    ):
        with pytest.raises(error):
            op(*broken, None, False, False, "triton")
    with pytest.raises(ValueError, match="window"):
        op(*fields, 3, 4, -1, False, False, "triton")
    torch.library.opcheck(op.default, (*fields, 3, 4, 1, False, False, "triton"))
