"""Degrading clean clips: the formula, the noise, the files beside the video."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from video_clips import refused_writes

from zsvr import degrading, noise, operators, video
from zsvr.operators.base import to_model


def clean(frames: int = 3, size: tuple[int, int] = (32, 48)) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return F.interpolate(torch.rand(frames, 3, 5, 6, generator=generator), size, mode="bilinear")


OPERATORS = [
    operators.make("denoise"), operators.make("sr", scale=4), operators.make("sr_avg", scale=2),
    operators.make("colorize"), operators.make("inpaint", box=(4, 6, 10, 12)),
]  # fmt: skip


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda op: op.name)
def test_a_measurement_is_the_operator_plus_noise_of_the_frame(operator):
    u = clean()
    plain = degrading.degrade(u, operator, seed=7)
    assert torch.equal(plain.y, operator.A(to_model(u)))
    noisy = degrading.degrade(u, operator, noise_std=0.1, seed=7)
    for n in range(3):
        field = noise.normal(7, "measurement", noisy.y.shape[1:], frame=n)
        assert torch.allclose(noisy.y[n] - plain.y[n], 0.2 * field, atol=1e-6)
    later = degrading.degrade(u[1:], operator, noise_std=0.1, seed=7, first=1)
    assert torch.equal(later.y, noisy.y[1:])
    other = degrading.degrade(u, operator, noise_std=0.1, seed=8)
    assert not torch.equal(other.y, noisy.y)


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda op: op.name)
@pytest.mark.parametrize("name", ["lq.mkv", "lq"])
def test_what_is_saved_comes_back(tmp_path, operator, name):
    measurement = degrading.degrade(clean(), operator, noise_std=0.03, seed=2, first=5)
    assert degrading.save(tmp_path / name, measurement, rate=25) == ()
    back = degrading.load(tmp_path / name)
    assert torch.equal(back.y, measurement.y)
    assert (back.noise_std, back.seed, back.first) == (0.03, 2, 5)
    assert repr(back.operator) == repr(operator)
    x = torch.rand(2, 3, 32, 48)
    assert torch.equal(back.operator.A(x), operator.A(x))
    shown = video.read(tmp_path / name).frames
    assert torch.equal(shown, torch.floor(measurement.picture * 255 + 0.5) / 255)
    inside = (measurement.y.abs() <= 1) & (operator.from_picture(torch.ones_like(shown)) != 0)
    real = operator.from_picture(shown)  # what a run on the video alone sees
    assert (real - measurement.y)[inside].abs().max() < 1 / 255 + 1e-5
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        name,
        *sorted(p.name for p in degrading.beside(tmp_path / name)),
    ]


def test_nothing_is_overwritten_or_left_half_done(tmp_path, monkeypatch):
    measurement = degrading.degrade(clean(), operators.make("denoise"), noise_std=0.1)
    degrading.save(tmp_path / "a.mkv", measurement)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(FileExistsError):
        degrading.save(tmp_path / "a.mkv", measurement)
    monkeypatch.setattr(video.writing, "_encode", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    for path in (tmp_path / "a.mkv", tmp_path / "b.mkv"):
        with pytest.raises(OSError, match="the disk is full"):
            degrading.save(path, measurement, overwrite=True)
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_full_disk_leaves_nothing_and_says_so(tmp_path):
    writes = """
        from zsvr import degrading, flow, operators
        measurement = degrading.degrade(clip, operators.make("denoise"))
        calls = [lambda: degrading.save(folder / "a.mkv", measurement),
                 lambda: flow.cached(folder, clip, flow.Zero())]
    """
    assert len(refused_writes(writes, (30_000, 100), tmp_path)) == 4
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["a.mkv", "a"])
@pytest.mark.parametrize("call", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), KeyboardInterrupt()], ids=["full", "interrupted"])
def test_a_fault_at_any_moment_leaves_no_measurement_beside_another_video(tmp_path, monkeypatch, name, call, error):
    path, u = tmp_path / name, clean()
    old = degrading.degrade(u, operators.make("denoise"), noise_std=0.1, seed=1)
    new = degrading.degrade(1 - u, operators.make("sr_avg", scale=2), seed=2)
    real, failures = getattr(os, call), 0
    for fails_at in range(1, 6):
        degrading.save(path, old, overwrite=True)
        calls = iter(range(1, 20))

        def fail(*arguments, calls=calls, fails_at=fails_at):
            if next(calls) == fails_at:
                raise error
            return real(*arguments)

        monkeypatch.setattr(os, call, fail)
        try:
            degrading.save(path, new, overwrite=True)
        except type(error):
            failures += 1
        monkeypatch.setattr(os, call, real)
        shown = video.read(path).frames
        try:
            exact = degrading.load(path)
        except FileNotFoundError:
            assert shown.shape == new.picture.shape and len(list(tmp_path.iterdir())) == 1
        else:
            assert torch.equal(shown, torch.floor(exact.picture * 255 + 0.5) / 255)
    assert failures >= 3


def test_damage_and_absence_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="was not made by degrading"):
        degrading.load(tmp_path / "a.mkv")
    degrading.save(tmp_path / "a.mkv", degrading.degrade(clean(), operators.make("denoise")))
    values, _ = degrading.beside(tmp_path / "a.mkv")
    data = bytearray(values.read_bytes())
    data[-5] ^= 4
    for broken in (bytes(data), bytes(data[:50]), b""):
        values.write_bytes(broken)
        with pytest.raises(ValueError, match="is damaged"):
            degrading.load(tmp_path / "a.mkv")
    for facts in ("[]", "null", "{}", '{"format": "zsvr.Measurement 1"}', "{"):
        safetensors.torch.save_file({"y": torch.zeros(1, 3, 4, 4)}, str(values), {"facts": facts})
        with pytest.raises(ValueError, match="is damaged"):
            degrading.load(tmp_path / "a.mkv")
    assert os.path.exists(tmp_path / "a.mkv")


def test_values_out_of_range_are_refused():
    operator = operators.make("sr", scale=4)
    with pytest.raises(ValueError, match="noise_std must be finite"):
        degrading.degrade(clean(), operator, noise_std=-1)
    with pytest.raises(ValueError, match=r"must be floating \[T, 3, H, W\]"):
        degrading.degrade(clean()[0], operator)
    with pytest.raises(ValueError):
        degrading.degrade(clean(size=(30, 48)), operator)
    with pytest.raises(ValueError, match="seed must be within"):
        degrading.degrade(clean(), operator, noise_std=0.1, seed=-1)


@pytest.mark.parametrize("size", [(60, 91), (91, 60), (40, 40)])
def test_preparing_crops_the_middle_and_resizes_like_other_libraries(size):
    Image = pytest.importorskip("PIL.Image")
    u = clean(2, size)
    side = min(size)
    top, left = (size[0] - side) // 2, (size[1] - side) // 2
    square = u[..., top : top + side, left : left + side]
    assert torch.equal(degrading.prepare(u, "none"), u)
    assert torch.equal(degrading.prepare(u, "square", side), square)
    for target in (24, 50):
        got = degrading.prepare(u, "square", target)
        assert got.shape == (2, 3, target, target) and got.min() >= 0 and got.max() <= 1
        channel = Image.fromarray(square[1, 2].numpy(), "F").resize((target, target), Image.Resampling.BICUBIC)
        assert torch.allclose(got[1, 2], torch.from_numpy(np.array(channel)), atol=2e-4)
    with pytest.raises(ValueError, match="prepared square or none, got 'crop'"):
        degrading.prepare(u, "crop")


def test_real_footage_degrades_as_strongly_as_it_is_asked_to(real_data):
    u = degrading.prepare(video.read(real_data / "carphone_pair" / "pristine", 0, 2).frames, "square", 128)
    measurement = degrading.degrade(u, operators.make("denoise"), noise_std=0.1)
    assert float((measurement.y - to_model(u)).std() / 2) == pytest.approx(0.1, rel=0.01)


def test_files_beside_a_video_are_as_readable_as_others(tmp_path):
    degrading.save(tmp_path / "small.mkv", degrading.degrade(clean(), operators.make("sr_avg", scale=2)))
    (tmp_path / "other").write_text("")
    assert len({path.stat().st_mode for path in tmp_path.iterdir()}) == 1
