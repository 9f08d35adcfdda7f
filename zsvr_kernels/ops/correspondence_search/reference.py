"""Correspondence search in plain PyTorch: the definition the kernel is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from zsvr_kernels.sampling import Grid, bilinear_sample

SMALLEST_NORM = 1e-6


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _length(x: Tensor) -> Tensor:  # [..., C] -> [...]
    return torch.linalg.vector_norm(x, dim=-1).clamp(min=SMALLEST_NORM)


def correspondence_search_reference(
    f_src: Tensor,  # [N, P, C]
    f_dst: Tensor,  # [N, P, C]
    centre: Tensor,  # int32 [N, P, 2]
    grid: Grid,
    radius: int,
) -> tuple[Tensor, Tensor]:  # site int32 [N, P], score fp32 (fp64 for fp64 features) [N, P]
    """Compare every source token with the window around its centre, candidate by candidate in row-major order."""
    Hg, Wg = grid
    src, dst = _wide(f_src), _wide(f_dst)
    inverse_src, inverse_dst = 1 / _length(src), 1 / _length(dst)
    x = centre[..., 0].long().clamp(0, Wg - 1)
    y = centre[..., 1].long().clamp(0, Hg - 1)
    first_x, first_y = (x - radius).clamp(min=0), (y - radius).clamp(min=0)
    site = first_y * Wg + first_x  # where no candidate has a number
    score = torch.full(site.shape, -torch.inf, dtype=src.dtype, device=src.device)
    far_x, far_y = min(radius, Wg - 1), min(radius, Hg - 1)  # beyond the grid there is nothing
    for dy in range(-far_y, far_y + 1):
        for dx in range(-far_x, far_x + 1):
            cx, cy = x + dx, y + dy
            inside = (cx >= 0) & (cx < Wg) & (cy >= 0) & (cy < Hg)
            candidate = cy.clamp(0, Hg - 1) * Wg + cx.clamp(0, Wg - 1)
            token = dst.gather(1, candidate[..., None].expand_as(src))
            cosine = (src * token).sum(-1) * inverse_src * inverse_dst.gather(1, candidate)
            better = inside & (cosine > score)  # the first of equals stays: the lowest site; NaN never wins
            site = torch.where(better, candidate, site)
            score = torch.where(better, cosine, score)
    return site.to(torch.int32), score


def link_score_reference(
    f_src: Tensor,  # [N, P, C]
    f_dst: Tensor,  # [N, P, C]
    positions: Tensor,  # [N, P, 2]
    grid: Grid,
) -> Tensor:  # fp32 (fp64 for fp64 features) [N, P]
    """Compare every source token with the bilinear sample at its position: sampled first, then normalised."""
    src = _wide(f_src)
    token = bilinear_sample(_wide(f_dst), positions.to(src.dtype), grid)
    return (src * token).sum(-1) / (_length(src) * _length(token))
