"""Reading videos and folders of pictures: whole, by range, or frame by frame."""

from __future__ import annotations

import errno
import os
import pathlib
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zsvr.files import Path
from zsvr.video import colour, endings

# What may be opened: no playlists, which would lead to other files or to the network.
DEMUXERS = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpeg,mpegts,ogg,flv,asf,y4m,yuv4mpegpipe,ivf,nut,mxf,"
    "png_pipe,jpeg_pipe,bmp_pipe,tiff_pipe,webp_pipe,webp,apng"
)
FOLDER_RATE = Fraction(24)
VARIABLE = 0.2  # spacing may differ this much from the median, frames be half a frame (or 2 ms) off an even rate


class TruncatedVideoError(ValueError):
    """A video ends before it should.

    Attributes:
        readable: frames that can be read.
    """

    def __init__(self, message: str, readable: int) -> None:
        super().__init__(message)
        self.readable = readable


class Frame(NamedTuple):
    """A frame ``picture [3, H, W]``, float32 in [0, 1], and its time in seconds in the file (None in a folder)."""

    picture: Tensor
    time: float | None


@dataclass(frozen=True)
class Sound:
    """Where the sound of some frames is: seconds ``start`` to ``stop`` of ``path``."""

    path: pathlib.Path
    start: float
    stop: float


@dataclass(frozen=True)
class VideoInfo:
    """What a video says of itself before it is decoded.

    Attributes:
        path: the file or folder.
        width, height: of upright frames, in pixels.
        frames: their number if known; files often do not say, or lie.
        rate: frames per second (a folder: 24).
        depth: bits per channel.
        matrix: colour matrix used for Y'CbCr, "rgb" where there is none.
        has_alpha, has_sound, is_folder: what the names say. ``rotation`` is done by the reader, counterclockwise.
    """

    path: pathlib.Path
    width: int
    height: int
    frames: int | None
    rate: Fraction
    depth: int
    matrix: str
    has_alpha: bool
    has_sound: bool
    is_folder: bool
    rotation: int

    def nbytes(self, start: int = 0, stop: int | None = None) -> int | None:
        """Return the bytes that `read` needs for a range of frames as float32, None if their number is not known."""
        if stop is None and self.frames is None:
            return None
        last = min(x for x in (stop, self.frames) if x is not None)
        return 12 * self.width * self.height * max(0, last - start)


@dataclass(frozen=True, eq=False)
class Video:
    """Frames of a video in memory.

    Attributes:
        frames: float32 ``[T, 3, H, W]`` in [0, 1].
        rate: frames per second; of a variable rate: the mean.
        times: seconds since the first of these frames, where the rate is variable; else None.
        depth: bits per channel in the file.
        sound: where the sound of these frames is, or None.
        notes: what a user should know: alpha dropped, frames missing, pixels not square.
    """

    frames: Tensor
    rate: Fraction
    times: tuple[float, ...] | None = None
    depth: int = 8
    sound: Sound | None = None
    notes: tuple[str, ...] = ()


def _natural(path: pathlib.Path) -> list[Any]:
    return [(int(part), part) if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]


def pictures(folder: pathlib.Path) -> list[pathlib.Path]:
    """Return the pictures of a folder; numbers in names count as numbers, so 2.png comes before 10.png.

    Raises:
        ValueError: there are none.
    """
    found = [p for p in folder.iterdir() if p.suffix.lower() in colour.PICTURES and not p.name.startswith(".")]
    if not found:
        raise ValueError(f"{folder} holds no pictures ({', '.join(colour.PICTURES)})")
    return sorted(found, key=_natural)


class _Unnamed:
    """A file for PyAV that keeps its name to itself: FFmpeg would take some names for patterns of other files."""

    def __init__(self, file: BinaryIO) -> None:
        self.read, self.seek, self.tell = file.read, file.seek, file.tell


