"""Keyed noise: pinned values, independence of window and order, unit variance under every way of sharing."""

from __future__ import annotations

import itertools
import math

import numpy
import pytest
import torch

from zsvr import noise
from zsvr.noise import FrameNoise, NoiseOptions

SHAPE = (3, 12, 10)
T = 5


def motion(frames: int, size: tuple[int, int], generator: torch.Generator, scale: float = 1.5):
    """Return smooth random flows in both directions and sparse random occlusion."""
    H, W = size
    flows, occluded = [], []
    for _ in range(2):
        coarse = scale * torch.randn(frames - 1, 2, 3, 3, generator=generator)
        flows.append(torch.nn.functional.interpolate(coarse, (H, W), mode="bicubic"))
        occluded.append(torch.rand(frames - 1, H, W, generator=generator) < 0.1)
    return {
        "flow_forward": flows[0],
        "flow_backward": flows[1],
        "occ_forward": occluded[0],
        "occ_backward": occluded[1],
    }


def test_pinned_key_and_values():
    assert noise.key(0, "step", 990, -1, 0) == 0xB63D22742271DD2D
    first = noise.normal(0, "step", (3, 8, 8), step=990).flatten()[:4]
    assert torch.equal(first, torch.tensor([-1.126182, -1.2308176, -0.23522082, -2.8171031]))


def test_mix_is_splitmix64():
    # Published outputs of SplitMix64 seeded with 1234567 (Rosetta Code): the state advances by the golden ratio.
    golden, state = 0x9E3779B97F4A7C15, 1234567
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [noise.mix((state + n * golden) % 2**64) for n in range(4)] == expected


def test_every_part_of_a_key_counts():
    keys = {
        noise.key(seed, kind, step, frame, visit)
        for seed, kind, step, frame, visit in itertools.product(
            (0, 1, 2**63 - 1), noise.KINDS, (-1, 0, 999), (-1, 0, 7), (0, 1)
        )
    }
    assert len(keys) == 3 * len(noise.KINDS) * 3 * 3 * 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, "steps"), "kind must be one of"),
        ((-1, "step"), "seed must be within"),
        ((2**63, "step"), "seed must be within"),
        ((0, "step", -2), "at least -1"),
        ((0, "step", 0, -2), "at least -1"),
        ((0, "step", 0, 0, -1), "at least -1"),
    ],
)
def test_bad_keys_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        noise.key(*arguments)


