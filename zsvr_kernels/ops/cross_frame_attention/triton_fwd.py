"""Cross-frame attention on GPUs, forward; and what the backward shares with it: rows of listed frames, scores."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
# The same in two parts: a product of 12 significant bits with 12 is exact in float32.
LOG2_E_HIGH = tl.constexpr(1.4423828125)
LOG2_E_LOW = tl.constexpr(1.4426950408889634 - 1.4423828125)
LN_2 = tl.constexpr(0.6931471805599453)
LN_2_HIGH = tl.constexpr(0.693115234375)
LN_2_LOW = tl.constexpr(0.6931471805599453 - 0.693115234375)


@triton.jit
def entries_of(step, p_frames, count, P: tl.constexpr, BLOCK: tl.constexpr, PACKED: tl.constexpr):
    """Return the entries of a list of frames that tile ``step`` of `find_rows` needs, -1 beyond the list.

    Loops load them for their next step: an address that waits for a load of its own step delays the whole pipeline.
    """
    i_entry = (step * BLOCK + tl.arange(0, BLOCK)) // P if PACKED else step // ((P + BLOCK - 1) // BLOCK)
    return tl.load(p_frames + i_entry, mask=i_entry < count, other=-1)


@triton.jit
def find_rows(
    step,
    entry,  # of `entries_of`
    bound,
    P: tl.constexpr,
    BLOCK: tl.constexpr,
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Return tile ``step`` of the sites of listed frames: frame, first site, sites [BLOCK] from there, mask, presence.

    A tile lies in one frame, which is then a scalar; or, PACKED, tiles run over the frames laid end to end, and
    every row has a frame of its own. An entry outside 0..bound-1 is absent: its rows are masked. Presence is that
    of a tile's one frame.
    """
    o_row = tl.arange(0, BLOCK)
    present = (entry >= 0) & (entry < bound)
    frame = tl.where(present, entry, 0).to(tl.int64)
    if PACKED:
        first = 0
        site = (step * BLOCK + o_row) % P
        m_row = present
    else:
        TILES: tl.constexpr = (P + BLOCK - 1) // BLOCK
        first = step % TILES * BLOCK
        site = o_row
        m_row = tl.full([BLOCK], 1, tl.int1) & present
        if P % BLOCK != 0:
            m_row = m_row & (first + o_row < P)
        if WIDE:
            first = first.to(tl.int64)
    if WIDE:
        site = site.to(tl.int64)
    return frame, first, site, m_row, present


@triton.jit
def rows_of(p, frame, stride, ALIGN: tl.constexpr, first, SITE: tl.constexpr, PACKED: tl.constexpr):
    """Return where the rows of `find_rows` begin: one address, or one [BLOCK, 1] for each row."""
    if PACKED:
        return (p + frame * stride * ALIGN)[:, None]
    else:
        return p + frame * stride * ALIGN + first * SITE


@triton.jit
def load_rows(p, site, m_row, SITE: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr):
    """Return channels START.. of rows, [BLOCK, WIDTH]; zero in masked rows and beyond channel D."""
    o_d = START + tl.arange(0, WIDTH)
    m = m_row[:, None]
    if START + WIDTH > D:
        m = m & (o_d < D)[None, :]
    return tl.load(p + ((site * SITE)[:, None] + o_d[None, :]), mask=m, other=0.0)


@triton.jit
def store_rows(
    p, site, m_row, b, SITE: tl.constexpr, START: tl.constexpr, WIDTH: tl.constexpr, D: tl.constexpr, ADDS: tl.constexpr
):
    """Write channels START.. of rows from b [BLOCK, WIDTH] float32; ADDS: add to what is there."""
    o_d = START + tl.arange(0, WIDTH)
    m = m_row[:, None]
    if START + WIDTH > D:
        m = m & (o_d < D)[None, :]
    p_tile = p + ((site * SITE)[:, None] + o_d[None, :])
    if ADDS:
        b += tl.load(p_tile, mask=m, other=0.0).to(tl.float32)
    tl.store(p_tile, b.to(p.dtype.element_ty), mask=m)


@triton.jit
def products(b_x1, b_x2, b_y1, b_y2, D2: tl.constexpr, PRECISION: tl.constexpr):
    """Return x y^T, [rows of x, rows of y], for rows given as two tiles of channels."""
    b_xy = tl.dot(b_x1, tl.trans(b_y1), input_precision=PRECISION)
    if D2 > 0:
        b_xy = tl.dot(b_x2, tl.trans(b_y2), b_xy, input_precision=PRECISION)
    return b_xy


@triton.jit
def high_part(x):
    """Return float32 x cut to 12 significant bits."""
    return (x.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)


@triton.jit
def decode(pid, TILES: tl.constexpr, T, H):
    """Return tile, frame, head and clip of a program: the tiles of a frame run first, then frames."""
    i_frame = pid // TILES
    i_head = i_frame // T
    i_clip = i_head // H
    return pid - i_frame * TILES, i_frame - i_head * T, i_head - i_clip * H, i_clip.to(tl.int64)


