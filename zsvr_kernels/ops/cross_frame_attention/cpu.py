"""Launches the C++ kernels of cross-frame attention on CPU tensors. Allocates everything they write."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zsvr_kernels import _native, validation


def _fill_common(p: Any, q: Tensor, k: Tensor, v: Tensor, frames: Tensor, scale: float) -> None:
    p.B, p.T, p.P, p.H, p.D = q.shape
    p.Tk, p.R = k.shape[1], frames.shape[1]
    p.dtype, p.scale = _native.DTYPES[q.dtype], scale
    p.q, p.k, p.v = _native.tokens(q), _native.tokens(k), _native.tokens(v)
    p.frames = frames.data_ptr()


def _check(q: Tensor, k: Tensor, v: Tensor, frames: Tensor) -> None:
    """Raise unless native code may follow these tensors' addresses; metadata only."""
    validation.check_qkv(q, k, v)
    validation.check_dtype("q", q, *_native.DTYPES)
    validation.check_frames(frames, q)
    validation.check_on_cpu(q=q, k=k, v=v, frames=frames)


def launch_fwd(
    q: Tensor,  # [B, T, P, H, D]
    k: Tensor,  # [B, Tk, P, H, D]
    v: Tensor,  # [B, Tk, P, H, D]
    frames: Tensor,  # int32 [T, R]
    scale: float,
    out: Tensor | None = None,  # [B, T, P, H, D], written in place if given
) -> tuple[Tensor, Tensor]:  # out, lse fp32 [B, T, P, H]
    native = _native.module()
    _check(q, k, v, frames)
    if out is None:
        out = q.new_empty(q.shape)
    else:
        validation.check_out(out, q, False, {"q": q, "k": k, "v": v, "frames": frames})
        validation.check_on_cpu(out=out)
    lse = q.new_empty(q.shape[:4], dtype=torch.float32)
    frames = frames.contiguous()
    p = native.CrossFrameAttentionParams()
    _fill_common(p, q, k, v, frames, scale)
    p.o, p.lse = _native.tokens(out), lse.data_ptr()
    threads = _native.threads()
    workspace = _native.workspace(native.cross_frame_attention_fwd_workspace(p, threads))
    p.workspace = workspace.data_ptr()
    native.cross_frame_attention_fwd(p, _native.parallel_for(), threads)
    return out, lse


def launch_bwd(
    d_o: Tensor,  # [B, T, P, H, D]
    dlse: Tensor | None,  # fp32 [B, T, P, H]
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,  # [B, T, P, H, D]
    lse: Tensor,  # fp32 [B, T, P, H]
    frames: Tensor,  # int32 [T, R]
    scale: float,
    needs: tuple[bool, bool, bool],  # dq, dk, dv
    into: tuple[Tensor, Tensor] | None = None,  # dq, dk to add to, instead of new ones
) -> tuple[Tensor, Tensor, Tensor]:  # an empty tensor where not needed
    native = _native.module()
    _check(q, k, v, frames)
    validation.check_gradients(q, d_o, dlse, lse, needs, 3)
    validation.check_tensor("o", o, 5, "[B, T, P, H, D]")
    validation.check_dtype("o", o, q.dtype)
    validation.check_shape("o", o, tuple(q.shape), "the shape of q")
    validation.check_on_cpu(o=o)
    frames, lse = frames.contiguous(), lse.contiguous()
    o = o if o.stride(-1) == 1 else o.contiguous()
    d_o = d_o if d_o.stride(-1) == 1 else d_o.contiguous()
    p = native.CrossFrameAttentionBackwardParams()
    _fill_common(p, q, k, v, frames, scale)
    p.o, p.d_o, p.lse = _native.tokens(o), _native.tokens(d_o), lse.data_ptr()
    if dlse is not None:
        dlse = dlse.to(torch.float32).contiguous()
        p.dlse = dlse.data_ptr()
    gradients = []
    if into is not None:
        for name, x, target in zip(("dq", "dk"), (q, k), into, strict=True):
            validation.check_sum(name, target, x)
        p.adds = True
    for n, (name, x, needed) in enumerate(zip(("dq", "dk", "dv"), (q, k, v), needs, strict=True)):
        gradient = q.new_empty(x.shape if needed else (0,)) if into is None or n == 2 else into[n]
        if needed:
            setattr(p, name, _native.tokens(gradient))
        gradients.append(gradient)
    threads = _native.threads()
    workspace = _native.workspace(native.cross_frame_attention_bwd_workspace(p, threads))
    p.workspace = workspace.data_ptr()
    native.cross_frame_attention_bwd(p, _native.parallel_for(), threads)
    return gradients[0], gradients[1], gradients[2]
