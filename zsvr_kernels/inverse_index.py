"""The inverse of the corner gather along trajectories: which samples read each source site.

`Trajectories` keeps it, the backward of trajectory attention walks it. Built by the native module on CPU tensors, on
GPUs by a stable sort.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zsvr_kernels import _native, validation
from zsvr_kernels.sampling import Grid

# offsets int64 [B*Tk*P + 1], samples int32 [nnz], weights float32 [nnz]; on GPUs nnz is the most that there could be,
# and what lies beyond offsets[-1] means nothing.
Index = tuple[Tensor, Tensor, Tensor]


def fill_trajectory(p: Any, positions: Tensor, valid: Tensor, frames: Tensor, grid: Grid, Tk: int) -> None:
    """Write trajectories (contiguous tensors) into native params."""
    p.Bp, p.T, p.L = valid.shape[:3]
    p.Hg, p.Wg = grid
    p.Tk = Tk
    p.positions, p.valid, p.frames = positions.data_ptr(), valid.data_ptr(), frames.data_ptr()


def inverse(
    positions: Tensor,  # fp32 [Bp, T, L, P, 2]
    valid: Tensor,  # bool [Bp, T, L, P]
    frames: Tensor,  # int32 [T, L]
    grid: Grid,
    Tk: int,
) -> Index:
    """Return the inverse index of the corner gather: which samples read each source site.

    Row ``(bp * Tk + j) * P + site`` owns entries ``offsets[row]..offsets[row + 1]``, ordered by sample;
    ``sample = (i * L + l) * P + p``.

    Returns:
        offsets int64 ``[Bp*Tk*P + 1]``, samples int32 ``[nnz]``, weights float32 ``[nnz]``. On GPUs nnz is
        ``4*Bp*T*L*P``, as no value is read back; entries from ``offsets[-1]`` on mean nothing.
    """
    Tk = validation.check_int("Tk", Tk, 1)
    grid = validation.check_trajectory_fields(positions, valid, frames, grid)
    if positions.is_cuda:
        return inverse_by_sorting(positions, valid, frames, grid, Tk)
    native = _native.module()
    validation.check_on_cpu(positions=positions, valid=valid, frames=frames)
    positions, valid, frames = positions.contiguous(), valid.contiguous(), frames.contiguous()
    p = native.TrajectoryInverseParams()
    fill_trajectory(p, positions, valid, frames, grid, Tk)
    offsets = torch.empty(valid.shape[0] * Tk * valid.shape[3] + 1, dtype=torch.int64, device="cpu")
    p.offsets = offsets.data_ptr()
    threads = _native.threads()
    native.trajectory_inverse_count(p, _native.parallel_for(), threads)
    count = int(offsets[-1])
    samples = torch.empty(count, dtype=torch.int32, device="cpu")
    weights = torch.empty(count, dtype=torch.float32, device="cpu")
    p.samples, p.weights = samples.data_ptr(), weights.data_ptr()
    native.trajectory_inverse_fill(p, _native.parallel_for(), threads)
    return offsets, samples, weights


def inverse_by_sorting(positions: Tensor, valid: Tensor, frames: Tensor, grid: Grid, Tk: int) -> Index:
    """Return what `inverse` does, on any device, from tensor operations that wait for nothing.

    Frames beyond ``Tk`` cannot be refused without reading values; they count as absent.
    """
    Bp, T, L, P = valid.shape
    Hg, Wg = grid
    rows = Bp * Tk * P
    if T * L * P >= 1 << 31:
        raise ValueError(f"an inverse index takes T*L*P below 2^31, got {T}*{L}*{P}")
    x, y = positions.unbind(-1)
    x = torch.where(x > 0, x, 0.0).clamp(max=Wg - 1)  # NaN becomes 0
    y = torch.where(y > 0, y, 0.0).clamp(max=Hg - 1)
    x0, y0 = x.floor(), y.floor()
    fx, fy = x - x0, y - y0
    weights = torch.stack(((1 - fx) * (1 - fy), fx * (1 - fy), (1 - fx) * fy, fx * fy), -1)
    right, below = fx > 0, fy > 0
    live = valid & ((frames >= 0) & (frames < Tk))[:, :, None]
    used = torch.stack((live, live & right, live & below, live & right & below), -1)
    kind = torch.int32 if rows + P < 1 << 31 else torch.int64
    first = (torch.arange(Bp, dtype=kind, device=valid.device)[:, None, None] * Tk + frames.to(kind)) * P
    site = first[..., None] + y0.to(kind) * Wg + x0.to(kind)
    keys = torch.stack((site, site + 1, site + Wg, site + (Wg + 1)), -1)
    keys = torch.where(used, keys, rows)  # what is not read sorts to the end
    del site, first, used, live
    # Corners stand in order of samples, so a stable sort leaves every row in that order.
    keys, order = keys.flatten().sort(stable=True)
    offsets = torch.searchsorted(keys, torch.arange(rows + 1, dtype=kind, device=valid.device))
    samples = (order.div(4, rounding_mode="floor") % (T * L * P)).to(torch.int32)
    return offsets, samples, weights.flatten()[order]
