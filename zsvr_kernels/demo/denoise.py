"""Denoising by attention over patch tokens: non-local means written with the package's operators.

Every pixel is a token: its 5x5 patch. With k = (patch, -|patch|^2) and q = (2 patch, 1) the product q.k is, up to a
constant per query, minus the squared distance of the patches, so softmax attention is non-local means. Values are
patches too; where they overlap they are averaged.

* ``spatial``: every frame attends to itself.
* ``cross-frame``: and to both neighbours (`cross_frame_attention`).
* ``both``: the serial combination: `trajectory_attention` along optical flow over a window of frames, with the q and k
  of the noisy clip, and the cross-frame result as its value. Flow is estimated on the cross-frame result, in which
  noise no longer hides motion.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import zsvr_kernels as zk

PATCH = 5
RADIUS = PATCH // 2
CHANNELS = 3 * PATCH * PATCH + 1
DIM = -(-CHANNELS // 8) * 8  # head dims are multiples of 8
TILE, OVERLAP = 96, 16
WINDOW = 3  # frames to either side in the trajectory step
CHUNK = 12  # frames restored together in long clips

METHODS = ("spatial", "cross-frame", "both")


@dataclass(frozen=True)
class Bandwidths:
    """Squared patch distance, in units of ``sigma^2 * 75``, at which a weight falls to 1/e.

    The defaults come from the bundled clip at sigma 25/255 alone (``--sweep`` repeats the search). Those of
    ``spatial`` and ``cross-frame`` have the best PSNR. Those of ``both`` give up 0.2 dB of theirs: a cross-frame width
    of 0.3 for 0.25 leaves less noise in flat parts and a warping error a third lower; and a trajectory width of 8,
    because the clip's flow is nearly right everywhere, so that it gains from ever wider ones, which elsewhere let wrong
    flow through.
    """

    spatial: float = 0.5
    cross_frame: float = 0.45
    before_trajectory: float = 0.3  # the cross-frame step of "both"
    trajectory: float = 8.0


def patches(frames: Tensor) -> Tensor:
    """Return the patch around every pixel, ``[T, 3, H, W]`` -> ``[T, H*W, 75]``; borders are mirrored."""
    padded = F.pad(frames - 0.5, (RADIUS,) * 4, mode="reflect")
    return F.unfold(padded, PATCH).mT


def tokens(x: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
    """Return ``q, k [1, T, P, 1, D]`` from patches ``[T, P, 75]``, for logits ``-distance^2 / bandwidth``."""
    T, P, C = x.shape
    q, k = x.new_zeros(2, 1, T, P, 1, DIM).unbind(0)
    q[0, :, :, 0, :C] = x * (2 / bandwidth)
    q[0, :, :, 0, C] = 1 / bandwidth
    k[0, :, :, 0, :C] = x
    k[0, :, :, 0, C] = -x.square().sum(-1)
    return q, k


def values(x: Tensor) -> Tensor:
    """Return patches ``[T, P, 75]`` as values ``[1, T, P, 1, D]``."""
    return F.pad(x, (0, DIM - x.shape[-1]))[None, :, :, None]


def fold(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Average overlapping patches, ``[1, T, P, 1, D]`` -> frames ``[T, 3, H, W]``."""
    inside = x[0, :, :, 0, : CHANNELS - 1].mT
    padded = (size[0] + 2 * RADIUS, size[1] + 2 * RADIUS)
    total = F.fold(inside, padded, PATCH)
    count = F.fold(torch.ones_like(inside[:1]), padded, PATCH)
    crop = slice(RADIUS, RADIUS + size[0]), slice(RADIUS, RADIUS + size[1])
    return (total / count)[..., crop[0], crop[1]] + 0.5


