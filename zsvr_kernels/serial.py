"""Serial SLR attention as one step of autograd: its backward holds one gradient of q and of k, not two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zsvr_kernels import backends
from zsvr_kernels.ops.cross_frame_attention import registration as _cross  # noqa: F401  (defines its ops)
from zsvr_kernels.ops.trajectory_attention import registration as _trajectory  # noqa: F401
from zsvr_kernels.records import is_exact
from zsvr_kernels.trajectories import Trajectories
from zsvr_kernels.validation import refuse_double_backward

# Backends whose cross-frame backward adds into dq and dk.
BACKENDS = ("cpu", "triton")


def takes(q: Tensor, k: Tensor, v: Tensor, trajectories: Trajectories, backend: str) -> str | None:
    """Return the one of `BACKENDS` on which `SerialFunction` can run the call: a gradient of q, k and v alone."""
    if torch.compiler.is_compiling() or not torch.is_grad_enabled() or trajectories.positions.requires_grad:
        return None
    if not (q.requires_grad and k.requires_grad and v.requires_grad):
        return None
    cross, trajectory = (
        backends.choose(backend, backends.Call(op, q.device.type, q.dtype, q.shape[-1], True))
        for op in ("cross_frame_attention", "trajectory_attention")
    )
    return cross if cross == trajectory and cross in BACKENDS else None


class SerialFunction(torch.autograd.Function):
    """``Tr(X)`` of `slr_attention` on one of `BACKENDS`."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,  # [B, T, P, H, D]
        k: Tensor,
        v: Tensor,
        frames: Tensor,  # int32 [T, R]
        trajectories: Trajectories,
        scale: float,
        backend: str,
    ) -> Tensor:
        fields = (trajectories.positions, trajectories.valid, trajectories.frames)
        records = trajectories.records(is_exact(q.dtype)) if backend == "triton" else ()
        where = (*fields, *trajectories.grid)
        x, lse_x = torch.ops.zsvr.cross_frame_attention_fwd(q, k, v, frames, scale, backend)
        o, lse = torch.ops.zsvr.trajectory_attention_fwd(q, k, x, *where, scale, backend, *records)
        ctx.save_for_backward(q, k, v, x, lse_x, lse, frames, *fields)
        ctx.trajectories, ctx.scale, ctx.backend = trajectories, scale, backend
        return o

    @staticmethod
    def backward(ctx: Any, d_o: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("slr_attention")
        q, k, v, x, lse_x, lse, frames, *fields = ctx.saved_tensors
        where = (*fields, *ctx.trajectories.inverse(k.shape[1]), *ctx.trajectories.grid)
        records = ctx.trajectories.records(is_exact(q.dtype)) if ctx.backend == "triton" else ()
        needs = [True, True, True, False]
        dq, dk, dx, _ = torch.ops.zsvr.trajectory_attention_bwd(
            d_o, None, q, k, x, lse, *where, ctx.scale, needs, ctx.backend, *records
        )
        dv = torch.ops.zsvr.cross_frame_attention_bwd_add(dx, q, k, v, x, lse_x, frames, ctx.scale, ctx.backend, dq, dk)
        return dq, dk, dv, None, None, None, None
