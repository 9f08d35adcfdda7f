"""The bundled sequence: a camera pan over a photograph with a second one moving in front, so flow is known."""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

PAN = (1.3, 0.55)  # background pixels per frame (x, y); the picture moves the other way
CUP = (-1.7, 0.4)  # foreground pixels per frame
SIZE, FRAMES = 96, 8


@dataclass(frozen=True)
class Clip:
    """A clean clip and what is known of its motion.

    Attributes:
        frames: float32 ``[T, 3, H, W]`` in [0, 1].
        flow_forward, flow_backward: exact flow ``[T-1, 2, H, W]`` (dx, dy) in pixels, or None.
        fps: frames per second.
    """

    frames: Tensor
    flow_forward: Tensor | None = None
    flow_backward: Tensor | None = None
    fps: float = 8.0


def _photograph(name: str) -> Tensor:
    from PIL import Image

    path = importlib.resources.files("zsvr_kernels.demo").joinpath("assets").joinpath(name)
    with path.open("rb") as file, Image.open(file) as image:
        pixels = np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _shifted(picture: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Sample ``picture [C, h, w]`` at pixel coordinates ``x, y [H, W]``, bicubically."""
    h, w = picture.shape[-2:]
    where = torch.stack((2 * x / (w - 1) - 1, 2 * y / (h - 1) - 1), -1)
    return F.grid_sample(picture[None], where[None], "bicubic", "border", align_corners=True)[0].clamp(0, 1)


def bundled_clip(size: int = SIZE, frames: int = FRAMES) -> Clip:
    """Return the bundled sequence with its exact flow: ``frames`` frames of ``size x size`` pixels."""
    background, cup = _photograph("cat.png"), _photograph("cup.png")
    y, x = torch.meshgrid(torch.arange(size).float(), torch.arange(size).float(), indexing="ij")
    half = torch.tensor((cup.shape[2], cup.shape[1])) / 2
    pictures, covers = [], []
    for t in range(frames):
        behind = _shifted(background, x + 40 + PAN[0] * t, y + 25 + PAN[1] * t)
        left, top = 0.5 * size + CUP[0] * t - 4, 0.42 * size + CUP[1] * t
        front = _shifted(cup, x - left, y - top)
        radius = ((x - left - half[0] + 0.5) / (half[0] - 1)) ** 2 + ((y - top - half[1] + 0.5) / (half[1] - 1)) ** 2
        # One pixel of transition at the rim, as a lens would give.
        alpha = ((1 - radius.sqrt()) * half.min() + 0.5).clamp(0, 1)
        pictures.append(alpha * front + (1 - alpha) * behind)
        covers.append(alpha > 0.5)
    still, moving = -torch.tensor(PAN)[:, None, None], torch.tensor(CUP)[:, None, None]
    forward = [torch.where(cover, moving, still) for cover in covers[:-1]]
    backward = [-torch.where(cover, moving, still) for cover in covers[1:]]
    return Clip(torch.stack(pictures), torch.stack(forward), torch.stack(backward))


def add_noise(frames: Tensor, sigma: float, seed: int = 0) -> Tensor:
    """Return frames in [0, 1] plus Gaussian noise of standard deviation ``sigma`` (not clipped)."""
    noise = np.random.default_rng(seed).standard_normal(tuple(frames.shape), dtype=np.float32)
    return frames + sigma * torch.from_numpy(noise)
