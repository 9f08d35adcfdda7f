"""Cross-frame attention on GPUs, backward: the inverse of the frame table, then dq, then dk and dv. No atomics."""

import triton
import triton.language as tl

from zsvr_kernels.ops.cross_frame_attention.triton_fwd import (
    LOG2_E,
    LOG2_E_HIGH,
    LOG2_E_LOW,
    decode,
    entries_of,
    find_rows,
    high_part,
    load_rows,
    products,
    rows_of,
    store_rows,
)


@triton.jit
def _inverse_frames_kernel(
    frames,  # int32 [T, R]
    inverse,  # int32 [2, Tk]: where a source frame's users begin in `users`, and how many they are
    users,  # int32 [T * R]
    Tk,
    R,
    total,  # T * R
    BLOCK: tl.constexpr,
):
    # Computes: for source frame j the query frames that list it, ascending, one for every time they do.
    # Grid: (Tk,).
    # Tiles: the table, BLOCK entries at a time, twice: where j's users begin, then who they are.
    # Traffic: 8 T R bytes read per program, from cache.
    # Numerics: integers; entries outside 0..Tk-1 are nobody's.
    j = tl.program_id(0)
    before = 0
    for start in range(0, total, BLOCK):
        o_entry = start + tl.arange(0, BLOCK)
        b_frame = tl.load(frames + o_entry, mask=o_entry < total, other=-1)
        before += tl.sum(((b_frame >= 0) & (b_frame < j)).to(tl.int32))
    found = 0
    for start in range(0, total, BLOCK):
        o_entry = start + tl.arange(0, BLOCK)
        b_hit = tl.load(frames + o_entry, mask=o_entry < total, other=-1) == j
        o_user = before + found + tl.cumsum(b_hit.to(tl.int32), 0) - 1
        tl.store(users + o_user, o_entry // R, mask=b_hit)
        found += tl.sum(b_hit.to(tl.int32))
    tl.store(inverse + j, before)
    tl.store(inverse + Tk + j, found)


@triton.jit
def _cross_frame_attention_bwd_dq_kernel(
    q,  # [B, T, P, H, D]; every batch and frame stride counts units of ALIGN elements
    k,  # [B, Tk, P, H, D]
    v,  # [B, Tk, P, H, D]
    o,  # [B, T, P, H, D]
    d_o,  # [B, T, P, H, D]
    lse,  # float32 [B, T, P, H]
    dlse,  # float32 [B, T, P, H], with HAS_DLSE
    frames,  # int32 [T, R]
    dq,  # [B, T, P, H, D], with NEEDS_DQ
    rows,  # float32 [2 or 3, B, H, T, P], written for dk and dv: lse log2(e), delta; EXACT: the rest of the first
    scale,
    scale_log2,  # |scale| log2(e)
    plane,  # B H T P
    T,
    Tk,
    H,
    R,
    steps,  # key tiles of a query frame
    q_batch,
    q_frame,
    k_batch,
    k_frame,
    v_batch,
    v_frame,
    o_batch,
    o_frame,
    do_batch,
    do_frame,
    Q_SITE: tl.constexpr,
    Q_HEAD: tl.constexpr,
    K_SITE: tl.constexpr,
    K_HEAD: tl.constexpr,
    V_SITE: tl.constexpr,
    V_HEAD: tl.constexpr,
    O_SITE: tl.constexpr,
    O_HEAD: tl.constexpr,
    DO_SITE: tl.constexpr,
    DO_HEAD: tl.constexpr,
    ALIGN: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,  # channels of the first tile, and of the second (0: none)
    D2: tl.constexpr,
    NEGATIVE: tl.constexpr,  # scale < 0
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,  # float32: lse log2(e) in two parts
    HAS_DLSE: tl.constexpr,
    NEEDS_DQ: tl.constexpr,
    ADDS: tl.constexpr,
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Computes: delta = rowsum(d_o o) - dlse, dS = P (d_o V^T - delta), dq = scale dS K.
    # Grid: (query tiles x T x H x B), as in the forward.
    # Tiles: BLOCK_M queries stay; BLOCK_N keys at a time; channels as D1 + D2.
    # Traffic: q, o, d_o, dq once, 12 bytes per row written; K and V as in the forward.
    # Numerics: the forward's scores, operand for operand; float32 but for dS, which meets K in k's dtype.
    i_tile, i_t, i_h, i_b = decode(tl.program_id(0), (P + BLOCK_M - 1) // BLOCK_M, T, H)
    t, h = i_t.to(tl.int64), i_h.to(tl.int64)
    p_frames = frames + i_t * R
    p_k = k + i_b * k_batch * ALIGN + h * K_HEAD
    p_v = v + i_b * v_batch * ALIGN + h * V_HEAD
    p_do = d_o + (i_b * do_batch + t * do_frame) * ALIGN + h * DO_HEAD
    p_o = o + (i_b * o_batch + t * o_frame) * ALIGN + h * O_HEAD
    o_m = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < P
    o_q = o_m.to(tl.int64) if WIDE else o_m

    b_do1 = load_rows(p_do, o_q, m_m, DO_SITE, 0, D1, D)
    b_do2 = load_rows(p_do, o_q, m_m, DO_SITE, D1, D2, D) if D2 > 0 else b_do1
    b_o = load_rows(p_o, o_q, m_m, O_SITE, 0, D1, D)
    b_delta = tl.sum(b_do1.to(tl.float32) * b_o.to(tl.float32), 1)
    if D2 > 0:
        b_o = load_rows(p_o, o_q, m_m, O_SITE, D1, D2, D)
        b_delta += tl.sum(b_do2.to(tl.float32) * b_o.to(tl.float32), 1)
    o_lse = (i_b * T + i_t) * P * H + o_m * H + i_h
    b_lse = tl.load(lse + o_lse, mask=m_m, other=-float("inf"))
    m_live = b_lse != -float("inf")
    b_lse = tl.where(m_live, b_lse, 0.0)
    if HAS_DLSE:
        b_delta -= tl.load(dlse + o_lse, mask=m_m, other=0.0)
    b_delta = tl.where(m_live, b_delta, 0.0)
    if EXACT:
        b_high = high_part(b_lse)
        b_low = (b_lse - b_high) * LOG2_E_HIGH + b_lse * LOG2_E_LOW
        b_high = b_high * LOG2_E_HIGH
    else:
        b_high = b_lse * LOG2_E
        b_low = b_high
    p_rows = rows + ((i_b * H + i_h) * T + i_t) * P + o_m
    tl.store(p_rows, b_high, mask=m_m)
    tl.store(p_rows + plane, b_delta, mask=m_m)
    if EXACT:
        tl.store(p_rows + plane + plane, b_low, mask=m_m)

    if NEEDS_DQ:
        p_q = q + (i_b * q_batch + t * q_frame) * ALIGN + h * Q_HEAD
        b_q1 = load_rows(p_q, o_q, m_m, Q_SITE, 0, D1, D)
        b_q2 = load_rows(p_q, o_q, m_m, Q_SITE, D1, D2, D) if D2 > 0 else b_q1
        b_dq1 = tl.zeros([BLOCK_M, D1], tl.float32)
        b_dq2 = tl.zeros([BLOCK_M, D2], tl.float32) if D2 > 0 else b_delta
        entry = entries_of(0, p_frames, R, P, BLOCK_N, PACKED)
        for step in range(0, steps):
            frame, first, site, m_n, present = find_rows(step, entry, Tk, P, BLOCK_N, PACKED, WIDE)
            entry = entries_of(step + 1, p_frames, R, P, BLOCK_N, PACKED)
            p_tile = rows_of(p_k, frame, k_frame, ALIGN, first, K_SITE, PACKED)
            b_k1 = load_rows(p_tile, site, m_n, K_SITE, 0, D1, D)
            b_k2 = load_rows(p_tile, site, m_n, K_SITE, D1, D2, D) if D2 > 0 else b_k1
            b_s = products(b_q1, b_q2, b_k1, b_k2, D2, PRECISION)  # [BLOCK_M, BLOCK_N]
            if NEGATIVE:
                b_s = -b_s
            if PACKED or P % BLOCK_N != 0:
                b_s = tl.where(m_n[None, :], b_s, -float("inf"))
            b_minus = b_high if PACKED else tl.where(present, b_high, float("inf"))
            b_s = b_s * scale_log2 - b_minus[:, None]
            if EXACT:
                b_s -= b_low[:, None]
            b_p = tl.exp2(b_s)
            p_tile = rows_of(p_v, frame, v_frame, ALIGN, first, V_SITE, PACKED)
            b_v1 = load_rows(p_tile, site, m_n, V_SITE, 0, D1, D)
            b_v2 = load_rows(p_tile, site, m_n, V_SITE, D1, D2, D) if D2 > 0 else b_v1
            b_ds = b_p * (products(b_do1, b_do2, b_v1, b_v2, D2, PRECISION) - b_delta[:, None])
            b_ds = b_ds.to(b_k1.dtype)
            b_dq1 = tl.dot(b_ds, b_k1, b_dq1, input_precision=PRECISION)
            if D2 > 0:
                b_dq2 = tl.dot(b_ds, b_k2, b_dq2, input_precision=PRECISION)
        m_add = m_live[:, None]
        p_dq = dq + ((i_b * T + i_t) * P * H + i_h) * D
        store_rows(p_dq, o_q, m_m, tl.where(m_add, b_dq1 * scale, 0.0), H * D, 0, D1, D, ADDS)
        if D2 > 0:
            store_rows(p_dq, o_q, m_m, tl.where(m_add, b_dq2 * scale, 0.0), H * D, D1, D2, D, ADDS)


@triton.jit
def _cross_frame_attention_bwd_dkv_kernel(
    q,  # [B, T, P, H, D]; every batch and frame stride counts units of ALIGN elements
    k,  # [B, Tk, P, H, D]
    v,  # [B, Tk, P, H, D]
    d_o,  # [B, T, P, H, D]
    rows,  # float32 [2 or 3, B, H, T, P]: lse log2(e), delta; EXACT: the rest of the first
    inverse,  # int32 [2, Tk]: where a source frame's users begin in `users`, and how many they are
    users,  # int32 [T * R]
    dk,  # [B, Tk, P, H, D], with NEEDS_DK
    dv,  # [B, Tk, P, H, D], with NEEDS_DV
    scale,
    scale_log2,  # |scale| log2(e)
    plane,  # B H T P
    T,
    Tk,
    H,
    q_batch,
    q_frame,
    k_batch,
    k_frame,
    v_batch,
    v_frame,
    do_batch,
    do_frame,
    Q_SITE: tl.constexpr,
    Q_HEAD: tl.constexpr,
    K_SITE: tl.constexpr,
    K_HEAD: tl.constexpr,
    V_SITE: tl.constexpr,
    V_HEAD: tl.constexpr,
    DO_SITE: tl.constexpr,
    DO_HEAD: tl.constexpr,
    ALIGN: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,  # channels of the first tile, and of the second (0: none)
    D2: tl.constexpr,
    NEGATIVE: tl.constexpr,  # scale < 0
    PRECISION: tl.constexpr,
    EXACT: tl.constexpr,
    NEEDS_DK: tl.constexpr,
    NEEDS_DV: tl.constexpr,
    ADDS: tl.constexpr,  # to dk alone
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Computes: dv = P^T d_o, dk = scale dS^T q, over the query frames that list this source frame, in their order.
    # Grid: (key tiles x Tk x H x B), tiles fastest, then source frames.
    # Tiles: BLOCK_N keys stay; BLOCK_M queries at a time, of one frame or (PACKED) of several.
    # Traffic: k, v, dk, dv once; q, d_o and 8 bytes per row (float32: 12) of every user once per key tile, from L2.
    # Numerics: transposed scores, sums over channels in the forward's order; P and dS meet d_o and q in their dtype.
    i_tile, j, i_h, i_b = decode(tl.program_id(0), (P + BLOCK_N - 1) // BLOCK_N, Tk, H)
    h, source = i_h.to(tl.int64), j.to(tl.int64)
    p_users = users + tl.load(inverse + j)
    count = tl.load(inverse + Tk + j)
    o_n = i_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < P
    o_k = o_n.to(tl.int64) if WIDE else o_n
    p_k = k + (i_b * k_batch + source * k_frame) * ALIGN + h * K_HEAD
    b_k1 = load_rows(p_k, o_k, m_n, K_SITE, 0, D1, D)
    b_k2 = load_rows(p_k, o_k, m_n, K_SITE, D1, D2, D) if D2 > 0 else b_k1
    p_v = v + (i_b * v_batch + source * v_frame) * ALIGN + h * V_HEAD
    b_v1 = load_rows(p_v, o_k, m_n, V_SITE, 0, D1, D)
    b_v2 = load_rows(p_v, o_k, m_n, V_SITE, D1, D2, D) if D2 > 0 else b_v1
    p_q = q + i_b * q_batch * ALIGN + h * Q_HEAD
    p_do = d_o + i_b * do_batch * ALIGN + h * DO_HEAD
    p_rows = rows + (i_b * H + i_h) * T * P

    b_dk1 = tl.zeros([BLOCK_N, D1], tl.float32)
    b_dv1 = tl.zeros([BLOCK_N, D1], tl.float32)
    b_dk2 = tl.zeros([BLOCK_N, D2], tl.float32) if D2 > 0 else b_dk1
    b_dv2 = tl.zeros([BLOCK_N, D2], tl.float32) if D2 > 0 else b_dv1
    steps = tl.cdiv(count * P, BLOCK_M) if PACKED else count * ((P + BLOCK_M - 1) // BLOCK_M)
    entry = entries_of(0, p_users, count, P, BLOCK_M, PACKED)
    for step in range(0, steps):
        frame, first, site, m_m, _ = find_rows(step, entry, T, P, BLOCK_M, PACKED, WIDE)
        entry = entries_of(step + 1, p_users, count, P, BLOCK_M, PACKED)
        p_tile = rows_of(p_q, frame, q_frame, ALIGN, first, Q_SITE, PACKED)
        b_q1 = load_rows(p_tile, site, m_m, Q_SITE, 0, D1, D)
        b_q2 = load_rows(p_tile, site, m_m, Q_SITE, D1, D2, D) if D2 > 0 else b_q1
        p_row = p_rows + frame * P + first + site
        # A masked query's weights are exp2(0 - inf).
        b_high = tl.load(p_row, mask=m_m, other=float("inf"))
        b_delta = tl.load(p_row + plane, mask=m_m, other=0.0)
        b_s = products(b_k1, b_k2, b_q1, b_q2, D2, PRECISION)  # [BLOCK_N, BLOCK_M]
        if NEGATIVE:
            b_s = -b_s
        b_s = b_s * scale_log2 - b_high[None, :]
        if EXACT:
            b_s -= tl.load(p_row + plane + plane, mask=m_m, other=0.0)[None, :]
        b_p = tl.exp2(b_s)
        p_tile = rows_of(p_do, frame, do_frame, ALIGN, first, DO_SITE, PACKED)
        b_do1 = load_rows(p_tile, site, m_m, DO_SITE, 0, D1, D)
        b_do2 = load_rows(p_tile, site, m_m, DO_SITE, D1, D2, D) if D2 > 0 else b_do1
        if NEEDS_DV:
            b_w = b_p.to(b_do1.dtype)
            b_dv1 = tl.dot(b_w, b_do1, b_dv1, input_precision=PRECISION)
            if D2 > 0:
                b_dv2 = tl.dot(b_w, b_do2, b_dv2, input_precision=PRECISION)
        if NEEDS_DK:
            b_ds = b_p * (products(b_v1, b_v2, b_do1, b_do2, D2, PRECISION) - b_delta[None, :])
            b_ds = b_ds.to(b_q1.dtype)
            b_dk1 = tl.dot(b_ds, b_q1, b_dk1, input_precision=PRECISION)
            if D2 > 0:
                b_dk2 = tl.dot(b_ds, b_q2, b_dk2, input_precision=PRECISION)

    begin = ((i_b * Tk + j) * P * H + i_h) * D
    if NEEDS_DK:
        store_rows(dk + begin, o_k, m_n, b_dk1 * scale, H * D, 0, D1, D, ADDS)
        if D2 > 0:
            store_rows(dk + begin, o_k, m_n, b_dk2 * scale, H * D, D1, D2, D, ADDS)
    if NEEDS_DV:
        store_rows(dv + begin, o_k, m_n, b_dv1, H * D, 0, D1, D, False)
        if D2 > 0:
            store_rows(dv + begin, o_k, m_n, b_dv2, H * D, D1, D2, D, False)
