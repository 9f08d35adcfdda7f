"""Cross-frame attention by torch's own SDPA kernels: a peer, and a fallback for odd head dims.

In eager mode, rows of the frame table whose frames lie side by side become overlapping views of K and V (no
copy); rows with every second frame, as in {i-1, i+1}, do so after K and V were stored once as even frames,
then odd frames; any other row is gathered. That needs the table's values on the host: they are read once per
table and kept while it lives unchanged. Where they cannot be read (under torch.compile, in the capture of a
CUDA graph by a table that no call has seen) or no kernel takes the views, K and V are gathered for the whole
table and absent entries masked.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from zsvr_kernels.ops.cross_frame_attention.sdpa_kernels import Kernel, choose
from zsvr_kernels.validation import check_frame_values, refuse_double_backward


@dataclass
class _Group:
    """Query frames ``queries`` (equally spaced); query number j reads ``width`` slots from ``start + j``."""

    storage: str  # "frames": slot = frame; "parity": even frames, then odd ones; "gather": own copies
    width: int
    start: int = 0
    queries: list[int] = field(default_factory=list)
    sources: list[list[int]] = field(default_factory=list)  # frames read by each query, in slot order
    index: Tensor | None = None  # of "gather": the sources, flat, where K and V are

    def takes(self, storage: str, width: int, start: int, i: int) -> bool:
        if (storage, width) != (self.storage, self.width):
            return False
        if storage != "gather" and start != self.start + len(self.queries):
            return False
        step = self.queries[-1] - self.queries[-2] if len(self.queries) > 1 else i - self.queries[-1]
        return i == self.queries[-1] + step


def _parity_slot(frame: int, Tk: int) -> int:
    return frame // 2 + (frame % 2) * ((Tk + 1) // 2)


def plan(rows: list[list[int]], Tk: int) -> list[_Group]:
    """Group the rows of a frame table into windows over stored frames; absent entries are left out.

    The order of a row's frames does not change its softmax, so rows are sorted first.
    """
    groups: list[_Group] = []
    for i, row in enumerate(rows):
        present = sorted(f for f in row if f >= 0)
        if not present:
            continue
        steps = {b - a for a, b in pairwise(present)}
        if steps <= {1}:
            storage, start = "frames", present[0]
        elif steps == {2}:
            storage, start = "parity", _parity_slot(present[0], Tk)
        else:
            storage, start = "gather", 0
        width = len(present)
        group = next((g for g in groups if g.takes(storage, width, start, i)), None)
        if group is None:
            group = _Group(storage, width, start)
            groups.append(group)
        group.queries.append(i)
        group.sources.append(present)
    return groups


class _Plan(NamedTuple):
    version: int
    Tk: int
    groups: list[_Group]


_plans: WeakTensorKeyDictionary = WeakTensorKeyDictionary()  # of frame tables, as long as they live


def _plan_of(frames: Tensor, Tk: int) -> list[_Group] | None:
    """Return the groups of a frame table, or None while its values cannot be read.

    Only the first call with a table waits for the device; tensors made in inference mode count no changes, so
    their values are read every time.
    """
    version = None if frames.is_inference() else frames._version
    kept = _plans.get(frames)
    if kept is not None and (kept.version, kept.Tk) == (version, Tk):
        return kept.groups
    if frames.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return None
    check_frame_values(frames, Tk)
    groups = plan(frames.tolist(), Tk)
    for group in groups:
        if group.storage == "gather":
            group.index = torch.tensor(group.sources, device=frames.device).flatten()
    if version is not None:
        _plans[frames] = _Plan(version, Tk, groups)
    return groups


def _query_view(x: Tensor, group: _Group) -> Tensor:  # [B, T, P, H, D] -> [B, J, H, P, D]
    queries = group.queries
    step = queries[1] - queries[0] if len(queries) > 1 else 1
    return x[:, queries[0] : queries[-1] + 1 : step].transpose(2, 3)


class _Stores:
    """K or V as windows: views of the tensor itself, of its even/odd copy, or gathered frames."""

    def __init__(self, x: Tensor) -> None:  # [B, Tk, P, H, D]
        self.x = x
        self.parity: Tensor | None = None

    def windows(self, group: _Group, b: int) -> Tensor:  # [J, H, width*P, D]
        J, P, H, D = len(group.queries), *self.x.shape[2:]
        if group.storage == "gather":
            assert group.index is not None
            return self.x[b].index_select(0, group.index).reshape(J, group.width * P, H, D).transpose(1, 2)
        source = self.x
        if group.storage == "parity":
            if self.parity is None:
                self.parity = torch.cat((source[:, 0::2], source[:, 1::2]), 1)
            source = self.parity
        elif group.width > 1 and source.stride(1) != P * source.stride(2):
            source = self.x = source.contiguous()  # frames apart in memory: no window spans two of them
        _, frame, site, head, _ = source.stride()
        return source.as_strided(
            (J, H, group.width * P, D),
            (frame, head, site, 1),
            source.storage_offset() + b * source.stride(0) + group.start * frame,
        )


def _add_windows(total: Tensor, part: Tensor, group: _Group) -> None:
    """Add the gradient of windows ``[J, H, width*P, D]`` to that of their frames ``[Tk, P, H, D]``.

    Window j begins one stored frame after window j-1, so slot by slot the windows are a slice of the frames.
    """
    J, P = len(group.queries), total.shape[1]
    parts = part.unflatten(2, (group.width, P)).permute(2, 0, 3, 1, 4)  # [width, J, P, H, D]
    step = 2 if group.storage == "parity" else 1
    for slot in range(group.width):
        if group.storage == "gather":
            for j, sources in enumerate(group.sources):
                total[sources[slot]] += parts[slot, j]
        else:
            first = group.sources[0][slot]
            total[first : first + step * (J - 1) + 1 : step] += parts[slot]


def _forward(
    q: Tensor, k: Tensor, v: Tensor, groups: list[_Group], scale: float, kernel: Kernel
) -> tuple[Tensor, Tensor, list[Any]]:
    B, T, P, H, _ = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    o = q.new_zeros(q.shape)
    lse = q.new_full((B, T, P, H), -torch.inf, dtype=wide)
    keys, values = _Stores(k), _Stores(v)
    rests = []
    for group in groups:
        for b in range(B):
            part, part_lse, rest = kernel.forward(
                _query_view(q, group)[b], keys.windows(group, b), values.windows(group, b), scale
            )
            _query_view(o, group)[b].copy_(part)
            _query_view(lse[..., None], group)[b, ..., 0].copy_(part_lse)
            rests.append(rest)
    return o, lse, rests


class CrossFrameSdpaFunction(torch.autograd.Function):
    """Autograd over the window calls; autograd of overlapping views would be slow and fragile."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, groups: list[_Group], scale: float, kernel: Kernel
    ) -> tuple[Tensor, Tensor]:
        o, lse, rests = _forward(q, k, v, groups, scale, kernel)
        ctx.save_for_backward(q, k, v, o, lse)
        ctx.groups, ctx.scale, ctx.kernel, ctx.rests = groups, scale, kernel, rests
        ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    def backward(ctx: Any, d_o: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("cross_frame_attention")
        q, k, v, o, lse = ctx.saved_tensors
        if d_o.stride(-1) != 1:  # kernels take rows whose last axis is dense: an expanded gradient has none
            d_o = d_o.contiguous()
        wide = lse.dtype
        dq = torch.zeros_like(q)
        dk, dv = (x.new_zeros(x.shape, dtype=wide) for x in (k, v))
        keys, values = _Stores(k), _Stores(v)
        rests = iter(ctx.rests)
        for group in ctx.groups:
            for b in range(q.shape[0]):
                part_q, part_k, part_v = ctx.kernel.backward(
                    _query_view(d_o, group)[b],
                    _query_view(q, group)[b],
                    keys.windows(group, b),
                    values.windows(group, b),
                    _query_view(o, group)[b],
                    _query_view(lse[..., None], group)[b, ..., 0],
                    next(rests),
                    ctx.scale,
                )
                _query_view(dq, group)[b].copy_(part_q)
                _add_windows(dk[b], part_k, group)
                _add_windows(dv[b], part_v, group)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _gathered(q: Tensor, k: Tensor, v: Tensor, frames: Tensor, scale: float) -> Tensor:
    B, T, P, H, D = q.shape
    R = frames.shape[1]
    sources = frames.clamp(min=0).flatten().long()
    absent = (frames < 0).repeat_interleave(P, dim=1)  # [T, R*P]
    all_absent = absent.all(1)
    mask = torch.zeros(absent.shape, dtype=q.dtype, device=q.device).masked_fill(
        absent & ~all_absent[:, None], -torch.inf
    )

    def rows(x: Tensor) -> Tensor:  # [B*T, H, R*P, D]
        return x.index_select(1, sources).reshape(B * T, R * P, H, D).transpose(1, 2)

    # 0 * NaN: what an absent entry points at must not reach the sum.
    values = rows(v).masked_fill(absent.repeat(B, 1)[:, None, :, None], 0.0)
    o = F.scaled_dot_product_attention(
        q.reshape(B * T, P, H, D).transpose(1, 2),
        rows(k),
        values,
        attn_mask=mask.repeat(B, 1)[:, None, None, :].expand(B * T, H, P, R * P),
        scale=scale,
    )
    o = o.transpose(1, 2).reshape(B, T, P, H, D)
    return o.masked_fill(all_absent[:, None, None, None], 0.0)


def cross_frame_attention_sdpa(
    q: Tensor,  # [B, T, P, H, D]
    k: Tensor,  # [B, Tk, P, H, D]
    v: Tensor,  # [B, Tk, P, H, D]
    frames: Tensor,  # int32 [T, R]
    scale: float,
    return_lse: bool,
) -> tuple[Tensor, Tensor]:
    """Return output and lse (empty where K and V are gathered); lse has no gradient here."""
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    # Other devices are traced or fake: their values cannot be read either.
    is_readable = not torch.compiler.is_compiling() and q.device.type in ("cpu", "cuda")
    groups = _plan_of(frames, k.shape[1]) if is_readable else None
    kernel = None if groups is None else choose(q, k, v, needs_grad)
    if groups is None or kernel is None:
        if return_lse:
            raise RuntimeError(
                "cross_frame_attention: backend 'sdpa' gives an lse only by torch's flash and efficient kernels, "
                "which do not take this call, or whose frame table a first call outside of graph capture must see"
            )
        return _gathered(q, k, v, frames, scale), q.new_empty(0)
    if needs_grad:
        return CrossFrameSdpaFunction.apply(q, k, v, groups, scale, kernel)
    return _forward(q, k, v, groups, scale, kernel)[:2]
