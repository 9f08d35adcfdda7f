"""Launches the Triton chaining kernel. Allocates everything it writes."""

from __future__ import annotations

import torch
from torch import Tensor

import zsvr_kernels.ops.chain_links.triton_configs as triton_configs
from zsvr_kernels import _triton, validation
from zsvr_kernels._triton import Launch
from zsvr_kernels.ops.chain_links.triton_chain import _chain_links_kernel

Outputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None]


def plan_chain(
    forward: Tensor,  # fp32 [B, T-1, P, 2]
    backward: Tensor,  # fp32 [B, T-1, P, 2]
    valid_forward: Tensor,  # bool [B, T-1, P]
    valid_backward: Tensor,  # bool [B, T-1, P]
    grid: tuple[int, int],
    window: int | None,
    nearest: bool,
    corners: bool,
    target: str,
    *,
    records: bool = False,
    exact: bool = False,
) -> tuple[list[Launch], Outputs]:  # positions [B, T, L, P, 2], valid, base [B, T, L, P], fractions
    """Plan one launch for all clips, start frames and both directions; with ``records`` those of the slots come too.

    A record is the upper left site of the cell that the position, clamped to the grid, lies in (-1 where the slot is
    not live; a cell never starts in the last column or row of an axis that has more than one), and its fractions:
    float32 ``[B, T, L, P, 2]`` if ``exact``, else int32 ``[B, T, L, P]``, ``round(2^15 * fraction)`` of x in the low
    and of y in the high half.
    """
    B, pairs, P, _ = forward.shape
    T = pairs + 1
    L = T if window is None else 2 * window + 1
    positions = forward.new_empty(B, T, L, P, 2)
    valid = forward.new_empty((B, T, L, P), dtype=torch.bool)
    base = forward.new_empty((B, T, L, P), dtype=torch.int32) if records else None
    fractions = None
    if records:
        fractions = torch.empty_like(positions) if exact else valid.new_empty(valid.shape, dtype=torch.int32)
    config = triton_configs.chain(target)
    blocks = -(-P // config.BLOCK)
    launch = Launch(
        kernel=_chain_links_kernel,
        grid=(B * T * 2 * blocks,),
        arguments={
            "forward": forward.contiguous(),
            "backward": backward.contiguous(),
            "valid_forward": valid_forward.contiguous(),
            "valid_backward": valid_backward.contiguous(),
            "positions": positions,
            "valid": valid,
            "base": base,
            "fractions": fractions,
            "T": T,
            "L": L,
            "Hg": grid[0],
            "Wg": grid[1],
            "window": -1 if window is None else window,
            "blocks": blocks,
            "NEAREST": nearest,
            "CORNERS": corners,
            "RECORDS": records,
            "EXACT": exact,
            "BLOCK": config.BLOCK,
        },
        # A contracted sum would differ from the reference in the last place, and so would a link at a threshold.
        options={"num_warps": config.num_warps, "num_stages": 1, "enable_fp_fusion": False},
    )
    return [launch], (positions, valid, base, fractions)


def launch(
    forward: Tensor,  # fp32 [B, T-1, P, 2]
    backward: Tensor,  # fp32 [B, T-1, P, 2]
    valid_forward: Tensor,  # bool [B, T-1, P]
    valid_backward: Tensor,  # bool [B, T-1, P]
    grid: tuple[int, int],
    window: int | None,
    nearest: bool,
    corners: bool,
    *,
    records: bool = False,
) -> tuple[Tensor, ...]:  # positions fp32 [B, T, L, P, 2], valid bool [B, T, L, P]; base, fractions int32 [B, T, L, P]
    grid = validation.check_links(forward, backward, valid_forward, valid_backward, grid)
    checks = {"valid_forward": valid_forward, "valid_backward": valid_backward}
    _triton.check_runs("chain_links", forward=forward, backward=backward, **checks)
    window = validation.check_window(window)
    fields = forward, backward, valid_forward, valid_backward
    launches, outputs = plan_chain(
        *fields, grid, window, nearest, corners, _triton.target(forward.device), records=records
    )
    _triton.run(launches)
    return tuple(x for x in outputs if x is not None)
