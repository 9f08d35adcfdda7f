"""What is no video, or half of one; and what is left behind when writing goes wrong."""

from __future__ import annotations

import errno
import os

import av
import numpy as np
import pytest
import torch
from video_clips import leftovers, noise, refused_writes, rgb

from zsvr import video
from zsvr.video import writing


def test_what_is_no_video_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file or folder"):
        video.read(tmp_path / "missing.mp4")
    for name, data in (("a.mp4", b"not a video" * 100), ("b.mp4", b""), ("c.png", b"\x89PNG")):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=r"cannot be (read as a video|decoded)|holds no frames"):
            video.read(tmp_path / name)
    with av.open(str(tmp_path / "tone.mp4"), "w") as output:
        tone = output.add_stream("aac", rate=48000, layout="mono")
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 4800), np.float32), format="fltp", layout="mono")
        sound.sample_rate = 48000
        output.mux([*tone.encode(sound), *tone.encode()])
    with pytest.raises(ValueError, match="no video stream: it holds audio"):
        video.read(tmp_path / "tone.mp4")


def test_pipes_and_folders_are_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.mp4")
    (tmp_path / "folder" / "sub.png").mkdir(parents=True)
    for name in ("a.mp4", "folder"):
        with pytest.raises(ValueError, match="is no regular file"):
            video.read(tmp_path / name)


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("share", [0.2, 0.99, 0.9998])
def test_a_truncated_picture_is_not_filled_up_with_grey(tmp_path, share, progressive):
    Image = pytest.importorskip("PIL.Image")
    levels = (noise(2, (64, 80)) * 255).to(torch.uint8).permute(0, 2, 3, 1).numpy()
    for n, picture in enumerate(levels):
        Image.fromarray(picture).save(tmp_path / f"{n}.jpg", progressive=progressive)
    assert len(video.read(tmp_path).frames) == 2
    for name in ("1.jpg", "0.jpg"):
        data = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(data[: int(share * len(data))])
        with pytest.raises(ValueError, match=rf"{name}.* (cannot be decoded|holds no frames)"):
            video.read(tmp_path)


def test_more_frames_than_announced_are_no_way_round_the_limit(tmp_path):
    clip = noise(100, (16, 16))
    rgb(tmp_path / "a.flv", clip)  # says nothing of its length
    assert video.probe(tmp_path / "a.flv").frames is None
    assert torch.equal(video.read(tmp_path / "a.flv").frames, clip)
    for fits in (5, 80):
        with pytest.raises(MemoryError, match=rf"more than {fits} frames of 16x16 .*stop={fits} fits"):
            video.read(tmp_path / "a.flv", max_bytes=fits * 12 * 16 * 16)
    video.write(tmp_path / "a", clip[:1])
    for path in (tmp_path / "a.flv", tmp_path / "a" / "00000.png", tmp_path / "a"):
        with pytest.raises(MemoryError, match=r"(a frame|frames 0 to 1) of 16x16 need .* scale them first"):
            video.read(path, max_bytes=12 * 16 * 16 - 1)
    assert video.probe(tmp_path / "a" / "00000.png").frames == 1
    video.write(tmp_path / "a.mkv", clip[:3], lossless=True)
    for stop in (4, 10**12):
        with pytest.raises(ValueError, match=f"holds 3 frames, so stop = {stop} is too far"):
            video.read(tmp_path / "a.mkv", 0, stop)


def test_playlists_that_lead_elsewhere_are_not_followed(tmp_path, monkeypatch):
    video.write(tmp_path / "secret.mkv", noise(2, (16, 16)), lossless=True)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "list.mp4").write_text("ffconcat version 1.0\nfile secret.mkv\n")
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nsecret.mkv\n#EXT-X-ENDLIST\n")
    with av.open("list.mp4") as followed:  # as FFmpeg alone would do
        assert sum(1 for _ in followed.decode(video=0)) == 2
    for name in ("list.mp4", "list.m3u8"):
        with pytest.raises(ValueError, match="cannot be read as a video"):
            video.read(tmp_path / name)


@pytest.mark.parametrize("suffix", [".mkv", ".webm", ".mov.front"])
@pytest.mark.parametrize("share", [0.4, 0.8])
def test_a_truncated_file_says_what_can_be_read(tmp_path, suffix, share):
    clip = noise(24, (32, 32))
    path = tmp_path / f"whole{suffix}"
    if suffix == ".mov.front":  # with its index in front, as many cameras and sites write
        path = tmp_path / "whole.mov"
        rgb(path, clip, movflags="faststart")
    else:
        video.write(path, clip, lossless=True)
    assert torch.equal(video.read(path).frames, clip)
    cut = path.with_name(f"cut{path.suffix}")
    cut.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(video.TruncatedVideoError, match=r"ends early .* frames can be read.*stop=") as caught:
        video.read(cut)
    readable = caught.value.readable
    assert 0 < readable < 24
    part = video.read(cut, allow_truncated=True)
    assert torch.equal(part.frames, clip[:readable]) and "ends early" in part.notes[0]
    assert torch.equal(video.read(cut, stop=readable).frames, clip[:readable])


