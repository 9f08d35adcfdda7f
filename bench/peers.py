"""What users run instead of these operators, in the tested dtype; each is imported or written as one would write it.

A peer is a function of no arguments that returns the output ``[B, T, P, H, D]`` for the inputs it was made with. The
cost of gathering and concatenating K and V is part of it, as it is for users.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from zsvr_kernels.ops.correspondence_search.reference import correspondence_search_reference, link_score_reference
from zsvr_kernels.plain import PlainAttention
from zsvr_kernels.trajectories import Trajectories

Peer = Callable[[], Any]
FLEX_BLOCK = 64  # divides every P of shapes.py, so that every block is full and no mask is evaluated
FLEX_BLOCK_CUDA = 128  # what its GPU kernels take
EAGER_BYTES = {"cpu": 3 << 30, "cuda": 12 << 30}  # an eager peer whose largest intermediate passes this is left out


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile afresh for the current number of threads."""
    return torch.compile(function, fullgraph=True, dynamic=False)


# ---- cross-frame attention ----


def concatenated(x: Tensor, rows: Tensor) -> Tensor:
    """Return keys or values ``[B*T, H, R*P, D]`` of the listed frames; ``x [B, Tk, P, H, D]``, ``rows [T, R]``."""
    B, _, P, H, D = x.shape
    T, R = rows.shape
    listed = x.index_select(1, rows.flatten())  # [B, T*R, P, H, D]
    return listed.reshape(B * T, R * P, H, D).transpose(1, 2)


