"""Launches the C++ kernels of trajectory attention on CPU tensors. Allocates everything they write."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zsvr_kernels import _native, validation
from zsvr_kernels.inverse_index import fill_trajectory, inverse


def _fill_attention(p: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    p.B, p.H, p.D = q.shape[0], q.shape[3], q.shape[4]
    p.dtype, p.scale = _native.DTYPES[q.dtype], scale
    p.q, p.k, p.v = _native.tokens(q), _native.tokens(k), _native.tokens(v)


def _check(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, valid: Tensor, frames: Tensor, grid: tuple[int, int]
) -> None:
    """Raise unless native code may follow these tensors' addresses; metadata only."""
    validation.check_qkv(q, k, v)
    validation.check_dtype("q", q, *_native.DTYPES)
    validation.check_trajectories(positions, valid, frames, grid, q)
    validation.check_on_cpu(q=q, k=k, v=v, positions=positions, valid=valid, frames=frames)


def launch_fwd(
    q: Tensor,  # [B, T, P, H, D]
    k: Tensor,  # [B, Tk, P, H, D]
    v: Tensor,  # [B, Tk, P, H, D]
    positions: Tensor,  # fp32 [Bp, T, L, P, 2]
    valid: Tensor,  # bool [Bp, T, L, P]
    frames: Tensor,  # int32 [T, L]
    grid: tuple[int, int],
    scale: float,
    out: Tensor | None = None,  # [B, T, P, H, D], written in place if given
) -> tuple[Tensor, Tensor]:  # out, lse fp32 [B, T, P, H]
    native = _native.module()
    _check(q, k, v, positions, valid, frames, grid)
    if out is None:
        out = q.new_empty(q.shape)
    else:
        inputs = {"q": q, "k": k, "v": v, "positions": positions, "valid": valid, "frames": frames}
        validation.check_out(out, q, False, inputs)
        validation.check_on_cpu(out=out)
    lse = q.new_empty(q.shape[:4], dtype=torch.float32)
    positions, valid, frames = positions.contiguous(), valid.contiguous(), frames.contiguous()
    p = native.TrajectoryAttentionParams()
    fill_trajectory(p, positions, valid, frames, grid, k.shape[1])
    _fill_attention(p, q, k, v, scale)
    p.o, p.lse = _native.tokens(out), lse.data_ptr()
    threads = _native.threads()
    workspace = _native.workspace(native.trajectory_attention_fwd_workspace(p, threads))
    p.workspace = workspace.data_ptr()
    native.trajectory_attention_fwd(p, _native.parallel_for(), threads)
    return out, lse


def launch_bwd(
    d_o: Tensor,  # [B, T, P, H, D]
    dlse: Tensor | None,  # fp32 [B, T, P, H]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,  # fp32 [B, T, P, H]
    positions: Tensor,  # fp32 [Bp, T, L, P, 2]
    valid: Tensor,  # bool [Bp, T, L, P]
    frames: Tensor,  # int32 [T, L]
    index: tuple[Tensor, Tensor, Tensor] | None,  # from inverse(); None: built here if needed
    grid: tuple[int, int],
    scale: float,
    needs: tuple[bool, bool, bool, bool],  # dq, dk, dv, dpositions
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # an empty tensor where not needed
    native = _native.module()
    _check(q, k, v, positions, valid, frames, grid)
    validation.check_gradients(q, d_o, dlse, lse, needs, 4)
    positions, valid, frames = positions.contiguous(), valid.contiguous(), frames.contiguous()
    lse = lse.contiguous()
    d_o = d_o if d_o.stride(-1) == 1 else d_o.contiguous()
    p = native.TrajectoryAttentionBackwardParams()
    fill_trajectory(p, positions, valid, frames, grid, k.shape[1])
    _fill_attention(p, q, k, v, scale)
    p.d_o, p.lse = _native.tokens(d_o), lse.data_ptr()
    if dlse is not None:
        dlse = dlse.to(torch.float32).contiguous()
        p.dlse = dlse.data_ptr()
    if needs[1] or needs[2]:
        if index is None:
            index = inverse(positions, valid, frames, grid, k.shape[1])
        else:
            validation.check_inverse(index, valid, k.shape[1])
        p.offsets, p.samples, p.weights = (x.data_ptr() for x in index)
    gradients = []
    for name, x, needed in zip(("dq", "dk", "dv"), (q, k, v), needs[:3], strict=True):
        gradient = q.new_empty(x.shape if needed else (0,))
        if needed:
            setattr(p, name, _native.tokens(gradient))
        gradients.append(gradient)
    dpositions = positions.new_empty(positions.shape if needs[3] else (0,))
    if needs[3]:
        p.dpositions = dpositions.data_ptr()
    threads = _native.threads()
    workspace = _native.workspace(native.trajectory_attention_bwd_workspace(p, threads))
    p.workspace = workspace.data_ptr()
    native.trajectory_attention_bwd(p, _native.parallel_for(), threads)
    return gradients[0], gradients[1], gradients[2], dpositions