@pytest.mark.parametrize("suffix", [".gif", ".mkv", ".webm"])
def test_a_file_that_lacks_its_last_bytes_alone_is_noticed(tmp_path, suffix):
    clip = noise(12, (32, 32))
    video.write(tmp_path / f"a{suffix}", clip, lossless=suffix != ".gif", rate=25)
    data, whole = (tmp_path / f"a{suffix}").read_bytes(), video.read(tmp_path / f"a{suffix}").frames
    path = tmp_path / f"b{suffix}"
    for size in (len(data) // 2, len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(video.TruncatedVideoError, match="ends early or is damaged") as caught:
            video.read(path)
        readable = caught.value.readable
        assert 4 <= readable <= 7 if size < len(data) - 1 else readable >= 11
        assert torch.equal(video.read(path, allow_truncated=True).frames, whole[:readable])
        assert torch.equal(video.read(path, stop=readable).frames, whole[:readable])
    path.write_bytes(data + bytes(100))
    assert torch.equal(video.read(path).frames, whole)


def test_gifs_of_other_programs_are_whole(tmp_path):
    Image = pytest.importorskip("PIL.Image")
    pages = [Image.fromarray(np.uint8(page.permute(1, 2, 0) * 255)) for page in noise(3, (20, 30))]
    pages[0].save(tmp_path / "a.gif", save_all=True, append_images=pages[1:], duration=50, comment=b";,!" * 200, loop=1)
    assert len(video.read(tmp_path / "a.gif").frames) == 3
    one = pages[0].convert("P", palette=Image.Palette.ADAPTIVE)
    one.save(tmp_path / "b.gif")
    assert torch.equal(
        video.read(tmp_path / "b.gif").frames[0] * 255,
        torch.from_numpy(np.array(one.convert("RGB"))).permute(2, 0, 1).float(),
    )


def test_matroska_of_unknown_length_is_read(tmp_path):
    clip = noise(5, (16, 16))
    rgb(tmp_path / "a.mkv", clip, live="1")
    assert torch.equal(video.read(tmp_path / "a.mkv").frames, clip)


def test_a_file_whose_frames_are_all_missing_says_so(tmp_path):
    rgb(tmp_path / "a.mp4", noise(4, (32, 32)), movflags="faststart")
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "b.mp4").write_bytes(data[: data.index(b"mdat") + 6])
    with pytest.raises(ValueError, match=r"b.mp4 holds no frames that can be decoded"):
        video.read(tmp_path / "b.mp4")


def test_a_video_that_changes_its_size_is_refused_at_that_frame(tmp_path):
    first, second = noise(3, (32, 32)), noise(3, (32, 48))
    rgb(tmp_path / "a.ts", first, "mpegts")
    rgb(tmp_path / "b.ts", second, "mpegts")
    assert torch.equal(video.read(tmp_path / "a.ts").frames, first)
    (tmp_path / "c.ts").write_bytes((tmp_path / "a.ts").read_bytes() + (tmp_path / "b.ts").read_bytes())
    with pytest.raises(ValueError, match="differ in size: frame 3 is 48x32, the first 32x32"):
        video.read(tmp_path / "c.ts")
    assert torch.equal(video.read(tmp_path / "c.ts", 0, 3).frames, first)


def test_a_file_that_ends_between_two_frames_is_noticed(tmp_path):
    clip = noise(12, (32, 32))
    rgb(tmp_path / "a.mp4", clip, movflags="faststart")
    with av.open(str(tmp_path / "a.mp4")) as source:
        entry = source.streams.video[0].index_entries[7]
        end = entry.pos + entry.size
    (tmp_path / "b.mp4").write_bytes((tmp_path / "a.mp4").read_bytes()[:end])
    with pytest.raises(video.TruncatedVideoError, match="8 frames can be read, 12 were declared"):
        video.read(tmp_path / "b.mp4")
    assert torch.equal(video.read(tmp_path / "b.mp4", 0, 8).frames, clip[:8])


def test_a_duration_that_is_wrong_is_no_truncation_where_frames_are_counted(tmp_path):
    clip = noise(4, (16, 16))
    rgb(tmp_path / "a.mp4", clip)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    at = data.index(b"mdhd") + 20  # version and flags, two dates, time scale
    duration = int.from_bytes(data[at : at + 4], "big")
    data[at : at + 4] = (duration * 20).to_bytes(4, "big")
    (tmp_path / "a.mp4").write_bytes(data)
    assert torch.equal(video.read(tmp_path / "a.mp4").frames, clip)


