"""Cross-frame attention in plain, differentiable PyTorch: the definition every kernel is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from zsvr_kernels.backends import without_autocast
from zsvr_kernels.validation import check_frame_values


def cross_frame_attention_reference(
    q: Tensor,  # [B, T, P, H, D]
    k: Tensor,  # [B, Tk, P, H, D]
    v: Tensor,  # [B, Tk, P, H, D]
    frames: Tensor,  # int32 [T, R], -1 = absent
    scale: float,
) -> tuple[Tensor, Tensor]:  # [B, T, P, H, D], [B, T, P, H]
    """Return output and natural-log lse; one query frame at a time, so memory is ``B*H*P*R*P`` logits.

    Arithmetic is float32, or float64 for float64 inputs; the output has the dtype of ``q``.
    """
    if not torch.compiler.is_compiling():
        check_frame_values(frames, k.shape[1])
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    B, T, P, H, D = q.shape
    R = frames.shape[1]
    outputs, lses = [], []
    with without_autocast(q.device):
        for i in range(T):
            row = frames[i].long()  # [R]
            sources = row.clamp(min=0)
            absent = (row < 0).repeat_interleave(P)  # [R*P]
            queries = q[:, i].to(wide).transpose(1, 2)  # [B, H, P, D]
            keys = k.index_select(1, sources).to(wide).reshape(B, R * P, H, D).transpose(1, 2)
            values = v.index_select(1, sources).to(wide).reshape(B, R * P, H, D).transpose(1, 2)
            logits = scale * (queries @ keys.transpose(-1, -2))  # [B, H, P, R*P]
            logits = logits.masked_fill(absent, -torch.inf)
            values = values.masked_fill(absent[:, None], 0.0)  # an absent frame may hold NaN: 0 * NaN
            lse = torch.logsumexp(logits, dim=-1)  # [B, H, P]
            # A row without a present entry: subtracting a finite number keeps exp(-inf) = 0 and NaN away.
            finite = torch.where(absent.all(), torch.zeros_like(lse), lse)
            outputs.append((torch.exp(logits - finite[..., None]) @ values).transpose(1, 2))
            lses.append(lse.transpose(1, 2))
    return torch.stack(outputs, 1).to(q.dtype), torch.stack(lses, 1)
