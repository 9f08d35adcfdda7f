"""Optical flow: estimators, the check and its resizing, cuts, files and the cache."""

from __future__ import annotations

import math
import pathlib
import sys
import types

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

import zsvr_kernels as zk
from zsvr import flow as flows
from zsvr import video
from zsvr_kernels.links import inside_pixels


def texture(size: tuple[int, int], seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    octaves = [torch.rand(1, 3, *(max(2, s // k) for s in size), generator=generator) for k in (3, 6, 12)]
    return sum(F.interpolate(x, size, mode="bicubic") for x in octaves)[0].div(3).clamp(0, 1)


def moving(frames: int, size: tuple[int, int], step: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """Return a clip whose content moves by ``step`` (x, y) pixels per frame."""
    big = texture((size[0] + 80, size[1] + 80), seed)
    return torch.stack([big[:, 40 - n * step[1] :, 40 - n * step[0] :][:, : size[0], : size[1]] for n in range(frames)])


class Fixed:
    """An estimator that returns what it was given."""

    name = "fixed"

    def __init__(self, forward: torch.Tensor, backward: torch.Tensor) -> None:
        self.flows, self.seen = (forward, backward), []

    def describe(self) -> dict[str, object]:
        return {"name": self.name}

    def __call__(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.seen.append(u)
        return self.flows


def constant(pairs: int, size: tuple[int, int], x: float, y: float) -> torch.Tensor:
    return torch.tensor((x, y), dtype=torch.float32)[:, None, None].expand(pairs, 2, *size).clone()


# ---- estimators ----


@pytest.mark.parametrize("step", [(3, -2), (0, 4), (-5, 1)])
def test_dis_finds_a_shift_in_both_directions(step):
    flow = flows.estimate(moving(3, (64, 80), step), flows.DIS())
    inner = (slice(None), slice(None), slice(16, -16), slice(16, -16))
    truth = torch.tensor(step, dtype=torch.float32)[:, None, None]
    assert (flow.forward[inner] - truth).norm(dim=1).mean() < 0.1
    assert (flow.backward[inner] + truth).norm(dim=1).mean() < 0.1
    assert not flow.cuts.any() and not flow.occ_forward[:, 16:-16, 16:-16].any()


@pytest.mark.parametrize(
    ("folder", "file", "first", "published"),
    [("gt_rubberwhale", "flow10.flo", 3, 0.23), ("gt_sintel_alley1_final", "frame_0002.flo", 1, 0.32)],
)
def test_dis_has_the_published_error_on_real_ground_truth(real_data, folder, file, first, published):
    clip = video.read(real_data / folder / "frames", first, first + 2).frames
    truth = flows.read_flo(real_data / folder / file)
    known = torch.isfinite(truth).all(0)
    whole = flows.estimate(clip, flows.DIS(), flows.EstimationOptions(max_side=4096))
    error = (whole.forward[0] - truth).norm(dim=0)
    assert float(error[known].mean()) == pytest.approx(published, abs=0.006)
    reliable = whole.between(0, 1)[1]
    assert error[known & reliable].mean() < 0.8 * error[known & ~reliable].mean()
    reduced = flows.estimate(clip, flows.DIS())
    assert (reduced.forward[0] - truth).norm(dim=0)[known].mean() < 2 * published


def test_small_frames_and_unknown_names_are_refused():
    with pytest.raises(ValueError, match="at least 16x16"):
        flows.estimate(torch.rand(2, 3, 12, 40), flows.DIS())
    with pytest.raises(ValueError, match="unknown flow estimator 'farneback': expected dis, raft_large, zero or given"):
        flows.estimator("farneback")
    for name in ("raft_large", "given"):
        with pytest.raises(ValueError, match=f"{name!r} needs a path"):
            flows.estimator(name)
    assert [flows.estimator(n).describe()["name"] for n in ("dis", "zero")] == ["dis", "zero"]
    with pytest.raises(ValueError, match=r"must be floating \[T, 3, H, W\], got \(2, 1, 32, 32\)"):
        flows.estimate(torch.rand(2, 1, 32, 32), flows.Zero())
    with pytest.raises(ValueError, match=r"fixed must return two flows \[2, 2, h, w\]"):
        flows.estimate(torch.rand(3, 3, 32, 32), Fixed(*[torch.zeros(1, 2, 32, 32)] * 2))


def test_a_strip_is_not_reduced_below_what_estimators_need():
    fixed = Fixed(*[torch.zeros(1, 2, 16, 128)] * 2)
    assert (
        flows.estimate(torch.rand(2, 3, 20, 400), fixed, flows.EstimationOptions(max_side=128)).forward.shape[3] == 400
    )
    assert fixed.seen[0].shape == (2, 3, 16, 128)
    with pytest.raises(ValueError, match="max_side must be at least 16, got 8"):
        flows.EstimationOptions(max_side=8)
    for bad in ({"check": "V"}, {"alpha": -1.0}, {"beta": math.nan}, {"cut_threshold": 0.0}, {"cut_difference": 0.0}):
        with pytest.raises(ValueError, match="must be"):
            flows.EstimationOptions(**bad)


def test_options_are_taken_from_settings_that_hold_more():
    settings = types.SimpleNamespace(check="S", max_side=64, alpha=None, estimator="dis", resize="area")
    assert flows.EstimationOptions.of(settings) == flows.EstimationOptions(check="S", max_side=64)


def test_one_frame_has_no_flow():
    flow = flows.estimate(torch.rand(1, 3, 32, 40), flows.DIS())
    assert flow.context().trajectories((8, 10)).positions.shape == (1, 1, 1, 80, 2)
    assert flow.frames == 1 and flow.forward.shape == (0, 2, 32, 40) and flow.cuts.shape == (0,)


def test_raft_says_what_is_missing(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="raft_large_C_T_SKHT_V2"):
        flows.estimator("raft_large", path=tmp_path / "missing.pth")
    weights = tmp_path / "weights.pth"
    torch.save({"x": torch.zeros(2)}, weights)
    monkeypatch.setitem(sys.modules, "torchvision.models.optical_flow", None)
    with pytest.raises(ModuleNotFoundError, match="needs a torchvision that fits torch"):
        flows.estimator("raft_large", path=weights)


class Network(torch.nn.Module):
    """In place of RAFT: says where its input was, so that padding, order and range show."""

    def __init__(self) -> None:
        super().__init__()
        self.x = torch.nn.Parameter(torch.zeros(2))
        self.calls: list[tuple[torch.Tensor, torch.Tensor, int]] = []

    def forward(self, a, b, num_flow_updates):
        self.calls.append((a, b, num_flow_updates))
        return [torch.zeros(len(a), 2, *a.shape[2:]), (b - a)[:, :2]]


def test_raft_is_fed_as_its_authors_do(tmp_path, monkeypatch):
    """Range [-1, 1], padding by replication to multiples of 8 and 128, 12 updates, the last prediction, cropped."""
    network = Network()
    fake = types.ModuleType("torchvision.models.optical_flow")
    fake.raft_large = lambda weights, progress: network
    for name in ("torchvision", "torchvision.models"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, "torchvision.models.optical_flow", fake)
    weights = tmp_path / "weights.pth"
    torch.save({"y": torch.zeros(2)}, weights)
    with pytest.raises(ValueError, match="no state dict of torchvision's raft_large"):
        flows.estimator("raft_large", path=weights)
    torch.save({"x": torch.zeros(2)}, weights)
    raft = flows.estimator("raft_large", path=weights)
    u = torch.rand(3, 3, 60, 150)
    forward, backward = raft(u)
    assert torch.allclose(forward, 2 * (u[1:] - u[:-1])[:, :2]) and torch.allclose(backward, -forward)
    a, _, updates = network.calls[0]
    assert a.shape == (1, 3, 128, 152) and updates == 12
    assert torch.equal(a[..., :60, :150], 2 * u[:1] - 1) and torch.equal(a[..., 59:60, :150], a[..., 127:, :150])
    assert raft.describe()["weights"] != flows.identify.__name__ and len(raft.describe()["weights"]) == 64


# ---- files ----


def test_flo_files_are_the_published_format(tmp_path):
    flow = torch.tensor([[[1.5, -2.0, 0.25]], [[0.0, 1e-3, 7.0]]])
    flows.write_flo(tmp_path / "a.flo", flow)
    data = (tmp_path / "a.flo").read_bytes()
    assert data[:4] == b"PIEH"  # 202021.25 as float32 spells that
    assert np.frombuffer(data, "<i4", 2, 4).tolist() == [3, 1]
    assert np.frombuffer(data, "<f4", offset=12).tolist() == pytest.approx([1.5, 0, -2, 1e-3, 0.25, 7])
    assert torch.equal(flows.read_flo(tmp_path / "a.flo"), flow)
    flow[0, 0, 1] = math.nan
    flows.write_flo(tmp_path / "a.flo", flow, overwrite=True)
    assert flows.read_flo(tmp_path / "a.flo").isnan()[:, 0].tolist() == [[False, True, False]] * 2
    for bad, message in ((data[:-4], "takes 36 bytes, has 32"), (b"P" + data, "does not begin"), (b"PI", "no .flo")):
        (tmp_path / "b.flo").write_bytes(bad)
        with pytest.raises(ValueError, match=message):
            flows.read_flo(tmp_path / "b.flo")


def test_opencv_writes_and_reads_the_same_files(tmp_path):
    cv2 = pytest.importorskip("cv2")
    flow = torch.randn(2, 5, 7)
    cv2.writeOpticalFlow(str(tmp_path / "a.flo"), flow.permute(1, 2, 0).contiguous().numpy())
    assert torch.equal(flows.read_flo(tmp_path / "a.flo"), flow)
    flows.write_flo(tmp_path / "b.flo", flow)
    assert (tmp_path / "a.flo").read_bytes() == (tmp_path / "b.flo").read_bytes()


def test_given_flow_is_scaled_to_the_canvas(tmp_path):
    forward, backward = constant(3, (16, 20), 2.0, -1.0), constant(3, (16, 20), -2.0, 1.0)
    forward[1, :, 4, 5] = math.nan
    flows.write_flow(tmp_path / "flow", forward, backward)
    flow = flows.estimate(torch.rand(4, 3, 32, 60), flows.Given(tmp_path / "flow"))
    assert flow.forward.shape == (3, 2, 32, 60)
    assert torch.allclose(flow.forward[0], torch.tensor((6.0, -2.0))[:, None, None].expand(2, 32, 60))
    assert torch.allclose(flow.backward[2], torch.tensor((-6.0, 2.0))[:, None, None].expand(2, 32, 60))
    assert flow.occ_forward[1, 8:10, 15:18].all() and flow.occ_forward.sum() == 6  # the unknown pixel's cell
    later = flows.Given(tmp_path / "flow", start=1)(torch.rand(3, 3, 16, 20))[0]
    assert torch.equal(later[1], forward[2])
    with pytest.raises(FileNotFoundError, match=r"forward_00003.flo is missing: 5 frames from 0"):
        flows.estimate(torch.rand(5, 3, 32, 60), flows.Given(tmp_path / "flow"))
    with pytest.raises(FileNotFoundError, match="no folder"):
        flows.Given(tmp_path / "other")


# ---- check and resizing ----


def test_the_estimator_sees_reduced_frames_and_the_check_runs_there():
    u = torch.rand(2, 3, 96, 128)
    forward, backward = constant(1, (48, 64), 1.0, 0.0), constant(1, (48, 64), -1.0, 0.0)
    backward[0, 0, 10, 21] = 5.0  # what pixel 20 of row 10 comes back with
    fixed = Fixed(forward, backward)
    flow = flows.estimate(u, fixed, flows.EstimationOptions(max_side=64, cut_threshold=1))
    reduced = F.interpolate(u, (48, 64), mode="bilinear", antialias=True)
    assert torch.equal(fixed.seen[0], reduced)
    assert torch.allclose(flow.forward, constant(1, (96, 128), 2.0, 0.0))
    occluded = flow.occ_forward[0].nonzero().tolist()
    assert occluded == [[y, x] for y in (20, 21) for x in (40, 41)]


@pytest.mark.parametrize("options", [{}, {"check": "S"}, {"check": "none"}, {"threshold_warped": True},
                                     {"motion_boundary": True}, {"alpha": 0.2, "beta": 0.0}])  # fmt: skip
def test_every_rule_is_that_of_the_kernels(options):
    forward, backward = torch.randn(2, 2, 24, 32), torch.randn(2, 2, 24, 32)
    flow = flows.estimate(
        torch.rand(3, 3, 24, 32), Fixed(forward, backward), flows.EstimationOptions(cut_threshold=1, **options)
    )
    ours = flow.links((24, 32))
    theirs = zk.Links.from_flow(forward[None], backward[None], grid=(24, 32), **options)
    for name, expected in theirs.tensors().items():
        assert torch.equal(getattr(ours, name), expected), name


def test_masks_are_what_passes_the_check_and_stays_inside():
    flow = flows.estimate(torch.rand(2, 3, 16, 20), Fixed(constant(1, (16, 20), 3, 0), constant(1, (16, 20), -3, 0)),
                          flows.EstimationOptions(cut_threshold=1))  # fmt: skip
    field, mask = flow.between(0, 1)
    assert torch.equal(field, flow.forward[0])
    assert mask[:, :17].all() and not mask[:, 17:].any()
    assert torch.equal(mask, flow.reliable_forward[0])
    field, mask = flow.between(1, 0)
    assert torch.equal(mask, flow.reliable_backward[0])
    assert torch.equal(field, flow.backward[0]) and not mask[:, :3].any() and mask[:, 3:].all()
    for i, j in ((0, 0), (1, 2), (-1, 0), (0, 2)):
        with pytest.raises(ValueError, match="adjacent frames"):
            flow.between(i, j)


def test_flow_that_is_not_finite_is_zero_and_occluded():
    forward, backward = constant(1, (16, 16), 0, 0), constant(1, (16, 16), 0, 0)
    forward[0, 1, 3, 4], backward[0, 0, 7, 7] = math.inf, math.nan
    flow = flows.estimate(torch.full((2, 3, 16, 16), 0.5), Fixed(forward, backward))
    assert flow.occ_forward[0].nonzero().tolist() == [[3, 4]] and flow.occ_backward[0].nonzero().tolist() == [[7, 7]]
    assert not flow.forward.any() and not flow.backward.any()


@pytest.mark.parametrize("options", [{}, {"max_side": 64}, {"check": "S"}, {"check": "none"}])
def test_flow_that_is_not_finite_makes_a_cut_whatever_the_check(options):
    unknown = torch.full((1, 2, 32, 32), math.nan)
    flow = flows.estimate(torch.full((2, 3, 32, 32), 0.5), Fixed(unknown, unknown), flows.EstimationOptions(**options))
    assert flow.cuts.tolist() == [True] and flow.failed.tolist() == [1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_frames_of_16_bit_floats_are_reduced_as_float32(dtype):
    u = moving(2, (48, 64), (2, 1)).to(dtype)
    options = flows.EstimationOptions(max_side=32)
    assert torch.equal(
        flows.estimate(u, flows.DIS(), options).forward, flows.estimate(u.float(), flows.DIS(), options).forward
    )


def test_the_checks_result_goes_to_the_nearest_pixel():
    """From 16 x 20 to 24 x 30: output n takes input floor((n + 0.5) / 1.5), so 1 and 2 take 1, 4 and 5 take 3."""
    forward, backward = constant(1, (16, 20), 0, 0), constant(1, (16, 20), 0, 0)
    forward[0, 0, 1, 3] = math.nan
    flow = flows.estimate(torch.full((2, 3, 24, 30), 0.5), Fixed(forward, backward))
    assert flow.occ_forward[0].nonzero().tolist() == [[1, 4], [1, 5], [2, 4], [2, 5]]


def test_windows_and_tiles_are_parts_of_the_whole():
    flow = flows.estimate(moving(6, (48, 64), (2, 1)), flows.DIS())
    part = flow.window([0, 2, 3, 4])
    assert torch.equal(part.forward[1:], flow.forward[2:4]) and part.cuts.tolist() == [True, False, False]
    assert not part.forward[0].any() and part.occ_forward[0].all() and part.occ_backward[0].all()
    tile = flow.crop(slice(8, 40), slice(16, 48))
    assert torch.equal(tile.forward, flow.forward[..., 8:40, 16:48]) and torch.equal(tile.cuts, flow.cuts)
    assert tile.occ_backward.shape == (5, 32, 32)
    with pytest.raises(ValueError, match="must rise"):
        flow.window([2, 1])


# ---- cuts ----


def test_links_end_at_a_cut():
    clip = torch.cat((moving(3, (96, 128), (2, 0), 1), moving(3, (96, 128), (-1, 2), 11)))
    flow = flows.estimate(clip, flows.DIS())
    assert flow.cuts.tolist() == [False, False, True, False, False]
    plain = flows.estimate(clip, flows.DIS(), flows.EstimationOptions(cut_threshold=1))
    links, expected = flow.links((12, 16)), plain.links((12, 16)).cut(flow.cuts)
    for name in links.tensors():
        assert torch.equal(getattr(links, name), getattr(expected, name)), name
    trajectories = flow.context().trajectories((12, 16))
    assert not trajectories.valid[0, :3, 3:].any() and not trajectories.valid[0, 3:, :3].any()
    assert not flow.between(2, 3)[1].any() and not flow.between(3, 2)[1].any()
    assert inside_pixels(flow.forward[2]).all()


REAL = ("woman_running/frames", "carphone_pair/pristine", "gt_rubberwhale/frames", "gt_sintel_alley1_final/frames")


def test_cuts_are_found_between_real_clips_and_not_inside(real_data):
    clips = {n: F.interpolate(video.read(real_data / n, 0, 4).frames, (160, 192), mode="area") for n in REAL}
    for sigma in (0.0, 0.15):
        generator = torch.Generator().manual_seed(3)
        joined = torch.cat(list(clips.values()))
        noisy = (joined + sigma * torch.randn(joined.shape, generator=generator)).clamp(0, 1)
        flow = flows.estimate(noisy, flows.DIS())
        assert flow.cuts.nonzero().flatten().tolist() == [3, 7, 11], (sigma, flow.failed)
        assert flow.failed[[3, 7, 11]].min() > 0.95
        assert flow.failed[~flow.cuts].max() < 0.7, (sigma, flow.failed)


@pytest.mark.parametrize("check", ["U", "S", "none"])
def test_cuts_need_no_texture_and_its_lack_is_no_cut(check):
    options = flows.EstimationOptions(check=check)
    flat = torch.full((6, 3, 32, 32), 0.2)
    assert not flows.estimate(flat, flows.DIS(), options).cuts.any()
    flat[3:] = 0.7
    assert flows.estimate(flat, flows.DIS(), options).cuts.tolist() == [False, False, True, False, False]
    clip = torch.cat((moving(3, (48, 64), (1, 0)), torch.zeros(3, 3, 48, 64)))
    assert flows.estimate(clip, flows.DIS(), options).cuts.tolist() == [False, False, True, False, False]


# ---- cache ----


class Counting(flows.DIS):
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, u):
        self.calls += 1
        return super().__call__(u)


def test_the_cache_returns_the_same_flow_and_notices_every_change(tmp_path, recwarn):
    u, estimator = moving(3, (32, 48), (2, 1)), Counting()
    first = flows.cached(tmp_path, u, estimator)
    again = flows.cached(tmp_path, u.clone(), estimator)
    assert estimator.calls == 1 and len(list(tmp_path.iterdir())) == 1
    for name, x in first.tensors().items():
        assert torch.equal(again.tensors()[name], x), name
    other = u.clone()
    other[1, 0, 5, 5] = torch.nextafter(other[1, 0, 5, 5], torch.tensor(2.0))
    flows.cached(tmp_path, other, estimator)
    flows.cached(tmp_path, u, estimator, flows.EstimationOptions(beta=0.4))
    flows.cached(tmp_path, u, flows.Zero())
    assert estimator.calls == 3 and len(list(tmp_path.iterdir())) == 4
    assert len(recwarn) == 0


def test_a_damaged_cache_is_estimated_anew(tmp_path):
    u, estimator = moving(3, (32, 48), (2, 1)), Counting()
    first = flows.cached(tmp_path, u, estimator)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    broken = bytearray(whole)
    broken[-7] ^= 1  # one bit of a tensor
    for data in (bytes(broken), whole[: len(whole) // 2], b"", b"junk" * 50):
        path.write_bytes(data)
        with pytest.warns(UserWarning, match="estimated anew"):
            again = flows.cached(tmp_path, u, estimator)
        assert torch.equal(again.forward, first.forward)
        assert path.read_bytes() == whole  # same inputs, same bytes
    with pytest.raises(ValueError, match="no file of saved flow"):
        path.write_bytes(b"junk")
        flows.load(path)
    for facts in ("[]", "null", "{"):
        safetensors.torch.save_file({"forward": first.forward}, str(path), {"facts": facts})
        with pytest.raises(ValueError, match="no file of saved flow"):
            flows.load(path)


def test_saving_stops_half_way_without_a_trace(tmp_path, monkeypatch):
    def interrupted(tensors, path, facts):
        pathlib.Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(safetensors.torch, "save_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        flows.cached(tmp_path, moving(2, (32, 32), (1, 0)), flows.DIS())
    assert list(tmp_path.iterdir()) == []
