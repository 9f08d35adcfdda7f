"""The public function: validates once, chooses a backend, hands over."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from zsvr_kernels import backends, validation
from zsvr_kernels.ops.trajectory_attention.reference import trajectory_attention_reference
from zsvr_kernels.ops.trajectory_attention.registration import TrajectoryAttentionFunction, records_for
from zsvr_kernels.trajectories import Trajectories


@overload
def trajectory_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    trajectories: Trajectories,
    *,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: str = ...,
    out: Tensor | None = ...,
) -> Tensor: ...


@overload
def trajectory_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    trajectories: Trajectories,
    *,
    scale: float | None = ...,
    return_lse: Literal[True],
    backend: str = ...,
    out: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...


def trajectory_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    trajectories: Trajectories,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from every token to the bilinear samples of K and V along its trajectory.

    Slot l of query ``(i, p)`` is live if ``frames[i, l] >= 0`` and ``valid[b, i, l, p]``; there K and V of
    frame ``frames[i, l]`` are sampled at ``positions[b, i, l, p]`` (border clamp). The output is the softmax
    over the live slots of ``scale * q . K_l``, times V_l. No live slot: 0 (lse -inf); one live slot: exactly
    V_l.

    Args:
        q: ``[B, T, P, H, D]`` float32, bfloat16, float16 (float64 on ``reference``); any strides, D dense.
        k, v: ``[B, Tk, P, H, D]`` of q's dtype and device.
        trajectories: from `chain_links` or `Trajectories.from_positions`, for Bp clips, Bp dividing B (clip b
            reads entry ``b mod Bp``). Positions that require a gradient get one.
        scale: factor on the logits; None means ``D ** -0.5``.
        return_lse: also return the log-sum-exp of the logits. It is differentiable.
        backend: ``"auto"``, ``"reference"``, ``"cpu"`` or ``"triton"`` (GPUs); see `explain`.
        out: tensor ``[B, T, P, H, D]`` to write instead of a new one, where no gradient is needed. It must
            not share memory with an input: address ranges that overlap are refused, interleaved views too.

    Returns:
        ``[B, T, P, H, D]`` of q's dtype; with ``return_lse`` also float32 ``[B, T, P, H]``, natural log.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or frame indices that do not fit, named with what was
            expected.
        RuntimeError: the requested backend cannot run this call.

    Source: the trajectory attention of arXiv 2407.01960; equations are in this operator's README.

    Example:
        >>> q, k, v = torch.randn(3, 1, 8, 12 * 16, 4, 64).unbind(0)
        >>> flow = torch.zeros(1, 7, 2, 96, 128)
        >>> links = zsvr_kernels.Links.from_flow(flow, flow, grid=(12, 16))
        >>> zsvr_kernels.trajectory_attention(q, k, v, zsvr_kernels.chain_links(links)).shape
        torch.Size([1, 8, 192, 4, 64])
    """
    if not isinstance(trajectories, Trajectories):
        raise TypeError(
            "trajectories must be zsvr_kernels.Trajectories (from chain_links or "
            f"Trajectories.from_positions), got {type(trajectories).__name__}"
        )
    q, k, v = backends.autocast(q, k, v)
    sizes = validation.check_qkv(q, k, v)
    positions, valid, frames = trajectories.positions, trajectories.valid, trajectories.frames
    grid = trajectories.grid
    validation.check_trajectories(positions, valid, frames, grid, q)
    scale = validation.check_scale(scale, sizes.D)
    needs_grad = torch.is_grad_enabled() and (
        q.requires_grad or k.requires_grad or v.requires_grad or positions.requires_grad
    )
    if out is not None:
        inputs = {"q": q, "k": k, "v": v, "positions": positions, "valid": valid, "frames": frames}
        validation.check_out(out, q, needs_grad, inputs)
    call = backends.Call("trajectory_attention", q.device.type, q.dtype, sizes.D, needs_grad, return_lse)
    backend = backends.choose(backend, call)

    owner = None if torch.compiler.is_compiling() else trajectories
    if backend == "reference":
        o, lse = trajectory_attention_reference(q, k, v, positions, valid, frames, grid, scale)
    elif needs_grad:
        o, lse = TrajectoryAttentionFunction.apply(
            q, k, v, positions, valid, frames, owner, *grid, scale, backend, return_lse
        )
    elif out is not None:
        made = records_for(backend, owner, q.dtype)
        fields = (positions, valid, frames, *grid)
        lse = torch.ops.zsvr.trajectory_attention_out(q, k, v, *fields, scale, backend, out, *made)
        o = out
    else:
        made = records_for(backend, owner, q.dtype)
        fields = (positions, valid, frames, *grid)
        o, lse = torch.ops.zsvr.trajectory_attention_fwd(q, k, v, *fields, scale, backend, *made)
    if out is not None and o is not out:
        out.copy_(o)
        o = out
    return (o, lse) if return_lse else o
