"""The drift of features along trajectories: by hand, of a network, and in a run of the demo."""

from __future__ import annotations

import json
import math

import pytest
import torch

import zsvr_kernels as zk

pytest.importorskip("av")
pytest.importorskip("cv2")
pytest.importorskip("tqdm")
pytest.importorskip("PIL")

from zsvr_kernels.demo import drift, video
from zsvr_kernels.demo.__main__ import main
from zsvr_kernels.demo.clip import Clip, add_noise, bundled_clip
from zsvr_kernels.demo.denoise import optical_flow
from zsvr_kernels.demo.network import SmallUNet
from zsvr_kernels.plain import PlainAttention


def straight(T: int, Wg: int, valid: torch.Tensor | None = None) -> zk.Trajectories:
    """Return trajectories that stay on their site of a grid of one row, every frame in reach."""
    sites = torch.stack((torch.arange(Wg).float(), torch.zeros(Wg)), -1)
    frames = torch.arange(T, dtype=torch.int32).expand(T, T).contiguous()
    if valid is None:
        valid = torch.ones(1, T, T, Wg, dtype=torch.bool)
    return zk.Trajectories.from_positions(sites.expand(1, T, T, Wg, 2).contiguous(), valid, frames, (1, Wg))


def test_drift_by_hand():
    features = torch.tensor([[[1.0], [5.0]], [[3.0], [5.0]]])  # [T, P, C] = [2, 2, 1]
    # Site 0 varies by 2 (unbiased) from either frame, site 1 not at all; all four values vary by 11/3.
    assert drift.along_trajectories(features, straight(2, 2)) == pytest.approx(1.0 / (11 / 3))
    valid = torch.ones(1, 2, 2, 2, dtype=torch.bool)
    valid[0, 0, 1, 1] = valid[0, 1, 0, 1] = False  # site 1 is seen in one frame only: no variance, so not counted
    assert drift.along_trajectories(features, straight(2, 2, valid)) == pytest.approx(2.0 / (11 / 3))
    alone = torch.eye(2, dtype=torch.bool)[None, :, :, None].expand(1, 2, 2, 2).contiguous()
    assert math.isnan(drift.along_trajectories(features, straight(2, 2, alone)))
    assert math.isnan(drift.along_trajectories(torch.ones(2, 2, 1), straight(2, 2)))


def test_features_that_follow_the_flow_do_not_drift_and_noise_does(generator):
    T, Hg, Wg = 4, 6, 12
    flow = torch.zeros(1, T - 1, 2, Hg, Wg)
    flow[:, :, 0] = 1.0
    paths = zk.chain_links(zk.Links.from_flow(flow, -flow, grid=(Hg, Wg)))
    texture = torch.randn(Hg, Wg + T, 8, generator=generator)
    moving = torch.stack([texture[:, T - i : T - i + Wg].flatten(0, 1) for i in range(T)])
    assert drift.along_trajectories(moving, paths) < 1e-10
    assert drift.along_trajectories(3 * moving - 5, paths) < 1e-10
    against = torch.stack([texture[:, i : i + Wg].flatten(0, 1) for i in range(T)])
    noise = torch.randn(T, Hg * Wg, 64, generator=generator)
    assert drift.along_trajectories(against, paths) > 0.8
    assert drift.along_trajectories(noise, paths) == pytest.approx(1.0, abs=0.05)


def test_occluded_features_do_not_count(generator):
    T, Wg = 3, 5
    features = torch.randn(1, Wg, 4, generator=generator).repeat(T, 1, 1)
    valid = torch.ones(1, T, T, Wg, dtype=torch.bool)
    features[1, 2] += 100.0
    assert drift.along_trajectories(features, straight(T, Wg)) > 0.1
    valid[0, :, 1, 2] = False  # frame 1 is hidden at site 2
    assert drift.along_trajectories(features, straight(T, Wg, valid)) < 1e-10


