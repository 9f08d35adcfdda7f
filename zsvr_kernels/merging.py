"""Merging of attention over disjoint sets of keys by their log-sum-exp."""

from __future__ import annotations

import torch
from torch import Tensor

from zsvr_kernels import validation


def merge_attention(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Merge two attention outputs over disjoint keys into the output over all keys.

    With ``m = max(lse1, lse2)`` and ``e = exp(lse - m)``: ``out = (e1 out1 + e2 out2) / (e1 + e2)`` and
    ``lse = m + ln(e1 + e2)``. A side with lse -inf (no keys) does not count; two such give 0 and -inf.
    Differentiable in all four.

    Args:
        out1, out2: ``[B, T, P, H, D]``, one floating dtype.
        lse1, lse2: ``[B, T, P, H]`` natural logs, float32 (float64 with float64 outputs), on the same device.

    Returns:
        ``out`` of the outputs' dtype and ``lse`` of the inputs' lse dtype.

    Raises:
        ValueError, TypeError: shapes, dtypes or devices that do not fit.
    """
    for name, x in (("out1", out1), ("out2", out2)):
        validation.check_tensor(name, x, 5, "[B, T, P, H, D]")
        validation.check_dtype(name, x, *validation.FLOATS)
        validation.check_shape(name, x, tuple(out1.shape), "the shape of out1")
        validation.check_device(name, x, out1, "out1")
    if out1.dtype != out2.dtype:
        raise TypeError(f"out1 is {out1.dtype}, but out2 is {out2.dtype}")
    wide = torch.float64 if out1.dtype == torch.float64 else torch.float32
    for name, x in (("lse1", lse1), ("lse2", lse2)):
        validation.check_tensor(name, x, 4, "[B, T, P, H]")
        validation.check_dtype(name, x, wide)
        validation.check_shape(name, x, tuple(out1.shape[:4]), "[B, T, P, H] of out1")
        validation.check_device(name, x, out1, "out1")
    largest = torch.maximum(lse1, lse2).detach()
    none = torch.isneginf(largest)
    # Where neither side has keys, a finite stand-in keeps -inf - -inf, and its gradient, away.
    shift = largest.masked_fill(none, 0.0)
    e1, e2 = torch.exp(lse1 - shift), torch.exp(lse2 - shift)
    total = (e1 + e2).masked_fill(none, 1.0)
    a1, a2 = (e1 / total)[..., None], (e2 / total)[..., None]
    # An empty side's output is 0 by definition, but a caller may hand over anything: 0 * NaN.
    o1 = out1.to(wide).masked_fill(torch.isneginf(lse1)[..., None], 0.0)
    o2 = out2.to(wide).masked_fill(torch.isneginf(lse2)[..., None], 0.0)
    out = (a1 * o1 + a2 * o2).to(out1.dtype)
    return out, (shift + torch.log(total)).masked_fill(none, -torch.inf)