def optical_flow(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Return DIS flow ``[T-1, 2, H, W]`` forward and backward of frames ``[T, 3, H, W]`` in [0, 1]."""
    import cv2

    weights = torch.tensor((0.299, 0.587, 0.114))[:, None, None]
    luma = ((frames * weights).sum(1).clamp(0, 1) * 255).round().to(torch.uint8).numpy()
    luma = np.ascontiguousarray(luma)
    if min(luma.shape[1:]) < 16:
        raise ValueError(f"optical flow needs frames of at least 16x16 pixels, got {luma.shape[1:]}")
    dis = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)

    def flow(source: np.ndarray, target: np.ndarray) -> np.ndarray:
        return dis.calc(source, target, np.zeros((*source.shape, 2), np.float32))

    forward = [flow(a, b) for a, b in pairwise(luma)]
    backward = [flow(b, a) for a, b in pairwise(luma)]

    def stack(flows: list[np.ndarray]) -> Tensor:
        if not flows:
            return torch.zeros(0, 2, *frames.shape[2:])
        return torch.from_numpy(np.stack(flows)).permute(0, 3, 1, 2).contiguous()

    return stack(forward), stack(backward)


def cross_frame_step(noisy: Tensor, frames: Tensor, bandwidth: float, backend: str = "auto") -> Tensor:
    """Restore ``noisy [T, 3, H, W]`` by attention over the frames of a table."""
    x = patches(noisy)
    q, k = tokens(x, bandwidth)
    out = zk.cross_frame_attention(q, k, values(x), frames, scale=1.0, backend=backend)
    return fold(out, (noisy.shape[2], noisy.shape[3]))


def trajectory_step(
    noisy: Tensor,  # [T, 3, H, W]
    restored: Tensor,  # [T, 3, H, W]
    flows: tuple[Tensor, Tensor],  # [T-1, 2, H, W] each
    bandwidth: float,
    window: int = WINDOW,
    backend: str = "auto",
) -> Tensor:
    """Restore by attention along the trajectories of flow: weights from ``noisy``, values from ``restored``."""
    size = (noisy.shape[2], noisy.shape[3])
    q, k = tokens(patches(noisy), bandwidth)
    links = zk.Links.from_flow(flows[0][None], flows[1][None], grid=size)
    trajectories = zk.chain_links(links, window=min(window, len(noisy) - 1), backend=backend)
    out = zk.trajectory_attention(q, k, values(patches(restored)), trajectories, scale=1.0, backend=backend)
    return fold(out, size)


def _tiles(size: int) -> list[tuple[int, int]]:
    """Return overlapping ranges that cover ``size`` pixels."""
    if size <= TILE:
        return [(0, size)]
    starts = [*range(0, size - TILE, TILE - OVERLAP), size - TILE]
    return [(start, start + TILE) for start in starts]


def _chunks(T: int) -> Iterator[tuple[slice, slice]]:
    """Yield (frames to read, frames of those to keep) so that memory does not grow with the clip."""
    for begin in range(0, T, CHUNK):
        end = min(begin + CHUNK, T)
        first, last = max(begin - WINDOW, 0), min(end + WINDOW, T)
        yield slice(first, last), slice(begin - first, end - first)


def _by_tiles(frames: Tensor, restore: Callable[[Tensor, slice, slice], Tensor]) -> Tensor:
    """Restore tile by tile and average where tiles overlap."""
    total, count = torch.zeros_like(frames), torch.zeros_like(frames[:, :1])
    for top, bottom in _tiles(frames.shape[2]):
        for left, right in _tiles(frames.shape[3]):
            rows, columns = slice(top, bottom), slice(left, right)
            total[..., rows, columns] += restore(frames[..., rows, columns], rows, columns)
            count[..., rows, columns] += 1
    return total / count


def work(shape: tuple[int, ...], methods: tuple[str, ...] = METHODS) -> int:
    """Return how often `denoise` will call its progress function for frames of this shape."""
    tiles = len(_tiles(shape[2])) * len(_tiles(shape[3]))
    steps = sum(2 if method == "both" else 1 for method in methods)
    return steps * tiles * sum(1 for _ in _chunks(shape[0]))


def denoise(
    noisy: Tensor,
    sigma: float,
    method: str,
    bandwidths: Bandwidths | None = None,
    *,
    backend: str = "auto",
    progress: Callable[[], object] = lambda: None,
) -> Tensor:
    """Denoise a clip with one of `METHODS`.

    Args:
        noisy: ``[T, 3, H, W]``, clean values in [0, 1]; at least 16x16 pixels.
        sigma: standard deviation of the noise, same units.
        method: ``"spatial"``, ``"cross-frame"`` or ``"both"``.
        bandwidths: None means the committed ones.
        backend: passed to the operators.
        progress: called after every tile of every step.

    Returns:
        The restored clip, ``[T, 3, H, W]``.

    Raises:
        ValueError: an unknown method, a sigma that is not positive.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if not sigma > 0:
        raise ValueError(f"sigma must be positive, got {sigma}")
    widths = bandwidths or Bandwidths()
    unit = sigma * sigma * (CHANNELS - 1)
    restored = []
    for read, keep in _chunks(len(noisy)):
        part = noisy[read]
        T = len(part)
        if method == "spatial":
            table, width = zk.neighbors(T, (0,)), widths.spatial
        else:
            table = zk.neighbors(T, (-1, 1), include_self=True, border="drop")
            width = widths.cross_frame if method == "cross-frame" else widths.before_trajectory

        def short(x: Tensor, rows: slice, columns: slice, table: Tensor = table, width: float = width) -> Tensor:
            out = cross_frame_step(x, table, width * unit, backend)
            progress()
            return out

        result = _by_tiles(part, short)
        if method == "both" and T > 1:
            flows = optical_flow(result)

            def long(
                x: Tensor, rows: slice, columns: slice, part: Tensor = part, flows: tuple[Tensor, Tensor] = flows
            ) -> Tensor:
                cut = (flows[0][..., rows, columns], flows[1][..., rows, columns])
                noise = part[..., rows, columns]
                out = trajectory_step(noise, x, cut, widths.trajectory * unit, backend=backend)
                progress()
                return out

            result = _by_tiles(result, long)
        restored.append(result[keep])
    return torch.cat(restored)
