"""Writing videos and folders of pictures: for viewing, or bit-exact; whole or not at all."""

from __future__ import annotations

import contextlib
import itertools
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from torch import Tensor

from zsvr.files import Path, check_free, new_file, new_folder
from zsvr.video import colour
from zsvr.video.reading import DEMUXERS, Sound

MILLION = 1_000_000
GIF_LEAST = 0.02  # seconds that a frame may last: players show what is shorter for 0.1
LONGEST = 10_000  # seconds, of other kinds: mp4 counts ticks in 31 bits, and reordering takes some of them


@dataclass(frozen=True)
class Encoding:
    """How frames become a stream: codec, pixel format, the codec's options; ``even``: sides are padded to even ones."""

    codec: str
    pixels: str
    options: dict[str, str] = field(default_factory=dict)
    even: bool = False


_X264 = {"crf": "10", "preset": "medium"}
_VP9 = {"crf": "10", "b": "0", "row-mt": "1"}
_MP4 = {
    (False, 8): Encoding("libx264", "yuv420p", _X264, even=True),
    (False, 10): Encoding("libx264", "yuv420p10le", _X264, even=True),
    (True, 8): Encoding("libx264rgb", "rgb24", {"qp": "0"}),
    (True, 10): Encoding("libx265", "gbrp10le", {"x265-params": "lossless=1:log-level=error"}),
}
_MKV = _MP4 | {(True, 8): Encoding("ffv1", "bgr0"), (True, 10): Encoding("ffv1", "gbrp10le")}
_WEBM = {
    (False, 8): Encoding("libvpx-vp9", "yuv420p", _VP9, even=True),
    (True, 8): Encoding("libvpx-vp9", "gbrp", {"lossless": "1"}),
}
_GIF = {(False, 8): Encoding("gif", "rgb8")}
CONTAINERS: dict[str, tuple[str, dict[tuple[bool, int], Encoding]]] = {
    ".mp4": ("mp4", _MP4),
    ".m4v": ("mp4", _MP4),
    ".mov": ("mov", _MP4),
    ".mkv": ("matroska", _MKV),
    ".webm": ("webm", _WEBM),
    ".gif": ("gif", _GIF),
}


def encodings() -> str:
    """Return what can be written, as a line per container."""
    lines = []
    for suffix, (_, table) in CONTAINERS.items():
        kinds = [f"{'lossless' if lossless else 'viewing'} {bits} bit" for lossless, bits in table]
        lines.append(f"{suffix}: {', '.join(kinds)}")
    return "\n".join([*lines, "a folder (no suffix): lossless 8 or 16 bit PNG"])


def _choose(path: pathlib.Path, lossless: bool, depth: int) -> tuple[str, Encoding]:
    if path.suffix.lower() not in CONTAINERS:
        raise ValueError(f"{path.name}: unknown kind of video {path.suffix!r}; known are\n{encodings()}")
    container, table = CONTAINERS[path.suffix.lower()]
    if (lossless, depth) not in table:
        kind = f"{'lossless' if lossless else 'viewing'} {depth} bit"
        raise ValueError(f"{path.name} cannot be {kind}; known are\n{encodings()}")
    return container, table[lossless, depth]


