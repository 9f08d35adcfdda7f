"""Correspondence search and link scores by Triton against every candidate in float64, and what else they promise."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

import zsvr_kernels as zk
from zsvr_kernels import _triton, testing
from zsvr_kernels.ops.correspondence_search import correspondence_search_reference, link_score_reference
from zsvr_kernels.sampling import sites
from zsvr_kernels.testing import assert_best_sites, cosines, own_sites, random_centres, random_features, window_mask

# The interpreter computes with NumPy, which warns of NaN and infinity.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")


def search(f_src, f_dst, centre, grid, radius, device):
    with testing.poisoned_allocations():
        found = zk.correspondence_search(
            f_src.to(device), f_dst.to(device), centre.to(device), grid=grid, radius=radius, backend="triton"
        )
    return found[0].cpu(), found[1].cpu()


def score(f_src, f_dst, where, grid, device):
    with testing.poisoned_allocations():
        return zk.link_score(f_src.to(device), f_dst.to(device), where.to(device), grid=grid, backend="triton").cpu()


SHAPES = [  # N, grid, C, radius
    (1, (1, 1), 1, 0),
    (2, (5, 7), 3, 1),
    (1, (13, 16), 8, 2),
    (2, (8, 8), 40, 2),
    (1, (12, 17), 64, 4),
    (2, (1, 19), 16, 2),
    (1, (23, 2), 40, 4),
    (1, (7, 11), 160, 40),
    (1, (6, 5), 272, 1),
    (1, (9, 10), 24, 0),
    (1, (4, 3), 17, 65535),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_search_finds_the_best_candidate(shape, dtype, device, generator):
    N, grid, C, radius = shape
    f_src, f_dst = random_features(N, grid[0] * grid[1], C, dtype, generator)
    for centre in (random_centres(N, grid, generator), own_sites(grid).expand(N, -1, 2)):
        found = search(f_src, f_dst, centre, grid, radius, device)
        assert_best_sites(found, f_src, f_dst, centre, grid, radius, f"{shape} {dtype}")


def dense_search(f_src, f_dst, centre, grid, radius, device, limit):
    """Search by the dense kernel whatever pays; boxes of more than ``limit`` strips are left (None: of one motion)."""
    from zsvr_kernels.ops.correspondence_search import triton_configs, triton_launch

    x = (f_src.to(device), f_dst.to(device), centre.to(device))
    with mock.patch.dict(triton_configs._WORTH, {2: 64, 4: 64}), testing.poisoned_allocations():
        launches, found = triton_launch.plan_search(*x, grid, radius, _triton.target(device))
    arguments = launches[1].arguments
    assert launches[1].kernel.__name__ == "_search_dense_kernel"
    side = 8 + 2 * radius
    arguments["limit"] = -(-side // arguments["STRIP_H"]) * -(-side // arguments["STRIP_W"]) if limit is None else limit
    _triton.run(launches)
    return [x.cpu() for x in found]


def test_both_ways_of_a_tile_find_the_best_and_agree(dtype, device, generator):
    """Whole boxes, windows one by one, and a launch in which every tile decides for itself."""
    grid, radius, C = (15, 19), 2, 40
    f_src, f_dst = random_features(1, 285, C, dtype, generator)
    centre = own_sites(grid)[None].clone()
    centre[:, 150:] = random_centres(1, grid, generator)[:, 150:]
    results = []
    for limit in (100, 0, None):
        results.append(dense_search(f_src, f_dst, centre, grid, radius, device, limit))
        assert_best_sites(results[-1], f_src, f_dst, centre, grid, radius, f"limit {limit}")
    for site, best in results[1:]:
        assert (site == results[0][0]).float().mean() > 0.99
        assert (best - results[0][1]).abs().max() < 1e-6


def test_the_dense_search_is_for_windows_that_overlap():
    from zsvr_kernels.ops.correspondence_search import triton_configs

    for target in ("sm_80", "sm_86", "sm_90", "sm_100", "gfx942"):
        for radius in (1, 2, 4, 16, 65535):
            assert triton_configs.dense(target, 2, (32, 32), 512, radius) is not None
        assert triton_configs.dense(target, 2, (32, 32), 512, 0) is None
        # Exact products of float32 run at a fraction of the rate: only wide windows are worth a whole box.
        assert triton_configs.dense(target, 4, (32, 32), 512, 2) is None
        assert triton_configs.dense(target, 4, (32, 32), 512, 31) is not None


@pytest.mark.parametrize(("radius", "limit"), [(1, "auto"), (30, "auto"), (2, 100), (2, 0)])
def test_ties_go_to_the_lowest_site(radius, limit, dtype, device, generator):
    grid, P = (11, 13), 143
    alphabet = torch.randn(3, 20, generator=generator).to(dtype)
    letters = torch.randint(0, 3, (1, P), generator=generator)
    f_src, f_dst = torch.randn(1, P, 20, generator=generator).to(dtype), alphabet[letters]
    for centre in (random_centres(1, grid, generator), own_sites(grid)[None]):
        if limit == "auto":
            site, _ = search(f_src, f_dst, centre, grid, radius, device)
        else:
            site, _ = dense_search(f_src, f_dst, centre, grid, radius, device, limit)
        chosen = letters.gather(1, site.long())
        same = window_mask(centre, grid, radius) & (letters[:, None, :] == chosen[..., None])
        assert torch.equal(site.long(), same.int().argmax(-1))


@pytest.mark.parametrize("radius", [1, 2])
def test_what_is_no_number_never_wins(radius, dtype, device, generator):
    grid = (7, 9)
    f_src, f_dst = random_features(2, 63, 24, dtype, generator)
    for x, share in ((f_dst, 0.5), (f_src, 0.1)):
        hit = torch.rand(2, 63, generator=generator) < share
        channel = torch.randint(0, 24, (2, 63), generator=generator)
        bad = torch.tensor([torch.nan, torch.inf, -torch.inf])[torch.randint(0, 3, (2, 63), generator=generator)]
        n, p = hit.nonzero().unbind(1)
        x[n, p, channel[n, p]] = bad[n, p].to(dtype)
    f_dst[:, :20] = torch.nan
    centre = random_centres(2, grid, generator)
    found = search(f_src, f_dst, centre, grid, radius, device)
    assert bool((found[1] == -torch.inf).any()) and bool((found[1] > 0).any())
    assert_best_sites(found, f_src, f_dst, centre, grid, radius, f"{dtype}")
    expected = correspondence_search_reference(f_src, f_dst, centre, grid, radius)
    assert torch.equal(found[1].isinf(), expected[1].isinf())


def test_short_tokens_count_by_the_smallest_length(device):
    f_src = torch.tensor([1e-7, 1.0]).reshape(1, 2, 1)
    f_dst = torch.tensor([0.0, 2e-7]).reshape(1, 2, 1)
    centre = torch.zeros(1, 2, 2, dtype=torch.int32)
    site, best = search(f_src, f_dst, centre, (1, 2), 1, device)
    assert site.tolist() == [[1, 1]]
    torch.testing.assert_close(best, torch.tensor([[0.1 * 0.2, 0.2]]))
    where = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    torch.testing.assert_close(score(f_src, f_dst, where, (1, 2), device), best)


def views(x):
    """The same features with other strides and offsets, NaN all around."""
    N, P, C = x.shape
    for shape, index, order in (
        ((N, P, C + 3), (slice(None), slice(None), slice(3, None)), (0, 1, 2)),
        ((N + 1, 2 * P, C), (slice(1, None), slice(None, None, 2)), (0, 1, 2)),
        ((P, N, 3 * C), (slice(None), slice(None), slice(C, 2 * C)), (1, 0, 2)),
    ):
        buffer = torch.full(shape, torch.nan, dtype=x.dtype, device=x.device)
        view = buffer[index].permute(order)
        view.copy_(x)
        yield view


@pytest.mark.parametrize("radius", [1, 2])
def test_strides_do_not_matter(radius, dtype, device, generator):
    """Only the order in which lanes are summed may follow from them."""
    grid = (6, 7)
    f_src, f_dst = random_features(2, 42, 40, dtype, generator)
    centre = random_centres(2, grid, generator)
    where = sites(grid) + torch.randn(2, 42, 2, generator=generator)
    oracle = link_score_reference(f_src.double(), f_dst.double(), where, grid)
    eager = link_score_reference(f_src.float(), f_dst.float(), where, grid)
    f_src, f_dst = f_src.to(device), f_dst.to(device)
    pairs = [*zip(views(f_src), views(f_dst), strict=True), (f_src, f_dst[:1].expand(2, -1, -1))]
    for a, b in pairs:
        found = search(a, b, centre.mT.contiguous().mT, grid, radius, device)
        assert_best_sites(found, a.cpu(), b.cpu(), centre, grid, radius, f"strides {a.stride()}")
    for a, b in pairs[:-1]:
        got = score(a, b, where.mT.contiguous().mT, grid, device)
        testing.assert_within_budget(got, oracle, eager, f"strides {a.stride()}")


def test_offsets_of_64_bits(device, generator):
    from zsvr_kernels.ops.correspondence_search import triton_launch

    grid, where = (5, 6), sites((5, 6))[None]
    f_src, f_dst = random_features(1, 30, 24, torch.float32, generator)
    huge = torch.empty_strided((1, 30, 24), (24, 1 << 27, 1), device="meta")
    assert triton_launch._features(huge, f_dst)["WIDE"] and not triton_launch._features(f_src, f_dst)["WIDE"]
    for radius in (1, 2):
        narrow = search(f_src, f_dst, own_sites(grid)[None], grid, radius, device)
        scored = score(f_src, f_dst, where, grid, device)
        with mock.patch.object(triton_launch, "INT32", 1):
            wide = search(f_src, f_dst, own_sites(grid)[None], grid, radius, device)
            assert torch.equal(score(f_src, f_dst, where, grid, device), scored)
        assert all(torch.equal(a, b) for a, b in zip(narrow, wide, strict=True))


def test_runs_repeat(dtype, device, generator):
    grid = (9, 10)
    f_src, f_dst = random_features(2, 90, 24, dtype, generator)
    centre = random_centres(2, grid, generator)
    first, again = (search(f_src, f_dst, centre, grid, 2, device) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_no_pairs(device):
    empty = torch.zeros(0, 12, 8)
    site, best = search(empty, empty, torch.zeros(0, 12, 2, dtype=torch.int32), (3, 4), 2, device)
    assert site.shape == best.shape == (0, 12)
    assert score(empty, empty, torch.zeros(0, 12, 2), (3, 4), device).shape == (0, 12)


# ---- link scores ----


@pytest.mark.parametrize("shape", [(1, (1, 1), 1), (2, (5, 7), 3), (3, (8, 9), 40), (1, (6, 6), 64), (1, (3, 5), 2048)])
def test_link_score_samples_first(shape, dtype, device, generator):
    N, grid, C = shape
    P = grid[0] * grid[1]
    f_src, f_dst = random_features(N, P, C, dtype, generator)
    where = sites(grid) + torch.randn(N, P, 2, generator=generator)
    where = torch.where(torch.rand(N, P, 1, generator=generator) < 0.3, where.round(), where)
    got = score(f_src, f_dst, where, grid, device)
    oracle = link_score_reference(f_src.double(), f_dst.double(), where, grid)
    eager = link_score_reference(f_src.float(), f_dst.float(), where, grid)
    testing.assert_within_budget(got, oracle, eager, f"{shape} {dtype}")


def test_link_score_at_a_site_is_the_search_there(dtype, device, generator):
    """So that flow and search compete on equal terms; correct_links calls 1e-5 a tie."""
    grid = (7, 6)
    f_src, f_dst = random_features(2, 42, 160, dtype, generator)
    for radius in (1, 2):
        site, best = search(f_src, f_dst, own_sites(grid).expand(2, -1, 2), grid, radius, device)
        where = torch.stack((site % 6, site // 6), -1).float()
        torch.testing.assert_close(score(f_src, f_dst, where, grid, device), best, rtol=0, atol=1e-6)


def test_positions_of_any_value_are_clamped(device, generator):
    grid = (3, 4)
    f_src, f_dst = random_features(1, 12, 24, torch.float32, generator)
    for wild, tame in (
        ((torch.inf, -torch.inf), (3.0, 0.0)),
        ((3e38, -3e38), (3.0, 0.0)),
        ((torch.nan, 1.0), (0.0, 1.0)),
        ((2.0, torch.nan), (2.0, 0.0)),
        ((-0.0, -0.5), (0.0, 0.0)),
        ((3.4, 2.5), (3.0, 2.0)),
    ):
        got, expected = (score(f_src, f_dst, torch.tensor(at).expand(1, 12, 2), grid, device) for at in (wild, tame))
        assert torch.equal(got, expected)


def test_corners_of_weight_zero_take_no_part(device, generator):
    grid = (3, 4)
    f_src, f_dst = random_features(1, 12, 24, torch.float32, generator)
    f_dst[:, 6] = torch.nan
    f_dst[:, 11] = torch.inf
    for at, neighbour in (((1.0, 1.0), 5), ((2.0, 2.0), 10)):
        got = score(f_src, f_dst, torch.tensor(at).expand(1, 12, 2), grid, device)
        expected = cosines(f_src.double(), f_dst.double()[:, neighbour : neighbour + 1])[..., 0]
        assert torch.isfinite(got).all()
        assert (got - expected).abs().max() < 1e-6
    assert score(f_src, f_dst, torch.tensor((1.5, 1.0)).expand(1, 12, 2), grid, device).isnan().all()


# ---- torch's machinery and refusals ----


def test_opcheck(device, generator):
    f_src, f_dst = torch.randn(2, 2, 12, 16, generator=generator).to(device)
    centre = random_centres(2, (3, 4), generator).to(device)
    where = sites((3, 4)).expand(2, -1, -1).contiguous().to(device)
    torch.library.opcheck(torch.ops.zsvr.correspondence_search.default, (f_src, f_dst, centre, 3, 4, 2, "triton"))
    torch.library.opcheck(torch.ops.zsvr.link_score.default, (f_src, f_dst, where, 3, 4, "triton"))


def test_the_ops_check_again_what_reaches_kernels(device, generator):
    f = torch.randn(1, 12, 8, generator=generator).to(device)
    centre, where = own_sites((3, 4))[None].to(device), sites((3, 4))[None].to(device)
    op = torch.ops.zsvr.correspondence_search
    for call, error in (
        (lambda: op(f, f, centre, 3, 5, 2, "triton"), ValueError),
        (lambda: op(f, f, centre[:, :5], 3, 4, 2, "triton"), ValueError),
        (lambda: op(f, f, centre.long(), 3, 4, 2, "triton"), TypeError),
        (lambda: op(f, f, centre, 3, 4, -1, "triton"), ValueError),
        (lambda: op(f.double(), f.double(), centre, 3, 4, 2, "triton"), TypeError),
        (lambda: op(f, f[..., ::2], centre, 3, 4, 2, "triton"), ValueError),
        (lambda: op(f.mT.contiguous().mT, f, centre, 3, 4, 2, "triton"), ValueError),
        (lambda: torch.ops.zsvr.link_score(f, f, where[..., :1], 3, 4, "triton"), ValueError),
        (lambda: torch.ops.zsvr.link_score(f, f, where.double(), 3, 4, "triton"), TypeError),
        (lambda: torch.ops.zsvr.link_score(f, f.to("meta"), where, 3, 4, "triton"), ValueError),
    ):
        with pytest.raises(error):
            call()
