"""Triton kernel of the backward of trajectory attention by source sites: dk and dv, without atomics."""

from __future__ import annotations

import triton
import triton.language as tl

from zsvr_kernels.ops.trajectory_attention.triton_samples import (
    channels,
    over_channels,
    tile_sites,
    unpack,
    words_of,
)


@triton.jit
def _trajectory_attention_bwd_sites_kernel(
    d_o,  # [B, T, P, H, D]
    q,  # [B, T, P, H, D]
    pairs,  # fp32 [clips, T, L, P, 2, H]: p, g
    delta,  # fp32 [clips, T, P, H]
    offsets,  # int64 [Bp*Tk*P + 1]
    samples,  # int32 [N]
    weights,  # fp32 [N]
    dk,  # [B, Tk, P, H, D], written if NEEDS_DK
    dv,  # [B, Tk, P, H, D], written if NEEDS_DV
    d_o_b,  # strides, in units of UNIT words
    d_o_t,
    d_o_p,
    d_o_h,
    q_b,
    q_t,
    q_p,
    q_h,
    scale,
    inverse_L,
    N,
    first_clip,
    Bp,
    T,
    Tk,
    L,
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
    NEEDS_DK: tl.constexpr,
    NEEDS_DV: tl.constexpr,
):
    # Computes: dk[site] = sum w scale p (g - delta) q and dv[site] = sum w p dO over the samples that read the site.
    # Grid: (clips * Tk * (H / HEADS) * tiles of sites,), tiles innermost.
    # Tiles: [ENTRIES, HEADS, TILE_H * TILE_W source sites, BLOCK words]; a program runs as long as its longest row.
    #   Rows list samples in one order, so neighbouring sites meet the same queries at about the same time.
    # Traffic: 2 D elements and 12 bytes for each entry and head, 8 bytes for each entry and program; dk, dv once.
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

    p_q = q + b64 * q_b * UNIT
    p_do = d_o + b64 * d_o_b * UNIT
    o_qh = (o_head * (q_h * UNIT))[None, :, None, None] + o_c[None, None, None, :]
    o_doh = (o_head * (d_o_h * UNIT))[None, :, None, None] + o_c[None, None, None, :]
    p_pairs = pairs + i_c.to(tl.int64) * T * L * (P * 2 * H)
    p_delta = delta + i_c.to(tl.int64) * T * (P * H)
    dk_even = tl.zeros([HEADS, S, BLOCK], tl.float32)
    dk_odd = tl.zeros([HEADS, S, BLOCK], tl.float32)
    dv_even = tl.zeros([HEADS, S, BLOCK], tl.float32)
    dv_odd = tl.zeros([HEADS, S, BLOCK], tl.float32)
    for n in range(0, longest, ENTRIES):
        # Tile: [ENTRIES, S].
        o_n = n + tl.arange(0, ENTRIES)
        m_n = o_n[:, None] < count[None, :]
        o_entry = begin[None, :] + o_n[:, None]
        sample = tl.load(samples + o_entry, mask=m_n, other=-1)
        b_w = tl.load(weights + o_entry, mask=m_n, other=0.0)
        m_n = sample.to(tl.uint32, bitcast=True) < T * L * P
        sample = tl.where(m_n, sample, 0)
        il = sample // P
        site = sample - il * P
        # il < 2^21 where IS_SHORT: the quotient is then never near enough to an integer to be rounded across it.
        i_t = ((il.to(tl.float32) + 0.5) * inverse_L).to(tl.int32) if IS_SHORT else il // L
        i_t64 = i_t.to(tl.int64)
        # Tile: [ENTRIES, HEADS, S].
        o_pair = (sample.to(tl.int64) * (2 * H))[:, None, :] + o_head[None, :, None]
        m_pair = m_n[:, None, :]
        b_p = tl.load(p_pairs + o_pair, mask=m_pair, other=0.0)
        b_a = b_p * b_w[:, None, :]
        m_row = m_n[:, None, :, None]
        if BLOCK != WORDS:
            m_row = m_row & (o_c < WORDS)[None, None, None, :]
        # Tile: [ENTRIES, HEADS, S, BLOCK].
        if NEEDS_DK:
            b_g = tl.load(p_pairs + (o_pair + H), mask=m_pair, other=0.0)
            o_delta = ((i_t64 * P + site) * H)[:, None, :] + o_head[None, :, None]
            b_delta = tl.load(p_delta + o_delta, mask=m_pair, other=0.0)
            o_q = (i_t64 * (q_t * UNIT) + site * (q_p * UNIT))[:, None, :, None] + o_qh
            x_even, x_odd = unpack(tl.load(p_q + o_q, mask=m_row, other=0), KIND)
            b_ds = (b_a * (b_g - b_delta))[:, :, :, None]
            dk_even += tl.sum(b_ds * x_even, 0)
            dk_odd += tl.sum(b_ds * x_odd, 0)
        if NEEDS_DV:
            o_do = (i_t64 * (d_o_t * UNIT) + site * (d_o_p * UNIT))[:, None, :, None] + o_doh
            x_even, x_odd = unpack(tl.load(p_do + o_do, mask=m_row, other=0), KIND)
            b_a = b_a[:, :, :, None]
            dv_even += tl.sum(b_a * x_even, 0)
            dv_odd += tl.sum(b_a * x_odd, 0)

    SPAN: tl.constexpr = BLOCK if KIND == 0 else 2 * BLOCK
    o_d = tl.arange(0, SPAN)
    m_out = over_channels(m_s, o_d, D, SPAN)
    o_tile = (o_site * (H * D))[None, :, None] + (o_head * D)[:, None, None] + o_d[None, None, :]
    o_frame = (b64 * Tk + i_j) * (P * H * D)
    if NEEDS_DK:
        b_dk = channels(dk_even, dk_odd, KIND) * scale
        tl.store(dk + o_frame + o_tile, b_dk.to(dk.dtype.element_ty), mask=m_out)
    if NEEDS_DV:
        b_dv = channels(dv_even, dv_odd, KIND)
        tl.store(dv + o_frame + o_tile, b_dv.to(dv.dtype.element_ty), mask=m_out)
