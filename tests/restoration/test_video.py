"""Reading and writing videos: bit-exact round trips, colours, ranges, sound, damage, and what is left after a fault."""

from __future__ import annotations

import pathlib
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from video_clips import leftovers, noise, rgb, smooth

from zsvr import video
from zsvr.video import colour, reading, writing

LOSSLESS = [(".mp4", 8), (".mp4", 10), (".mov", 8), (".mkv", 8), (".mkv", 10), (".webm", 8), ("", 8), ("", 16)]


@pytest.mark.parametrize("size", [(32, 48), (37, 51)])
@pytest.mark.parametrize(("suffix", "bits"), LOSSLESS)
def test_lossless_reads_back_bit_exactly(tmp_path, suffix, bits, size):
    clip = noise(3, size, bits)
    assert video.write(tmp_path / f"clip{suffix}", clip, rate=25, lossless=True, depth=bits) == ()
    back = video.read(tmp_path / f"clip{suffix}")
    assert torch.equal(back.frames, clip)
    assert back.depth == bits and back.notes == () and back.times is None
    assert back.rate == (25 if suffix else 24)
    assert leftovers(tmp_path) == [f"clip{suffix}"]


def test_grey_is_written_as_rgb_and_values_are_clipped_and_rounded(tmp_path):
    clip = noise(2, (20, 24), channels=1)
    video.write(tmp_path / "grey", clip)
    assert torch.equal(video.read(tmp_path / "grey").frames, clip.expand(-1, 3, -1, -1))
    odd = torch.tensor([-1.0, 0.5, 0.4999 / 255, 2.0]).reshape(1, 1, 2, 2)
    video.write(tmp_path / "odd", odd)
    assert (video.read(tmp_path / "odd").frames[0, 0] * 255).flatten().tolist() == [0, 128, 0, 255]


@pytest.mark.parametrize(("suffix", "bits"), [(".mp4", 8), (".mp4", 10), (".webm", 8), (".mkv", 8)])
def test_viewing_copies_look_the_same_and_pad_odd_sides(tmp_path, suffix, bits):
    clip = smooth(3, (37, 51))
    notes = video.write(tmp_path / f"clip{suffix}", clip, depth=bits)
    assert notes == ("padded from 51x37 to even sides",)
    back = video.read(tmp_path / f"clip{suffix}")
    assert back.frames.shape == (3, 3, 38, 52) and back.depth == bits
    error = (back.frames[..., :37, :51] - clip).square().mean().sqrt()
    assert error < 0.02, error
    info = video.probe(tmp_path / f"clip{suffix}")
    assert (info.matrix, info.width, info.height, info.frames) == ("bt709", 52, 38, 3)


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ".webm", ".gif"])
def test_the_same_frames_give_the_same_bytes(tmp_path, suffix):
    for name in ("a", "b"):
        video.write(tmp_path / f"{name}{suffix}", noise(4, (32, 32)))
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()


def test_a_gif_that_players_could_not_show_is_slower_and_says_so(tmp_path):
    for name, given in (("a.gif", {"rate": 120}), ("b.gif", {"times": (0, 0.004, 0.008, 1)})):
        notes = video.write(tmp_path / name, smooth(4, (20, 30)), **given)
        assert len(notes) == 1 and "plays slower" in notes[0]
    assert video.read(tmp_path / "a.gif").rate == 50
    assert video.read(tmp_path / "b.gif").times == pytest.approx((0, 0.02, 0.04, 1.03), abs=0.011)
    assert video.write(tmp_path / "c.gif", smooth(4, (20, 30)), rate=50) == ()


def test_a_gif_can_be_written_and_read(tmp_path):
    video.write(tmp_path / "a.gif", smooth(4, (20, 30)), rate=10)
    back = video.read(tmp_path / "a.gif")
    assert back.frames.shape == (4, 3, 20, 30) and back.rate == 10 and back.notes == ()
    assert (back.frames - smooth(4, (20, 30))).abs().mean() < 0.1


# ---- colour: the published matrices (ITU-R BT.601, BT.709, BT.2020) as oracle ----

WEIGHTS = {1: (0.2126, 0.0722), 5: (0.299, 0.114), 6: (0.299, 0.114), 9: (0.2627, 0.0593), 2: (0.299, 0.114)}


