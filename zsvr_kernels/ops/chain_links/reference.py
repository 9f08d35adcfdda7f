"""Chaining of links in plain PyTorch: the definition the kernel is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from zsvr_kernels.sampling import Grid, bilinear_sample, is_inside, nearest_site, sites


def slot_frames(T: int, window: int | None, device: torch.device | str = "cpu") -> Tensor:
    """Return the frame of each slot, int32 ``[T, L]``: all frames, or the window around the own frame."""
    if window is None:
        return torch.arange(T, dtype=torch.int32, device=device).expand(T, T).contiguous()
    frames = torch.arange(T, device=device)[:, None] + torch.arange(-window, window + 1, device=device)
    return frames.masked_fill((frames < 0) | (frames >= T), -1).to(torch.int32)


def _corners_valid(valid: Tensor, positions: Tensor, grid: Grid) -> Tensor:
    """Return whether all corners of non-zero weight are valid; ``valid [B, P]``, ``positions [B, M, 2]``."""
    Hg, Wg = grid
    x, y = positions[..., 0].clamp(0, Wg - 1), positions[..., 1].clamp(0, Hg - 1)
    x0, y0 = x.floor().nan_to_num(0.0), y.floor().nan_to_num(0.0)
    right, below = (x > x0).long(), (y > y0).long()
    corner = y0.long() * Wg + x0.long()
    result = torch.ones_like(corner, dtype=torch.bool)
    for dx in (0, 1):
        for dy in (0, 1):
            result &= valid.gather(1, corner + dx * right + dy * below * Wg)
    return result


def chain_links_reference(
    forward: Tensor,  # [B, T-1, P, 2]
    backward: Tensor,  # [B, T-1, P, 2]
    valid_forward: Tensor,  # bool [B, T-1, P]
    valid_backward: Tensor,  # bool [B, T-1, P]
    grid: Grid,
    window: int | None,
    nearest: bool,
    corners: bool,
) -> tuple[Tensor, Tensor]:  # positions [B, T, L, P, 2], valid bool [B, T, L, P]
    """Follow every token of every frame forward and backward, link by link, until it is lost.

    Arithmetic has the dtype of the links (float32; float64 serves as oracle).
    """
    B, pairs, P, _ = forward.shape
    T = pairs + 1
    L = T if window is None else 2 * window + 1
    own = sites(grid, dtype=forward.dtype, device=forward.device)
    positions = own.expand(B, T, L, P, 2).clone()
    valid = torch.zeros(B, T, L, P, dtype=torch.bool, device=forward.device)
    if nearest:
        forward, backward = torch.floor(forward + 0.5), torch.floor(backward + 0.5)
    for i in range(T):
        first = 0 if window is None else i - window  # frame of slot 0
        valid[:, i, i - first] = True
        for step, links, checks in ((1, forward, valid_forward), (-1, backward, valid_backward)):
            current = own.expand(B, P, 2)
            alive = torch.ones(B, P, dtype=torch.bool, device=forward.device)
            j = i + step
            while 0 <= j < T and 0 <= j - first < L:
                pair = min(j, j - step)
                if corners:
                    alive = alive & _corners_valid(checks[:, pair], current, grid)
                else:
                    alive = alive & checks[:, pair].gather(1, nearest_site(current, grid))
                current = current + bilinear_sample(links[:, pair] - own, current, grid)
                alive = alive & is_inside(current, grid)
                positions[:, i, j - first] = torch.where(alive[..., None], current, own)
                valid[:, i, j - first] = alive
                j += step
    return positions, valid