def test_a_long_last_frame_is_no_truncation(tmp_path):
    clip = noise(4, (16, 16))
    for suffix in (".mp4", ".mkv"):
        with av.open(str(tmp_path / f"a{suffix}"), "w") as output:
            stream = output.add_stream("libx264rgb", rate=24, options={"qp": "0", "bf": "0"})
            stream.height, stream.width, stream.pix_fmt = 16, 16, "rgb24"
            for frame in clip:
                levels = (frame * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
                output.mux(stream.encode(av.VideoFrame.from_ndarray(levels, format="rgb24")))
            packets = stream.encode()
            packets[-1].duration *= 48
            output.mux(packets)
        assert torch.equal(video.read(tmp_path / f"a{suffix}").frames, clip)
    Image = pytest.importorskip("PIL.Image")
    pages = [Image.fromarray(np.full((16, 16, 3), 60 * n, np.uint8)) for n in range(4)]
    pages[0].save(tmp_path / "a.gif", save_all=True, append_images=pages[1:], duration=[40, 40, 40, 3000], loop=0)
    assert len(video.read(tmp_path / "a.gif").frames) == 4


def test_an_mp4_without_its_index_says_so(tmp_path):
    video.write(tmp_path / "a.mp4", noise(8), lossless=True)
    data = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "b.mp4").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match="index is missing"):
        video.read(tmp_path / "b.mp4")


# ---- nothing half-written ----


def test_nothing_is_overwritten_unless_asked(tmp_path):
    one, two = noise(2, (16, 16)), noise(3, (16, 16))
    for name in ("a.mkv", "folder"):
        video.write(tmp_path / name, one, lossless=True)
        with pytest.raises(FileExistsError, match="exists already"):
            video.write(tmp_path / name, two, lossless=True)
        assert len(video.read(tmp_path / name).frames) == 2
        video.write(tmp_path / name, two, lossless=True, overwrite=True)
        assert len(video.read(tmp_path / name).frames) == 3
    (tmp_path / "folder" / "thesis.tex").write_text("years of work")
    with pytest.raises(FileExistsError, match=r"holds thesis.tex and is not replaced"):
        video.write(tmp_path / "folder", one, overwrite=True)
    assert (tmp_path / "folder" / "thesis.tex").exists()
    with pytest.raises(FileNotFoundError, match="is no folder"):
        video.write(tmp_path / "missing" / "a.mkv", one)
    assert leftovers(tmp_path) == ["a.mkv", "folder"]


def failing(clip: torch.Tensor, after: int, error: BaseException):
    for n, frame in enumerate(clip):
        if n == after:
            raise error
        yield frame


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "a.webm", "a.gif", "folder"])
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("the network failed")])
def test_an_interruption_leaves_the_old_file_or_nothing(tmp_path, name, error):
    clip = noise(5, (16, 16))
    with pytest.raises(type(error)):
        video.write(tmp_path / name, failing(clip, 3, error))
    assert leftovers(tmp_path) == []
    video.write(tmp_path / name, clip[:2])
    with pytest.raises(type(error)):
        video.write(tmp_path / name, failing(clip, 3, error), overwrite=True)
    assert leftovers(tmp_path) == [name] and len(video.read(tmp_path / name).frames) == 2


def test_a_full_disk_leaves_nothing_and_says_so(tmp_path):
    writes = """
        from zsvr import video
        calls = [lambda name=name: video.write(folder / name, clip, lossless=True) for name in {names}]
    """
    names = ("a.mp4", "a.mkv", "a.webm")
    assert len(refused_writes(writes.format(names=names), (30_000,), tmp_path)) == 3
    assert len(refused_writes(writes.format(names=(*names, "folder")), (9_000, 100), tmp_path)) == 8
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("call", ["write", "flush", "fsync"])
def test_a_full_disk_is_noticed_at_every_write(tmp_path, monkeypatch, call):
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if call == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        monkeypatch.setattr(writing._Watched, call, lambda self, *data: self._watch(full))
    with pytest.raises(OSError, match=r"a.mkv was not written, the disk is full \(\d+ MB are free in"):
        video.write(tmp_path / "a.mkv", noise(2, (16, 16)), lossless=True)
    assert leftovers(tmp_path) == []


def test_frames_that_cannot_be_written_are_refused(tmp_path):
    clip = noise(2, (16, 16))
    for frames, message in (
        (clip[:0], "no frames"),
        (clip * float("nan"), "not finite"),
        (clip[:, :2], r"frame 0 is \(2, 16, 16\)"),
        ((clip * 255).to(torch.uint8), "of uint8"),
        ([clip[0], clip[1, :, :8]], "of one size"),
    ):
        for name in ("a.mkv", "folder"):
            with pytest.raises(ValueError, match=message):
                video.write(tmp_path / name, frames)
    with pytest.raises(ValueError, match=r"unknown kind of video '.xyz'; known are\n.mp4"):
        video.write(tmp_path / "a.xyz", clip)
    with pytest.raises(ValueError, match=r"cannot be lossless 8 bit"):
        video.write(tmp_path / "a.gif", clip, lossless=True)
    for rate in (0, float("nan"), float("inf"), 1e-9):
        with pytest.raises(ValueError, match="rate must be"):
            video.write(tmp_path / "a.mkv", clip, rate=rate)
    for times in ((0, float("nan")), (0, float("inf")), (0, 1e9), (1, 0)):
        with pytest.raises(ValueError, match="times must rise"):
            video.write(tmp_path / "a.mkv", clip, times=times)
    with pytest.raises(ValueError, match=r"libx265 cannot encode frames of 1x2 .*: choose another container"):
        video.write(tmp_path / "a.mp4", clip[..., :2, :1], lossless=True, depth=10)
    assert leftovers(tmp_path) == []
