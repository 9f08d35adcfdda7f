"""Triton kernel of the backward of trajectory attention by samples: dpositions."""

from __future__ import annotations

import triton
import triton.language as tl

from zsvr_kernels.ops.trajectory_attention.triton_samples import (
    QUERIES_FIRST,
    by_channel,
    by_head,
    by_query,
    corner_weights,
    is_inside,
    load_corners,
    over_channels,
    split_pair,
    tile_sites,
    zeros,
)


@triton.jit
def clean(x, w):
    # A corner of weight zero keeps its derivative, unless it is not finite.
    x = x.to(tl.float32)
    return tl.where((w == 0.0) & (tl.abs(x) < float("inf")) | (w != 0.0), x, 0.0)


@triton.jit
def _trajectory_attention_bwd_samples_kernel(
    d_o,  # [B, T, P, H, D]
    q,  # [B, T, P, H, D]
    k,  # [B, Tk, P, H, D]
    v,  # [B, Tk, P, H, D]
    pairs,  # int64 [clips, T, L, P, H]: two float32, p and scale ds
    base,  # int32 [Bp, T, L, P]
    positions,  # fp32 [Bp, T, L, P, 2]
    frames,  # int32 [T, L]
    dpositions,  # fp32 [Bp, T, L, P, 2]
    d_o_b,
    d_o_t,
    d_o_p,
    d_o_h,
    q_b,
    q_t,
    q_p,
    q_h,
    k_b,
    k_t,
    k_p,
    k_h,
    v_b,
    v_t,
    v_p,
    v_h,  # strides in units of UNIT numbers
    first_clip,
    stop_clip,
    Bp,
    T,
    Tk,
    L,
    H: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    UNIT: tl.constexpr,
    IS_FIRST: tl.constexpr,
):
    # Computes: dx = sum over heads of scale ds q . dK/dx + p dO . dV/dx, dy alike; 0 where clamped or dead.
    # Grid: (Bp * T * L * tiles of sites,), tiles innermost.
    # Tiles: TILE_H * TILE_W samples x HEADS x BLOCK_D channels, for all heads and for the clips of an entry in turn.
    # Traffic: 10 H D elements for each sample and clip, 8 of them mostly from L1 and L2.
    # Numerics: float32, fractions from the positions themselves; clips add up in order (IS_FIRST: onto nothing).
    P: tl.constexpr = HEIGHT * WIDTH
    TILES: tl.constexpr = ((HEIGHT + TILE_H - 1) // TILE_H) * ((WIDTH + TILE_W - 1) // TILE_W)
    pid = tl.program_id(0)
    i_tile = pid % TILES
    i_row = pid // TILES  # (bp, t, l)
    i_tl = i_row % (T * L)
    i_bp = i_row // (T * L)
    i_t = i_tl // L
    o_site, m_q = tile_sites(i_tile, HEIGHT, WIDTH, TILE_H, TILE_W)
    o_sample = i_row.to(tl.int64) * P + o_site
    frame = tl.load(frames + i_tl)
    cell = tl.load(base + o_sample, mask=m_q, other=-1)
    is_live = is_inside(cell, frame, Tk, HEIGHT, WIDTH)
    x = tl.load(positions + 2 * o_sample, mask=is_live, other=0.0)
    y = tl.load(positions + 2 * o_sample + 1, mask=is_live, other=0.0)
    fx = tl.minimum(tl.maximum(x, 0.0), WIDTH - 1.0) - (cell % WIDTH).to(tl.float32)
    fy = tl.minimum(tl.maximum(y, 0.0), HEIGHT - 1.0) - (cell // WIDTH).to(tl.float32)
    w0, w1, w2, w3 = corner_weights(fx, fy, is_live, HEIGHT, WIDTH)
    w0 = by_query(w0)
    w1 = by_query(w1)
    w2 = by_query(w2)
    w3 = by_query(w3)
    fx = by_query(fx)
    fy = by_query(fy)

    o_d = tl.arange(0, BLOCK_D)
    m_qd = over_channels(is_live, o_d, D, BLOCK_D)
    t64 = i_t.to(tl.int64) * UNIT
    f64 = frame.to(tl.int64) * UNIT
    b_x = zeros(HEADS, TILE_H * TILE_W, BLOCK_D)
    b_y = zeros(HEADS, TILE_H * TILE_W, BLOCK_D)
    # The first clip of this launch that reads entry i_bp.
    first = first_clip + (i_bp - first_clip % Bp + Bp) % Bp
    stop = tl.where(frame.to(tl.uint32, bitcast=True) < Tk, stop_clip, first)
    i_b64 = first.to(tl.int64)
    for _ in range(first, stop, Bp):
        b64 = i_b64 * UNIT
        p_q = q + b64 * q_b + t64 * q_t
        p_do = d_o + b64 * d_o_b + t64 * d_o_t
        p_k = k + b64 * k_b + f64 * k_t
        p_v = v + b64 * v_b + f64 * v_t
        c64 = i_b64 - first_clip
        i_b64 += Bp
        p_pairs = pairs + (c64 * (T * L) + i_tl) * (P * H)
        for i_h in range(0, H, HEADS):
            o_head = i_h + tl.arange(0, HEADS)
            # One number for each query and head.
            o_pair = by_query(o_site * H) + by_head(o_head)
            b_p, b_ds = split_pair(tl.load(p_pairs + o_pair, mask=by_query(is_live), other=0))
            # Tiles of BLOCK_D channels.
            o_tile = by_head(o_head * (q_h * UNIT)) + by_query(o_site * (q_p * UNIT))
            b_q = tl.load(p_q + (o_tile + by_channel(o_d)), mask=m_qd, other=0.0).to(tl.float32) * b_ds
            o_tile = by_head(o_head * (d_o_h * UNIT)) + by_query(o_site * (d_o_p * UNIT))
            b_do = tl.load(p_do + (o_tile + by_channel(o_d)), mask=m_qd, other=0.0).to(tl.float32) * b_p
            o_tile = by_head(o_head * (k_h * UNIT)) + by_query(cell * (k_p * UNIT))
            p_x = p_k + (o_tile + by_channel(o_d))
            c0, c1, c2, c3 = load_corners(p_x, k_p * UNIT, WIDTH * k_p * UNIT, m_qd, m_qd, m_qd, m_qd, HEIGHT, WIDTH)
            c0 = clean(c0, w0)
            c1 = clean(c1, w1)
            c2 = clean(c2, w2)
            c3 = clean(c3, w3)
            b_x += b_q * ((1.0 - fy) * (c1 - c0) + fy * (c3 - c2))
            b_y += b_q * ((1.0 - fx) * (c2 - c0) + fx * (c3 - c1))
            o_tile = by_head(o_head * (v_h * UNIT)) + by_query(cell * (v_p * UNIT))
            p_x = p_v + (o_tile + by_channel(o_d))
            c0, c1, c2, c3 = load_corners(p_x, v_p * UNIT, WIDTH * v_p * UNIT, m_qd, m_qd, m_qd, m_qd, HEIGHT, WIDTH)
            c0 = clean(c0, w0)
            c1 = clean(c1, w1)
            c2 = clean(c2, w2)
            c3 = clean(c3, w3)
            b_x += b_do * ((1.0 - fy) * (c1 - c0) + fy * (c3 - c2))
            b_y += b_do * ((1.0 - fx) * (c2 - c0) + fx * (c3 - c1))
    HEAD_AXIS: tl.constexpr = 1 if QUERIES_FIRST else 0
    # On the far border itself both corners of the reference are the border's site.
    dx = tl.where((x >= 0.0) & (x < WIDTH - 1.0), tl.sum(tl.sum(b_x, 2), HEAD_AXIS), 0.0)
    dy = tl.where((y >= 0.0) & (y < HEIGHT - 1.0), tl.sum(tl.sum(b_y, 2), HEAD_AXIS), 0.0)
    if not IS_FIRST:
        dx += tl.load(dpositions + 2 * o_sample, mask=m_q, other=0.0)
        dy += tl.load(dpositions + 2 * o_sample + 1, mask=m_q, other=0.0)
    tl.store(dpositions + 2 * o_sample, dx, mask=m_q)
    tl.store(dpositions + 2 * o_sample + 1, dy, mask=m_q)
