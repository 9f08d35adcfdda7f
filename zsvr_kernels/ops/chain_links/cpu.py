"""Launches the C++ chaining kernel on CPU tensors. Allocates everything it writes."""

from __future__ import annotations

import torch
from torch import Tensor

from zsvr_kernels import _native, validation


def launch(
    forward: Tensor,  # fp32 [B, T-1, P, 2]
    backward: Tensor,  # fp32 [B, T-1, P, 2]
    valid_forward: Tensor,  # bool [B, T-1, P]
    valid_backward: Tensor,  # bool [B, T-1, P]
    grid: tuple[int, int],
    window: int | None,
    nearest: bool,
    corners: bool,
) -> tuple[Tensor, Tensor]:  # positions fp32 [B, T, L, P, 2], valid bool [B, T, L, P]
    native = _native.module()
    grid = validation.check_links(forward, backward, valid_forward, valid_backward, grid)
    fields = {"forward": forward, "backward": backward}
    validation.check_on_cpu(**fields, valid_forward=valid_forward, valid_backward=valid_backward)
    window = validation.check_window(window)
    inputs = [x.contiguous() for x in (forward, backward, valid_forward, valid_backward)]
    B, pairs, P, _ = forward.shape
    T = pairs + 1
    L = T if window is None else 2 * window + 1
    positions = forward.new_empty(B, T, L, P, 2)
    valid = torch.empty(B, T, L, P, dtype=torch.bool, device="cpu")
    p = native.ChainLinksParams()
    p.B, p.T, p.Hg, p.Wg = B, T, *grid
    p.window = -1 if window is None else window
    p.round_to_nearest, p.check_corners = nearest, corners
    p.forward, p.backward, p.valid_forward, p.valid_backward = (x.data_ptr() for x in inputs)
    p.positions, p.valid = positions.data_ptr(), valid.data_ptr()
    native.chain_links(p, _native.parallel_for(), _native.threads())
    return positions, valid