class _Watched:
    """A file for PyAV that remembers the first error: not every one comes back through FFmpeg."""

    def __init__(self, path: pathlib.Path) -> None:
        self._file = open(path, "wb+")  # noqa: SIM115
        self.error: BaseException | None = None

    def _watch(self, call: Any, *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except BaseException as error:
            self.error = self.error or error
            raise

    def write(self, data: bytes) -> int:
        return self._watch(self._file.write, data)

    def read(self, size: int) -> bytes:
        return self._watch(self._file.read, size)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return self._watch(self._file.seek, offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def flush(self) -> None:
        self._watch(self._file.flush)

    def close(self) -> None:
        self._file.close()


def _pictures(frames: Tensor | Iterable[Tensor]) -> Iterator[np.ndarray]:
    """Yield float pictures ``[3, H, W]`` of one size, from ``[3, H, W]`` or grey ``[1, H, W]`` tensors."""
    size = None
    for n, frame in enumerate(frames):
        if frame.dim() != 3 or frame.shape[0] not in (1, 3) or not frame.is_floating_point() or 0 in frame.shape:
            raise ValueError(
                f"frames must be floating [3, H, W] or [1, H, W] in [0, 1], frame {n} is {tuple(frame.shape)} of "
                f"{str(frame.dtype).removeprefix('torch.')}"
            )
        if size is not None and frame.shape[1:] != size:
            raise ValueError(f"frames must be of one size, got {tuple(size)}, then {tuple(frame.shape[1:])} at {n}")
        size = frame.shape[1:]
        picture = frame.detach().cpu().float().numpy()
        if not np.isfinite(picture).all():
            raise ValueError(f"frame {n} holds values that are not finite")
        yield np.broadcast_to(picture, (3, *picture.shape[1:]))
    if size is None:
        raise ValueError("there are no frames to write")


def check_target(path: Path, *, lossless: bool = False, depth: int = 8, overwrite: bool = False) -> pathlib.Path:
    """Return the path if `write` would take it, before there are frames to write.

    Raises:
        FileExistsError, FileNotFoundError: see `zsvr.files.check_free`. ValueError: an unknown kind of video, or one
            that cannot be written so.
    """
    target = check_free(path, overwrite=overwrite)
    if target.suffix:
        _choose(target, lossless, depth)
    return target


def _steps(times: Sequence[float] | None) -> list[float]:
    return [] if times is None else [b - a for a, b in itertools.pairwise(times)]


def _ticks(times: Sequence[float] | None) -> int:
    """Return how finely times are told, per second."""
    return MILLION if max(_steps(times), default=0) < 100 else 1000


def write(
    path: Path,
    frames: Tensor | Iterable[Tensor],
    *,
    rate: float | Fraction = 24,
    times: Sequence[float] | None = None,
    sound: Sound | None = None,
    lossless: bool = False,
    depth: int = 8,
    overwrite: bool = False,
) -> tuple[str, ...]:
    """Write frames as a video file, or (a name without suffix) as a folder of PNG.

    Args:
        path: .mp4, .mov, .m4v, .mkv, .webm, .gif, or a folder; see `encodings`.
        frames: floating ``[T, 3, H, W]`` or ``[T, 1, H, W]`` in [0, 1] (clipped), or an iterable of single ones, which
            is consumed as it is encoded. Levels are ``floor(u (2^depth - 1) + 0.5)``.
        rate: frames per second.
        times: seconds since the first frame, rising, where the rate is variable.
        sound: copied, not encoded again, where the container can hold it.
        lossless: RGB that reads back bit-exactly. Else H.264 or VP9 in BT.709, studio range, 4:2:0, for viewing:
            odd sides are padded to even ones by repeating the last column or row.
        depth: 8 or 10 bits per channel (a folder: 8 or 16).
        overwrite: replace what is at ``path``. It is replaced at once, when the new file is whole.

    Returns:
        Notes for the user: what of the sound was lost, padding, a GIF that plays slower.

    Raises:
        FileExistsError, FileNotFoundError: see `zsvr.files.check_free`.
        ValueError: frames or options that do not fit.
        OSError: writing failed, for instance on a full disk; nothing is left behind.
    """
    target = check_target(path, lossless=lossless, depth=depth, overwrite=overwrite)
    if not target.suffix:
        return write_pictures(target, frames, depth=depth, overwrite=overwrite)
    container, encoding = _choose(target, lossless, depth)
    if not 1e-4 <= float(rate) <= 1000:
        raise ValueError(f"rate must be within 0.0001..1000 frames per second, got {rate}")
    exact = Fraction(rate).limit_denominator(100_000)
    if not all(1 / _ticks(times) <= step * (1 + 1e-6) and step <= LONGEST for step in _steps(times)):
        raise ValueError(
            f"times must rise by a microsecond or more (a millisecond if a frame lasts minutes), and by {LONGEST} s at "
            "most, from frame to frame"
        )
    notes = []
    if container == "gif" and (least := min(_steps(times), default=1 / exact)) < GIF_LEAST * 0.999:
        notes.append(f"it plays slower: a GIF's frames last {GIF_LEAST} s or more, these {float(least):.3g} s")
        exact = min(exact, Fraction(round(1 / GIF_LEAST)))
        if times is not None:
            times = list(itertools.accumulate((max(step, GIF_LEAST) for step in _steps(times)), initial=0.0))
    with new_file(target, overwrite=overwrite) as partial:
        file = _Watched(partial)
        try:
            return (*notes, *_encode(file, container, encoding, _pictures(frames), exact, times, sound, depth))
        except BaseException as error:
            if file.error is not None and error is not file.error:
                raise file.error from error
            raise
        finally:
            with contextlib.suppress(OSError):
                file.close()


def _encode(
    file: _Watched,
    container: str,
    encoding: Encoding,
    pictures: Iterator[np.ndarray],  # each [3, H, W]
    rate: Fraction,
    times: Sequence[float] | None,
    sound: Sound | None,
    depth: int,
) -> tuple[str, ...]:
    import av

    first = next(pictures)
    height, width = first.shape[1:]
    notes = []
    if encoding.even and (height % 2 or width % 2):
        notes.append(f"padded from {width}x{height} to even sides")
        height, width = height + height % 2, width + width % 2
    output = av.open(file, "w", format=container, options={"fflags": "+bitexact"})  # else Matroska has random numbers
    try:
        stream: Any = output.add_stream(encoding.codec, rate=rate, options=encoding.options)
        stream.height, stream.width, stream.pix_fmt = height, width, encoding.pixels
        if encoding.codec == "libx265" and container in ("mp4", "mov"):
            stream.codec_context.codec_tag = "hvc1"
        if encoding.pixels.startswith("yuv"):
            context = stream.codec_context
            context.colorspace = context.color_primaries = context.color_trc = colour.BT709
            context.color_range = colour.STUDIO
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 100 if container == "gif" else _ticks(times))
        try:
            stream.codec_context.open()
        except av.FFmpegError as error:
            reason = f"{encoding.codec} cannot encode frames of {width}x{height} ({error.strerror})"
            raise ValueError(f"{reason}: choose another container") from error
        copy = contextlib.ExitStack()
        with copy:
            packets = _sound_packets(output, sound, copy, notes) if sound else iter(())
            waiting = next(packets, None)
            count = 0
            for count, picture in enumerate(itertools.chain((first,), pictures), 1):
                frame = _frame(picture, (height, width), encoding.pixels, depth)
                if times is None:
                    frame.pts, frame.time_base = count - 1, 1 / rate
                else:
                    if count > len(times):
                        raise ValueError(f"times are {len(times)}, frames more")
                    frame.time_base = stream.codec_context.time_base
                    frame.pts = round(times[count - 1] / frame.time_base)
                output.mux(stream.encode(frame))
                while waiting is not None and waiting.pts * waiting.time_base <= frame.pts * frame.time_base:
                    output.mux(waiting)
                    waiting = next(packets, None)
            output.mux(stream.encode())
            if waiting is not None:
                output.mux([waiting, *packets])
        if times is not None and count != len(times):
            raise ValueError(f"times are {len(times)}, frames {count}")
        output.close()
        file.flush()
        if file.error is not None:
            raise file.error
    except BaseException:
        with contextlib.suppress(Exception):
            output.close()
        raise
    return tuple(notes)


def _frame(picture: np.ndarray, size: tuple[int, int], pixels: str, depth: int) -> Any:
    """Return an av.VideoFrame in the encoder's pixel format of a picture ``[3, H, W]``."""
    import av

    pad = [(0, 0), (0, size[0] - picture.shape[1]), (0, size[1] - picture.shape[2])]
    if any(after for _, after in pad):
        picture = np.pad(picture, pad, mode="edge")
    if pixels.startswith("yuv"):
        return colour.to_luma_chroma(picture, depth)
    levels = colour.to_integers(picture, depth)
    if pixels.startswith("gbrp"):
        return av.VideoFrame.from_ndarray(levels, format=pixels)
    frame = av.VideoFrame.from_ndarray(levels, format="rgb24")
    return frame if pixels == "rgb24" else frame.reformat(format=pixels)


class _Nowhere:
    """A file for PyAV that forgets what is written."""

    def __init__(self) -> None:
        self.at = self.end = 0

    def write(self, data: bytes) -> int:
        self.at += len(data)
        self.end = max(self.end, self.at)
        return len(data)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.at, os.SEEK_END: self.end}[whence]
        return self.at

    def tell(self) -> int:
        return self.at