def coded(rgb, tag: int, bits: int, full: bool, pixels: str, height: int = 16):
    """Return an av frame of one colour, by the definition of Y'CbCr."""
    kr, kb = WEIGHTS[tag]
    r, g, b = rgb
    y = kr * r + (1 - kr - kb) * g + kb * b
    cb, cr = (b - y) / (2 * (1 - kb)), (r - y) / (2 * (1 - kr))
    unit, top = 2 ** (bits - 8), 2**bits - 1
    values = (top * y, top * cb + 128 * unit, top * cr + 128 * unit)
    if not full:
        values = (219 * unit * y + 16 * unit, 224 * unit * cb + 128 * unit, 224 * unit * cr + 128 * unit)
    frame = av.VideoFrame(16, height, pixels)
    kind = np.uint8 if bits == 8 else np.uint16
    for plane, value in zip(frame.planes, values, strict=True):
        plane.update(np.full(plane.buffer_size // kind().itemsize, round(value), kind).tobytes())
    frame.colorspace, frame.color_range = tag, 2 if full else 1
    return frame


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("tag", [1, 5, 6, 9, 2])
@pytest.mark.parametrize(
    ("pixels", "bits"), [("yuv420p", 8), ("yuv422p", 8), ("yuv444p", 8), ("yuv420p10le", 10), ("yuv444p12le", 12)]
)
def test_colours_follow_the_tagged_matrix_and_range(pixels, bits, tag, full):
    for one in ((0.9, 0.2, 0.3), (0.1, 0.8, 0.4), (0.5, 0.5, 0.5), (1, 1, 1), (0, 0, 0)):
        got = colour.to_rgb(coded(one, tag, bits, full, pixels))
        assert got.dtype == np.float32 and got.shape == (3, 16, 16)
        assert np.abs(got[:, 8, 8] - one).max() < 1.5 / 2**bits * 1.2, (one, got[:, 8, 8])


def test_untagged_frames_are_bt709_from_720_lines_on():
    red = (0.9, 0.2, 0.3)
    tall = coded(red, 1, 8, False, "yuv420p", 720)
    tall.colorspace = 2
    assert np.abs(colour.to_rgb(tall)[:, 8, 8] - red).max() < 0.01
    low = coded(red, 5, 8, False, "yuv420p", 718)
    low.colorspace = 2
    assert np.abs(colour.to_rgb(low)[:, 8, 8] - red).max() < 0.01


def test_grey_video_of_studio_range_is_stretched():
    frame = av.VideoFrame.from_ndarray(np.tile(np.uint8([16, 235]), (8, 4)), format="gray")
    frame.color_range = 1
    assert colour.to_rgb(frame)[0, 0, :2].tolist() == [0, 1]
    frame.color_range = 2
    assert np.allclose(colour.to_rgb(frame)[0, 0, :2], [16 / 255, 235 / 255])


# ---- ranges, times, rotation, sound ----


def test_ranges_and_streaming_agree_with_the_whole(tmp_path):
    clip = noise(7, (16, 16))
    video.write(tmp_path / "a.mkv", clip, lossless=True)
    assert torch.equal(video.read(tmp_path / "a.mkv", 2, 5).frames, clip[2:5])
    assert torch.equal(video.read(tmp_path / "a.mkv", 6).frames, clip[6:])
    streamed = list(video.stream(tmp_path / "a.mkv", 1, 3))
    assert torch.equal(torch.stack([f.picture for f in streamed]), clip[1:3])
    assert [round(f.time * 24) for f in streamed] == [1, 2]
    for start, stop in ((7, None), (0, 8), (3, 3), (-1, 2), (8, 9)):
        with pytest.raises(ValueError, match=r"too far|0 <= start < stop"):
            video.read(tmp_path / "a.mkv", start, stop)


def test_reading_says_how_much_memory_it_takes_before_it_takes_it(tmp_path):
    video.write(tmp_path / "a.mkv", noise(7, (16, 20)), lossless=True)
    info = video.probe(tmp_path / "a.mkv")
    assert info.nbytes() == 7 * 3 * 16 * 20 * 4 and info.nbytes(2, 5) == 3 * 3 * 16 * 20 * 4
    with pytest.raises(MemoryError, match=r"frames 0 to 7 of 20x16 need .*stop=3 fits"):
        video.read(tmp_path / "a.mkv", max_bytes=3 * 3 * 16 * 20 * 4 + 5)
    assert len(video.read(tmp_path / "a.mkv", 0, 3, max_bytes=3 * 3 * 16 * 20 * 4).frames) == 3


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_variable_rate_keeps_its_times(tmp_path, suffix):
    times = (0.0, 0.04, 0.08, 0.3, 0.5, 0.54)
    clip = noise(6, (16, 16))
    video.write(tmp_path / f"a{suffix}", clip, times=times, lossless=True)
    back = video.read(tmp_path / f"a{suffix}")
    assert torch.equal(back.frames, clip)
    assert back.times == pytest.approx(times, abs=1e-3)
    assert float(back.rate) == pytest.approx(5 / 0.54, rel=0.02) and "evenly" in back.notes[0]
    video.write(tmp_path / f"b{suffix}", back.frames, rate=back.rate, times=back.times, lossless=True)
    assert video.read(tmp_path / f"b{suffix}").times == pytest.approx(times, abs=1e-3)
    for wrong in ((0, 1, 1, 2, 3, 4), (0, 1, 1 + 1e-7, 2, 3, 4), (0, 200, 200.0001, 201, 202, 203)):
        with pytest.raises(ValueError, match="times must rise"):
            video.write(tmp_path / "c.mkv", clip, times=wrong)
    with pytest.raises(ValueError, match="times are 2"):
        video.write(tmp_path / "c.mkv", clip, times=(0, 1))
    assert leftovers(tmp_path) == [f"a{suffix}", f"b{suffix}"]


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_rate_that_changes_slowly_is_variable(tmp_path, suffix):
    """As of a telephone in growing darkness: no step differs much from the median, the middle would be .57 s off."""
    steps = [0.0333] * 200 + [0.039] * 199
    times = tuple(np.cumsum([0, *steps]).tolist())
    video.write(tmp_path / f"a{suffix}", noise(1, (16, 16)).expand(400, -1, -1, -1), times=times, lossless=True)
    assert video.read(tmp_path / f"a{suffix}").times == pytest.approx(times, abs=1e-3)


def test_a_rate_that_the_file_tells_wrong_is_measured(tmp_path):
    times = tuple(n * 1001 / 24000 for n in range(1000))
    video.write(tmp_path / "a.mkv", noise(1, (16, 16)).expand(1000, -1, -1, -1), times=times, lossless=True)
    assert video.probe(tmp_path / "a.mkv").rate == 24
    back = video.read(tmp_path / "a.mkv")
    assert back.times is None and 999 / float(back.rate) == pytest.approx(times[-1], abs=2e-3)


def test_frames_may_be_minutes_apart(tmp_path):
    for name in ("a.mp4", "a.mkv"):
        for times in ((0, 1000, 2000, 3000, 4000), (0, 1000, 2000, 2001), (0, 10_000, 20_000, 20_000.001)):
            video.write(tmp_path / name, noise(len(times), (16, 16)), times=times, overwrite=True)
            back = video.read(tmp_path / name)
            assert float(back.rate) == pytest.approx((len(times) - 1) / times[-1])
            assert back.times == (None if times[-1] == 4000 else pytest.approx(times))


def test_a_video_that_begins_after_its_sound_is_whole(tmp_path):
    with_sound(tmp_path / "a.mkv", late=0.5)
    clip = video.read(tmp_path / "a.mkv")
    assert len(clip.frames) == 48 and clip.notes == () and clip.sound.start == pytest.approx(0.5, abs=2e-3)


@pytest.mark.parametrize("rate", [Fraction(24000, 1001), 60, 12.5])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_an_even_rate_stays_even(tmp_path, suffix, rate):
    video.write(tmp_path / f"a{suffix}", noise(9, (16, 16)), rate=rate)
    back = video.read(tmp_path / f"a{suffix}")
    assert back.times is None and float(back.rate) == pytest.approx(float(rate), rel=2e-3)


@pytest.mark.parametrize(("degrees", "turns"), [(90, 1), (-90, -1), (180, 2)])
def test_rotation_is_done(tmp_path, degrees, turns):
    clip = noise(2, (16, 24))
    with av.open(str(tmp_path / "a.mp4"), "w") as output:
        stream = output.add_stream("libx264rgb", rate=24, options={"qp": "0"})
        stream.height, stream.width, stream.pix_fmt = 16, 24, "rgb24"
        stream.set_display_rotation(degrees)
        for frame in clip:
            levels = (frame * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
            output.mux(stream.encode(av.VideoFrame.from_ndarray(levels, format="rgb24")))
        output.mux(stream.encode())
    assert torch.equal(video.read(tmp_path / "a.mp4").frames, torch.rot90(clip, turns, (2, 3)))
    info = video.probe(tmp_path / "a.mp4")
    assert (info.height, info.width) == ((16, 24) if turns == 2 else (24, 16))


@pytest.mark.parametrize(
    ("matrix", "shown"),
    [
        ((-1, 0, 0, 1), lambda clip: clip.flip(3)),
        ((1, 0, 0, -1), lambda clip: clip.flip(2)),
        ((0, 1, 1, 0), lambda clip: clip.transpose(2, 3)),
        ((0, -1, -1, 0), lambda clip: clip.transpose(2, 3).flip(2, 3)),
    ],
)
def test_mirroring_is_done(tmp_path, matrix, shown):
    clip = noise(2, (16, 24))
    rgb(tmp_path / "a.mp4", clip)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    at = data.index(b"tkhd") + 44  # version and flags, dates, track, duration, layer, volume, reserved
    assert data[at : at + 4] == (1 << 16).to_bytes(4, "big")
    for place, value in zip((0, 4, 12, 16), matrix, strict=True):
        data[at + place : at + place + 4] = (value << 16).to_bytes(4, "big", signed=True)
    (tmp_path / "a.mp4").write_bytes(data)
    assert torch.equal(video.read(tmp_path / "a.mp4").frames, shown(clip))


def with_sound(
    path: pathlib.Path, frames: int = 48, codec: str = "aac", sample_format: str = "fltp", late: float = 0
) -> None:
    """Write a video of 24 frames per second, which begins ``late``, with a tone of rising loudness."""
    with av.open(str(path), "w") as output:
        picture = output.add_stream("libx264rgb", rate=24, options={"qp": "0"})
        picture.height, picture.width, picture.pix_fmt = 16, 16, "rgb24"
        tone = output.add_stream(codec, rate=48000, layout="mono")
        for n, frame in enumerate(noise(frames, (16, 16))):
            levels = (frame * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
            coded = av.VideoFrame.from_ndarray(levels, format="rgb24")
            coded.pts, coded.time_base = n + round(24 * late), Fraction(1, 24)
            output.mux(picture.encode(coded))
        output.mux(picture.encode())
        t = np.arange(2000 * frames) / 48000
        wave = (np.sin(2 * np.pi * 440 * t) * t / t[-1] * 0.9).astype(np.float32)
        if sample_format == "s16":
            wave = (wave * 32767).astype(np.int16)
        sound = av.AudioFrame.from_ndarray(wave[None], format=sample_format, layout="mono")
        sound.sample_rate = 48000
        output.mux(tone.encode(sound))
        output.mux(tone.encode())


def sound_of(path: pathlib.Path) -> tuple[np.ndarray, float]:
    with av.open(str(path)) as source:
        decoded = list(source.decode(audio=0))
        return np.concatenate([f.to_ndarray()[0] for f in decoded]), float(decoded[0].time)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_sound_is_kept_and_cut_to_the_range(tmp_path, suffix):
    with_sound(tmp_path / "in.mp4")
    whole, part = video.read(tmp_path / "in.mp4"), video.read(tmp_path / "in.mp4", 24, 36)
    assert video.probe(tmp_path / "in.mp4").has_sound
    assert (part.sound.start, part.sound.stop) == pytest.approx((1.0, 1.5), abs=1e-3)
    for name, clip in (("whole", whole), ("part", part)):
        out = tmp_path / f"{name}{suffix}"
        assert video.write(out, clip.frames, rate=clip.rate, sound=clip.sound, lossless=True) == ()
        assert torch.equal(video.read(out).frames, clip.frames)
    samples, start = sound_of(tmp_path / f"whole{suffix}")
    assert abs(len(samples) / 48000 - 2) < 0.05 and abs(start) < 0.03
    samples, start = sound_of(tmp_path / f"part{suffix}")
    assert abs(len(samples) / 48000 - 0.5) < 0.06 and abs(start) < 0.03
    assert np.abs(samples[4000:8000]).max() == pytest.approx(0.9 * 1.15 / 2, rel=0.1)  # a tone that rises over 2 s


def test_sound_that_a_container_cannot_hold_is_dropped_with_a_note(tmp_path):
    with_sound(tmp_path / "in.mp4", 12)
    clip = video.read(tmp_path / "in.mp4")
    notes = video.write(tmp_path / "out.webm", clip.frames, sound=clip.sound, lossless=True)
    assert len(notes) == 1 and "sound was dropped" in notes[0]
    assert torch.equal(video.read(tmp_path / "out.webm").frames, clip.frames)


def test_sound_of_a_transport_stream_fits_other_containers(tmp_path):
    """Its AAC has a header in every packet, which mp4 and Matroska must not have."""
    with_sound(tmp_path / "in.ts", 24)
    clip = video.read(tmp_path / "in.ts")
    for name in ("a.mp4", "a.mkv"):
        assert video.write(tmp_path / name, clip.frames, sound=clip.sound) == ()
        assert abs(len(sound_of(tmp_path / name)[0]) / 48000 - 1) < 0.1


def test_sound_that_goes_back_in_time_costs_no_frames(tmp_path):
    """Two recordings, one behind the other: the second's times begin anew."""
    with_sound(tmp_path / "one.ts", 24)
    (tmp_path / "in.ts").write_bytes((tmp_path / "one.ts").read_bytes() * 2)
    clip = video.read(tmp_path / "in.ts")
    notes = video.write(tmp_path / "a.mp4", clip.frames, sound=clip.sound)
    assert notes == ("the sound was dropped: mp4 cannot hold this aac",)
    assert len(video.read(tmp_path / "a.mp4").frames) == len(clip.frames)


@pytest.mark.parametrize("suffix", [".mov", ".gif"])
def test_sound_that_only_the_muxer_refuses_is_dropped_too(tmp_path, suffix):
    with_sound(tmp_path / "in.mkv", 12, "libopus", "flt")
    clip = video.read(tmp_path / "in.mkv")
    notes = video.write(tmp_path / f"out{suffix}", clip.frames, sound=clip.sound)
    assert notes == (f"the sound was dropped: {suffix[1:]} cannot hold this opus",)
    assert len(video.read(tmp_path / f"out{suffix}").frames) == 12
    assert video.write(tmp_path / "out.mp4", clip.frames, sound=clip.sound) == ()
    assert video.probe(tmp_path / "out.mp4").has_sound


def test_sound_is_kept_where_frames_have_no_times(tmp_path):
    """As H.264 in an MPEG program stream, where few frames have one."""
    wave = np.zeros((1, 1152), np.int16)
    with av.open(str(tmp_path / "a.mpg"), "w") as output:
        picture = output.add_stream("libx264", rate=24, options={"bf": "3"})
        picture.height, picture.width, picture.pix_fmt = 16, 16, "yuv420p"
        tone = output.add_stream("mp2", rate=48000, layout="mono")
        packets = []
        for _ in range(48):
            packets += picture.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8), format="rgb24"))
        packets += picture.encode()
        for n in range(83):
            sound = av.AudioFrame.from_ndarray(wave, format="s16", layout="mono")
            sound.sample_rate, sound.pts, sound.time_base = 48000, 1152 * n, Fraction(1, 48000)
            packets += tone.encode(sound)
        packets += tone.encode()
        packets.sort(key=lambda packet: packet.dts * packet.time_base)
        output.mux(packets)
    with av.open(str(tmp_path / "a.mpg")) as source:
        times = [frame.time for frame in source.decode(video=0)]
    assert times[0] is not None and None in times
    clip = video.read(tmp_path / "a.mpg")
    assert (clip.sound.start, clip.sound.stop) == pytest.approx((times[0], times[0] + 2), abs=1e-3)
    assert video.read(tmp_path / "a.mpg", 20, 21).notes == (
        "the sound was dropped: nothing says when these frames are shown",
    )


# ---- folders ----


def test_folders_are_read_in_the_order_of_numbers_and_need_one_size(tmp_path):
    clip = noise(11, (8, 8))
    folder = tmp_path / "in"
    folder.mkdir()
    for n, frame in enumerate(clip):
        (folder / f"frame{n + 1}.png").write_bytes(writing.picture_bytes(frame.numpy()))
    (folder / "notes.txt").write_text("not a picture")
    assert torch.equal(video.read(folder).frames, clip)
    assert torch.equal(video.read(folder, 3, 5).frames, clip[3:5])
    with pytest.raises(ValueError, match="11 pictures, so stop = 12"):
        video.read(folder, 0, 12)
    (folder / "frame5.png").write_bytes(writing.picture_bytes(noise(1, (8, 10))[0].numpy()))
    with pytest.raises(ValueError, match=r"differ in size: frame5.png is 10x8, the first 8x8"):
        video.read(folder)
    (folder / "frame5.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    with pytest.raises(ValueError, match=r"frame5\.png"):
        video.read(folder)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no pictures"):
        video.read(tmp_path / "empty")


@pytest.mark.parametrize("kind", ["tiff", "webp", "bmp", "jpg", "png"])
def test_pictures_of_other_programs_are_read(tmp_path, kind):
    Image = pytest.importorskip("PIL.Image")
    levels = (smooth(1, (24, 32))[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    options = {"webp": {"lossless": True}, "jpg": {"quality": 100, "subsampling": 0}}.get(kind, {})
    Image.fromarray(levels).save(tmp_path / f"a.{kind}", **options)
    got = video.read(tmp_path).frames[0].permute(1, 2, 0).numpy() * 255
    with Image.open(tmp_path / f"a.{kind}") as picture:
        expected = np.asarray(picture.convert("RGB"), dtype=np.float32)
    assert np.abs(got - expected).max() < (3 if kind == "jpg" else 1e-3)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"subsampling": 0}, {"progressive": True}], ids=str)
def test_large_jpegs_are_read_whatever_their_folder_is_called(tmp_path, mode, options):
    Image = pytest.importorskip("PIL.Image")
    folder = tmp_path / "take%03d"
    folder.mkdir()
    levels = (smooth(1, (240, 320))[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(levels).convert(mode).save(folder / "a.jpg", quality=95, **options)
    assert (folder / "a.jpg").stat().st_size > 4096
    with Image.open(folder / "a.jpg") as picture:
        expected = np.asarray(picture.convert("RGB"), dtype=np.float32)
    for path in (folder, folder / "a.jpg"):
        got = video.read(path).frames[0].permute(1, 2, 0).numpy() * 255
        assert np.abs(got - expected).max() < 5 and np.abs(got - expected).mean() < 1.5
    (tmp_path / "two.jpg").write_bytes((folder / "a.jpg").read_bytes() * 2)  # as cameras put a second view behind
    assert len(video.read(tmp_path / "two.jpg").frames) == 1


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_upright_however_the_camera_was_held(tmp_path, kind, orientation):
    Image = pytest.importorskip("PIL.Image")
    from PIL import ImageOps

    levels = (smooth(1, (48, 64))[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    exif = Image.Exif()
    exif[0x112] = orientation
    options = {"webp": {"lossless": True}, "jpg": {"quality": 95}}.get(kind, {})
    Image.fromarray(levels).save(tmp_path / f"a.{kind}", exif=exif, **options)
    with Image.open(tmp_path / f"a.{kind}") as picture:
        expected = np.asarray(ImageOps.exif_transpose(picture).convert("RGB"), dtype=np.float32)
    got = video.read(tmp_path).frames[0].permute(1, 2, 0).numpy() * 255
    assert got.shape == expected.shape and np.abs(got - expected).max() < 5
    info = video.probe(tmp_path)
    assert (info.height, info.width) == expected.shape[:2]


def test_transparency_is_dropped_with_a_note(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    levels = (noise(1, (8, 8), channels=3)[0] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    for name, alpha in (("solid", 255), ("clear", 100)):
        (tmp_path / name).mkdir()
        rgba = np.concatenate((levels, np.full((8, 8, 1), alpha, np.uint8)), -1)
        Image.fromarray(rgba, "RGBA").save(tmp_path / name / "a.png")
    assert video.read(tmp_path / "solid").notes == ()
    clear = video.read(tmp_path / "clear")
    assert clear.notes == ("transparency was dropped",)
    assert torch.equal(clear.frames[0], torch.from_numpy(levels).permute(2, 0, 1) / 255)


def test_real_frames_survive_exactly(real_data, tmp_path):
    clip = video.read(real_data / "carphone_pair" / "pristine", 0, 6)
    assert clip.frames.shape == (6, 3, 144, 176)
    for name in ("a.mp4", "a.mkv", "folder"):
        video.write(tmp_path / name, clip.frames, lossless=True)
        assert torch.equal(video.read(tmp_path / name).frames, clip.frames)
    assert clip.rate == reading.FOLDER_RATE
