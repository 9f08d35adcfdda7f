"""The kernels below torch's SDPA under one signature, so that windows and their backward are written once.

``q [J, H, P, D]``, ``k, v [J, H, n, D]`` with a dense last axis and any other strides, overlapping ones too;
``o [J, H, P, D]``, ``lse [J, H, P]``, natural log. What a backward needs besides is handed through as ``rest``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_efficient_attention, can_use_flash_attention

Rest = tuple[Any, ...]
HALVES = (torch.float16, torch.bfloat16)
EFFICIENT_ROWS = 32  # the efficient kernel's lse is padded to a multiple of this


class Kernel(NamedTuple):
    """One of torch's fused kernels: ``forward(q, k, v, scale)`` and its backward."""

    forward: Callable[[Tensor, Tensor, Tensor, float], tuple[Tensor, Tensor, Rest]]
    backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Rest, float], tuple[Tensor, Tensor, Tensor]]


def _cpu_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Rest]:
    o, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
    return o, lse, ()


def _cpu_backward(
    d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, rest: Rest, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        d_o, q, k, v, o, lse, 0.0, False, scale=scale
    )


def _flash_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Rest]:
    o, lse, *rest, _ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, False, scale=scale)
    return o, lse, tuple(rest)  # cumulative lengths, longest lengths, the state of dropout and its offset


def _flash_backward(
    d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, rest: Rest, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    *lengths, state, offset = rest
    return torch.ops.aten._scaled_dot_product_flash_attention_backward(
        d_o, q, k, v, o, lse.contiguous(), *lengths, 0.0, False, state, offset, scale=scale
    )


def _efficient_forward(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor, Rest]:
    o, lse, seed, offset = torch.ops.aten._scaled_dot_product_efficient_attention(
        q, k, v, None, True, 0.0, False, scale=scale
    )
    return o, lse[..., : q.shape[2]], (seed, offset)


def _efficient_backward(
    d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, rest: Rest, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    padded = F.pad(lse, (0, -lse.shape[-1] % EFFICIENT_ROWS), value=torch.inf)
    dq, dk, dv, _ = torch.ops.aten._scaled_dot_product_efficient_attention_backward(
        d_o, q, k, v, None, o, padded.contiguous(), *rest, 0.0, [True, True, True, False], False, scale=scale
    )
    return dq, dk, dv


CPU = Kernel(_cpu_forward, _cpu_backward)
FLASH = Kernel(_flash_forward, _flash_backward)
EFFICIENT = Kernel(_efficient_forward, _efficient_backward)


def choose(
    q: Tensor,  # [B, T, P, H, D]
    k: Tensor,  # [B, Tk, P, H, D]
    v: Tensor,  # [B, Tk, P, H, D]
    needs_grad: bool,
) -> Kernel | None:
    """Return the kernel that takes windows of these tensors, or None.

    On a GPU torch itself is asked, its switches included; what it says of one frame holds for every window.
    """
    if q.device.type == "cpu":
        return CPU
    if torch.version.hip is not None or q.shape[-1] % 8:
        return None
    if not q.shape[0]:
        return EFFICIENT  # no clip, so nothing will be called
    frame_q, frame_k, frame_v = (x[0, :1].transpose(1, 2).detach().requires_grad_(needs_grad) for x in (q, k, v))
    asked = SDPAParams(frame_q, frame_k, frame_v, None, 0.0, False, False)
    if q.dtype in HALVES and can_use_flash_attention(asked):
        return FLASH
    return EFFICIENT if can_use_efficient_attention(asked) else None
