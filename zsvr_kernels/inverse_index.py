"""The inverse of the corner gather along trajectories: which samples read each source site.

`Trajectories` keeps it, the backward of trajectory attention walks it. Built by the native module on CPU tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zsvr_kernels import _native, validation
from zsvr_kernels.sampling import Grid

Index = tuple[Tensor, Tensor, Tensor]  # offsets int64 [B*Tk*P + 1], samples int32 [nnz], weights float32 [nnz]


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
        offsets int64 ``[Bp*Tk*P + 1]``, samples int32 ``[nnz]``, weights float32 ``[nnz]``.
    """
    native = _native.module()
    Tk = validation.check_int("Tk", Tk, 1)
    grid = validation.check_trajectory_fields(positions, valid, frames, grid)
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
