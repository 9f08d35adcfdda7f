"""Reading and writing clips with PyAV; a run's outputs appear under their names together, when all are complete."""

from __future__ import annotations

import contextlib
import os
import pathlib
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from zsvr_kernels.demo.clip import Clip
from zsvr_kernels.demo.metrics import quantize

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


def _reduced(picture: np.ndarray, longest: int | None) -> np.ndarray:
    """Return a picture ``[H, W, 3]`` area-averaged so that its longest side is at most ``longest``."""
    import cv2

    H, W = picture.shape[:2]
    if longest is None or max(H, W) <= longest:
        return picture
    size = tuple(max(1, round(side * longest / max(H, W))) for side in (W, H))
    return cv2.resize(picture, size, interpolation=cv2.INTER_AREA)


def _decode(path: pathlib.Path, limit: int | None, longest: int | None) -> tuple[list[np.ndarray], float]:
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} has no video stream")
            stream = container.streams.video[0]
            rate = float(stream.average_rate or 24)
            frames = []
            for frame in container.decode(stream):
                frames.append(_reduced(frame.to_ndarray(format="rgb24"), longest))
                if limit is not None and len(frames) >= limit:
                    break
    except av.FFmpegError as error:
        raise ValueError(f"{path} cannot be read as a video or picture: {error}") from error
    return frames, rate


def read_clip(path: pathlib.Path, limit: int | None = None, longest: int | None = None) -> Clip:
    """Read a video file, or a folder of pictures in the order of their names.

    Args:
        path: the file or folder.
        limit: read at most this many frames.
        longest: reduce larger frames by area averaging, so that their longest side is this many pixels.

    Raises:
        FileNotFoundError: there is nothing at ``path``.
        ValueError: nothing readable in it, or pictures of different sizes.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    rate = 8.0
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURES)
        if not files:
            raise ValueError(f"{path} holds no pictures ({', '.join(PICTURES)})")
        arrays = [_decode(file, 1, longest)[0][0] for file in files[:limit]]
    else:
        arrays, rate = _decode(path, limit, longest)
    if not arrays:
        raise ValueError(f"{path} holds no frames")
    if len({a.shape for a in arrays}) != 1:
        raise ValueError(f"frames of {path} differ in size: {sorted({a.shape[:2] for a in arrays})}")
    return Clip(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255, fps=rate)


def to_bytes(frames: Tensor) -> np.ndarray:
    """Return frames ``[T, 3, H, W]`` in [0, 1] as uint8 ``[T, H, W, 3]``."""
    rounded = (quantize(frames) * 255).round().to(torch.uint8)
    return np.ascontiguousarray(rounded.permute(0, 2, 3, 1).numpy())


def write_video(path: pathlib.Path, frames: np.ndarray, fps: float) -> None:
    """Write uint8 frames ``[T, H, W, 3]`` of even sides as H.264 that browsers play."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"crf": "10"}
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let Ctrl-C wait until the end of the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    pressed: list[object] = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append(1))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if pressed:
        signal.raise_signal(signal.SIGINT)


@contextlib.contextmanager
def results(out: pathlib.Path) -> Iterator[pathlib.Path]:
    """Give a folder to write results to; they move to ``out`` together if the block ends without an error."""
    had_folder = out.is_dir()
    out.mkdir(parents=True, exist_ok=True)
    staging = pathlib.Path(tempfile.mkdtemp(prefix=".partial-", dir=out))
    try:
        yield staging
        with _uninterrupted():
            for path in sorted(staging.iterdir()):
                os.replace(path, out / path.name)
            had_folder = True
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        if not had_folder:
            out.rmdir()
