"""Reading and writing clips with PyAV; outputs appear under their name only when complete."""

from __future__ import annotations

import os
import pathlib
from fractions import Fraction

import numpy as np
import torch
from torch import Tensor

from zsvr_kernels.demo.clip import Clip

PICTURES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp")


def _decode(path: pathlib.Path, limit: int | None) -> tuple[list[np.ndarray], float]:
    import av

    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} has no video stream")
            stream = container.streams.video[0]
            rate = float(stream.average_rate or 24)
            frames = []
            for frame in container.decode(stream):
                frames.append(frame.to_ndarray(format="rgb24"))
                if limit is not None and len(frames) >= limit:
                    break
    except av.FFmpegError as error:
        raise ValueError(f"{path} cannot be read as a video or picture: {error}") from error
    return frames, rate


def read_clip(path: pathlib.Path, limit: int | None = None) -> Clip:
    """Read a video file, or a folder of pictures in the order of their names.

    Args:
        path: the file or folder.
        limit: read at most this many frames.

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
        arrays = [_decode(file, 1)[0][0] for file in files[:limit]]
    else:
        arrays, rate = _decode(path, limit)
    if not arrays:
        raise ValueError(f"{path} holds no frames")
    if len({a.shape for a in arrays}) != 1:
        raise ValueError(f"frames of {path} differ in size: {sorted({a.shape[:2] for a in arrays})}")
    return Clip(torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255, fps=rate)


def to_bytes(frames: Tensor) -> np.ndarray:
    """Return frames ``[T, 3, H, W]`` in [0, 1] as uint8 ``[T, H, W, 3]``."""
    rounded = torch.floor(frames.clamp(0, 1) * 255 + 0.5).to(torch.uint8)
    return np.ascontiguousarray(rounded.permute(0, 2, 3, 1).numpy())


def write_video(path: pathlib.Path, frames: np.ndarray, fps: float) -> None:
    """Write uint8 frames ``[T, H, W, 3]`` of even sides as H.264 that browsers play; replaces the file at once."""
    import av

    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        with av.open(str(partial), "w") as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            stream.options = {"crf": "10"}
            for frame in frames:
                container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
            container.mux(stream.encode())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: pathlib.Path, text: str) -> None:
    """Write a text file; it replaces an older one at once."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text)
    os.replace(partial, path)
