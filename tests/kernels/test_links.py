"""Links from flow: checks, resizing, pooling; frame tables."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import zsvr_kernels as zk
from zsvr_kernels.links import _resize_matrix, occlusion, pool_occlusion, resize_flow
from zsvr_kernels.sampling import bilinear_sample, is_inside, nearest_site, sites, warp


def read_flo(path):
    with open(path, "rb") as file:
        assert np.fromfile(file, np.float32, 1)[0] == np.float32(202021.25)
        width, height = np.fromfile(file, np.int32, 2)
        flow = np.fromfile(file, np.float32).reshape(height, width, 2)
    return torch.from_numpy(flow).permute(2, 0, 1)[None, None]


def test_area_resize_of_whole_ratios_is_average_pooling(generator):
    flow = torch.randn(2, 3, 2, 24, 40, generator=generator)
    got = resize_flow(flow, (6, 8))
    expected = F.avg_pool2d(flow.flatten(0, 1), (4, 5)).reshape(2, 3, 2, 6, 8)
    expected = expected * torch.tensor((8 / 40, 6 / 24))[:, None, None]
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("kind", ["area", "antialias", "nearest"])
@pytest.mark.parametrize("sizes", [(584, 64), (7, 3), (5, 5), (4, 9), (1, 6), (6, 1)], ids=str)
def test_resize_rows_sum_to_one(kind, sizes):
    rows = _resize_matrix(*sizes, kind).sum(1)
    torch.testing.assert_close(rows, torch.ones_like(rows))


def test_nearest_resize_follows_exact_arithmetic():
    sizes = [(size, target) for size in range(1, 50) for target in range(1, 50)] + [(2, 41), (1023, 997), (480, 7)]
    for size, target in sizes:
        expected = [int((Fraction(o) + Fraction(1, 2)) * Fraction(size, target)) for o in range(target)]
        assert _resize_matrix(size, target, "nearest").argmax(1).tolist() == expected, (size, target)


def test_area_resize_matches_opencv():
    cv2 = pytest.importorskip("cv2")
    flow = torch.randn(1, 1, 2, 388, 584, generator=torch.Generator().manual_seed(1))
    got = resize_flow(flow, (32, 48))[0, 0] / torch.tensor((48 / 584, 32 / 388))[:, None, None]
    for axis in range(2):
        expected = cv2.resize(flow[0, 0, axis].numpy(), (48, 32), interpolation=cv2.INTER_AREA)
        np.testing.assert_allclose(got[axis].numpy(), expected, atol=2e-5)


def test_constant_flow_is_scaled():
    flow = torch.tensor((3.0, -2.0))[:, None, None].expand(1, 2, 2, 30, 50)
    links = zk.Links.from_flow(flow, -flow, grid=(7, 9))
    step = torch.tensor((3.0 * 9 / 50, -2.0 * 7 / 30))
    torch.testing.assert_close(links.forward, (sites((7, 9)) + step).expand_as(links.forward))
    torch.testing.assert_close(links.backward, (sites((7, 9)) - step).expand_as(links.backward))
    assert links.valid_forward.all() and links.frames == 3


def test_one_occluded_pixel_occludes_every_token_it_touches():
    mask = torch.zeros(1, 1, 10, 14, dtype=torch.bool)
    mask[0, 0, 2, 3] = True
    pooled = pool_occlusion(mask, (4, 4))  # cells of 2.5 x 3.5 pixels
    expected = torch.zeros(4, 4, dtype=torch.bool)
    for y in range(4):
        for x in range(4):
            rows = range(int(np.floor(y * 2.5)), int(np.ceil((y + 1) * 2.5)))
            columns = range(int(np.floor(x * 3.5)), int(np.ceil((x + 1) * 3.5)))
            expected[y, x] = 2 in rows and 3 in columns
    assert torch.equal(pooled[0, 0], expected) and expected.sum() == 4
    assert not pool_occlusion(mask, (4, 4), "mean").any()


@pytest.mark.parametrize("check", ["U", "S", "none"])
def test_checks_follow_their_formula(check, generator):
    flow, opposite = torch.randn(2, 1, 1, 2, 12, 15, generator=generator).unbind(0)
    warped = warp(opposite[0], flow[0])[None]
    alpha, beta = {"U": (0.1, 0.7), "S": (0.05, 0.9), "none": (0.0, 0.0)}[check]
    got = occlusion(flow, opposite, check, alpha, beta)

    def norm(x):
        return x.norm(dim=2)

    expected = {
        "U": norm(flow + warped) > alpha * (norm(flow) + norm(opposite)) + beta,
        "S": norm(flow + warped) ** 2 > alpha * (norm(flow) ** 2 + norm(warped) ** 2) + beta,
        "none": torch.zeros(1, 1, 12, 15, dtype=torch.bool),
    }[check]
    assert torch.equal(got, expected)
    if check == "U":
        by_warped = occlusion(flow, opposite, check, alpha, beta, threshold_warped=True)
        assert torch.equal(by_warped, norm(flow + warped) > alpha * (norm(flow) + norm(warped)) + beta)


def test_motion_boundaries_count_where_asked():
    flow = torch.zeros(1, 1, 2, 8, 8)
    flow[..., 4:] = 1.0
    assert not occlusion(flow, -flow, "none", 0, 0).any()
    edge = occlusion(flow, -flow, "none", 0, 0, motion_boundary=True)
    assert edge[..., 3].all() and edge.sum() == 8


def test_non_finite_flow_is_occluded_and_zero():
    flow = torch.zeros(1, 1, 2, 8, 8)
    flow[0, 0, 0, 1, 1] = torch.nan
    flow[0, 0, 1, 7, 7] = torch.inf
    links = zk.Links.from_flow(flow, torch.zeros_like(flow), grid=(4, 4))
    assert torch.isfinite(links.forward).all() and torch.isfinite(links.backward).all()
    assert not links.valid_forward[0, 0, 0] and not links.valid_forward[0, 0, 15]
    assert links.valid_forward.sum() == 14


@pytest.mark.parametrize("check", ["U", "S"])
@pytest.mark.parametrize("size", [1e19, 1.8e19, 3e38])
def test_flow_whose_length_overflows_is_occluded(check, size):
    flow = torch.zeros(1, 1, 2, 8, 8)
    flow[0, 0, :, 1, 1] = size
    for opposite in (torch.zeros_like(flow), flow, -flow):
        links = zk.Links.from_flow(flow, opposite, grid=(8, 8), check=check)
        assert not links.valid_forward[0, 0, 9]
        assert links.valid_forward[0, 0, 40:].all()


def test_given_bounds_are_finite_numbers():
    flow = torch.zeros(1, 1, 2, 8, 8)
    for name in ("alpha", "beta"):
        for bad in (float("nan"), float("inf"), -0.1, 10**400):
            with pytest.raises(ValueError, match=name):
                zk.Links.from_flow(flow, flow, grid=(4, 4), **{name: bad})
        for bad in ("1", True, torch.ones(()), [1.0]):
            with pytest.raises(TypeError, match=name):
                zk.Links.from_flow(flow, flow, grid=(4, 4), **{name: bad})
        zk.Links.from_flow(flow, flow, grid=(4, 4), **{name: np.float32(0.1)})
    mask = torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"occ_backward is on meta"):
        zk.Links.from_flow(flow, flow, grid=(4, 4), occ_forward=mask, occ_backward=mask.to("meta"))


def test_links_print_in_one_line():
    flow = torch.zeros(2, 3, 2, 8, 8)
    links = zk.Links.from_flow(flow, flow, grid=(np.int64(4), 5))
    assert repr(links) == "Links(B=2, T=4, grid=(4, 5), valid=100%, 100%)"
    assert "valid=none" in repr(zk.Links.from_flow(flow[:, :0], flow[:, :0], grid=(4, 5)))


def test_rounding_and_given_occlusion(generator):
    flow = 3 * torch.randn(1, 2, 2, 16, 24, generator=generator)
    occ = torch.zeros(1, 2, 16, 24, dtype=torch.bool)
    occ[0, 1, :4, :4] = True
    links = zk.Links.from_flow(flow, -flow, grid=(4, 6), occ_forward=occ, occ_backward=occ, rounding="nearest")
    assert torch.equal(links.forward, links.forward.round())
    assert (~links.valid_forward).nonzero().tolist() == [[0, 1, 0]]


def test_real_flow_agrees_with_its_truth(real_data):
    cv2 = pytest.importorskip("cv2")
    folder = real_data / "gt_sintel_alley1_final"
    flow = read_flo(folder / "frame_0002.flo")
    occluded = cv2.imread(str(folder / "occlusion_0002.png"), cv2.IMREAD_GRAYSCALE) > 0
    frames = [cv2.imread(str(folder / "frames" / f"frame_000{n}.png"), cv2.IMREAD_GRAYSCALE) for n in (2, 3)]
    dis = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    back = torch.from_numpy(dis.calc(frames[1], frames[0], None)).permute(2, 0, 1)[None, None]
    grid = (34, 80)
    links = zk.Links.from_flow(flow, back, grid=grid)
    truth = pool_occlusion(torch.from_numpy(occluded)[None, None], grid, "mean").flatten(2)
    wrong = ~links.valid_forward
    # Most of what the truth calls hidden is refused, and most of the picture is kept.
    assert (wrong & truth).sum() > 0.6 * truth.sum()
    assert links.valid_forward.float().mean() > 0.7
    moved = (links.forward - sites(grid)).reshape(34, 80, 2)
    expected = cv2.resize(flow[0, 0].permute(1, 2, 0).numpy(), (80, 34), interpolation=cv2.INTER_AREA)
    expected = torch.from_numpy(expected) * torch.tensor((80 / 1024, 34 / 436))
    torch.testing.assert_close(moved, expected, atol=1e-3, rtol=1e-3)


def test_sampling_matches_grid_sample_and_its_gradient(generator):
    grid = (5, 7)
    x = torch.randn(2, 35, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    where = torch.rand(2, 20, 2, generator=generator, dtype=torch.float64) * torch.tensor((9.0, 7.0)) - 1.3
    where.requires_grad_()
    got = bilinear_sample(x, where, grid)
    norm = (where / torch.tensor((3.0, 2.0)) - 1)[:, None]
    expected = F.grid_sample(x.mT.reshape(2, 3, 5, 7), norm, padding_mode="border", align_corners=True)[:, :, 0].mT
    torch.testing.assert_close(got, expected)
    weight = torch.randn(got.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(*(torch.autograd.grad(y, (x, where), weight) for y in (got, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_nearest_and_inside():
    grid = (3, 4)
    positions = torch.tensor([[0.5, 0.0], [-0.5, -0.5], [3.5, 2.5], [3.51, 0.0], [torch.nan, 0.0]])
    assert nearest_site(positions, grid).tolist() == [1, 0, 11, 3, 0]
    assert is_inside(positions, grid).tolist() == [True, True, True, False, False]


def test_bad_links_are_refused():
    flow = torch.zeros(1, 2, 2, 8, 8)
    with pytest.raises(ValueError, match="flow_backward"):
        zk.Links.from_flow(flow, flow[:, :1], grid=(4, 4))
    with pytest.raises(ValueError, match=r"\[B, T-1, 2, Hi, Wi\]"):
        zk.Links.from_flow(flow[:, :, :1], flow, grid=(4, 4))
    with pytest.raises(TypeError, match="float"):
        zk.Links.from_flow(flow.int(), flow, grid=(4, 4))
    for grid in ((0, 4), (4,), "ab", (2.0, 3)):
        with pytest.raises((ValueError, TypeError), match="grid"):
            zk.Links.from_flow(flow, flow, grid=grid)
    for option in ("check", "resize", "occ_pool", "rounding"):
        with pytest.raises(ValueError, match=option):
            zk.Links.from_flow(flow, flow, grid=(4, 4), **{option: "unknown"})
    with pytest.raises(ValueError, match="both"):
        zk.Links.from_flow(flow, flow, grid=(4, 4), occ_forward=torch.zeros(1, 2, 8, 8, dtype=torch.bool))
    with pytest.raises(ValueError, match="not finite"):
        zk.Trajectories.from_positions(
            torch.full((1, 1, 1, 4, 2), torch.nan),
            torch.ones(1, 1, 1, 4, dtype=torch.bool),
            torch.zeros(1, 1, dtype=torch.int32),
            (2, 2),
        )


def test_presets():
    assert zk.neighbors(4).tolist() == [[0, 1], [0, 2], [1, 3], [2, 3]]
    assert zk.neighbors(3, include_self=True).tolist() == [[0, 1, 0], [0, 2, 1], [1, 2, 2]]
    assert zk.neighbors(3, border="drop").tolist() == [[-1, 1], [0, 2], [1, -1]]
    assert zk.neighbors(3, border="reflect").tolist() == [[1, -1], [0, 2], [1, -1]]
    assert zk.neighbors(1).tolist() == [[0, -1]]
    assert zk.neighbors(2, (-2,), border="drop").tolist() == [[0], [1]]
    assert zk.previous(3).tolist() == [[0], [0], [1]]
    assert zk.first_and_previous(4).tolist() == [[0, -1], [0, -1], [0, 1], [0, 2]]
    assert zk.anchors(3, (0, -1)).tolist() == [[0, 2]] * 3
    assert zk.all_frames(2).tolist() == [[0, 1], [0, 1]]
    mixed = zk.index_list(3, [zk.absolute(-1), zk.relative(-1), zk.relative(0)], dedupe=True)
    assert mixed.tolist() == [[2, 0, -1], [2, 0, 1], [2, 1, -1]]
    assert zk.neighbors(5).dtype == torch.int32
    assert zk.neighbors(np.int64(4), (np.int32(-1), 1)).tolist() == zk.neighbors(4).tolist()


@pytest.mark.parametrize(
    ("border", "expected"),
    [
        ("replicate", [[0, 1, 0], [1, 2, 0], [2, 2, 1]]),
        ("drop", [[-1, 1, -1], [-1, 2, 0], [-1, -1, 1]]),
        ("reflect", [[0, 1, 1], [1, 2, 0], [2, 1, 1]]),
    ],
)
def test_every_item_has_the_border_rule(border, expected):
    # Frames outside a window of a long clip are missing, whether named relatively or absolutely.
    def table(frame):
        return zk.index_list(3, [zk.absolute(frame), zk.relative(1), zk.relative(-1)], border=border).tolist()

    assert table(7) == table(-4) == expected
    assert zk.index_list(2, [zk.absolute(5)], border="drop").tolist() == [[0], [1]]


@settings(deadline=None, max_examples=60, derandomize=True)
@given(
    T=st.integers(1, 9),
    offsets=st.lists(st.integers(-10, 10), min_size=1, max_size=4),
    include_self=st.booleans(),
    border=st.sampled_from(["replicate", "drop", "reflect"]),
    dedupe=st.booleans(),
)
def test_tables_keep_their_promises(T, offsets, include_self, border, dedupe):
    table = zk.neighbors(T, tuple(offsets), include_self, border, dedupe=dedupe)
    assert table.shape == (T, len(offsets) + include_self)
    assert ((table >= -1) & (table < T)).all() and (table >= 0).any(1).all()
    for i, row in enumerate(table.tolist()):
        present = [j for j in row if j >= 0]
        if dedupe or len(set(present)) == 1:
            assert len(set(present)) == len(present)
        for o, j in zip(offsets, row, strict=False):
            if 0 <= i + o < T:
                assert j in (i + o, -1)


def test_bad_tables_are_refused():
    for call in (
        lambda: zk.neighbors(0),
        lambda: zk.neighbors(3, ()),
        lambda: zk.neighbors(3, border="wrap"),
        lambda: zk.anchors(3, (3,)),
        lambda: zk.all_frames(0),
    ):
        with pytest.raises(ValueError, match=r"at least|border|outside"):
            call()
    for bad in (0.5, True, "1", None):
        with pytest.raises(TypeError, match="must be an int"):
            zk.neighbors(3, (bad,))
        with pytest.raises(TypeError, match="must be an int"):
            zk.neighbors(bad)
