"""Triton kernel of the backward of trajectory attention by queries: dq, and what the other two kernels start from."""

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
    join_pair,
    load_corners,
    load_record,
    mix,
    over_channels,
    split_pair,
    tile_sites,
    unpack,
    words_of,
    zeros,
)


@triton.jit
def _trajectory_attention_bwd_queries_kernel(
    d_o,  # [B, T, P, H, D]
    dlse,  # fp32 [B, T, P, H], read if HAS_DLSE
    q,  # [B, T, P, H, D]
    k,  # [B, Tk, P, H, D]
    v,  # [B, Tk, P, H, D]
    lse,  # fp32 [B, T, P, H]
    base,  # int32 [Bp, T, L, P]
    fractions,  # int32 [Bp, T, L, P] or fp32 [Bp, T, L, P, 2]
    frames,  # int32 [T, L]
    dq,  # [B, T, P, H, D], written if NEEDS_DQ
    pairs,  # int64 [clips, T, L, P, H], written if NEEDS_PAIRS: two float32, p and scale ds
    d_o_b,  # strides, in units of UNIT words
    d_o_t,
    d_o_p,
    d_o_h,
    q_b,
    q_t,
    q_p,
    q_h,
    k_b,
    k_t,
    v_b,
    v_t,
    scale,
    first_clip,
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
    KIND: tl.constexpr,
    EXACT: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    NEEDS_DQ: tl.constexpr,
    NEEDS_PAIRS: tl.constexpr,
):
    # Computes: p_l = exp(z_l - lse) and ds_l = p_l (dO . V_l - delta) of every sample, and dq = scale sum ds_l K_l.
    # Grid: (clips * T * (H / HEADS) * tiles of sites,), as the forward's.
    # Tiles: TILE_H * TILE_W queries x HEADS x BLOCK words.
    # Traffic: the forward's gathers; 8 bytes for each sample and head are written, read again and written.
    # Numerics: float32. delta is known after the last slot only, so dq = scale (sum p g K - delta sum p K) and ds is
    #   put in g's place at the end; in float32 (EXACT) g counts from the g of the most probable slot so far, as the
    #   difference would lose digits.
    P: tl.constexpr = HEIGHT * WIDTH
    TILES: tl.constexpr = ((HEIGHT + TILE_H - 1) // TILE_H) * ((WIDTH + TILE_W - 1) // TILE_W)
    GROUPS: tl.constexpr = H // HEADS
    Q: tl.constexpr = TILE_H * TILE_W
    LOG2_E: tl.constexpr = 1.4426950408889634
    pid = tl.program_id(0)
    i_tile = pid % TILES
    i_group = (pid // TILES) % GROUPS
    i_ct = pid // (TILES * GROUPS)
    i_t = i_ct % T
    i_b = first_clip + i_ct // T
    b64 = i_b.to(tl.int64)
    t64 = i_t.to(tl.int64)
    d_o = words_of(d_o, KIND)
    q = words_of(q, KIND)
    k = words_of(k, KIND)
    v = words_of(v, KIND)

    o_site, m_q = tile_sites(i_tile, HEIGHT, WIDTH, TILE_H, TILE_W)
    o_head = i_group * HEADS + tl.arange(0, HEADS)
    o_c = tl.arange(0, BLOCK)
    m_tile = over_channels(m_q, o_c, WORDS, BLOCK)
    # Tiles of BLOCK words.
    o_tile = by_head(o_head * (q_h * UNIT)) + by_query(o_site * (q_p * UNIT)) + by_channel(o_c)
    p_q = q + (b64 * q_b + t64 * q_t) * UNIT
    q_even, q_odd = unpack(tl.load(p_q + o_tile, mask=m_tile, other=0), KIND)
    o_tile = by_head(o_head * (d_o_h * UNIT)) + by_query(o_site * (d_o_p * UNIT)) + by_channel(o_c)
    p_do = d_o + (b64 * d_o_b + t64 * d_o_t) * UNIT
    do_even, do_odd = unpack(tl.load(p_do + o_tile, mask=m_tile, other=0), KIND)
    # One number for each query and head.
    o_row = by_query(o_site * H) + by_head(o_head)
    bt64 = (b64 * T + i_t) * (P * H)
    b_lse = tl.load(lse + bt64 + o_row, mask=by_query(m_q), other=0.0)
    b_lse = tl.where(b_lse == float("-inf"), 0.0, b_lse) * LOG2_E

    p_k = k + (b64 * k_b * UNIT + i_group * (HEADS * K_H))
    p_v = v + (b64 * v_b * UNIT + i_group * (HEADS * V_H))
    o_kh = by_head(tl.arange(0, HEADS) * K_H)
    o_vh = by_head(tl.arange(0, HEADS) * V_H)
    row = ((i_b % Bp) * T + i_t).to(tl.int64) * L * P
    p_base = base + row
    p_fractions = fractions + (2 * row if EXACT else row)
    p_frames = frames + i_t * L
    p_pairs = pairs + i_ct.to(tl.int64) * L * (P * H) + o_row
    b_delta = zeros(HEADS, Q, 1)
    b_sum = zeros(HEADS, Q, 1)
    b_most = zeros(HEADS, Q, 1)
    b_centre = zeros(HEADS, Q, 1)
    pk_even = zeros(HEADS, Q, BLOCK)
    pk_odd = zeros(HEADS, Q, BLOCK)
    pgk_even = zeros(HEADS, Q, BLOCK)
    pgk_odd = zeros(HEADS, Q, BLOCK)
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
        v0, v1, v2, v3 = load_corners(p_vc, V_P, WIDTH * V_P, m0, m1, m2, m3, HEIGHT, WIDTH)
        k0, k1, k2, k3 = load_corners(p_kc, K_P, WIDTH * K_P, m0, m1, m2, m3, HEIGHT, WIDTH)
        o_next += P
        cell, first, second = load_record(p_base, p_fractions, o_next, m_q & (o_next < L * P), EXACT)
        w0 = by_query(w0)
        w1 = by_query(w1)
        w2 = by_query(w2)
        w3 = by_query(w3)
        # V first: of it only g is kept, while K goes into dq.
        v_even, v_odd = mix(v0, v1, v2, v3, w0, w1, w2, w3, HEIGHT, WIDTH, KIND)
        # One number for each query and head.
        b_g = dot(do_even, do_odd, v_even, v_odd, KIND)
        k_even, k_odd = mix(k0, k1, k2, k3, w0, w1, w2, w3, HEIGHT, WIDTH, KIND)
        b_z = dot(q_even, q_odd, k_even, k_odd, KIND) * (scale * LOG2_E)
        b_p = tl.exp2(tl.where(by_query(is_live), b_z - b_lse, float("-inf")))
        if EXACT:
            b_next = tl.where(b_p > b_most, b_g, b_centre)
            b_move = b_centre - b_next
            b_centre = b_next
            b_most = tl.maximum(b_most, b_p)
            b_delta += b_move * b_sum
            b_sum += b_p
            if NEEDS_DQ:
                pgk_even += b_move * pk_even
                pgk_odd += b_move * pk_odd
        b_pg = b_p * (b_g - b_centre)
        b_delta += b_pg
        if NEEDS_PAIRS:
            tl.store(p_pairs, join_pair(b_p, b_g), mask=by_query(m_q))
            p_pairs += P * H
        if NEEDS_DQ:
            pk_even += b_p * k_even
            pk_odd += b_p * k_odd
            pgk_even += b_pg * k_even
            pgk_odd += b_pg * k_odd

    if HAS_DLSE:
        b_delta -= tl.load(dlse + bt64 + o_row, mask=by_query(m_q), other=0.0)
    if NEEDS_PAIRS:
        tl.debug_barrier()  # the program's own stores, by other threads
        p_pairs = pairs + i_ct.to(tl.int64) * L * (P * H) + o_row
        for _ in range(0, L):
            b_p, b_g = split_pair(tl.load(p_pairs, mask=by_query(m_q), other=0))
            b_ds = b_p * ((b_g - b_centre) - b_delta) * scale
            tl.store(p_pairs, join_pair(b_p, b_ds), mask=by_query(m_q))
            p_pairs += P * H
    if NEEDS_DQ:
        b_dq = channels(pgk_even - b_delta * pk_even, pgk_odd - b_delta * pk_odd, KIND) * scale
        SPAN: tl.constexpr = BLOCK if KIND == 0 else 2 * BLOCK
        o_d = tl.arange(0, SPAN)
        o_tile = by_query(o_site * (H * D)) + by_head(o_head * D) + by_channel(o_d)
        tl.store(dq + bt64 * D + o_tile, b_dq.to(dq.dtype.element_ty), mask=over_channels(m_q, o_d, D, SPAN))
