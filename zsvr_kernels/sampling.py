"""Bilinear sampling on the token grid: the elementary functions that every definition here is built from.

Positions are ``(x, y)`` in pixels of the grid, pixel centres at integers; sites are row-major, ``p = y*Wg + x``.
"""

from __future__ import annotations

import torch
from torch import Tensor

Grid = tuple[int, int]  # (Hg, Wg)


def sites(grid: Grid, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """Return the positions of all sites, ``[P, 2]`` as (x, y)."""
    Hg, Wg = grid
    y, x = torch.meshgrid(
        torch.arange(Hg, dtype=dtype, device=device),
        torch.arange(Wg, dtype=dtype, device=device),
        indexing="ij",
    )
    return torch.stack((x, y), -1).reshape(Hg * Wg, 2)


def is_inside(positions: Tensor, grid: Grid) -> Tensor:
    """Return whether each position ``[..., 2]`` lies on the grid's area, half a pixel around its centres."""
    Hg, Wg = grid
    x, y = positions.unbind(-1)
    return (x >= -0.5) & (x <= Wg - 0.5) & (y >= -0.5) & (y <= Hg - 0.5)


def nearest_site(positions: Tensor, grid: Grid) -> Tensor:
    """Return the site (int64) nearest to each position ``[..., 2]``: halves round up, outside is clamped."""
    Hg, Wg = grid
    x, y = torch.floor(positions + 0.5).unbind(-1)
    x = x.nan_to_num(0.0).clamp(0, Wg - 1)
    y = y.nan_to_num(0.0).clamp(0, Hg - 1)
    return y.long() * Wg + x.long()


def bilinear_sample(x: Tensor, positions: Tensor, grid: Grid) -> Tensor:
    """Sample tokens bilinearly, clamping to the border.

    A corner of weight zero does not take part, so neighbours of an integer position may hold anything.

    Args:
        x: ``[N, P, C]`` floating.
        positions: ``[N, M, 2]`` (x, y). Its gradient is zero along an axis that was clamped.
        grid: ``(Hg, Wg)`` with ``Hg * Wg = P``.

    Returns:
        ``[N, M, C]`` of x's dtype.
    """
    Hg, Wg = grid
    N, _, C = x.shape
    px = positions[..., 0].clamp(0, Wg - 1)
    py = positions[..., 1].clamp(0, Hg - 1)
    left, top = px.detach().floor(), py.detach().floor()
    fx, fy = (px - left).to(x.dtype), (py - top).to(x.dtype)
    x0, y0 = left.nan_to_num(0.0).long(), top.nan_to_num(0.0).long()
    x1, y1 = (x0 + 1).clamp(max=Wg - 1), (y0 + 1).clamp(max=Hg - 1)

    def corner(column: Tensor, row: Tensor, weight: Tensor) -> Tensor:
        index = (row * Wg + column)[..., None].expand(-1, -1, C)
        value = x.gather(1, index) if N else x.new_zeros(index.shape)
        # The weight keeps its gradient even where it is zero: only the product is cut off NaN and inf.
        unused = (weight == 0)[..., None] & ~torch.isfinite(value)
        return weight[..., None] * value.masked_fill(unused, 0.0)

    return (
        corner(x0, y0, (1 - fx) * (1 - fy))
        + corner(x1, y0, fx * (1 - fy))
        + corner(x0, y1, (1 - fx) * fy)
        + corner(x1, y1, fx * fy)
    )


def warp(field: Tensor, displacement: Tensor) -> Tensor:
    """Warp backward: sample ``field`` where ``displacement`` points.

    Args:
        field: ``[N, C, Hc, Wc]``.
        displacement: ``[N, 2, Hc, Wc]`` (dx, dy) in pixels.

    Returns:
        ``[N, C, Hc, Wc]`` with ``result(p) = field(p + displacement(p))``.
    """
    N, C, Hc, Wc = field.shape
    grid = (Hc, Wc)
    where = sites(grid, dtype=displacement.dtype, device=field.device) + displacement.flatten(2).mT
    sampled = bilinear_sample(field.flatten(2).mT, where, grid)
    return sampled.mT.reshape(N, C, Hc, Wc)