class _Source:
    """An open video file or picture; use as a context manager."""

    def __init__(self, path: pathlib.Path) -> None:
        import av

        self.path = path
        self.container: Any
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for, a device never ends
            raise ValueError(f"{path} is no regular file: a video or picture is read from one")
        size = status.st_size
        self._file = open(path, "rb")  # noqa: SIM115
        try:
            beginning = self._file.read(6)
            self._is_jpeg = beginning.startswith(endings.JPEG)  # FFmpeg does not know a large one by its beginning
            self._file.seek(0)
            kind = "jpeg_pipe" if self._is_jpeg else None
            self.container = av.open(_Unnamed(self._file), format=kind, options={"format_whitelist": DEMUXERS})
        except BaseException as error:
            self._file.close()
            is_seek = isinstance(error, OSError) and error.errno == errno.EINVAL  # to before the start of a tiny file
            if not isinstance(error, (av.FFmpegError, ValueError)) and not is_seek:
                raise
            raise ValueError(
                f"{path} ({size} bytes) cannot be read as a video or picture ({type(error).__name__}): it is "
                "another kind of file, or its beginning or index is missing (an mp4 whose recording was cut off has "
                "none)"
            ) from error
        streams = [s for s in self.container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not streams or not streams[0].codec_context:
            kinds = ", ".join(s.type for s in self.container.streams) or "no streams"
            self.close()
            raise ValueError(f"{path} has no video stream: it holds {kinds}")
        self.stream = streams[0]
        self.mirroring = 0
        self._whole: int | None = None  # frames of a file that ends early
        if beginning.startswith(endings.GIF):
            self._whole = endings.whole_gif_frames(path.read_bytes())
        self._is_picture = self.container.format.name.endswith("_pipe")
        if self._is_picture:
            data = path.read_bytes()
            self.mirroring = colour.exif_mirroring(data)
            if self._is_jpeg:  # what is missing would be grey, unheard
                self._whole = 0 if endings.jpeg_ends_early(data) else None
                self.stream.codec_context.options = {"err_detect": "explode"}

    def __enter__(self) -> _Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.container.close()
        self._file.close()

    @property
    def rate(self) -> Fraction:
        found = self.stream.average_rate or self.stream.guessed_rate
        return Fraction(found) if found and 0 < found < 10000 else FOLDER_RATE

    def declared(self) -> int | None:
        """Return how many frames the file says it has: counted by the container, or by duration; a picture: 1."""
        if self._is_picture:
            return 1
        if self.stream.frames:
            return int(self.stream.frames)
        seconds = self.duration()
        return None if seconds is None else max(1, round(seconds * self.rate))

    def duration(self) -> float | None:
        """Return the seconds the video stream says it lasts; Matroska's count from the start of the file, not its own.

        Such a stream that begins late may therefore seem longer than it is.
        """
        if self.stream.duration and self.stream.time_base:
            return float(self.stream.duration * self.stream.time_base)
        match = re.fullmatch(r"(\d+):(\d+):(\d+(?:\.\d+)?)", self.stream.metadata.get("DURATION", ""))
        return None if match is None else sum(float(x) * s for x, s in zip(match.groups(), (3600, 60, 1), strict=True))

    def points_beyond_the_end(self) -> bool:
        """Return whether the index, or the length that the file says it has, names bytes that it does not have."""
        if self.container.format.name.startswith("matroska") and endings.matroska_ends_early(self.path):
            return True
        size = self.path.stat().st_size
        entries = self.stream.index_entries
        return any(entry.pos + entry.size > size for entry in entries)

    def decode(self) -> Iterator[Any]:
        """Yield decoded frames until the file ends or cannot be decoded; sets ``self.fault`` in that case."""
        import av

        self.fault: str | None = None
        count = 0
        try:
            for packet in self.container.demux(self.stream):
                for frame in packet.decode():
                    if frame.is_corrupt or count == self._whole:
                        self.fault = "a damaged frame" if frame.is_corrupt else "its end is missing"
                        return
                    count += 1
                    yield frame
                    if self._is_jpeg:  # others may follow: a thumbnail, another view
                        return
        except av.FFmpegError as error:
            self.fault = f"{error.__class__.__name__}"
        if count == self._whole:
            self.fault = "its end is missing"


def probe(path: Path) -> VideoInfo:
    """Return what a video file or folder of pictures says of itself; one frame is decoded.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: it is no video, or has no frames.
    """
    source = pathlib.Path(path)
    if not source.exists():
        raise FileNotFoundError(f"there is no file or folder {source}")
    files = pictures(source) if source.is_dir() else [source]
    with _Source(files[0]) as opened:
        first = next(opened.decode(), None)
        if first is None:
            raise ValueError(f"{files[0]} holds no frames that can be decoded ({opened.fault or 'zero frames'})")
        turned = bool(first.rotation) and round(first.rotation / 90) % 2
        is_luma_chroma = colour.is_luma_chroma(first.format)
        return VideoInfo(
            path=source,
            width=first.height if turned else first.width,
            height=first.width if turned else first.height,
            frames=len(files) if source.is_dir() else opened.declared(),
            rate=FOLDER_RATE if source.is_dir() else opened.rate,
            depth=colour.depth(first.format),
            matrix=colour.NAMES[colour.matrix(first.colorspace, first.height)] if is_luma_chroma else "rgb",
            has_alpha=colour.has_alpha(first.format),
            has_sound=bool(opened.container.streams.audio),
            is_folder=source.is_dir(),
            rotation=int(first.rotation or 0),
        )


def _check_range(start: int, stop: int | None) -> None:
    if start < 0 or (stop is not None and stop <= start):
        raise ValueError(f"a range of frames needs 0 <= start < stop, got start = {start}, stop = {stop}")


class _Decoding:
    """Pictures of a source in order, from ``start`` on, with what was learnt on the way."""

    def __init__(self, path: Path, start: int, stop: int | None, allow_truncated: bool) -> None:
        _check_range(start, stop)
        self.info = probe(path)
        self.start, self.stop, self.allow_truncated = start, stop, allow_truncated
        self.notes: list[str] = []
        if stop is not None and self.info.is_folder and self.info.frames is not None and stop > self.info.frames:
            raise ValueError(f"{self.info.path} holds {self.info.frames} pictures, so stop = {stop} is too far")

    def _frames(self) -> Iterator[Any]:
        """Yield av.VideoFrame of the whole source up to ``stop``."""
        if self.info.is_folder:
            for file in pictures(self.info.path)[: self.stop]:
                with _Source(file) as source:
                    frame = next(source.decode(), None)
                    if frame is None:
                        raise ValueError(f"{file} cannot be decoded ({source.fault or 'it holds no picture'})")
                    self._mirroring = source.mirroring
                    yield frame
            return
        found, last = 0, None
        with _Source(self.info.path) as source:
            self._mirroring = source.mirroring
            self._note_shape(source)
            for frame in source.decode():
                if found == self.stop:
                    return
                found, last = found + 1, frame
                yield frame
            missing = self._missing(source, last)
            if self.stop is not None and found == self.stop:
                return
        if missing:
            declared = f", {self.info.frames} were declared" if (self.info.frames or 0) > found else ""
            message = f"{self.info.path} ends early or is damaged ({missing}): {found} frames can be read{declared}"
            if not self.allow_truncated:
                advice = f"read those with stop={found} or allow_truncated=True, or get the whole file again"
                raise TruncatedVideoError(f"{message}; {advice}", found)
            self.notes.append(message)
        elif self.stop is not None:
            raise ValueError(f"{self.info.path} holds {found} frames, so stop = {self.stop} is too far")

    def _note_shape(self, source: _Source) -> None:
        ratio = source.stream.sample_aspect_ratio
        if ratio and ratio != 1:
            self.notes.append(f"pixels are not square ({ratio}) and are kept so")

    def _missing(self, source: _Source, last: Any) -> str | None:
        """Return what shows that the file is not whole, given its last decoded frame."""
        if source.fault:
            return source.fault
        if source.points_beyond_the_end():
            return "it names bytes beyond its end"
        seconds, begin = source.duration(), source.stream.start_time
        if source.stream.frames or seconds is None or begin is None or last is None or last.time is None:
            return None
        # Containers without a count of frames: how long the stream says it is.
        shown = max(float(1 / source.rate), float((last.duration or 0) * (last.time_base or 0)))
        end = last.time + shown - (float(begin * source.stream.time_base) if source.stream.duration else 0)
        return f"it ends at {end:.2f} of {seconds:.2f} s" if seconds - end > 2.5 / source.rate else None

    def __iter__(self) -> Iterator[tuple[np.ndarray, float | None, float | None]]:
        """Yield pictures ``[3, H, W]``, float32, their time, and when they end."""
        size = (self.info.height, self.info.width)
        n = -1
        for n, frame in enumerate(self._frames()):
            if n < self.start:
                continue
            picture = colour.to_rgb(frame, self._mirroring)
            if picture.shape[1:] != size:
                name = pictures(self.info.path)[n].name if self.info.is_folder else f"frame {n}"
                got = f"{picture.shape[2]}x{picture.shape[1]}"
                raise ValueError(
                    f"frames of {self.info.path} differ in size: {name} is {got}, the first {size[1]}x{size[0]}; "
                    "scale or sort them first"
                )
            if n == self.start and frame.interlaced_frame:
                self.notes.append("frames are interlaced and are not deinterlaced")
            if not any("transparen" in note for note in self.notes) and colour.alpha_is_used(frame):
                self.notes.append("transparency was dropped")
            time = None if self.info.is_folder or frame.time is None else float(frame.time)
            lasts = float(frame.duration * frame.time_base) if frame.duration and frame.time_base else None
            yield picture, time, None if time is None else time + (lasts or float(1 / self.info.rate))
        if n < self.start:
            raise ValueError(f"{self.info.path} holds {n + 1} frames, so start = {self.start} is too far")


def stream(path: Path, start: int = 0, stop: int | None = None, *, allow_truncated: bool = False) -> Iterator[Frame]:
    """Yield the frames of a video or folder one by one, from ``start`` up to but without ``stop``.

    Frames before ``start`` are decoded too, since files cannot be entered at any frame exactly.

    Args:
        path: a video file (mp4, mkv, webm, gif and others), a picture, or a folder of pictures of one size, whose
            names give the order.
        start, stop: the range; None: to the end.
        allow_truncated: end where a damaged file ends, instead of raising.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        TruncatedVideoError: the file ends early, raised after the last frame that can be read.
        ValueError: no video, no frames, sizes that differ, a range beyond the end.
    """
    decoding = _Decoding(path, start, stop, allow_truncated)

    def frames() -> Iterator[Frame]:
        for picture, time, _ in decoding:
            yield Frame(torch.from_numpy(picture), time)

    return frames()


def read(
    path: Path,
    start: int = 0,
    stop: int | None = None,
    *,
    allow_truncated: bool = False,
    max_bytes: int | None = None,
) -> Video:
    """Read frames of a video or folder into memory; see `stream` for the arguments and errors.

    Args:
        max_bytes: refuse before decoding if the frames need more (`VideoInfo.nbytes`); None: this machine's memory.

    Raises:
        MemoryError: the frames need more than that; says how much, and what fits.
    """
    decoding = _Decoding(path, start, stop, allow_truncated)
    info = decoding.info
    limit = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if max_bytes is None else max_bytes
    needed = info.nbytes(start, stop)
    each = 12 * info.width * info.height
    fits = limit // each
    if (each if needed is None else needed) > limit:
        what = "a frame" if needed is None else f"frames {start} to {info.frames if stop is None else stop}"
        advice = f"read a range (stop={start + fits} fits)" if fits else "scale them first"
        raise MemoryError(
            f"{info.path}: {what} of {info.width}x{info.height} need {(needed or each) / 1e9:.2f} GB as float32, more "
            f"than {limit / 1e9:.2f} GB: {advice}"
        )
    count = min(64 if needed is None else needed // each, fits)
    frames = torch.empty(max(1, count), 3, info.height, info.width)
    times: list[float | None] = []
    end = None
    for picture, time, end in decoding:  # noqa: B007
        if len(times) == len(frames):  # the file has more than it says
            more = min(len(frames), fits - len(frames))
            if more < 1:
                raise MemoryError(
                    f"{info.path}: more than {len(frames)} frames of {info.width}x{info.height} need more than "
                    f"{limit / 1e9:.2f} GB as float32: read a range (stop={start + len(frames)} fits)"
                )
            frames = torch.cat((frames, frames.new_empty(more, *frames.shape[1:])))
        frames[len(times)] = torch.from_numpy(picture)
        times.append(time)
    frames = frames[: len(times)]
    known = [t for t in times if t is not None]
    rate, variable = _timing(known if len(known) == len(times) else [], info.rate)
    sound = None
    if info.has_sound and known:
        n = next(n for n, time in enumerate(times) if time is not None)  # MPEG files do not give every frame its time
        begin = known[0] - float(n / rate)
        sound = Sound(info.path, begin, begin + float(len(times) / rate) if end is None else end)
    notes = list(decoding.notes)
    if info.has_sound and sound is None:
        notes.append("the sound was dropped: nothing says when these frames are shown")
    if variable:
        notes.append(f"frames are not evenly spaced; their times are kept, {float(rate):.3f} per second on average")
    return Video(frames, rate, variable, info.depth, sound, tuple(notes))


def _timing(times: list[float], rate: Fraction) -> tuple[Fraction, tuple[float, ...] | None]:
    """Return the frame rate, and times since the first frame if they are not evenly spaced."""
    if len(times) < 2:
        return rate, None
    steps = np.diff(times)
    if steps.min() <= 0:  # times that do not rise say nothing
        return rate, None
    typical = float(np.median(steps))
    mean = (times[-1] - times[0]) / (len(times) - 1)
    drift = np.abs(times[0] + mean * np.arange(len(times)) - times).max()
    if np.abs(steps - typical).max() > max(VARIABLE * typical, 0.002) or drift > max(typical / 2, 0.002):
        return _rate(mean), tuple(t - times[0] for t in times)
    if abs(mean * rate - 1) * (len(times) - 1) > 0.5:  # the last frame would be shown half a frame off
        rate = _rate(mean)
    return rate, None


def _rate(seconds: float) -> Fraction:
    """Return a rate by the seconds between frames; those of minutes too."""
    return (
        Fraction(1 / seconds).limit_denominator(1001) if seconds < 1 else 1 / Fraction(seconds).limit_denominator(1001)
    )
