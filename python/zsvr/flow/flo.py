"""Middlebury .flo files: float32 202021.25, int32 width and height, then (dx, dy) per pixel; little-endian."""

from __future__ import annotations

import pathlib

import numpy as np
import torch
from torch import Tensor

from zsvr.files import Path, new_file, new_folder

FLO_MAGIC = 202021.25
FLO_UNKNOWN = 1e9  # larger values mark unknown flow


def read_flo(path: Path) -> Tensor:
    """Return the flow ``[2, H, W]`` of a Middlebury .flo file; unknown flow (above 1e9) is NaN.

    Raises:
        ValueError: it is no such file, or is cut off.
    """
    data = pathlib.Path(path).read_bytes()
    if len(data) < 12 or np.frombuffer(data, "<f4", 1)[0] != np.float32(FLO_MAGIC):
        raise ValueError(f"{path} is no .flo file: it does not begin with {FLO_MAGIC} as float32")
    width, height = (int(x) for x in np.frombuffer(data, "<i4", 2, 4))
    if not (0 < width < 100_000 and 0 < height < 100_000) or len(data) != 12 + 8 * width * height:
        raise ValueError(f"{path} says {width}x{height}, which takes {12 + 8 * width * height} bytes, has {len(data)}")
    flow = np.frombuffer(data, "<f4", offset=12).reshape(height, width, 2).transpose(2, 0, 1).astype(np.float32)
    return torch.from_numpy(np.where(np.abs(flow).max(0) > FLO_UNKNOWN, np.float32("nan"), flow))


def write_flo(path: Path, flow: Tensor, *, overwrite: bool = False) -> None:
    """Write a flow ``[2, H, W]`` as a Middlebury .flo file; what is not finite becomes the mark of unknown flow."""
    if flow.dim() != 3 or flow.shape[0] != 2:
        raise ValueError(f"flow must be [2, H, W], got {tuple(flow.shape)}")
    values = flow.detach().cpu().float()
    values = torch.where(torch.isfinite(values).all(0), values, values.new_tensor(1.6666667e9))
    header = np.array([FLO_MAGIC], "<f4").tobytes() + np.array([flow.shape[2], flow.shape[1]], "<i4").tobytes()
    with new_file(path, overwrite=overwrite) as partial:
        partial.write_bytes(header + values.permute(1, 2, 0).numpy().astype("<f4").tobytes())


def write_flow(folder: Path, forward: Tensor, backward: Tensor) -> None:
    """Write flows ``[T-1, 2, H, W]`` of a clip as a new folder, in the layout that the estimator "given" reads."""
    with new_folder(folder) as staging:
        for n, pair in enumerate(zip(forward, backward, strict=True)):
            for direction, flow in zip(("forward", "backward"), pair, strict=True):
                write_flo(staging / f"{direction}_{n:05d}.flo", flow)
