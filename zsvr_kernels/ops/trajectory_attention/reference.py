"""Trajectory attention in plain, differentiable PyTorch: the definition every kernel is tested against."""

from __future__ import annotations

import torch
from torch import Tensor

from zsvr_kernels.backends import without_autocast
from zsvr_kernels.sampling import bilinear_sample
from zsvr_kernels.validation import check_frame_values


def trajectory_attention_reference(
    q: Tensor,  # [B, T, P, H, D]
    k: Tensor,  # [B, Tk, P, H, D]
    v: Tensor,  # [B, Tk, P, H, D]
    positions: Tensor,  # [Bp, T, L, P, 2] (x, y)
    valid: Tensor,  # bool [Bp, T, L, P]
    frames: Tensor,  # int32 [T, L], -1 = absent
    grid: tuple[int, int],
    scale: float,
) -> tuple[Tensor, Tensor]:  # [B, T, P, H, D], [B, T, P, H]
    """Return output and natural-log lse; one query frame at a time: memory is ``2*B*L*P*H*D`` samples.

    Arithmetic is float32, or float64 for float64 inputs (positions too); differentiable in positions.
    """
    if not torch.compiler.is_compiling():
        check_frame_values(frames, k.shape[1])
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    B, T, P, H, D = q.shape
    Bp, L = positions.shape[0], positions.shape[2]
    repeats = B // Bp
    outputs, lses = [], []
    with without_autocast(q.device):
        for i in range(T):
            row = frames[i].long()  # [L]
            live = (row >= 0)[:, None] & valid[:, i]  # [Bp, L, P]
            live = live.repeat(repeats, 1, 1)[:, None]  # [B, 1, L, P]
            where = positions[:, i].to(wide).repeat(repeats, 1, 1, 1).reshape(B * L, P, 2)
            # A dead slot's position may be anything: sample the corner instead, its weight is zero.
            where = where.masked_fill(~live.reshape(B * L, P, 1), 0.0)

            def sample(x: Tensor, row: Tensor = row, where: Tensor = where) -> Tensor:
                source = x.index_select(1, row.clamp(min=0)).to(wide).reshape(B * L, P, H * D)
                return bilinear_sample(source, where, grid).reshape(B, L, P, H, D)

            keys, values = sample(k), sample(v)
            logits = scale * torch.einsum("bphd,blphd->bhlp", q[:, i].to(wide), keys)
            logits = logits.masked_fill(~live, -torch.inf)
            lse = torch.logsumexp(logits, dim=2)  # [B, H, P]
            finite = torch.where(live.any(2), lse, torch.zeros_like(lse))
            weights = torch.exp(logits - finite[:, :, None])  # [B, H, L, P]
            values = values.masked_fill(~live[:, 0, :, :, None, None], 0.0)  # 0 * NaN
            outputs.append(torch.einsum("bhlp,blphd->bphd", weights, values))
            lses.append(lse.transpose(1, 2))
    return torch.stack(outputs, 1).to(q.dtype), torch.stack(lses, 1)