def sdpa_on_concat(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """Cross-frame attention by `scaled_dot_product_attention`; ``rows`` int64 ``[T, R]``, no absent entry."""
    queries = q.flatten(0, 1).transpose(1, 2)  # [B*T, H, P, D]
    o = F.scaled_dot_product_attention(queries, concatenated(k, rows), concatenated(v, rows))
    return o.transpose(1, 2).reshape(q.shape)


def eager_on_concat(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Tensor:
    """Cross-frame attention by two matrix products and a softmax."""
    queries = q.flatten(0, 1).transpose(1, 2)
    logits = queries @ concatenated(k, rows).transpose(-1, -2) * q.shape[-1] ** -0.5
    o = logits.softmax(-1) @ concatenated(v, rows)
    return o.transpose(1, 2).reshape(q.shape)


def frame_mask(rows: Tensor, P: int, block: int = FLEX_BLOCK) -> BlockMask:
    """Return FlexAttention's mask of a frame table: whole blocks only.

    Raises:
        ValueError: ``block`` does not divide ``P``, or a row lists a frame twice, which a mask cannot say.
    """
    if P % block or any(len(set(row)) != len(row) for row in rows.tolist()):
        raise ValueError("a block mask needs blocks that divide a frame and rows without repeats")
    T, R = rows.shape
    per_frame = P // block
    within = torch.arange(per_frame, device=rows.device)
    listed = (rows.sort(1).values[:, :, None] * per_frame + within).reshape(T, R * per_frame)
    indices = torch.zeros(T * per_frame, T * per_frame, dtype=torch.int32, device=rows.device)
    indices[:, : R * per_frame] = listed.repeat_interleave(per_frame, 0).int()
    counts = torch.full((T * per_frame,), R * per_frame, dtype=torch.int32, device=rows.device)
    return BlockMask.from_kv_blocks(
        torch.zeros_like(counts)[None, None],
        torch.zeros_like(indices)[None, None],
        counts[None, None],
        indices[None, None],
        BLOCK_SIZE=block,
    )


def flex(q: Tensor, k: Tensor, v: Tensor, mask: BlockMask, attend: Callable[..., Any]) -> Tensor:
    """Cross-frame attention by a compiled FlexAttention; its lowering takes no views made inside the graph."""

    def rows(x: Tensor) -> Tensor:
        return x.flatten(1, 2).transpose(1, 2)  # [B, H, T*P, D]

    o = attend(rows(q), rows(k), rows(v), block_mask=mask)
    return o.transpose(1, 2).reshape(q.shape)


def cross_frame_attention(
    q: Tensor,  # [B, T, P, H, D]
    k: Tensor,
    v: Tensor,
    frames: Tensor,  # int32 [T, R], no absent entry
) -> dict[str, Peer | str]:
    """Return the peers by name; a string instead of a peer says why there is none."""
    B, T, P, H, _ = q.shape
    R = frames.shape[1]
    rows = frames.long()
    peers: dict[str, Peer | str] = {"sdpa_concat": lambda: sdpa_on_concat(q, k, v, rows)}
    scores = B * T * H * P * R * P * q.element_size()
    if scores > EAGER_BYTES[q.device.type]:
        peers["eager"] = f"its scores take {scores / 2**30:.0f} GiB"
    else:
        peers["eager"] = lambda: eager_on_concat(q, k, v, rows)
    fast = compiled(eager_on_concat)
    peers["compiled"] = lambda: fast(q, k, v, rows)
    if q.device.type == "cuda":
        peers |= on_cuda(q, k, v, rows)
    block = FLEX_BLOCK if q.device.type == "cpu" else FLEX_BLOCK_CUDA
    if q.requires_grad and q.device.type == "cpu":
        peers["flex"] = "FlexAttention has no backward on CPU"
    elif P % block:
        peers["flex"] = f"its blocks of {block} do not divide a frame of {P} tokens"
    else:
        mask, attend = frame_mask(rows, P, block), compiled(flex_attention)
        peers["flex"] = lambda: flex(q, k, v, mask, attend)
    return peers


SDPA_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def on_cuda(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> dict[str, Peer | str]:
    """Return SDPA on concatenated frames by each of its GPU kernels, and FlashAttention where it is installed."""
    peers: dict[str, Peer | str] = {}
    for name, backend in SDPA_BACKENDS.items():

        def pinned(backend: SDPBackend = backend) -> Tensor:
            with sdpa_kernel(backend):
                return sdpa_on_concat(q, k, v, rows)

        peers[f"sdpa_{name}"] = pinned
    try:
        from flash_attn import flash_attn_func
    except ImportError as error:
        peers["flash_attn"] = f"it is not installed ({error})"
        return peers

    def flash_attn() -> Tensor:
        R = rows.shape[1]
        keys, values = (x.index_select(1, rows.flatten()).reshape(-1, R * x.shape[2], *x.shape[3:]) for x in (k, v))
        return flash_attn_func(q.flatten(0, 1), keys, values).reshape(q.shape)

    peers["flash_attn"] = flash_attn
    return peers


# ---- trajectory attention ----


def live_rows(trajectories: Trajectories) -> tuple[Tensor, Tensor, Tensor, tuple[int, int]]:
    """Return positions, live slots bool ``[B, T, L, P]``, rows int64 ``[T, L]`` and the grid, for the gathers above."""
    live = trajectories.valid & (trajectories.frames >= 0)[None, :, :, None]
    return trajectories.positions, live, trajectories.frames.long().clamp(min=0), trajectories.grid


def corner_attention(
    q: Tensor,  # [B, T, P, H, D]
    k: Tensor,
    v: Tensor,
    positions: Tensor,  # fp32 [B, T, L, P, 2]
    live: Tensor,  # bool [B, T, L, P]
    rows: Tensor,  # int64 [T, L], absent entries clamped to 0
    grid: tuple[int, int],
) -> Tensor:
    """Trajectory attention by gathering the four corners of K and of V (B = 1).

    q meets every corner before the corners are mixed: three times as fast under torch.compile as mixing first.
    """
    Hg, Wg = grid
    P, (H, D) = Hg * Wg, q.shape[3:]
    x, y = positions[0, ..., 0].clamp(0, Wg - 1), positions[0, ..., 1].clamp(0, Hg - 1)  # [T, L, P]
    x0, y0 = x.floor(), y.floor()
    fx, fy = (x - x0).to(q.dtype), (y - y0).to(q.dtype)
    left, top = x0.long(), y0.long()
    right, below = (left + 1).clamp(max=Wg - 1), (top + 1).clamp(max=Hg - 1)
    base = (rows * P)[..., None]
    corners = (
        (base + top * Wg + left, (1 - fx) * (1 - fy)),
        (base + top * Wg + right, fx * (1 - fy)),
        (base + below * Wg + left, (1 - fx) * fy),
        (base + below * Wg + right, fx * fy),
    )
    keys, values = k[0].reshape(-1, H, D), v[0].reshape(-1, H, D)  # [Tk*P, H, D]
    queries = q[0][:, None]  # [T, 1, P, H, D]
    dots = [(queries * keys[index]).sum(-1) * weight[..., None] for index, weight in corners]
    logits = (dots[0] + dots[1] + dots[2] + dots[3]) * D**-0.5  # [T, L, P, H]
    weights = logits.masked_fill(~live[0, ..., None], float("-inf")).softmax(1)
    parts = [(values[index] * (weights * weight[..., None])[..., None]).sum(1) for index, weight in corners]
    return (parts[0] + parts[1] + parts[2] + parts[3])[None]


def grid_sample_attention(
    q: Tensor,  # [B, T, P, H, D]
    k: Tensor,
    v: Tensor,
    positions: Tensor,  # fp32 [B, T, L, P, 2]
    live: Tensor,  # bool [B, T, L, P]
    rows: Tensor,  # int64 [T, L]
    grid: tuple[int, int],
) -> Tensor:
    """Trajectory attention by `grid_sample` (B = 1), in float32: its bf16 positions are off by tenths of a pixel."""
    Hg, Wg = grid
    T, L = rows.shape
    H, D = q.shape[3:]
    x, y = (positions[0] + 0.5).unbind(-1)  # no tensor of numbers from the host: no graph captures that
    where = torch.stack((x * (2 / Wg) - 1, y * (2 / Hg) - 1), -1).reshape(T * L, Hg, Wg, 2)

    def sample(source: Tensor) -> Tensor:
        images = source[0].float().reshape(-1, Hg, Wg, H * D).permute(0, 3, 1, 2)  # [Tk, C, Hg, Wg]
        listed = images.index_select(0, rows.flatten())
        sampled = F.grid_sample(listed, where, mode="bilinear", padding_mode="border", align_corners=False)
        return sampled.permute(0, 2, 3, 1).reshape(1, T, L, Hg * Wg, H, D)

    queries, keys, values = q.float()[:, :, None], sample(k), sample(v)
    logits = (queries * keys).sum(-1) * D**-0.5  # [1, T, L, P, H]
    weights = logits.masked_fill(~live[..., None], float("-inf")).softmax(2)
    return (weights[..., None] * values).sum(2).to(q.dtype)


def trajectory_attention(
    q: Tensor,  # [1, T, P, H, D]
    k: Tensor,
    v: Tensor,
    trajectories: Trajectories,
) -> dict[str, Peer | str]:
    """Return the peers by name; a string instead of a peer says why there is none."""
    arguments = (q, k, v, *live_rows(trajectories))
    fast = compiled(corner_attention)
    return {
        "compiled_gather": lambda: fast(*arguments),
        "eager_gather": lambda: corner_attention(*arguments),
        "eager_grid_sample": lambda: grid_sample_attention(*arguments),
    }


# ---- the whole layer ----


def slr_layer(
    module: PlainAttention,
    x: Tensor,
    rows: Tensor,
    trajectories: Trajectories,
    attend: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] = sdpa_on_concat,
) -> Tensor:
    """SLR attention as published projects write it: SDPA on concatenated K and V, then gathers along trajectories.

    Args:
        module: norm, projections, residual.
        x: ``[T, C, Hg, Wg]``.
        rows: frame table, int64 ``[T, R]``, no absent entry.
        trajectories: over the frames and the grid of x.
        attend: the short range; takes q, k, v and rows.
    """
    tokens = module.normalise(x.flatten(2).mT)
    q, k, v = module.qkv(tokens).unflatten(-1, (3, module.num_heads, module.head_dim))[None].unbind(3)
    short = attend(q, k, v, rows)
    y = module.proj(corner_attention(q, k, short, *live_rows(trajectories))[0].flatten(2))
    return x + y.mT.reshape(x.shape)


# ---- correspondence search ----


def normalised(x: Tensor) -> Tensor:
    return x.float() / torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True).clamp(min=1e-6)


def unfold_search(
    f_src: Tensor, f_dst: Tensor, centre: Tensor, grid: tuple[int, int], radius: int
) -> tuple[Tensor, Tensor]:
    """Search by `unfold`: the window of every site, then of every centre; ``centre`` int64 inside the grid."""
    Hg, Wg = grid
    N, P, C = f_src.shape
    side = 2 * radius + 1
    images = normalised(f_dst).mT.reshape(N, C, Hg, Wg)
    windows = F.unfold(images, side, padding=radius).reshape(N, C, side**2, P)
    there = F.unfold(torch.ones(1, 1, Hg, Wg, device=centre.device), side, padding=radius) > 0  # [1, side^2, P]
    index = centre[..., 1] * Wg + centre[..., 0]  # [N, P]
    windows = windows.gather(3, index[:, None, None].expand(-1, C, side**2, -1))
    cosines = (normalised(f_src).mT[:, :, None] * windows).sum(1)  # [N, side^2, P]
    inside = there.expand(N, -1, -1).gather(2, index[:, None].expand(-1, side**2, -1))
    score, best = cosines.masked_fill(~inside, float("-inf")).max(1)
    return index + (best // side - radius) * Wg + best % side - radius, score


def matmul_search(
    f_src: Tensor, f_dst: Tensor, centre: Tensor, grid: tuple[int, int], radius: int
) -> tuple[Tensor, Tensor]:
    """Search in the full correlation of both frames, masked to the windows; ``centre`` int64 inside the grid."""
    Hg, Wg = grid
    correlation = normalised(f_src) @ normalised(f_dst).mT  # [N, P, P]
    near_x = (torch.arange(Wg, device=centre.device) - centre[..., :1]).abs() <= radius  # [N, P, Wg]
    near_y = (torch.arange(Hg, device=centre.device) - centre[..., 1:]).abs() <= radius
    window = (near_y[..., :, None] & near_x[..., None, :]).flatten(2)
    score, site = correlation.masked_fill(~window, float("-inf")).max(2)
    return site, score


def correspondence_search(
    f_src: Tensor,  # [N, P, C]
    f_dst: Tensor,
    centre: Tensor,  # int32 [N, P, 2], inside the grid
    grid: tuple[int, int],
    radius: int,
) -> dict[str, Peer | str]:
    """Return the peers by name; a string instead of a peer says why there is none."""
    N, P, C = f_src.shape
    at = centre.long()
    fast = torch.compile(correspondence_search_reference, fullgraph=True, dynamic=False)
    peers: dict[str, Peer | str] = {
        "eager_unfold": lambda: unfold_search(f_src, f_dst, at, grid, radius),
        "bmm": lambda: matmul_search(f_src, f_dst, at, grid, radius),
        "eager": lambda: correspondence_search_reference(f_src, f_dst, centre, grid, radius),
        "compiled": lambda: fast(f_src, f_dst, centre, grid, radius),
    }
    for name, size in (("eager_unfold", N * C * (2 * radius + 1) ** 2 * P * 4), ("bmm", N * P * P * 4)):
        if size > EAGER_BYTES[f_src.device.type]:
            peers[name] = f"its largest tensor takes {size / 2**30:.0f} GiB"
    return peers


def link_score(f_src: Tensor, f_dst: Tensor, positions: Tensor, grid: tuple[int, int]) -> dict[str, Peer | str]:
    """Return the peers by name."""
    fast = torch.compile(link_score_reference, fullgraph=True, dynamic=False)
    return {
        "eager": lambda: link_score_reference(f_src, f_dst, positions, grid),
        "compiled": lambda: fast(f_src, f_dst, positions, grid),
    }
