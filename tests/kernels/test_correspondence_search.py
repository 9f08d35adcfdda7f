"""Correspondence search and link scores against a float64 loop over the definition, and what they promise beside it."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

import zsvr_kernels as zk
from zsvr_kernels import _native, options, testing
from zsvr_kernels.ops.correspondence_search import correspondence_search_reference, link_score_reference
from zsvr_kernels.sampling import bilinear_sample, is_inside, nearest_site, sites
from zsvr_kernels.testing import assert_best_sites, cosines, own_sites, random_centres, random_features, window_mask

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
native_only = pytest.mark.skipif(not _native.is_available(), reason="the native module is not built")


SHAPES = [  # N, grid, C, radius
    (1, (1, 1), 1, 0),
    (2, (5, 7), 3, 1),
    (1, (13, 16), 8, 2),
    (3, (8, 8), 40, 2),
    (1, (12, 17), 64, 4),
    (2, (1, 19), 64, 2),
    (1, (23, 2), 40, 4),
    (1, (9, 10), 320, 3),
    (1, (7, 11), 64, 40),
    (1, (6, 5), 2048, 1),
    (1, (4, 3), 17, 65535),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_search_finds_the_best_candidate(isa, dtype, shape, generator):
    N, grid, C, radius = shape
    f_src, f_dst = random_features(N, grid[0] * grid[1], C, dtype, generator)
    for centre in (random_centres(N, grid, generator), own_sites(grid).expand(N, -1, 2)):
        with testing.poisoned_allocations():
            found = zk.correspondence_search(f_src, f_dst, centre, grid=grid, radius=radius, backend="cpu")
        assert_best_sites(found, f_src, f_dst, centre, grid, radius, f"{shape} {dtype}")


def test_the_reference_finds_the_best_candidate(generator):
    for dtype in (*DTYPES, torch.float64):
        f_src, f_dst = random_features(2, 56, 40, dtype, generator)
        centre = random_centres(2, (7, 8), generator)
        site, score = zk.correspondence_search(f_src, f_dst, centre, grid=(7, 8), radius=2, backend="reference")
        assert_best_sites((site, score.float()), f_src, f_dst, centre, (7, 8), 2, str(dtype))


def test_a_window_wider_than_the_grid_is_the_grid(isa, generator):
    f_src, f_dst = random_features(1, 12, 16, torch.float32, generator)
    centre = random_centres(1, (3, 4), generator)
    wide, whole = (
        zk.correspondence_search(f_src, f_dst, centre, grid=(3, 4), radius=radius, backend=backend)
        for radius, backend in ((65535, "reference"), (4, "cpu"))
    )
    assert torch.equal(wide[0], whole[0])


def test_every_offset_between_neighbours_finds_the_best(isa, generator):
    """Neighbouring windows that coincide, overlap a little, or not at all, at borders and inside."""
    grid, radius = (6, 9), 2
    f_src, f_dst = random_features(1, 54, 24, torch.float32, generator)
    for shift in range(-3, 5):
        centre = own_sites(grid).clone()[None]
        centre[:, 1::2, 0] += shift
        centre[:, 9:18] += torch.tensor((0, shift), dtype=torch.int32)
        found = zk.correspondence_search(f_src, f_dst, centre, grid=grid, radius=radius, backend="cpu")
        assert_best_sites(found, f_src, f_dst, centre, grid, radius, f"shift {shift}")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("radius", [1, 2, 3, 4, 30])
def test_ties_go_to_the_lowest_site(isa, radius, dtype, generator):
    grid, N = (11, 13), 2
    P = 143
    alphabet = torch.randn(3, 20, generator=generator).to(dtype)
    letters = torch.randint(0, 3, (N, P), generator=generator)
    f_src = torch.randn(N, P, 20, generator=generator).to(dtype)
    for centre in (random_centres(N, grid, generator), own_sites(grid).expand(N, -1, 2)):
        site, _ = zk.correspondence_search(f_src, alphabet[letters], centre, grid=grid, radius=radius, backend="cpu")
        chosen = letters.gather(1, site.long())
        same = window_mask(centre, grid, radius) & (letters[:, None, :] == chosen[..., None])
        assert torch.equal(site.long(), same.int().argmax(-1))


def test_what_is_no_number_never_wins(isa, generator):
    grid, radius = (7, 9), 2
    for dtype in DTYPES:
        f_src, f_dst = random_features(2, 63, 24, dtype, generator)
        for x, share in ((f_dst, 0.5), (f_src, 0.1)):
            hit = torch.rand(2, 63, generator=generator) < share
            channel = torch.randint(0, 24, (2, 63), generator=generator)
            bad = torch.tensor([torch.nan, torch.inf, -torch.inf])[torch.randint(0, 3, (2, 63), generator=generator)]
            n, p = hit.nonzero().unbind(1)
            x[n, p, channel[n, p]] = bad[n, p].to(dtype)
        f_dst[:, :20] = torch.nan
        centre = random_centres(2, grid, generator)
        found = zk.correspondence_search(f_src, f_dst, centre, grid=grid, radius=radius, backend="cpu")
        assert bool((found[1] == -torch.inf).any()) and bool((found[1] > 0).any())
        assert_best_sites(found, f_src, f_dst, centre, grid, radius, f"{dtype}")
        expected = correspondence_search_reference(f_src, f_dst, centre, grid, radius)
        assert torch.equal(found[1].isinf(), expected[1].isinf())


def test_short_tokens_count_by_the_smallest_length(isa):
    f_src = torch.tensor([1e-7, 1.0]).reshape(1, 2, 1)
    f_dst = torch.tensor([0.0, 2e-7]).reshape(1, 2, 1)
    centre = torch.zeros(1, 2, 2, dtype=torch.int32)
    site, score = zk.correspondence_search(f_src, f_dst, centre, grid=(1, 2), radius=1, backend="cpu")
    assert site.tolist() == [[1, 1]]
    torch.testing.assert_close(score, torch.tensor([[0.1 * 0.2, 0.2]]))
    where = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    torch.testing.assert_close(zk.link_score(f_src, f_dst, where, grid=(1, 2), backend="cpu"), score)


def views(x):
    """The same features with other strides and offsets, NaN all around."""
    N, P, C = x.shape
    for shape, index, order in (
        ((N, P, C + 3), (slice(None), slice(None), slice(3, None)), (0, 1, 2)),
        ((N + 1, 2 * P, C), (slice(1, None), slice(None, None, 2)), (0, 1, 2)),
        ((P, N, 3 * C), (slice(None), slice(None), slice(C, 2 * C)), (1, 0, 2)),
    ):
        buffer = torch.full(shape, torch.nan, dtype=x.dtype)
        view = buffer[index].permute(order)
        view.copy_(x)
        yield view


@pytest.mark.parametrize("C", [1, 3, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_do_not_matter(isa, dtype, C, generator):
    grid = (6, 7)
    f_src, f_dst = random_features(2, 42, C, dtype, generator)
    centre = random_centres(2, grid, generator)
    where = sites(grid) + torch.randn(2, 42, 2, generator=generator)
    site, score = zk.correspondence_search(f_src, f_dst, centre, grid=grid, backend="cpu")
    linked = zk.link_score(f_src, f_dst, where, grid=grid, backend="cpu")
    for a, b in zip(views(f_src), views(f_dst), strict=True):
        got = zk.correspondence_search(a, b, centre.mT.contiguous().mT, grid=grid, backend="cpu")
        assert torch.equal(got[0], site) and torch.equal(got[1], score)
        assert torch.equal(zk.link_score(a, b, where.mT.contiguous().mT, grid=grid, backend="cpu"), linked)
    one = f_dst[:1].expand(2, -1, -1)
    got = zk.correspondence_search(f_src, one, centre, grid=grid, backend="cpu")
    expected = zk.correspondence_search(f_src, one.contiguous(), centre, grid=grid, backend="cpu")
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])


@native_only
def test_the_number_of_threads_does_not_matter(isa, generator):
    grid = (17, 15)
    for N, C in ((1, 64), (7, 40)):
        f_src, f_dst = random_features(N, 255, C, torch.float32, generator)
        centre = random_centres(N, grid, generator)
        where = sites(grid) + torch.randn(N, 255, 2, generator=generator)
        results = []
        for count in (1, 2, 3):
            with testing.threads(count):
                found = zk.correspondence_search(f_src, f_dst, centre, grid=grid, radius=2, backend="cpu")
                results.append((*found, zk.link_score(f_src, f_dst, where, grid=grid, backend="cpu")))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_a_score_does_not_depend_on_its_neighbours(isa, generator):
    """The windows decide which kernel computes a dot product; its value must not tell which."""
    grid = (8, 12)
    f_src, f_dst = random_features(1, 96, 56, torch.float32, generator)
    together = own_sites(grid)[None]
    apart = together.clone()
    apart[:, 1::2] = 100
    a = zk.correspondence_search(f_src, f_dst, together, grid=grid, radius=2, backend="cpu")
    b = zk.correspondence_search(f_src, f_dst, apart, grid=grid, radius=2, backend="cpu")
    assert torch.equal(a[0][:, ::2], b[0][:, ::2]) and torch.equal(a[1][:, ::2], b[1][:, ::2])


@native_only
def test_no_pairs_and_no_memory():
    empty = torch.zeros(0, 12, 8)
    site, score = zk.correspondence_search(empty, empty, torch.zeros(0, 12, 2, dtype=torch.int32), grid=(3, 4))
    assert site.shape == score.shape == (0, 12)
    assert zk.link_score(empty, empty, torch.zeros(0, 12, 2), grid=(3, 4)).shape == (0, 12)


# ---- link scores ----


@pytest.mark.parametrize("shape", [(1, (1, 1), 1), (2, (5, 7), 3), (3, (8, 9), 40), (1, (6, 6), 64), (1, (3, 5), 2048)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_link_score_samples_first(isa, dtype, shape, generator):
    N, grid, C = shape
    P = grid[0] * grid[1]
    f_src, f_dst = random_features(N, P, C, dtype, generator)
    where = sites(grid) + torch.randn(N, P, 2, generator=generator)
    where = torch.where(torch.rand(N, P, 1, generator=generator) < 0.3, where.round(), where)
    with testing.poisoned_allocations():
        got = zk.link_score(f_src, f_dst, where, grid=grid, backend="cpu")
    oracle = link_score_reference(f_src.double(), f_dst.double(), where, grid)
    eager = link_score_reference(f_src.float(), f_dst.float(), where, grid)
    testing.assert_within_budget(got, oracle, eager, f"{shape} {dtype}")


def test_link_score_at_a_site_is_the_search_there(isa, generator):
    grid = (7, 6)
    f_src, f_dst = random_features(2, 42, 40, torch.float32, generator)
    site, score = zk.correspondence_search(f_src, f_dst, own_sites(grid).expand(2, -1, 2), grid=grid, backend="cpu")
    where = torch.stack((site % 6, site // 6), -1).float()
    torch.testing.assert_close(zk.link_score(f_src, f_dst, where, grid=grid, backend="cpu"), score, rtol=0, atol=5e-7)


def test_positions_of_any_value_are_clamped(isa, generator):
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
        got, expected = (
            zk.link_score(f_src, f_dst, torch.tensor(at).expand(1, 12, 2), grid=grid, backend="cpu")
            for at in (wild, tame)
        )
        assert torch.equal(got, expected)


def test_corners_of_weight_zero_take_no_part(isa, generator):
    grid = (3, 4)
    f_src, f_dst = random_features(1, 12, 24, torch.float32, generator)
    f_dst[:, 6] = torch.nan
    f_dst[:, 11] = torch.inf
    for at, neighbour in (((1.0, 1.0), 5), ((2.0, 2.0), 10), ((1e-40, 1e-40), 0)):
        if at[0] == 1e-40:  # the product of both fractions is zero
            f_dst[:, 5] = torch.inf
        where = torch.tensor(at).expand(1, 12, 2)
        got = zk.link_score(f_src, f_dst, where, grid=grid, backend="cpu")
        expected = cosines(f_src.double(), f_dst.double()[:, neighbour : neighbour + 1])[..., 0]
        assert torch.isfinite(got).all()
        assert (got - expected).abs().max() < 1e-6
    half = zk.link_score(f_src, f_dst, torch.tensor((1.5, 1.0)).expand(1, 12, 2), grid=grid, backend="cpu")
    assert half.isnan().all()


# ---- what the corrections are for ----


def texture(grid, shift, generator, patch=1, frames=2):
    """Tokens of a drifting random texture: RGB patches of 3x3 sites with a little noise, ``[frames, P, 27]``."""
    Hg, Wg = grid
    margin = 8
    size = (Hg + 2 * margin, Wg + 2 * margin)
    canvas = torch.randn(3, *size, generator=generator)
    canvas = torch.nn.functional.avg_pool2d(canvas[None], 3, 1, 1)[0] * 3
    features = []
    for t in range(frames):
        top, left = margin - t * shift[1], margin - t * shift[0]
        crop = canvas[:, top - patch : top + Hg + patch, left - patch : left + Wg + patch]
        tokens = torch.nn.functional.unfold(crop[None], 2 * patch + 1)[0].mT
        features.append(tokens + 0.02 * torch.randn(tokens.shape, generator=generator))
    return torch.stack(features)


@pytest.mark.parametrize("shift", [(0, 0), (1, -2), (3, 2)])
@pytest.mark.parametrize("error", [(0, 0), (2, -1), (-2, 2)])
def test_a_translating_texture_is_found_again(shift, error, generator):
    grid = (20, 24)
    features = texture(grid, shift, generator)
    truth = own_sites(grid).long() + torch.tensor(shift)
    inside = (truth >= 0).all(-1) & (truth < torch.tensor((grid[1], grid[0]))).all(-1)
    centre = (truth + torch.tensor(error)).to(torch.int32)[None]
    site, _ = zk.correspondence_search(features[:1], features[1:], centre, grid=grid, radius=2)
    # A centre that was clamped at the border has the truth in its window all the same.
    right = site[0].long() == truth[:, 1] * grid[1] + truth[:, 0]
    assert right[inside].float().mean() >= 0.99


@pytest.mark.parametrize("error", [(2, -1), (-1, 2)])
def test_corrupted_links_return_to_the_truth(error, generator):
    grid, shift, frames = (20, 24), (1, -1), 4
    features = texture(grid, shift, generator, frames=frames)
    P = grid[0] * grid[1]
    move, wrong = torch.tensor(shift, dtype=torch.float32), torch.tensor(error, dtype=torch.float32)
    truth = {"forward": sites(grid) + move, "backward": sites(grid) - move}
    corrupted = [(x + wrong).expand(1, frames - 1, P, 2) for x in truth.values()]
    valid = torch.ones(1, frames - 1, P, dtype=torch.bool)
    links = zk.Links.from_positions(*corrupted, valid, valid, grid)
    corrected, _ = zk.correct_links(links, features[None], k=9, K=10, options=options.CorrectionOptions())
    limit = torch.tensor((grid[1], grid[0]))
    for name, there in truth.items():
        inside = ((there >= 0) & (there < limit)).all(-1) & is_inside(there + wrong, grid)
        got = getattr(corrected, name)[0]
        right = (got == there).all(-1)[:, inside]
        assert right.float().mean() >= 0.99
        assert not (corrupted[0][0, :, inside] == there[inside]).all(-1).any()


def test_features_of_any_strides_correct_links(generator):
    grid = (4, 6)
    features = torch.randn(1, 3, 10, 24, generator=generator).mT  # channels first in memory
    where = (sites(grid) + torch.randn(2, 1, 2, 24, 2, generator=generator)).unbind(0)
    valid = torch.ones(1, 2, 24, dtype=torch.bool)
    links = zk.Links.from_positions(*where, valid, valid, grid)
    got, expected = (zk.correct_links(links, x, k=9, K=10)[0] for x in (features, features.contiguous()))
    assert torch.equal(got.forward, expected.forward) and not torch.equal(got.forward, links.forward)


# ---- torch's machinery and refusals ----


@native_only
def test_opcheck(generator):
    f_src, f_dst = torch.randn(2, 2, 12, 16, generator=generator)
    centre = random_centres(2, (3, 4), generator)
    where = sites((3, 4)).expand(2, -1, -1).contiguous()
    torch.library.opcheck(torch.ops.zsvr.correspondence_search.default, (f_src, f_dst, centre, 3, 4, 2, "cpu"))
    torch.library.opcheck(torch.ops.zsvr.link_score.default, (f_src, f_dst, where, 3, 4, "cpu"))


@native_only
def test_torch_compile_takes_the_whole_graph(generator):
    grid = (5, 6)
    f_src, f_dst = torch.randn(2, 2, 30, 24, generator=generator)
    centre = random_centres(2, grid, generator)

    def both(f_src, f_dst, centre):
        site, score = zk.correspondence_search(f_src * 2, f_dst, centre, grid=grid, radius=1, backend="cpu")
        where = torch.stack((site % 6, site // 6), -1).float()
        return site, score, zk.link_score(f_src, f_dst, where, grid=grid, backend="cpu")

    got = torch.compile(both, fullgraph=True, backend="aot_eager")(f_src, f_dst, centre)
    for a, b in zip(got, both(f_src, f_dst, centre), strict=True):
        assert torch.equal(a, b)


@native_only
def test_no_gradient_flows_through(generator):
    f_src, f_dst = torch.randn(2, 1, 12, 8, generator=generator).requires_grad_()
    centre = own_sites((3, 4))[None]
    for backend in ("cpu", "reference"):
        _, score = zk.correspondence_search(f_src, f_dst, centre, grid=(3, 4), backend=backend)
        where = sites((3, 4))[None].requires_grad_()
        assert not score.requires_grad
        assert not zk.link_score(f_src, f_dst, where, grid=(3, 4), backend=backend).requires_grad


def test_explicit_backends_never_fall_back(generator):
    x, centre = torch.randn(1, 12, 8, dtype=torch.float64, generator=generator), own_sites((3, 4))[None]
    for backend, reason in (("cpu", "float64"), ("sdpa", "cross_frame_attention only"), ("cuda", "no such kernel")):
        with pytest.raises(RuntimeError, match=f"correspondence_search: backend '{backend}' .*{reason}"):
            zk.correspondence_search(x, x, centre, grid=(3, 4), backend=backend)
        with pytest.raises(RuntimeError, match=f"link_score: backend '{backend}' .*{reason}"):
            zk.link_score(x, x, sites((3, 4))[None], grid=(3, 4), backend=backend)
    with pytest.raises(ValueError, match="backend must be one of"):
        zk.correspondence_search(x, x, centre, grid=(3, 4), backend="fast")
    site, score = zk.correspondence_search(x, x, centre, grid=(3, 4))
    assert score.dtype == torch.float64 and torch.equal(site[0].long(), torch.arange(12))


@native_only
def test_the_ops_check_again_what_reaches_native_code(generator):
    f = torch.randn(1, 12, 8, generator=generator)
    centre, where = own_sites((3, 4))[None], sites((3, 4))[None]
    op = torch.ops.zsvr.correspondence_search
    for call, error in (
        (lambda: op(f, f, centre, 3, 5, 2, "cpu"), ValueError),
        (lambda: op(f, f, centre[:, :5], 3, 4, 2, "cpu"), ValueError),
        (lambda: op(f, f, centre.long(), 3, 4, 2, "cpu"), TypeError),
        (lambda: op(f, f, centre, 3, 4, -1, "cpu"), ValueError),
        (lambda: op(f, f, centre, 3, 4, 65536, "cpu"), ValueError),
        (lambda: op(f, f, centre, 3, 4, 2, "reference"), ValueError),
        (lambda: op(f.double(), f.double(), centre, 3, 4, 2, "cpu"), TypeError),
        (lambda: op(f, f[..., ::2], centre, 3, 4, 2, "cpu"), ValueError),
        (lambda: op(f.mT.contiguous().mT, f, centre, 3, 4, 2, "cpu"), ValueError),
        (lambda: torch.ops.zsvr.link_score(f, f, where[..., :1], 3, 4, "cpu"), ValueError),
        (lambda: torch.ops.zsvr.link_score(f, f, where.double(), 3, 4, "cpu"), TypeError),
    ):
        with pytest.raises(error):
            call()


@native_only
def test_the_workspace_is_what_the_readme_says(generator):
    f, asked = torch.randn(3, 20, 8, generator=generator), []
    original = _native.workspace
    with mock.patch.object(_native, "workspace", lambda size: asked.append(size) or original(size)):
        zk.correspondence_search(f, f, own_sites((4, 5)).expand(3, -1, 2), grid=(4, 5), backend="cpu")
    assert asked == [4 * (3 * 20 + 16)]


def test_the_helpers_used_here_follow_the_definition(generator):
    """The oracle in testing.py is only as good as its mask and its cosines: seed a fault and see it caught."""
    grid, centre = (3, 4), torch.tensor([[[-5, 9]]], dtype=torch.int32).expand(1, 12, 2)
    assert window_mask(centre, grid, 1)[0, 0].nonzero().flatten().tolist() == [4, 5, 8, 9]
    f_src, f_dst = random_features(1, 12, 16, torch.float32, generator)
    site, score = correspondence_search_reference(f_src, f_dst, centre, grid, 1)
    with pytest.raises(AssertionError, match="score"):
        assert_best_sites((site, score + 1e-4), f_src, f_dst, centre, grid, 1, "shifted")
    second = torch.where(site == 4, 5, 4).to(torch.int32)
    worse = cosines(f_src, f_dst).gather(-1, second.long()[..., None])[..., 0]
    with pytest.raises(AssertionError, match="a candidate is better"):
        assert_best_sites((second, worse), f_src, f_dst, centre, grid, 1, "second best")
    assert torch.equal(nearest_site(sites(grid), grid), torch.arange(12))
    assert torch.equal(bilinear_sample(f_dst, sites(grid)[None], grid), f_dst)
