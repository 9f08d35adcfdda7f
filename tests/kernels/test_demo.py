"""The demo: its clip, its metrics, and a small run from end to end."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

pytest.importorskip("av")
pytest.importorskip("cv2")
pytest.importorskip("tqdm")
pytest.importorskip("PIL")

from PIL import Image

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


@pytest.mark.parametrize("size, frames", [(64, 5), pytest.param(96, 8, marks=pytest.mark.slow)])
def test_more_range_restores_better(size, frames):
    clip = bundled_clip(size, frames)
    noisy = add_noise(clip.frames, 25 / 255)
    psnr, error = {}, {}
    for name in ("spatial", "both"):
        output = metrics.quantize(method.denoise(noisy, 25 / 255, name))
        psnr[name] = metrics.psnr(output, metrics.quantize(clip.frames))
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
    assert "cross-frame + trajectory" in printed and "vs reference" in printed
    assert "48x48 crop of 4 frames" in printed and printed.count("auto runs") == 3
    record = json.loads((out / "metrics.json").read_text())
    assert record["frames"] == [4, 48, 48] and record["results"]["both"]["psnr"] > record["results"]["noisy"]["psnr"]
    assert len(video.read_clip(out / "before_after.mp4").frames) == 4
    sheet = video.read_clip(out / "contact_sheet.png").frames
    assert sheet.std() > 0.1 and sheet.shape[-1] > 5 * 48
    assert sorted(p.name for p in out.iterdir()) == [
        "before_after.mp4",
        "contact_sheet.png",
        "metrics.json",
        "report.md",
    ]
    before = (out / "metrics.json").read_bytes()
    assert main([str(source), str(out)]) == 1
    assert "--overwrite" in capsys.readouterr().err and (out / "metrics.json").read_bytes() == before
    assert main([str(source), str(out), "--overwrite", "--already-noisy", "--no-timing", "--frames", "3"]) == 0
    assert "psnr" not in json.loads((out / "metrics.json").read_text())["results"]["both"]
    (out / "metrics.json").unlink()  # the picture alone is worth guarding too
    assert main([str(source), str(out)]) == 1
    assert "contact_sheet.png" in capsys.readouterr().err


def test_a_degraded_clip_is_measured_against_its_reference(tmp_path, capsys):
    clean = bundled_clip(64, 3).frames
    for name, frames in (("clean", clean), ("noisy", add_noise(clean, 20 / 255))):
        (tmp_path / name).mkdir()
        for n, picture in enumerate(video.to_bytes(frames)):
            Image.fromarray(picture).save(tmp_path / name / f"{n:02}.png")
    source, reference, out = (str(tmp_path / name) for name in ("noisy", "clean", "out"))
    options = ["--reference", reference, "--sigma", "20", "--size", "48", "--no-timing", "--no-drift"]
    assert main([source, out, *options]) == 0
    assert "assumed noise 20/255" in capsys.readouterr().out
    record = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert record["frames"] == [3, 48, 48] and record["reference"] == reference
    # Nothing was added: what is called noisy is the input itself.
    noisy, truth = (video.read_clip(tmp_path / name, longest=48).frames for name in ("noisy", "clean"))
    assert record["results"]["noisy"]["psnr"] == pytest.approx(metrics.psnr(noisy, truth), abs=1e-9)
    assert main([source, out, "--overwrite", "--reference", reference, "--frames", "2", "--size", "0"]) == 1
    assert "--size must be at least 16" in capsys.readouterr().err
    (tmp_path / "clean" / "02.png").unlink()
    assert main([source, out, "--overwrite", *options]) == 1
    assert "must be the same" in capsys.readouterr().err


def test_size_reduces_by_area_and_never_enlarges(tmp_path):
    picture = np.random.default_rng(3).integers(0, 256, (40, 64, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "0.png")
    half = video.read_clip(tmp_path, longest=32).frames
    means = torch.from_numpy(picture).float().view(20, 2, 32, 2, 3).mean((1, 3)).permute(2, 0, 1) / 255
    torch.testing.assert_close(half[0], means, atol=0.6 / 255, rtol=0)
    assert video.read_clip(tmp_path, longest=64).frames.shape == (1, 3, 40, 64)
    assert video.read_clip(tmp_path, longest=999).frames.shape == (1, 3, 40, 64)


def test_a_run_that_fails_or_is_interrupted_changes_nothing(tmp_path, capsys, monkeypatch):
    from zsvr_kernels.demo import report

    out = tmp_path / "out"
    out.mkdir()
    for name in ("before_after.mp4", "contact_sheet.png", "metrics.json"):
        (out / name).write_text(f"earlier {name}")
    source = tmp_path / "in.mp4"
    video.write_video(source, video.to_bytes(bundled_clip(32, 2).frames), 8)
    for error, status in ((KeyboardInterrupt(), 130), (OSError("disk full"), 1)):

        def stop(*_: object, error: BaseException = error, **__: object) -> None:
            raise error

        monkeypatch.setattr(report, "contact_sheet", stop)  # the video is written by then
        for folder in (out, tmp_path / "new"):
            assert main([str(source), str(folder), "--overwrite", "--no-timing", "--no-drift"]) == status
        said = capsys.readouterr().err
        assert "nothing was overwritten" in said if status == 130 else "disk full" in said
        assert {p.name: p.read_text() for p in out.iterdir()} == {
            name: f"earlier {name}" for name in ("before_after.mp4", "contact_sheet.png", "metrics.json")
        }
        assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("width", [40, 96, 150, 176, 299, 320])
def test_the_sheet_has_room_for_labels_and_fills_its_columns(tmp_path, width):
    from zsvr_kernels.demo import report

    clip = torch.full((3, 3, 32, width), 0.25)
    report.contact_sheet(tmp_path / "sheet.png", {"one": clip, "two": clip}, {}, row=17)
    sheet = (video.read_clip(tmp_path / "sheet.png").frames[0] * 255).round()
    column = (sheet.shape[2] - report.GAP) // 2 - report.GAP
    assert column >= 300 and column % width == 0
    picture = sheet == 64
    # Every column of pixels of both pictures shows the clip in all three parts.
    for left in (report.GAP, 2 * report.GAP + column):
        rows = picture[:, :, left : left + column].all(0).all(1)
        assert rows.sum() >= 32 * column // width - 2 + 10 * 3 * (column // width) + 96
    yellow = (sheet == torch.tensor((255, 230, 0))[:, None, None]).all(0)
    assert yellow.sum() > column / 2


def test_metrics_are_those_of_the_picture_files():
    values = torch.tensor([-0.2, 0.0, 0.4 / 255, 0.5 / 255, 254.6 / 255, 1.3])
    assert (metrics.quantize(values) * 255).round().tolist() == [0, 0, 0, 1, 255, 255]
    clip = bundled_clip(24, 2).frames
    again = torch.from_numpy(video.to_bytes(clip)).permute(0, 3, 1, 2) / 255
    assert torch.equal(metrics.quantize(clip), again)


def test_the_trajectory_step_takes_weights_from_the_noisy_clip_and_values_from_the_restored():
    clip = bundled_clip(32, 3).frames
    still = (torch.zeros(2, 2, 32, 32),) * 2
    # A wide bandwidth averages the values of the same pixel over time, whatever the noisy clip holds.
    out = method.trajectory_step(add_noise(clip, 0.1), clip, still, 1e9)
    torch.testing.assert_close(out, clip.mean(0, keepdim=True).expand_as(clip), atol=1e-5, rtol=1e-4)
    # A narrow one keeps each frame's own value, since only there the noisy patch is at distance 0.
    out = method.trajectory_step(add_noise(clip, 0.1), clip, still, 1e-3)
    torch.testing.assert_close(out, clip, atol=1e-5, rtol=1e-4)


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
        ([broken, tmp_path / "o", "--frames", "0"], "--frames must be at least 1"),
        ([broken, tmp_path / "o", "--backend", "sdpa"], "it implements cross_frame_attention only"),
        (["--reference", broken], "need an input"),
    ):
        assert main([str(a) for a in arguments]) == 1
        assert words in capsys.readouterr().err
    assert not (tmp_path / "o").exists()


def test_real_clips_gain_too(real_data):
    clip = video.read_clip(real_data / "carphone_pair" / "pristine", 5).frames[..., 24:120, 40:136]
    noisy = add_noise(clip, 25 / 255)
    psnr = {n: metrics.psnr(method.denoise(noisy, 25 / 255, n).clamp(0, 1), clip) for n in ("spatial", "both")}
    assert psnr["both"] > psnr["spatial"]