def _shifted_packets(sound: Sound, source: Any, copied: Any) -> Iterator[Any]:
    """Yield the packets of the sound's range for the stream ``copied``, shifted to start at 0."""
    for packet in source.demux(source.streams.audio[0]):
        if packet.dts is None or packet.pts is None:
            continue
        begin = float(packet.pts * packet.time_base)
        if begin < sound.start - 1e-3 or begin >= sound.stop - 1e-3:
            continue
        shift = round(sound.start / packet.time_base)
        packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
        packet.stream = copied
        yield packet


def _refusal(sound: Sound, container: str) -> str | None:
    """Return why a container cannot hold the sound, found by writing it nowhere, or None if it can."""
    import av

    with sound.path.open("rb") as file, av.open(file, options={"format_whitelist": DEMUXERS}) as source:
        original = source.streams.audio[0]
        if original.codec_context is None:
            return "its codec is unknown"
        try:
            with av.open(_Nowhere(), "w", format=container) as trial:
                for packet in _shifted_packets(sound, source, trial.add_stream_from_template(original)):
                    trial.mux(packet)
        except (av.FFmpegError, ValueError):
            return f"{container} cannot hold this {original.codec_context.codec.canonical_name}"
    return None


def _sound_packets(output: Any, sound: Sound, stack: contextlib.ExitStack, notes: list[str]) -> Iterator[Any]:
    """Return packets of the sound's range, shifted to start at 0, for a stream added to ``output``."""
    import av

    file = stack.enter_context(sound.path.open("rb"))
    source = stack.enter_context(av.open(file, options={"format_whitelist": DEMUXERS}))
    tracks = source.streams.audio
    if not tracks:
        notes.append(f"{sound.path} has no sound to copy")
        return iter(())
    if len(tracks) > 1:
        notes.append(f"of {len(tracks)} sound tracks the first was kept")
    refusal = _refusal(sound, output.format.name)
    if refusal:
        notes.append(f"the sound was dropped: {refusal}")
        return iter(())
    return _shifted_packets(sound, source, output.add_stream_from_template(tracks[0]))


