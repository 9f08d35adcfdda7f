"""Clips and files that the tests of videos share."""

from __future__ import annotations

import pathlib

import av
import torch


def noise(frames: int = 4, size: tuple[int, int] = (48, 64), bits: int = 8, channels: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    levels = torch.randint(0, 2**bits, (frames, channels, *size), generator=generator)
    return levels.float() / (2**bits - 1)


def smooth(frames: int, size: tuple[int, int]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(2)
    small = torch.rand(1, 3, 4, 4, generator=generator)
    picture = torch.nn.functional.interpolate(small, size, mode="bilinear", align_corners=False)
    return picture.expand(frames, -1, -1, -1)


def rgb(path: pathlib.Path, clip: torch.Tensor, kind: str | None = None, **options: str) -> None:
    """Write RGB H.264 in a container of its own kind, as other programs might."""
    with av.open(str(path), "w", format=kind, options=options) as output:
        stream = output.add_stream("libx264rgb", rate=24, options={"qp": "0", "bf": "0"})
        stream.height, stream.width, stream.pix_fmt = *clip.shape[2:], "rgb24"
        for frame in clip:
            levels = (frame * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy()
            output.mux(stream.encode(av.VideoFrame.from_ndarray(levels, format="rgb24")))
        output.mux(stream.encode())


def leftovers(folder: pathlib.Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())
