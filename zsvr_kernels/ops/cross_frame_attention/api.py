"""The public function: validates once, chooses a backend, hands over."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from zsvr_kernels import backends, validation
from zsvr_kernels.ops.cross_frame_attention.reference import cross_frame_attention_reference
from zsvr_kernels.ops.cross_frame_attention.registration import CrossFrameAttentionFunction
from zsvr_kernels.ops.cross_frame_attention.sdpa import cross_frame_attention_sdpa


@overload
def cross_frame_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    frames: Tensor,
    *,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: str = ...,
    out: Tensor | None = ...,
) -> Tensor: ...


@overload
def cross_frame_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    frames: Tensor,
    *,
    scale: float | None = ...,
    return_lse: Literal[True],
    backend: str = ...,
    out: Tensor | None = ...,
) -> tuple[Tensor, Tensor]: ...


def cross_frame_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    frames: Tensor,
    *,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str = "auto",
    out: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend from every frame's tokens to all tokens of the frames listed for it.

    ``out[b,i,p,h] = softmax(scale * q[b,i,p,h] . K) V``, where K and V are the ``R*P`` keys and values of
    frames ``frames[i]``; no copy of them is made. An entry -1 is absent; a row of absent entries gives 0
    (lse -inf); a frame listed twice counts twice.

    Args:
        q: ``[B, T, P, H, D]`` float32, bfloat16, float16 (float64 on ``reference``); any strides, D dense.
        k, v: ``[B, Tk, P, H, D]`` of q's dtype and device; usually ``Tk = T``.
        frames: int32 ``[T, R]``, entries -1 or 0..Tk-1; see `neighbors`.
        scale: factor on the logits; None means ``D ** -0.5``.
        return_lse: also return the log-sum-exp of the logits. It is differentiable.
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"sdpa"`` or ``"triton"``; see `explain`.
        out: tensor ``[B, T, P, H, D]`` to write instead of a new one, where no gradient is needed. It must
            not share memory with an input: address ranges that overlap are refused, interleaved views too.

    Returns:
        ``[B, T, P, H, D]`` of q's dtype; with ``return_lse`` also float32 ``[B, T, P, H]``, natural log.

    Raises:
        ValueError, TypeError: shapes, dtypes, devices or frame indices that do not fit, named with what was
            expected.
        RuntimeError: the requested backend cannot run this call.

    Source: the cross-neighbour-frame attention of arXiv 2407.01960; equations are in this operator's README.

    Example:
        >>> q, k, v = torch.randn(3, 1, 8, 256, 4, 64).unbind(0)
        >>> zsvr_kernels.cross_frame_attention(q, k, v, zsvr_kernels.neighbors(8)).shape
        torch.Size([1, 8, 256, 4, 64])
    """
    q, k, v = backends.autocast(q, k, v)
    sizes = validation.check_qkv(q, k, v)
    validation.check_frames(frames, q)
    scale = validation.check_scale(scale, sizes.D)
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if out is not None:
        validation.check_out(out, q, needs_grad, {"q": q, "k": k, "v": v, "frames": frames})
    call = backends.Call("cross_frame_attention", q.device.type, q.dtype, sizes.D, needs_grad, return_lse)
    backend = backends.choose(backend, call)

    if backend == "reference":
        o, lse = cross_frame_attention_reference(q, k, v, frames, scale)
    elif backend == "sdpa":
        o, lse = cross_frame_attention_sdpa(q, k, v, frames, scale, return_lse)
    elif needs_grad:
        o, lse = CrossFrameAttentionFunction.apply(q, k, v, frames, scale, backend, return_lse)
    elif out is not None:
        lse = torch.ops.zsvr.cross_frame_attention_out(q, k, v, frames, scale, backend, out)
        o = out
    else:
        o, lse = torch.ops.zsvr.cross_frame_attention_fwd(q, k, v, frames, scale, backend)
    if out is not None and o is not out:
        out.copy_(o)
        o = out
    return (o, lse) if return_lse else o