def write_pictures(
    path: Path, frames: Tensor | Iterable[Tensor], *, depth: int = 8, first: int = 0, overwrite: bool = False
) -> tuple[str, ...]:
    """Write frames as a new folder of PNG files 00000.png, 00001.png, ..; the folder appears when all are written.

    Args:
        path: the folder; an existing one is replaced only on ``overwrite``, and if it holds nothing but pictures.
        frames: as in `write`.
        depth: 8 or 16 bits per channel.
        first: number of the first file.

    Returns:
        Notes: none.

    Raises:
        As `write`.
    """
    if depth not in (8, 16):
        raise ValueError(f"pictures have 8 or 16 bits per channel, got {depth}")
    with new_folder(path, overwrite=overwrite, replaceable=colour.PICTURES) as folder:
        for n, picture in enumerate(_pictures(frames), first):
            data = picture_bytes(picture, depth)
            with open(folder / f"{n:05d}.png", "wb") as file:
                file.write(data)
    return ()


def picture_bytes(picture: np.ndarray, depth: int = 8) -> bytes:
    """Return a picture ``[3, H, W]`` in [0, 1] as a PNG file of 8 or 16 bits per channel."""
    import av

    levels = colour.to_integers(picture, depth)
    name = "rgb24" if depth == 8 else "rgb48be"
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width, encoder.pix_fmt = *levels.shape[:2], name
    encoder.time_base = Fraction(1, 25)
    frame = av.VideoFrame.from_ndarray(levels, format=name)
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])
