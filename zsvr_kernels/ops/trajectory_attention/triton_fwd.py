"""Triton kernel of the forward of trajectory attention."""

from __future__ import annotations

import triton
import triton.language as tl

from zsvr_kernels.ops.trajectory_attention.triton_samples import (
    by_channel,
    by_head,
    by_query,
    channels,
    corner_weights,
    dot,
    fractions_of,
    is_inside,
    load_corners,
    load_record,
    mix,
    over_channels,
    tile_sites,
    unpack,
    words_of,
    zeros,
)


@triton.jit
def _trajectory_attention_fwd_kernel(
    q,  # [B, T, P, H, D]
    k,  # [B, Tk, P, H, D]
    v,  # [B, Tk, P, H, D]
    base,  # int32 [Bp, T, L, P]
    fractions,  # int32 [Bp, T, L, P] or fp32 [Bp, T, L, P, 2]
    frames,  # int32 [T, L]
    out,  # [B, T, P, H, D]
    lse,  # fp32 [B, T, P, H]
    q_b,  # strides, in units of UNIT words
    q_t,
    q_p,
    q_h,
    k_b,
    k_t,
    v_b,
    v_t,
    out_b,  # of `out` in units of OUT_UNIT numbers
    out_t,
    out_p,
    out_h,
    scale_log2,
    Bp,
    T,
    Tk,
    L,
    K_P: tl.constexpr,  # in words
    K_H: tl.constexpr,
    V_P: tl.constexpr,
    V_H: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    UNIT: tl.constexpr,
    OUT_UNIT: tl.constexpr,
    KIND: tl.constexpr,
    EXACT: tl.constexpr,
):
    # Computes: o = sum_l softmax_l(scale q . K_l) V_l over the live slots, and lse.
    # Grid: (B * T * (H / HEADS) * tiles of sites,), tiles innermost. Programs that run together take the slots in the
    #   same order, so they meet in the same source frames: those are read from memory once for each wave of programs.
    # Tiles: TILE_H * TILE_W queries x HEADS x BLOCK words; the tile is spatial, so that neighbours share corners in L1.
    # Traffic: a record (8 or 12 bytes) for each sample and program, 8 D numbers for each sample and head, mostly from
    #   L1 and L2; q and o once.
    # Numerics: float32 sums and online softmax in base 2; with one live slot the weight is exp2(0) = 1 exactly.
    P: tl.constexpr = HEIGHT * WIDTH
    TILES: tl.constexpr = ((HEIGHT + TILE_H - 1) // TILE_H) * ((WIDTH + TILE_W - 1) // TILE_W)
    GROUPS: tl.constexpr = H // HEADS
    Q: tl.constexpr = TILE_H * TILE_W
    pid = tl.program_id(0)
    i_tile = pid % TILES
    i_group = (pid // TILES) % GROUPS
    i_bt = pid // (TILES * GROUPS)
    i_t = i_bt % T
    i_b = i_bt // T
    b64 = i_b.to(tl.int64)
    t64 = i_t.to(tl.int64)
    q = words_of(q, KIND)
    k = words_of(k, KIND)
    v = words_of(v, KIND)

    o_site, m_q = tile_sites(i_tile, HEIGHT, WIDTH, TILE_H, TILE_W)
    o_head = i_group * HEADS + tl.arange(0, HEADS)
    o_c = tl.arange(0, BLOCK)
    # Tiles of BLOCK words.
    o_tile = by_head(o_head * (q_h * UNIT)) + by_query(o_site * (q_p * UNIT)) + by_channel(o_c)
    p_q = q + (b64 * q_b + t64 * q_t) * UNIT
    q_even, q_odd = unpack(tl.load(p_q + o_tile, mask=over_channels(m_q, o_c, WORDS, BLOCK), other=0), KIND)

    # What is known to the compiler is added last: it then needs no instructions, but becomes part of the loads.
    p_k = k + (b64 * k_b * UNIT + i_group * (HEADS * K_H))
    p_v = v + (b64 * v_b * UNIT + i_group * (HEADS * V_H))
    o_kh = by_head(tl.arange(0, HEADS) * K_H)
    o_vh = by_head(tl.arange(0, HEADS) * V_H)
    row = ((i_b % Bp) * T + i_t).to(tl.int64) * L * P
    p_base = base + row
    p_fractions = fractions + (2 * row if EXACT else row)
    p_frames = frames + i_t * L

    b_m = zeros(HEADS, Q, 1) - 3.4028234663852886e38
    b_l = zeros(HEADS, Q, 1)
    o_even = zeros(HEADS, Q, BLOCK)
    o_odd = zeros(HEADS, Q, BLOCK)
    # One slot ahead, so that the gather does not wait for its own addresses.
    cell, first, second = load_record(p_base, p_fractions, o_site, m_q, EXACT)
    o_next = o_site
    for i_l in range(0, L):
        frame = tl.load(p_frames + i_l)
        is_live = is_inside(cell, frame, Tk, HEIGHT, WIDTH)
        fx, fy = fractions_of(first, second, EXACT)
        w0, w1, w2, w3 = corner_weights(fx, fy, is_live, HEIGHT, WIDTH)
        m0 = over_channels(w0 > 0.0, o_c, WORDS, BLOCK)
        m1 = over_channels(w1 > 0.0, o_c, WORDS, BLOCK)
        m2 = over_channels(w2 > 0.0, o_c, WORDS, BLOCK)
        m3 = over_channels(w3 > 0.0, o_c, WORDS, BLOCK)
        f64 = frame.to(tl.int64)
        p_kc = p_k + f64 * k_t * UNIT + (by_query(cell * K_P) + by_channel(o_c)) + o_kh
        p_vc = p_v + f64 * v_t * UNIT + (by_query(cell * V_P) + by_channel(o_c)) + o_vh
        k0, k1, k2, k3 = load_corners(p_kc, K_P, WIDTH * K_P, m0, m1, m2, m3, HEIGHT, WIDTH)
        v0, v1, v2, v3 = load_corners(p_vc, V_P, WIDTH * V_P, m0, m1, m2, m3, HEIGHT, WIDTH)
        o_next += P
        cell, first, second = load_record(p_base, p_fractions, o_next, m_q & (o_next < L * P), EXACT)
        w0 = by_query(w0)
        w1 = by_query(w1)
        w2 = by_query(w2)
        w3 = by_query(w3)
        x_even, x_odd = mix(k0, k1, k2, k3, w0, w1, w2, w3, HEIGHT, WIDTH, KIND)
        # One number for each query and head.
        b_z = dot(q_even, q_odd, x_even, x_odd, KIND) * scale_log2
        b_z = tl.where(by_query(is_live), b_z, float("-inf"))
        b_max = tl.maximum(b_m, b_z)
        alpha = tl.exp2(b_m - b_max)
        b_p = tl.exp2(b_z - b_max)
        b_m = b_max
        b_l = b_l * alpha + b_p
        x_even, x_odd = mix(v0, v1, v2, v3, b_p * w0, b_p * w1, b_p * w2, b_p * w3, HEIGHT, WIDTH, KIND)
        o_even = o_even * alpha + x_even
        o_odd = o_odd * alpha + x_odd

    is_any = b_l != 0.0  # true of NaN: a score that is NaN shows in lse too
    b_l = tl.where(is_any, b_l, 1.0)
    b_o = channels(o_even, o_odd, KIND) / b_l
    SPAN: tl.constexpr = BLOCK if KIND == 0 else 2 * BLOCK
    o_d = tl.arange(0, SPAN)
    o_tile = by_head(o_head * (out_h * OUT_UNIT)) + by_query(o_site * (out_p * OUT_UNIT))
    p_out = out + (b64 * out_b + t64 * out_t) * OUT_UNIT + (o_tile + by_channel(o_d))
    tl.store(p_out, b_o.to(out.dtype.element_ty), mask=over_channels(m_q, o_d, D, SPAN))
    b_lse = tl.where(is_any, (b_m + tl.log2(b_l)) * 0.6931471805599453, float("-inf"))
    o_lse = by_query(o_site * H) + by_head(o_head)
    tl.store(lse + i_bt.to(tl.int64) * (P * H) + o_lse, b_lse, mask=by_query(m_q))