def test_the_spatial_row_is_that_of_plain_attention(monkeypatch):
    monkeypatch.setattr(drift, "SEEDS", 1)
    clip = bundled_clip(32, 3)
    noisy = add_noise(clip.frames, 0.1)
    found = drift.measure(clip, noisy, clip.frames)
    assert found["size"] == [3, 32, 32] and found["grids"] == ["output 32x32", "16x16", "8x8", "4x4"]
    assert list(found["rows"]) == list(drift.ROWS)

    outputs = {}
    network = SmallUNet(0)
    for layer in network.attentions():
        assert isinstance(layer.attention, PlainAttention)

        def keep(layer: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            added = layer.attention(inputs[0]) - inputs[0]
            outputs.setdefault(added.shape[-1], []).append(added.flatten(2).mT)

        layer.register_forward_pre_hook(keep)
    with torch.no_grad():
        image = network(2 * noisy - 1)
    outputs[32] = [image.flatten(2).mT]
    for value, (side, tensors) in zip(found["rows"]["spatial"], sorted(outputs.items(), reverse=True), strict=True):
        links = zk.Links.from_flow(clip.flow_forward[None], clip.flow_backward[None], grid=(side, side))
        paths = zk.chain_links(links)
        expected = sum(drift.along_trajectories(x, paths) for x in tensors) / len(tensors)
        assert value == pytest.approx(expected, rel=1e-4)


def test_attention_along_trajectories_drifts_less(monkeypatch):
    monkeypatch.setattr(drift, "SEEDS", 1)
    clip = bundled_clip(48, 4)
    rows = drift.measure(clip, add_noise(clip.frames, 0.1), clip.frames)["rows"]
    for spatial, serial in zip(rows["spatial"], rows["serial"], strict=True):
        assert serial < 0.8 * spatial
    assert rows["the same, corrected"] != rows["serial, DIS on noisy"] != rows["serial"]


def test_networks_are_seeded_and_leave_the_generator_alone():
    state = torch.get_rng_state()
    a, b, other = SmallUNet(1), SmallUNet(1), SmallUNet(2)
    assert torch.equal(torch.get_rng_state(), state)
    x = torch.ones(1, 3, 16, 16)
    assert torch.equal(a(x), b(x)) and not torch.equal(a(x), other(x))


@pytest.mark.parametrize(
    "shape, expected",
    [((3, 3, 96, 96), (3, 96, 96)), ((20, 3, 50, 35), (8, 48, 32)), ((4, 3, 480, 853), (4, 48, 96)),
     ((2, 3, 16, 960), (2, 8, 96))],
)  # fmt: skip
def test_large_clips_are_reduced(shape, expected):
    frames = torch.rand(shape)
    small = drift.reduced(frames)
    assert (small.shape[0], *small.shape[2:]) == expected
    if max(shape[2:]) <= drift.LONGEST:
        assert torch.equal(small, frames[: drift.FRAMES, :, : expected[1], : expected[2]])


def test_flow_of_low_frames_is_cut_to_them(monkeypatch):
    monkeypatch.setattr(drift, "SEEDS", 1)
    frames = bundled_clip(96, 2).frames[:, :, 40:56]
    wide = torch.nn.functional.interpolate(frames, scale_factor=(1.0, 4.0))
    assert drift.reduced(wide).shape[2:] == (8, 96)
    found = drift.measure(Clip(wide), wide, wide)
    assert found["grids"] == ["output 8x96", "4x48", "2x24", "1x12"]
    assert drift.measure(Clip(wide[:1]), wide[:1], wide[:1]) == {}


def test_exact_flow_must_be_of_what_is_measured():
    clip = bundled_clip(100, 2)
    with pytest.raises(ValueError, match=r"exact flow .* 100, 100.* 96x96 pixels"):
        drift.measure(clip, clip.frames, clip.frames)


def test_without_exact_flow_the_true_frames_are_followed(monkeypatch):
    monkeypatch.setattr(drift, "SEEDS", 1)
    clip = bundled_clip(48, 3)
    noisy = add_noise(clip.frames, 0.2)
    rows = drift.measure(Clip(clip.frames), noisy, clip.frames)["rows"]
    forward, backward = optical_flow(clip.frames)
    assert rows == drift.measure(Clip(clip.frames, forward, backward), noisy, noisy)["rows"]
    # Where the noisy frames are all there is, both flows are the same.
    rows = drift.measure(Clip(noisy), noisy, noisy)["rows"]
    assert rows["serial"] == rows["serial, DIS on noisy"]


def test_a_run_reports_drift(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(drift, "SEEDS", 1)
    source, out = tmp_path / "in.mp4", tmp_path / "out"
    video.write_video(source, video.to_bytes(bundled_clip(48, 3).frames), 8)
    assert main([str(source), str(out), "--no-timing"]) == 0
    printed, written = capsys.readouterr().out, (out / "report.md").read_text()
    found = json.loads((out / "metrics.json").read_text())["drift"]
    assert found["size"] == [3, 48, 48] and len(found["rows"]) == len(drift.ROWS)
    for words in (
        "along trajectories of the flow (DIS on the clean clip)",
        *(f"{x:.3f}" for x in found["rows"]["joint"]),
    ):
        assert words in printed and words in written
    assert "WE: warping error" in written and written.startswith(f"{source}: 3 frames of 48x48")
    assert main([str(source), str(out), "--overwrite", "--no-timing", "--no-drift"]) == 0
    assert "Drift" not in capsys.readouterr().out and "Drift" not in (out / "report.md").read_text()
    assert "drift" not in json.loads((out / "metrics.json").read_text())
