"""The demo: its clip, its metrics, and a small run from end to end."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("cv2")

from zsvr_kernels.demo import denoise as method
from zsvr_kernels.demo import metrics, video
from zsvr_kernels.demo.__main__ import main
from zsvr_kernels.demo.clip import add_noise, bundled_clip
from zsvr_kernels.sampling import warp


def test_the_bundled_flow_is_true():
    clip = bundled_clip()
    assert torch.equal(clip.frames, bundled_clip().frames)
    assert clip.frames.shape == (8, 3, 96, 96) and clip.frames.min() >= 0 and clip.frames.max() <= 1
    for frames, flow, other in (
        (clip.frames, clip.flow_forward, clip.flow_backward),
        (clip.frames.flip(0), clip.flow_backward.flip(0), clip.flow_forward.flip(0)),
    ):
        visible = ~metrics.occluded(flow, other)
        assert visible.float().mean() > 0.9
        error = (warp(frames[1:], flow) - frames[:-1]).abs().mean(1)
        moved = (frames[1:] - frames[:-1]).abs().mean(1)
        # Bilinear warping blurs fur a little; not warping at all is far worse.
        assert error[visible].mean() < 0.02 < 2 * error[visible].mean() < moved[visible].mean()


def test_psnr_and_ssim_are_those_of_scikit_image():
    skimage = pytest.importorskip("skimage.metrics")
    clip = bundled_clip(48, 3).frames
    noisy = add_noise(clip, 0.1).clamp(0, 1)
    a, b = (x.permute(0, 2, 3, 1).double().numpy() for x in (clip, noisy))
    psnr = np.mean([skimage.peak_signal_noise_ratio(x, y, data_range=1) for x, y in zip(a, b, strict=True)])
    assert metrics.psnr(noisy, clip) == pytest.approx(psnr, abs=1e-6)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "data_range": 1.0}
    ssim = []
    for x, y in zip(a, b, strict=True):
        for c in range(3):
            _, full = skimage.structural_similarity(x[..., c], y[..., c], full=True, **options)
            ssim.append(full[5:-5, 5:-5].mean())
    assert metrics.ssim(noisy, clip) == pytest.approx(np.mean(ssim), abs=1e-6)
    assert metrics.psnr(clip, clip) == pytest.approx(100.0)


def test_warping_error_by_hand():
    output = torch.zeros(2, 3, 4, 5)
    output[1] = 0.5
    still = torch.zeros(1, 2, 4, 5)
    assert metrics.warping_error(output, still, still) == pytest.approx(25.0)
    right = still.clone()
    right[:, 0] = 1.0  # the last column leaves the frame by more than half a pixel
    output[1, :, :, 4] = 1.0
    # Columns 0..2 see 0.5, column 3 sees column 4.
    assert metrics.warping_error(output, right, -right) == pytest.approx(100 * (3 * 0.25 + 1.0) / 4)
    assert np.isnan(metrics.warping_error(output[:1], right[:0], right[:0]))
    clip = bundled_clip(64, 3)
    steady = clip.frames[:1].expand(3, 3, 64, 64)
    zero = torch.zeros(2, 2, 64, 64)
    assert metrics.warping_error(steady, zero, zero) == 0.0


def test_patches_and_fold_are_inverse_and_tokens_measure_distance():
    clip = bundled_clip(24, 2).frames
    x = method.patches(clip)
    torch.testing.assert_close(method.fold(method.values(x), (24, 24)), clip)
    q, k = method.tokens(x, 0.7)
    logits = q[0, 0, :, 0] @ k[0, 1, :, 0].T
    distance = torch.cdist(x[0].double(), x[1].double()).square()
    expected = (x[0].double().square().sum(1, keepdim=True) - distance) / 0.7
    torch.testing.assert_close(logits.double(), expected, atol=1e-3, rtol=1e-4)


def test_more_range_restores_better():
    clip = bundled_clip(64, 5)
    noisy = add_noise(clip.frames, 25 / 255)
    psnr, error = {}, {}
    for name in method.METHODS:
        output = method.denoise(noisy, 25 / 255, name).clamp(0, 1)
        psnr[name] = metrics.psnr(output, clip.frames)
        error[name] = metrics.warping_error(output, clip.flow_forward, clip.flow_backward)
    assert psnr["both"] > psnr["spatial"] + 1.5
    assert error["both"] < 0.6 * error["spatial"]


def test_tiles_cover_everything_and_chunks_keep_every_frame_once():
    for size in (16, 96, 97, 250):
        covered = np.zeros(size, int)
        for begin, end in method._tiles(size):
            assert end - begin <= method.TILE
            covered[begin:end] += 1
        assert (covered > 0).all()
    for T in (1, 12, 13, 40):
        kept = [i for read, keep in method._chunks(T) for i in list(range(T))[read][keep]]
        assert kept == list(range(T))
    calls = []
    noisy = add_noise(bundled_clip(100, 2).frames, 0.1)
    method.denoise(noisy, 0.1, "both", progress=lambda: calls.append(1))
    assert len(calls) == method.work(tuple(noisy.shape), ("both",)) == 8


def test_a_run_from_a_video_file(tmp_path, capsys):
    clip = bundled_clip(48, 4)
    source, out = tmp_path / "in.mp4", tmp_path / "out"
    video.write_video(source, video.to_bytes(clip.frames), 8)
    assert main([str(source), str(out)]) == 0
    printed = capsys.readouterr().out
    assert "cross-frame + trajectory" in printed and "auto runs" in printed and "vs reference" in printed
    record = json.loads((out / "metrics.json").read_text())
    assert record["frames"] == [4, 48, 48] and record["results"]["both"]["psnr"] > record["results"]["noisy"]["psnr"]
    assert len(video.read_clip(out / "before_after.mp4").frames) == 4
    sheet = video.read_clip(out / "contact_sheet.png").frames
    assert sheet.std() > 0.1 and sheet.shape[-1] > 5 * 48
    assert not [p for p in out.iterdir() if "partial" in p.name]
    before = (out / "metrics.json").read_bytes()
    assert main([str(source), str(out)]) == 1
    assert "--overwrite" in capsys.readouterr().err and (out / "metrics.json").read_bytes() == before
    assert main([str(source), str(out), "--overwrite", "--already-noisy", "--no-timing", "--frames", "3"]) == 0
    assert "psnr" not in json.loads((out / "metrics.json").read_text())["results"]["both"]


def test_bad_input_is_a_sentence_not_a_traceback(tmp_path, capsys):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"not a video" * 100)
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, words in (
        ([tmp_path / "absent.mp4", tmp_path / "o"], "no file or folder"),
        ([broken, tmp_path / "o"], "cannot be read"),
        ([empty, tmp_path / "o"], "no pictures"),
        ([broken], "is a file"),
        ([broken, tmp_path / "o", "--sigma", "0"], "positive"),
    ):
        assert main([str(a) for a in arguments]) == 1
        assert words in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_real_clips_gain_too(real_data):
    clip = video.read_clip(real_data / "carphone_pair" / "pristine", 5).frames[..., 24:120, 40:136]
    noisy = add_noise(clip, 25 / 255)
    psnr = {n: metrics.psnr(method.denoise(noisy, 25 / 255, n).clamp(0, 1), clip) for n in ("spatial", "both")}
    assert psnr["both"] > psnr["spatial"]