@triton.jit
def _cross_frame_attention_fwd_kernel(
    q,  # [B, T, P, H, D]; every batch and frame stride counts units of ALIGN elements
    k,  # [B, Tk, P, H, D]
    v,  # [B, Tk, P, H, D]
    o,  # [B, T, P, H, D]
    lse,  # float32 [B, T, P, H]
    frames,  # int32 [T, R]
    scale_log2,  # |scale| log2(e)
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
    Q_SITE: tl.constexpr,
    Q_HEAD: tl.constexpr,
    K_SITE: tl.constexpr,
    K_HEAD: tl.constexpr,
    V_SITE: tl.constexpr,
    V_HEAD: tl.constexpr,
    O_SITE: tl.constexpr,
    O_HEAD: tl.constexpr,
    ALIGN: tl.constexpr,
    P: tl.constexpr,
    D: tl.constexpr,
    D1: tl.constexpr,  # channels of the first tile, and of the second (0: none)
    D2: tl.constexpr,
    NEGATIVE: tl.constexpr,  # scale < 0
    PRECISION: tl.constexpr,
    PACKED: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    # Computes: o = softmax(scale q K^T) V and lse, K and V being the rows of the frames listed for q's frame.
    # Grid: (query tiles x T x H x B), tiles fastest, then frames: a frame's K and V are read by neighbours in time.
    # Tiles: BLOCK_M queries stay; BLOCK_N keys at a time; channels as D1 + D2.
    # Traffic: q, o once; K and V of every listed frame once per query tile, from L2 but for the first time.
    # Numerics: float32 scores, maximum, sum and accumulator; exp2; weights enter the product with V in v's dtype.
    i_tile, i_t, i_h, i_b = decode(tl.program_id(0), (P + BLOCK_M - 1) // BLOCK_M, T, H)
    p_frames = frames + i_t * R
    p_q = q + (i_b * q_batch + i_t.to(tl.int64) * q_frame) * ALIGN + i_h.to(tl.int64) * Q_HEAD
    p_k = k + i_b * k_batch * ALIGN + i_h.to(tl.int64) * K_HEAD
    p_v = v + i_b * v_batch * ALIGN + i_h.to(tl.int64) * V_HEAD
    o_m = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < P
    o_q = o_m.to(tl.int64) if WIDE else o_m
    b_q1 = load_rows(p_q, o_q, m_m, Q_SITE, 0, D1, D)
    b_q2 = load_rows(p_q, o_q, m_m, Q_SITE, D1, D2, D) if D2 > 0 else b_q1

    b_max = tl.full([BLOCK_M], -float("inf"), tl.float32)  # of unscaled scores
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_o1 = tl.zeros([BLOCK_M, D1], tl.float32)
    b_o2 = tl.zeros([BLOCK_M, D2], tl.float32) if D2 > 0 else b_sum
    b_shift = b_sum
    entry = entries_of(0, p_frames, R, P, BLOCK_N, PACKED)
    for step in range(0, steps):
        frame, first, site, m_n, present = find_rows(step, entry, Tk, P, BLOCK_N, PACKED, WIDE)
        entry = entries_of(step + 1, p_frames, R, P, BLOCK_N, PACKED)
        p_rows = rows_of(p_k, frame, k_frame, ALIGN, first, K_SITE, PACKED)
        b_k1 = load_rows(p_rows, site, m_n, K_SITE, 0, D1, D)
        b_k2 = load_rows(p_rows, site, m_n, K_SITE, D1, D2, D) if D2 > 0 else b_k1
        b_s = products(b_q1, b_q2, b_k1, b_k2, D2, PRECISION)  # [BLOCK_M, BLOCK_N]
        if NEGATIVE:
            b_s = -b_s
        if PACKED or P % BLOCK_N != 0:
            b_s = tl.where(m_n[None, :], b_s, -float("inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, 1))
        if not PACKED:
            b_new = tl.where(present, b_new, b_max)
        # Nothing but absent keys so far: subtracting a finite number keeps exp2(-inf) = 0 and NaN away.
        b_shift = tl.where(b_new == -float("inf"), 0.0, b_new * scale_log2)
        b_decay = tl.exp2(b_max * scale_log2 - b_shift)
        b_max = b_new
        # Keys of one absent frame get weight 0 by their rows, not one by one.
        b_minus = b_shift if PACKED else tl.where(present, b_shift, float("inf"))
        b_p = tl.exp2(b_s * scale_log2 - b_minus[:, None])
        b_sum = b_sum * b_decay + tl.sum(b_p, 1)
        p_rows = rows_of(p_v, frame, v_frame, ALIGN, first, V_SITE, PACKED)
        b_v1 = load_rows(p_rows, site, m_n, V_SITE, 0, D1, D)
        b_p = b_p.to(b_v1.dtype)
        b_o1 = tl.dot(b_p, b_v1, b_o1 * b_decay[:, None], input_precision=PRECISION)
        if D2 > 0:
            b_v2 = load_rows(p_rows, site, m_n, V_SITE, D1, D2, D)
            b_o2 = tl.dot(b_p, b_v2, b_o2 * b_decay[:, None], input_precision=PRECISION)

    m_empty = b_sum == 0.0
    b_sum = tl.where(m_empty, 1.0, b_sum)
    b_inverse = 1.0 / b_sum
    p_o = o + (i_b * o_batch + i_t.to(tl.int64) * o_frame) * ALIGN + i_h.to(tl.int64) * O_HEAD
    store_rows(p_o, o_q, m_m, b_o1 * b_inverse[:, None], O_SITE, 0, D1, D, False)
    if D2 > 0:
        store_rows(p_o, o_q, m_m, b_o2 * b_inverse[:, None], O_SITE, D1, D2, D, False)
    # shift ln(2) + ln(sum) with one rounding, where the parts meet: the backward subtracts it from the scores again.
    b_high = high_part(b_shift)
    b_low = (b_shift - b_high) * LN_2_HIGH + b_shift * LN_2_LOW + tl.log2(b_sum) * LN_2
    p_lse = lse + (i_b * T + i_t) * P * H
    b_lse = tl.where(m_empty, -float("inf"), b_high * LN_2_HIGH + b_low)
    tl.store(p_lse + o_m * H + i_h, b_lse, mask=m_m)
