"""The whole system on real footage, with networks of random weights: that it fits together, not how it looks."""

from __future__ import annotations

import math

import pytest
import torch
from restoration_models import SIZE, tiny_prior
from saved_folders import latent_folder

import zsvr
from zsvr import metrics, priors, video

TASKS = {
    "denoise": ({"noise_std": 0.1}, {}),
    "sr": ({}, {"scale": 4}),
    "deblur": ({}, {"kernel": "motion"}),
    "inpaint": ({}, {"ratio": 0.5}),
    "colorize": ({}, {}),
    "lowlight": ({}, {"gain": 0.2}),
}


@pytest.fixture(scope="module")
def prior():
    return tiny_prior()


def crop(real_data, start: int = 0) -> torch.Tensor:
    frames = video.read(real_data / "woman_running" / "frames", start, start + 3).frames
    return frames[:, :, 200 : 200 + 4 * SIZE, 240 : 240 + 4 * SIZE].unfold(2, 4, 4).unfold(3, 4, 4).mean((-1, -2))


@pytest.mark.parametrize("task", TASKS)
def test_six_tasks_on_a_real_clip(real_data, prior, task, tmp_path):
    extra, operator = TASKS[task]
    result = zsvr.restore(
        crop(real_data), prior=prior, task=task, operator=operator, mode="synthetic", temporal="best", steps=3,
        device="cpu", **extra,
    )  # fmt: skip
    assert result.frames.shape == (3, 3, SIZE, SIZE) and torch.isfinite(result.frames).all()
    found = metrics.evaluate(result.frames, result.clean)
    assert all(math.isfinite(found[name]) for name in ("psnr", "ssim", "we"))
    video.write(tmp_path / "out.mkv", result.frames, lossless=True)
    assert torch.equal(video.read(tmp_path / "out.mkv").frames, metrics.quantize(result.frames))


def test_a_real_input_is_used_as_it_is(real_data, prior):
    small = crop(real_data)[..., ::4, ::4]
    result = zsvr.restore(small, prior=prior, task="sr_avg", operator={"scale": 4}, steps=3, device="cpu")
    assert result.clean is None
    torch.testing.assert_close(result.degraded, small)
    back = torch.nn.functional.avg_pool2d(2 * result.frames - 1, 4)
    inside = (result.frames > 0) & (result.frames < 1)
    whole = torch.nn.functional.avg_pool2d(inside.float(), 4) == 1  # blocks that clipping has not touched
    torch.testing.assert_close(back[whole], (2 * small - 1)[whole], rtol=0, atol=1e-4)


def test_shots_are_found_and_restored_apart(real_data, prior):
    other = video.read(real_data / "gt_rubberwhale" / "frames", 0, 3).frames[:, :, 100:228, 200:328]
    other = other.unfold(2, 4, 4).unfold(3, 4, 4).mean((-1, -2))
    both = torch.cat((crop(real_data), other))
    result = zsvr.restore(both, prior=prior, task="sr_avg", operator={"scale": 2}, mode="synthetic", steps=2,
                          device="cpu")  # fmt: skip
    assert any("0-2, 3-5" in note for note in result.notes)


@pytest.mark.parametrize("latent_host", ["project", "none"])
def test_a_latent_prior(real_data, tmp_path, latent_host):
    prior = priors.open(latent_folder(tmp_path / "sd"), prompt="a b", negative_prompt="c", guidance_scale=2.0)
    clean = torch.nn.functional.avg_pool2d(crop(real_data), 2)
    sampling = zsvr.Sampling(steps=3, latent_host=latent_host, latent_every=1)
    result = zsvr.restore(clean, prior=prior, task="sr_avg", operator={"scale": 2}, mode="synthetic", device="cpu",
                          sampling=sampling)  # fmt: skip
    assert result.frames.shape == clean.shape and "layers patched" in result.patch
    if latent_host == "project":
        with pytest.raises(ValueError, match="scale_by_variance"):
            zsvr.restore(clean, prior=prior, task="sr_avg", operator={"scale": 2}, mode="synthetic", device="cpu",
                         host="gdp", host_options={"scale_by_variance": True}, steps=2)  # fmt: skip


def test_a_clip_of_another_size_than_the_operator_expects(real_data, prior):
    mask = torch.ones(SIZE, SIZE)
    with pytest.raises(ValueError, match="mask"):
        zsvr.restore(crop(real_data)[..., :24], prior=prior, task="inpaint", operator={"mask": mask}, steps=2,
                     device="cpu", prepare="none")  # fmt: skip
    with pytest.raises(ValueError, match="multiples of 4"):
        zsvr.restore(crop(real_data)[..., :30], prior=prior, task="denoise", noise_std=0.1, steps=2, device="cpu",
                     prepare="none")  # fmt: skip
