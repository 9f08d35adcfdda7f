"""Triton kernel of the backward of trajectory attention by source sites: dk and dv, without atomics."""

from __future__ import annotations

import triton
import triton.language as tl

from zsvr_kernels.ops.trajectory_attention.triton_samples import (
    by_channel,
    by_head,
    by_query,
    channels,
    over_channels,
    split_pair,
    tile_sites,
    unpack,
    words_of,
    zeros,
)


@triton.jit
def _trajectory_attention_bwd_sites_kernel(
    d_o,  # [B, T, P, H, D]
    q,  # [B, T, P, H, D]
    pairs,  # int64 [clips, T, L, P, H]: two float32, p and scale ds
    offsets,  # int64 [Bp*Tk*P + 1]
    samples,  # int32 [N]
    weights,  # fp32 [N]
    dk,  # [B, Tk, P, H, D], written if NEEDS_DK
    dv,  # [B, Tk, P, H, D], written if NEEDS_DV
    d_o_b,  # strides, in units of UNIT words
    d_o_t,
    q_b,
    q_t,
    inverse_L,
    N,
    first_clip,
    Bp,
    T,
    Tk,
    L,
    DO_P: tl.constexpr,  # in words
    DO_H: tl.constexpr,
    Q_P: tl.constexpr,
    Q_H: tl.constexpr,
    H: tl.constexpr,
    D: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    ENTRIES: tl.constexpr,
    UNIT: tl.constexpr,
    KIND: tl.constexpr,
    IS_SHORT: tl.constexpr,
    IS_FLAT: tl.constexpr,
    NEEDS_DK: tl.constexpr,
    NEEDS_DV: tl.constexpr,
):
    # Computes: dk[site] = sum w scale ds q and dv[site] = sum w p dO over the samples that read the site.
    # Grid: (clips * Tk * (H / HEADS) * tiles of sites,), tiles innermost.
    # Tiles: TILE_H * TILE_W source sites x HEADS x BLOCK words, ENTRIES at a time; a program runs as long as its
    #   longest row. Rows list samples in one order, so neighbouring sites meet the same queries at about the same time.
    # Traffic: 2 D numbers and 8 bytes for each entry and head, 8 bytes for each entry and program; dk, dv once.
    # Numerics: float32 sums in the order of the index.
    P: tl.constexpr = HEIGHT * WIDTH
    TILES: tl.constexpr = ((HEIGHT + TILE_H - 1) // TILE_H) * ((WIDTH + TILE_W - 1) // TILE_W)
    GROUPS: tl.constexpr = H // HEADS
    S: tl.constexpr = TILE_H * TILE_W
    pid = tl.program_id(0)
    i_tile = pid % TILES
    i_group = (pid // TILES) % GROUPS
    i_cj = pid // (TILES * GROUPS)
    i_j = i_cj % Tk
    i_c = i_cj // Tk
    i_b = first_clip + i_c
    b64 = i_b.to(tl.int64)
    d_o = words_of(d_o, KIND)
    q = words_of(q, KIND)

    o_site, m_s = tile_sites(i_tile, HEIGHT, WIDTH, TILE_H, TILE_W)
    o_head = i_group * HEADS + tl.arange(0, HEADS)
    o_c = tl.arange(0, BLOCK)
    row = ((i_b % Bp) * Tk + i_j).to(tl.int64) * P + o_site
    # Held inside the index whatever the offsets say.
    begin = tl.maximum(tl.load(offsets + row, mask=m_s, other=0), 0)
    end = tl.minimum(tl.load(offsets + row + 1, mask=m_s, other=0), N)
    count = tl.maximum(end - begin, 0).to(tl.int32)
    longest = tl.max(count, 0)

    p_q = q + (b64 * q_b * UNIT + i_group * (HEADS * Q_H))
    p_do = d_o + (b64 * d_o_b * UNIT + i_group * (HEADS * DO_H))
    p_pairs = pairs + (i_c.to(tl.int64) * T * L * (P * H) + i_group * HEADS)
    o_h = tl.arange(0, HEADS)
    p_samples = samples + begin
    p_weights = weights + begin
    dk_even = zeros(HEADS, S, BLOCK)
    dk_odd = zeros(HEADS, S, BLOCK)
    dv_even = zeros(HEADS, S, BLOCK)
    dv_odd = zeros(HEADS, S, BLOCK)
    for n in range(0, longest, ENTRIES):
        for u in tl.static_range(ENTRIES):
            # One number for each site.
            sample = tl.load(p_samples + u, mask=n + u < count, other=-1)
            b_w = tl.load(p_weights + u, mask=n + u < count, other=0.0)
            m_n = sample.to(tl.uint32, bitcast=True) < T * L * P
            il = sample // P
            site = sample - il * P
            # il < 2^21 where IS_SHORT: the quotient is then never near enough to an integer to be rounded across it.
            i_t = ((il.to(tl.float32) + 0.5) * inverse_L).to(tl.int32) if IS_SHORT else il // L
            o_pair = sample * H if IS_FLAT else sample.to(tl.int64) * H
            # One number for each site and head.
            p_pair = p_pairs + by_query(o_pair) + by_head(o_h)
            b_p, b_ds = split_pair(tl.load(p_pair, mask=by_query(m_n), other=0))
            m_row = over_channels(m_n, o_c, WORDS, BLOCK)
            # Tiles of BLOCK words.
            if NEEDS_DK:
                o_row = (i_t * P + site) * Q_P if IS_FLAT else i_t.to(tl.int64) * q_t * UNIT + site * Q_P
                p_x = p_q + (by_query(o_row) + by_channel(o_c)) + by_head(o_h * Q_H)
                x_even, x_odd = unpack(tl.load(p_x, mask=m_row, other=0), KIND)
                b_ds = b_ds * by_query(b_w)
                dk_even += b_ds * x_even
                dk_odd += b_ds * x_odd
            if NEEDS_DV:
                o_row = (i_t * P + site) * DO_P if IS_FLAT else i_t.to(tl.int64) * d_o_t * UNIT + site * DO_P
                p_x = p_do + (by_query(o_row) + by_channel(o_c)) + by_head(o_h * DO_H)
                x_even, x_odd = unpack(tl.load(p_x, mask=m_row, other=0), KIND)
                b_p = b_p * by_query(b_w)
                dv_even += b_p * x_even
                dv_odd += b_p * x_odd
        p_samples += ENTRIES
        p_weights += ENTRIES

    SPAN: tl.constexpr = BLOCK if KIND == 0 else 2 * BLOCK
    o_d = tl.arange(0, SPAN)
    m_out = over_channels(m_s, o_d, D, SPAN)
    o_tile = by_query(o_site * (H * D)) + by_head(o_head * D) + by_channel(o_d)
    o_frame = (b64 * Tk + i_j) * (P * H * D)
    if NEEDS_DK:
        b_dk = channels(dk_even, dk_odd, KIND)
        tl.store(dk + o_frame + o_tile, b_dk.to(dk.dtype.element_ty), mask=m_out)
    if NEEDS_DV:
        b_dv = channels(dv_even, dv_odd, KIND)
        tl.store(dv + o_frame + o_tile, b_dv.to(dv.dtype.element_ty), mask=m_out)
