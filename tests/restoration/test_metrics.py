"""Metrics against torchmetrics, scikit-image, scipy and by hand; what is missing is said."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from zsvr import metrics, video
from zsvr.flow import DIS, EstimationOptions, Flow, Zero, estimate, write_flow
from zsvr.flow import Given as FromFiles
from zsvr.temporal.semantic import MEAN, STD, open_clip_encoder


def clips(frames: int = 3, size: tuple[int, int] = (24, 33)) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    truth = F.interpolate(torch.rand(frames, 3, 6, 7, generator=generator), size, mode="bilinear")
    return (truth + 0.05 * torch.randn(truth.shape, generator=generator)).clamp(0, 1), truth


def known(forward: torch.Tensor, backward: torch.Tensor) -> Flow:
    no = torch.zeros(len(forward), *forward.shape[2:], dtype=torch.bool)
    return Flow(forward, backward, no, no, torch.zeros(len(forward)), torch.zeros(len(forward), dtype=torch.bool))


def still(frames: int, size: tuple[int, int]) -> Flow:
    return known(*[torch.zeros(frames - 1, 2, *size)] * 2)


# ---- PSNR, SSIM ----


@pytest.mark.parametrize("luma", [False, True])
def test_psnr_and_ssim_are_those_of_other_packages(luma):
    skimage = pytest.importorskip("skimage.metrics")
    functional = pytest.importorskip("torchmetrics.functional.image")
    output, truth = clips()
    ours = metrics.psnr(output, truth, luma=luma), metrics.ssim(output, truth, luma=luma)
    weights = torch.tensor((0.299, 0.587, 0.114), dtype=torch.float64)[:, None, None]
    for n in range(3):
        a, b = (x[n].double() for x in (output, truth))
        if luma:
            a, b = ((x * weights).sum(0, keepdim=True) for x in (a, b))
        expected = skimage.peak_signal_noise_ratio(b.numpy(), a.numpy(), data_range=1)
        assert float(ours[0][n]) == pytest.approx(expected, abs=1e-6)
        theirs = functional.peak_signal_noise_ratio(a[None], b[None], data_range=1.0)
        assert float(ours[0][n]) == pytest.approx(float(theirs), abs=1e-5)
        whole = skimage.structural_similarity(
            a.numpy(), b.numpy(), channel_axis=0, gaussian_weights=True, sigma=1.5, use_sample_covariance=False,
            data_range=1,
        )  # fmt: skip
        assert float(ours[1][n]) == pytest.approx(whole, abs=1e-6)
        _, theirs = functional.structural_similarity_index_measure(
            a[None], b[None], data_range=1.0, return_full_image=True
        )
        valid = theirs[..., 5:-5, 5:-5].mean()  # its own mean takes the padded border in
        assert float(ours[1][n]) == pytest.approx(float(valid), abs=1e-6)


def test_psnr_has_a_cap_and_ssim_of_equals_is_one():
    _, truth = clips()
    assert metrics.psnr(truth, truth).tolist() == [100.0] * 3
    assert metrics.ssim(truth, truth).tolist() == pytest.approx([1.0] * 3)
    off = truth.clone()
    off[1] += 0.1
    assert metrics.psnr(off, truth).tolist() == pytest.approx([100, 20, 100], abs=1e-4)


def test_clips_that_do_not_fit_are_refused():
    output, truth = clips()
    with pytest.raises(ValueError, match="output has 2 frames of 33x24, reference 3 frames of 33x24"):
        metrics.psnr(output[:2], truth)
    with pytest.raises(ValueError, match=r"must be floating \[T, 3, H, W\]"):
        metrics.ssim(output[0], truth[0])
    with pytest.raises(ValueError, match="at least 11x11, got \\(10, 33\\)"):
        metrics.ssim(output[:, :, :10], truth[:, :, :10])
    with pytest.raises(ValueError, match="flow must be of 3 frames"):
        metrics.warping_error(output, still(2, (24, 33)))


def test_quantizing_rounds_as_a_file_does(tmp_path):
    halves = (torch.arange(255) + 0.5) / 255  # where rounding decides, and the numbers next to it
    values = torch.cat((halves, *(torch.nextafter(halves, torch.tensor(x)) for x in (0.0, 1.0)), torch.rand(255)))
    output = values.reshape(1, 1, 20, 51).expand(-1, 3, -1, -1)
    for name in ("a", "a.mkv"):
        video.write(tmp_path / name, output, lossless=True)
        assert torch.equal(video.read(tmp_path / name).frames, metrics.quantize(output))


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_values_that_are_not_finite_are_refused_and_not_left_out(broken):
    """A frame without a PSNR would be left out of the mean, as pairs across cuts are: a broken clip would look good."""
    output, truth = clips(3, (32, 32))
    bad = output.clone()
    bad[1, 0, 3, 4] = broken
    for measure in (metrics.psnr, metrics.ssim, metrics.evaluate):
        with pytest.raises(ValueError, match="output has values that are not finite in 1 frames, first in 1"):
            measure(bad, truth)
    with pytest.raises(ValueError, match="reference has values that are not finite"):
        metrics.evaluate(output, bad)
    with pytest.raises(ValueError, match="preview has values that are not finite"):
        metrics.evaluate(output, truth, preview=bad)
    with pytest.raises(ValueError, match="output has 3 frames of 32x32, preview 2 frames of 32x32"):
        metrics.evaluate(output, truth, preview=truth[:2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("quantized", [True, False])
def test_clips_of_16_bit_floats_are_measured_as_float32(dtype, quantized):
    """255 levels do not fit bfloat16, and their half steps do not fit float16."""
    output, truth = (x.to(dtype) for x in clips(3, (32, 40)))
    assert torch.equal(metrics.quantize(output), metrics.quantize(output.float()))
    options, reduced = metrics.MetricOptions(quantize=quantized), EstimationOptions(max_side=24)
    ours = metrics.evaluate(output, truth, options=options, flow_options=reduced)
    wide = metrics.evaluate(output.float(), truth.float(), options=options, flow_options=reduced)
    for kind in ("per_frame", "per_pair"):
        np.testing.assert_equal(ours[kind], wide[kind])


def test_clips_are_clipped_with_and_without_quantizing():
    output, truth = clips(3, (32, 40))
    options = metrics.MetricOptions(quantize=False)
    wild = 2 * output - 0.5
    ours = metrics.evaluate(wild, truth, options=options)
    assert ours["per_frame"] == metrics.evaluate(wild.clamp(0, 1), truth, options=options)["per_frame"]
    assert ours["psnr"] > metrics.psnr(wild, truth).mean() + 1


# ---- warping error, by hand ----


def test_warping_error_of_two_frames_by_hand():
    """A 2 x 4 picture moves right by one: columns 0-2 count, column 3 leaves the frame."""
    first = torch.tensor([[0.1, 0.2, 0.3, 0.4], [0.5, 0.6, 0.7, 0.8]])
    second = torch.tensor([[0.9, 0.1, 0.2, 0.5], [0.9, 0.5, 0.7, 0.7]])
    clip = torch.stack((first, second))[:, None].expand(-1, 3, -1, -1)
    forward, backward = torch.zeros(1, 2, 2, 4), torch.zeros(1, 2, 2, 4)
    forward[:, 0], backward[:, 0] = 1.0, -1.0
    # W(o2, F) is second shifted left: [0.1, 0.2, 0.5, -], [0.5, 0.7, 0.7, -]; differences 0.2 and 0.1 in two pixels
    result = metrics.warping_error(clip, known(forward, backward))
    assert result["we"].tolist() == pytest.approx([100 * (0.2**2 + 0.1**2) / 6], abs=1e-5)
    assert result["visible"].tolist() == [6 / 8] and result["dynamic"].tolist() == [0]
    assert result["we_static"].tolist() == result["we"].tolist() and result["we_dynamic"].tolist() == [0]
    moved = metrics.warping_error(clip, known(forward, backward), dynamic_px=0.5)
    assert moved["we_dynamic"].tolist() == result["we"].tolist() and moved["we_static"].tolist() == [0]


def test_warping_error_splits_by_motion_and_weighs_pixels_evenly():
    """Left half still, right half moving by 2: the whole is the mean of both, weighted by their pixels."""
    generator = torch.Generator().manual_seed(0)
    clip = torch.rand(2, 3, 8, 16, generator=generator)
    forward = torch.zeros(1, 2, 8, 16)
    forward[:, 0, :, 8:] = -2.0
    result = metrics.warping_error(clip, known(forward, -forward))
    share = result["dynamic"] / result["visible"]
    assert 0.2 < float(share) < 0.6
    mixed = share * result["we_dynamic"] + (1 - share) * result["we_static"]
    assert float(result["we"]) == pytest.approx(float(mixed), rel=1e-9)
    assert float(result["we_dynamic"]) != pytest.approx(float(result["we_static"]), rel=1e-3)


def test_what_is_occluded_does_not_count():
    """The rule of Lai et al.: |F+G|^2 > 0.01 (|F|^2+|G|^2) + 0.5, motion boundaries, and leaving the frame."""
    clip = torch.rand(2, 3, 9, 12)
    backward = torch.zeros(1, 2, 9, 12)
    backward[0, 0, 4, 5] = 0.70  # |G|^2 = 0.49 < 0.5 + ...
    visible = metrics.warping_error(clip, known(torch.zeros(1, 2, 9, 12), backward))["visible"]
    assert float(visible) == 1
    backward[0, 0, 4, 5] = 0.72  # 0.518 > 0.5 + 0.01 * 0.518
    visible = metrics.warping_error(clip, known(torch.zeros(1, 2, 9, 12), backward))["visible"]
    assert float(visible) == pytest.approx(1 - 1 / 108)
    # a step of the flow between columns 5 and 6: its square counts against 0.002 + 0.01 |F|^2, F = 0 in column 5
    for step, expected in ((0.04, 1.0), (0.05, 11 / 12)):
        forward = torch.zeros(1, 2, 9, 12)
        forward[:, 0, :, 6:] = step
        visible = metrics.warping_error(clip, known(forward, -forward))["visible"]
        assert float(visible) == pytest.approx(expected)
    # all occluded: 0
    far = torch.full((1, 2, 9, 12), 100.0)
    result = metrics.warping_error(clip, known(far, -far))
    assert result["visible"].tolist() == [0] and result["we"].tolist() == [0]
    # what comes back from so far that its square is no float32 does not match either
    backward = torch.full((1, 2, 9, 12), 1e20)
    assert metrics.warping_error(clip, known(torch.zeros(1, 2, 9, 12), backward))["visible"].tolist() == [0]


def sampled(picture: np.ndarray, x: float, y: float) -> np.ndarray:
    """Return ``picture [C, H, W]`` at a position, bilinearly, clamped to the border."""
    height, width = picture.shape[1:]
    x, y = min(max(x, 0.0), width - 1.0), min(max(y, 0.0), height - 1.0)
    left, top = math.floor(x), math.floor(y)
    right, below = min(left + 1, width - 1), min(top + 1, height - 1)
    upper = (left + 1 - x) * picture[:, top, left] + (x - left) * picture[:, top, right]
    lower = (left + 1 - x) * picture[:, below, left] + (x - left) * picture[:, below, right]
    return (top + 1 - y) * upper + (y - top) * lower


@pytest.mark.parametrize(("seed", "amplitude", "offset"), [(0, 0.3, 0.0), (1, 1.0, 2.0), (3, 0.5, 1.0)])
def test_warping_error_is_that_of_a_loop_over_pixels(seed, amplitude, offset):
    generator = torch.Generator().manual_seed(seed)
    smooth = F.interpolate(torch.randn(2, 2, 3, 3, generator=generator), (11, 14), mode="bilinear", align_corners=True)
    forward = amplitude * smooth + offset * torch.randn(1, 2, 1, 1, generator=generator)
    backward = 0.2 * torch.randn(forward.shape, generator=generator) - forward
    output = torch.rand(3, 3, 11, 14, generator=generator)
    ours = metrics.warping_error(output, known(forward, backward))
    o, there, back = (x.double().numpy() for x in (output, forward, backward))
    for n in range(2):
        errors: dict[str, list[float]] = {"we": [], "we_static": [], "we_dynamic": []}
        for y, x in np.ndindex(11, 14):
            f = there[n, :, y, x]
            g = sampled(back[n], x + f[0], y + f[1])
            gradient = 0.0
            if x < 13:
                gradient += ((there[n, :, y, x + 1] - f) ** 2).sum()
            if y < 10:
                gradient += ((there[n, :, y + 1, x] - f) ** 2).sum()
            inside = -0.5 <= x + f[0] <= 13.5 and -0.5 <= y + f[1] <= 10.5
            mismatch = ((f + g) ** 2).sum() > 0.01 * ((f**2).sum() + (g**2).sum()) + 0.5
            if mismatch or gradient > 0.01 * (f**2).sum() + 0.002 or not inside:
                continue
            error = ((sampled(o[n + 1], x + f[0], y + f[1]) - o[n, :, y, x]) ** 2).mean()
            errors["we"].append(error)
            errors["we_dynamic" if math.hypot(*f) > 1 else "we_static"].append(error)
        assert errors["we"]
        for name, values in errors.items():
            assert float(ours[name][n]) == pytest.approx(100 * float(np.mean(values)) if values else 0, abs=1e-4), name


def test_a_video_that_stands_still_has_no_error_and_a_flickering_one_has():
    picture = torch.rand(1, 3, 24, 24)
    result = metrics.evaluate(picture.expand(4, -1, -1, -1), picture.expand(4, -1, -1, -1), estimator=Zero())
    assert result["we"] == 0 and result["ofme"] == 0 and result["psnr"] == 100
    flicker = picture.expand(4, -1, -1, -1) * torch.tensor([1, 0.9, 1, 0.9])[:, None, None, None]
    assert metrics.evaluate(flicker, picture.expand(4, -1, -1, -1), estimator=Zero())["we"] > 0.1


# ---- FS, OFME, FID, FVD ----


def mean_colour(u: torch.Tensor) -> torch.Tensor:
    return u.flatten(2).mean(2)


def test_frame_similarity_by_hand():
    colours = torch.tensor([[1.0, 0, 0], [1.0, 0, 0], [0, 1.0, 0], [0, 1.0, 1.0]])
    clip = colours[:, :, None, None].expand(-1, -1, 20, 30)
    assert metrics.frame_similarity(clip, mean_colour).tolist() == pytest.approx([1, 0, math.sqrt(0.5)], abs=1e-6)
    seen = []

    def encoder(u: torch.Tensor) -> torch.Tensor:
        seen.append(u)
        return mean_colour(u)

    metrics.frame_similarity(torch.rand(1, 3, 30, 60), encoder)
    assert seen[0].shape == (1, 3, 224, 224)
    picture = torch.rand(1, 3, 30, 60)
    resized = F.interpolate(picture, (224, 448), mode="bicubic", antialias=True).clamp(0, 1)
    assert torch.allclose(metrics.clip_crop(picture), resized[..., 112:336], atol=1e-6)


@pytest.mark.parametrize("size", [(225, 227), (333, 250), (101, 190), (224, 224)])
def test_the_crop_is_that_of_clips_own_preprocessing(size):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("PIL")
    kind = getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor
    processor = kind(do_normalize=False, size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})
    u = metrics.quantize(F.interpolate(torch.rand(1, 3, 12, 17), size, mode="bilinear"))
    picture = (255 * u[0]).round().to(torch.uint8).permute(1, 2, 0).numpy()
    theirs = torch.as_tensor(processor(images=picture, return_tensors="pt").pixel_values)
    assert (metrics.clip_crop(u) - theirs).abs().max() < 2 / 255  # theirs rounds after each axis


def test_clip_from_a_local_folder(tmp_path):
    transformers = pytest.importorskip("transformers")
    settings = transformers.CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=224, patch_size=56,
        projection_dim=8,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.CLIPVisionModelWithProjection(settings).eval()
    model.save_pretrained(tmp_path / "clip")
    encoder = open_clip_encoder(tmp_path / "clip")
    output, _ = clips()
    result = metrics.evaluate(output, encoder=encoder)
    mean, std = (torch.tensor(x)[:, None, None] for x in (MEAN, STD))
    with torch.no_grad():
        e = model((metrics.clip_crop(metrics.quantize(output)) - mean) / std).image_embeds
    assert result["fs"] == pytest.approx(float(F.cosine_similarity(e[:-1], e[1:]).mean()), abs=1e-6)
    assert math.isnan(result["psnr"]) and "no reference" in result["notes"][0]


class Given:
    name = "given"

    def __init__(self, *flows: torch.Tensor) -> None:
        self.flows = list(flows)

    def describe(self) -> dict[str, object]:
        return {"name": "given"}

    def __call__(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        flow = self.flows.pop(0)
        return flow, -flow


@pytest.mark.parametrize(("norm", "expected"), [("epe", 5.0), ("l1", 7.0)])
def test_flow_error_by_hand(norm, expected):
    output, truth = clips(2, (16, 16))
    base = torch.full((1, 2, 16, 16), 0.5)
    off = base.clone()
    off[..., 4:] += torch.tensor((4.0, -16 / 3))[:, None, None]  # in three quarters of the pixels
    result = metrics.evaluate(output, truth, options=metrics.MetricOptions(ofme_norm=norm), estimator=Given(base, off))
    assert result["ofme"] == pytest.approx(expected)


def test_flow_from_files_says_nothing_of_the_output(tmp_path):
    """The same files for output and reference would differ by nothing."""
    output, truth = clips(3, (32, 32))
    write_flow(tmp_path / "flow", torch.zeros(2, 2, 32, 32), torch.zeros(2, 2, 32, 32))
    result = metrics.evaluate(output, truth, estimator=FromFiles(tmp_path / "flow"))
    assert math.isnan(result["ofme"]) and any("ofme: the estimator reads files" in note for note in result["notes"])
    assert result["we"] > 0 and math.isnan(result["per_pair"].get("ofme", math.nan))


def test_flow_error_needs_no_preview_and_knows_the_cuts_without():
    _, truth = clips(3, (32, 32))
    truth = torch.cat((truth[:1].expand(3, -1, -1, -1), torch.zeros(3, 3, 32, 32)))
    options = metrics.MetricOptions(flow_source="input")
    result = metrics.evaluate(truth, truth, options=options, estimator=DIS(), encoder=mean_colour)
    assert math.isnan(result["we"]) and result["flow"] is None
    assert result["ofme"] == 0 and result["cuts"] == [2] and math.isnan(result["per_pair"]["ofme"][2])
    assert math.isnan(result["per_pair"]["fs"][2])


def test_frechet_distance_is_that_of_the_formula():
    linalg = pytest.importorskip("scipy.linalg")
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(40, 6, generator=generator) @ torch.randn(6, 6, generator=generator)
    b = torch.randn(30, 6, generator=generator) + 1
    mu = [x.double().numpy().mean(0) for x in (a, b)]
    sigma = [np.cov(x.double().numpy(), rowvar=False) for x in (a, b)]
    expected = ((mu[0] - mu[1]) ** 2).sum() + np.trace(sigma[0] + sigma[1] - 2 * linalg.sqrtm(sigma[0] @ sigma[1]).real)
    assert metrics.frechet_distance(a, b) == pytest.approx(expected, rel=1e-9)
    assert metrics.frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    assert math.isnan(metrics.frechet_distance(a[:1], b))
    with pytest.raises(ValueError, match="features are not finite"):
        metrics.frechet_distance(a, b / 0)


def test_fid_is_over_frames_and_fvd_over_sixteen():
    output, truth = clips(35, (16, 16))
    shapes = []

    def features(u: torch.Tensor) -> torch.Tensor:
        shapes.append(tuple(u.shape[1:]))
        return u.flatten(2).mean(2)

    result = metrics.evaluate(output, truth, estimator=Zero(), inception=features, i3d=features)
    assert shapes.count((3, 16, 16)) == 70 and shapes.count((3, 16, 16, 16)) == 4
    q = [metrics.quantize(x).flatten(2).mean(2) for x in (output, truth)]
    assert result["fid"] == pytest.approx(metrics.frechet_distance(*q)) and result["fvd"] >= 0
    short = metrics.evaluate(output[:20], truth[:20], estimator=Zero(), i3d=features)
    assert math.isnan(short["fvd"]) and any("fvd: too few frames" in note for note in short["notes"])


# ---- the whole ----


def test_one_frame_has_no_temporal_metrics():
    output, truth = clips(1)
    result = metrics.evaluate(output, truth, encoder=mean_colour)
    for name in ("we", "we_static", "we_dynamic", "fs", "ofme", "tlpips"):
        assert math.isnan(result[name]), name
    assert 20 < result["psnr"] < 40 and "one frame" in " ".join(result["notes"])


def test_cuts_are_left_out_of_temporal_metrics():
    _, truth = clips(6, (48, 48))
    truth = torch.cat((truth[:1].expand(3, -1, -1, -1), 1 - truth[1:2].expand(3, -1, -1, -1)))
    flow = estimate(truth, Zero(), EstimationOptions(cut_threshold=0.1, cut_difference=0.05))
    assert flow.cuts.tolist() == [False, False, True, False, False]
    result = metrics.evaluate(truth, truth, flow=flow, estimator=Zero(), encoder=mean_colour)
    assert result["we"] == 0 and result["fs"] == pytest.approx(1) and result["cuts"] == [2]
    uncut = metrics.evaluate(truth, truth, flow=still(6, (48, 48)), estimator=Zero(), encoder=mean_colour)
    assert uncut["we"] > 0.1 and uncut["cuts"] == []


def test_flow_comes_from_where_it_is_asked_to(monkeypatch):
    output, truth = clips(3, (32, 32))
    seen = []
    monkeypatch.setattr(metrics, "estimate", lambda u, e, o: seen.append(u) or estimate(u, e, o))
    metrics.evaluate(output, truth, estimator=Zero())
    assert torch.equal(seen[0], metrics.quantize(truth)) and torch.equal(seen[1], metrics.quantize(output))
    seen.clear()
    preview = (truth * 0.5).clone()
    options = metrics.MetricOptions(flow_source="input", quantize=False)
    result = metrics.evaluate(output, truth, preview=preview, options=options, estimator=Zero())
    assert torch.equal(seen[0], preview) and torch.equal(seen[1], truth) and torch.equal(seen[2], output)
    assert result["flow"] == {"source": "input", "estimator": {"name": "zero"}}
    missing = metrics.evaluate(output, truth, options=options, estimator=Zero())
    assert math.isnan(missing["we"]) and any("no preview" in note for note in missing["notes"])
    for bad in ({"flow_source": "output"}, {"ofme_norm": "l2"}, {"dynamic_px": -1}):
        with pytest.raises(ValueError, match="must be"):
            metrics.MetricOptions(**bad)


def test_peak_memory_counts_what_was_held():
    before = metrics.peak_memory_mb()
    torch.ones(2**25 + int(before) * 2**18).sum()
    assert metrics.peak_memory_mb() >= before + 100


def test_the_table_shows_what_is_known_and_means_leave_out_what_is_not():
    output, truth = clips(3, (32, 32))
    a = metrics.evaluate(output, truth, estimator=Zero(), seconds_per_frame=1.5)
    b = metrics.evaluate(output[:1], truth[:1], estimator=Zero())
    text = metrics.table({"ours": a, "one frame": b}).splitlines()
    assert (
        len(text) == 4
        and text[3] == "flow: of the reference, zero"
        and text[0].split()[:2] == ["PSNR", "dB"]
        and "FID" not in text[0]
    )
    assert f"{a['psnr']:.2f}" in text[1] and "1.50" in text[1] and " -" in text[2]
    means = metrics.mean_over_videos([a, b])
    assert means["psnr"] == pytest.approx((a["psnr"] + b["psnr"]) / 2) and means["we"] == pytest.approx(a["we"])
    assert math.isnan(means["fid"])


def test_degraded_real_footage_is_worse_in_every_way(real_data):
    pristine, distorted = (
        video.read(real_data / "carphone_pair" / name, 0, 4).frames for name in ("pristine", "distorted")
    )
    bad, good = metrics.evaluate(distorted, pristine), metrics.evaluate(pristine, pristine)
    assert 21 < bad["psnr"] < 25 and good["psnr"] == 100
    assert bad["ssim"] < 0.8 and bad["ofme"] > 0.1 and good["ofme"] == 0
    assert good["we"] > 0 and good["flow"]["estimator"]["name"] == DIS.name