OPTIONS = [
    NoiseOptions("share"),
    NoiseOptions("none"),
    *(NoiseOptions("rho", rho=rho) for rho in (0.0, 0.9, 1.0)),
    *(NoiseOptions("warp_blend", fill=fill) for fill in noise.FILLS),
    *(NoiseOptions("static_mask", soft=soft, static_px=1.0) for soft in (False, True)),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_mean_and_variance(options, generator):
    H, W, frames = 256, 256, 6
    fields = FrameNoise(3, (3, H, W), frames, options, **motion(frames, (H, W), generator))("step", range(6), step=500)
    tolerance = 3e-2 if options.sharing == "warp_blend" else 1e-2
    for field in fields:  # 2e5 values each: standard errors 2.3e-3 of the mean, 3.2e-3 of the variance
        assert abs(float(field.mean())) < tolerance
        assert abs(float(field.var()) - 1) < tolerance
        # Marginals stay normal: shares outside one and two standard deviations.
        for bound in (1, 2):
            expected = 1 - math.erf(bound / math.sqrt(2))
            assert abs(float((field.abs() > bound).float().mean()) - expected) < tolerance / 3


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_frame_depends_on_neither_window_nor_order(options, generator):
    fields = FrameNoise(3, SHAPE, T, options, **motion(T, SHAPE[1:], generator))
    whole = fields("step", range(T), step=10, visit=2)
    for ids in ([3], [4, 0, 2], [1, 1]):
        assert torch.equal(fields("step", ids, step=10, visit=2), whole[ids])
    assert torch.equal(fields("step", range(T), step=10, visit=2), whole)
    for other in (
        fields("step", range(T), step=11, visit=2),
        fields("step", range(T), step=10, visit=1),
        fields("travel", range(T), step=10, visit=2),
        FrameNoise(4, SHAPE, T, NoiseOptions("none"))("step", range(T), step=10, visit=2),
    ):
        assert all(not torch.equal(a, b) for a, b in zip(other, whole, strict=True))
    assert fields("step", [], step=10).shape == (0, *SHAPE)


def test_sharing_correlates_frames_as_it_says():
    def correlation(sharing):
        a, b = FrameNoise(0, (3, 300, 300), 2, sharing)("initial", [0, 1]).flatten(1)
        return float(torch.corrcoef(torch.stack((a, b)))[0, 1])

    assert correlation(NoiseOptions("share")) == pytest.approx(1, abs=1e-6)
    assert correlation(NoiseOptions("rho", rho=0.7)) == pytest.approx(0.7, abs=0.01)
    assert correlation(NoiseOptions("none")) == pytest.approx(0, abs=0.01)


def naive_origins(flow, mask):
    """The definition, pixel by pixel in Python numbers."""
    count, _, H, W = flow.shape
    origin = [[[(y, x) for x in range(W)] for y in range(H)]]
    start = [[[0] * W for _ in range(H)]]
    for i in range(count):
        here, begun = [], []
        for y in range(H):
            row, row_begun = [], []
            for x in range(W):
                if mask[i, y, x]:
                    px = min(max(math.floor(float(torch.tensor(float(x)) + flow[i, 0, y, x]) + 0.5), 0), W - 1)
                    py = min(max(math.floor(float(torch.tensor(float(y)) + flow[i, 1, y, x]) + 0.5), 0), H - 1)
                    row.append(origin[-1][py][px])
                    row_begun.append(start[-1][py][px])
                else:
                    row.append((y, x))
                    row_begun.append(i + 1)
            here.append(row)
            begun.append(row_begun)
        origin.append(here)
        start.append(begun)
    flat = [[y * W + x for row in frame for y, x in row] for frame in origin]
    return torch.tensor(flat), torch.tensor([[n for row in frame for n in row] for frame in start])


def test_origins_equal_the_definition(generator):
    given = motion(T, SHAPE[1:], generator)
    flow, mask = noise.reliable(given["flow_backward"], given["occ_backward"])
    flow[0, :, 0, 0] = torch.tensor([0.5, 1.5])  # halves round up
    origin, start = noise.origins(flow, mask)
    expected = naive_origins(flow, mask)
    assert torch.equal(origin.long(), expected[0]) and torch.equal(start.long(), expected[1])
    assert float((origin[-1] != origin[0]).float().mean()) > 0.2


def test_warped_noise_moves_with_the_picture():
    # Everything moves right by 2 pixels per frame: a pixel comes from 2 pixels to its left, as long as that exists.
    flow = torch.zeros(T - 1, 2, *SHAPE[1:])
    flow[:, 0] = -2
    visible = torch.zeros(T - 1, *SHAPE[1:], dtype=torch.bool)
    fields = FrameNoise(1, SHAPE, T, NoiseOptions("warp_blend"), flow_backward=flow, occ_backward=visible)
    e = fields("initial", range(T))
    for i in range(1, T):
        assert torch.equal(e[i, :, :, 2:], e[i - 1, :, :, :-2])
        assert torch.equal(e[i, :, :, :2], e[0, :, :, :2])  # what comes in has the shared field


def test_warp_blend_takes_values_of_the_shared_field(generator):
    given = motion(T, SHAPE[1:], generator)
    shared = noise.normal(1, "step", SHAPE, step=7)
    for field in FrameNoise(1, SHAPE, T, NoiseOptions("warp_blend"), **given)("step", range(T), step=7):
        for channel, e in zip(field, shared, strict=True):
            assert torch.isin(channel, e).all()
    fresh = FrameNoise(1, SHAPE, T, NoiseOptions("warp_blend", fill="fresh"), **given)("step", range(T), step=7)
    own = torch.stack([noise.normal(1, "step", SHAPE, step=7, frame=i) for i in range(T)])
    for i, field in enumerate(fresh):
        assert torch.isin(field, own[: i + 1]).all()
        assert i == 0 or (torch.isin(field, own[i]).any() and not torch.isin(field, own[i]).all())
    assert not torch.isin(fresh, shared).any()


def test_static_mask_shares_where_nothing_moves():
    flow = torch.zeros(T - 1, 2, *SHAPE[1:])
    flow[..., 5:] = 3.0
    occluded = torch.zeros(T - 1, *SHAPE[1:], dtype=torch.bool)
    occluded[1, 0, 0] = True
    forward = flow.clone()
    forward[:, :, 3] = 3.0  # of which only the first frame, which has none before it, takes notice
    given = {
        "flow_forward": forward,
        "flow_backward": flow,
        "occ_forward": torch.zeros_like(occluded),
        "occ_backward": occluded,
    }
    fields = FrameNoise(2, SHAPE, T, NoiseOptions("static_mask"), **given)("step", range(T), step=3)
    shared = noise.normal(2, "step", SHAPE, step=3)
    for i, field in enumerate(fields):
        own = noise.normal(2, "step", SHAPE, step=3, frame=i)
        expected = torch.where(torch.arange(SHAPE[2]) < 5, shared, own)
        if i == 0:
            expected[:, 3] = own[:, 3]
        if i == 2:  # frame 2 looks back to frame 1, where its corner is occluded
            expected[:, 0, 0] = own[:, 0, 0]
        assert torch.equal(field, expected)


def test_a_soft_mask_is_a_box_mean():
    ndimage = pytest.importorskip("scipy.ndimage")
    flow = torch.zeros(1, 2, 20, 21)
    flow[..., 10:] = 3.0
    got = noise.still(flow, torch.ones(1, 20, 21, dtype=torch.bool), 0.5, soft=True)[0].numpy()
    hard = (numpy.arange(21) < 10).astype(numpy.float32)[None].repeat(20, 0)
    expected = ndimage.uniform_filter(hard, 5, mode="constant")
    assert numpy.allclose(got[2:-2, 2:-2], expected[2:-2, 2:-2], atol=1e-6)
    assert got[0, 0] == 1 and got[0, -1] == 0


def test_a_single_frame_has_the_shared_field():
    shared = noise.normal(0, "initial", SHAPE)
    for mode in ("share", "warp_blend", "static_mask"):
        assert torch.equal(FrameNoise(0, SHAPE, 1, NoiseOptions(mode))("initial", [0])[0], shared)


def test_flow_that_is_not_finite_starts_anew():
    flow = torch.zeros(1, 2, *SHAPE[1:])
    flow[0, 0, 3, 4] = math.nan
    visible = torch.zeros(1, *SHAPE[1:], dtype=torch.bool)
    fields = FrameNoise(
        0, SHAPE, 2, NoiseOptions("warp_blend", fill="fresh"), flow_backward=flow, occ_backward=visible
    )("initial", [0, 1])
    same = (fields[0] == fields[1]).all(0)
    assert not same[3, 4] and same.sum() == same.numel() - 1


def test_flow_of_another_size_is_resized():
    # Twice the size, twice the motion: the same fields.
    large = torch.zeros(1, 2, 24, 20)
    large[:, 0] = -4
    small = torch.zeros(1, 2, 12, 10)
    small[:, 0] = -2
    fields = [
        FrameNoise(
            0,
            SHAPE,
            2,
            NoiseOptions("warp_blend"),
            flow_backward=flow,
            occ_backward=torch.zeros(1, *flow.shape[2:], dtype=torch.bool),
        )("initial", [1])
        for flow in (large, small)
    ]
    assert torch.equal(*fields)


def test_measurement_noise_belongs_to_a_frame():
    n = noise.measurement(5, [2, 0], (1, 4, 4))
    assert torch.equal(n[0], noise.normal(5, "measurement", (1, 4, 4), frame=2))
    assert not torch.equal(n[0], n[1])


def test_uniform_fields():
    u = noise.uniform(0, "mask", (512, 512))
    assert u.dtype == torch.float32 and float(u.min()) >= 0 and float(u.max()) < 1
    assert float(u.mean()) == pytest.approx(0.5, abs=3e-3) and float(u.var()) == pytest.approx(1 / 12, abs=2e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NoiseOptions("warp"), "noise.sharing must be one of"),
        (lambda: NoiseOptions(fill="old"), "noise.fill must be one of"),
        (lambda: NoiseOptions(static_px=math.nan), "noise.static_px"),
        (lambda: NoiseOptions(rho=1.1), "noise.rho"),
        (lambda: NoiseOptions(static_px=-1), "noise.static_px"),
        (lambda: FrameNoise(0, SHAPE, 0), "at least one frame"),
        (lambda: FrameNoise(0, (3, 4), 1), "shape"),
        (lambda: FrameNoise(-1, SHAPE, 1), "seed"),
        (lambda: FrameNoise(0, SHAPE, 3, NoiseOptions("warp_blend")), "needs flow_backward"),
        (
            lambda: FrameNoise(
                0,
                SHAPE,
                3,
                NoiseOptions("warp_blend"),
                flow_backward=torch.zeros(1, 2, 4, 4),
                occ_backward=torch.zeros(1, 4, 4, dtype=torch.bool),
            ),
            "expected flow_backward",
        ),
        (lambda: FrameNoise(0, SHAPE, 3)("step", [3], step=0), "within 0..2"),
        (lambda: FrameNoise(0, SHAPE, 3)("mask", [0]), "initial, step or travel"),
    ],
)
def test_faults_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
