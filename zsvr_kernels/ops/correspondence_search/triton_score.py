"""The kernel of link scores: source tokens against bilinear samples of the destination."""

import triton
import triton.language as tl

_SMALLEST_LENGTH = tl.constexpr(1e-6)


@triton.jit
def _clamp(x, last):
    # NaN becomes 0: no address may depend on it.
    return tl.where(x > 0.0, tl.where(x < last, x, last), 0.0)


@triton.jit
def _length(b_squares):
    b_length = tl.sqrt_rn(tl.sum(b_squares, 1))
    return tl.where(b_length < _SMALLEST_LENGTH, _SMALLEST_LENGTH, b_length)  # NaN stays


@triton.jit
def _link_score_kernel(
    f_src,  # [N, P, C]
    f_dst,  # [N, P, C]
    positions,  # fp32 [N, P, 2]
    score,  # fp32 [N, P]
    Hg,
    Wg,
    C,  # as the strides of f_src and f_dst in units
    s_src_n,
    s_src_p,
    s_dst_n,
    s_dst_p,
    blocks,  # of sites in a frame
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Computes: the cosine between every source token and the destination sampled bilinearly at its position.
    # Grid:     (frame pair x block of sites).
    # Tiles:    [BLOCK, BLOCK_C] tokens x channels; the product and both squares are summed over blocks of channels.
    # Traffic:  up to five rows of C channels a token, 16 bytes a lane; a corner of weight zero is not read.
    # Numerics: float32; sampled first, then normalised, with square roots and quotient rounded to nearest.
    i_n = (tl.program_id(0) // blocks).to(tl.int64)
    o_p = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    P = Hg * Wg
    m_p = o_p < P
    o = o_p[:, None] * 2 + tl.arange(0, 2)[None, :]
    x, y = tl.split(tl.load(positions + i_n * P * 2 + o, mask=m_p[:, None], other=0.0))
    x = _clamp(x, (Wg - 1) * 1.0)
    y = _clamp(y, (Hg - 1) * 1.0)
    x0 = x.to(tl.int32)
    y0 = y.to(tl.int32)
    fx = x - x0.to(tl.float32)
    fy = y - y0.to(tl.float32)
    o_row = o_p.to(tl.int64) if WIDE else o_p
    o_00 = y0 * Wg + x0
    o_00 = o_00.to(tl.int64) if WIDE else o_00
    o_10 = o_00 + (tl.minimum(x0 + 1, Wg - 1) - x0)
    below = (tl.minimum(y0 + 1, Hg - 1) - y0) * Wg
    w_00 = (1.0 - fx) * (1.0 - fy)
    w_10 = fx * (1.0 - fy)
    w_01 = (1.0 - fx) * fy
    w_11 = fx * fy
    s_dst = s_dst_p * UNIT
    p_dst = f_dst + i_n * s_dst_n * UNIT
    p_q = (f_src + i_n * s_src_n * UNIT + o_row * (s_src_p * UNIT))[:, None]
    p_00 = (p_dst + o_00 * s_dst)[:, None]
    p_10 = (p_dst + o_10 * s_dst)[:, None]
    p_01 = (p_dst + (o_00 + below) * s_dst)[:, None]
    p_11 = (p_dst + (o_10 + below) * s_dst)[:, None]
    m_00 = m_p[:, None]
    m_10 = (m_p & (w_10 != 0.0))[:, None]
    m_01 = (m_p & (w_01 != 0.0))[:, None]
    m_11 = (m_p & (w_11 != 0.0))[:, None]
    b_dot = tl.zeros([BLOCK, BLOCK_C], tl.float32)
    b_src = tl.zeros([BLOCK, BLOCK_C], tl.float32)
    b_dst = tl.zeros([BLOCK, BLOCK_C], tl.float32)
    for c in range(0, C * UNIT, BLOCK_C):
        o_c = (c + tl.arange(0, BLOCK_C))[None, :]
        m_c = o_c < C * UNIT
        # Tiles of [BLOCK, BLOCK_C].
        b_q = tl.load(p_q + o_c, mask=m_p[:, None] & m_c, other=0.0).to(tl.float32)
        b_00 = tl.load(p_00 + o_c, mask=m_00 & m_c, other=0.0).to(tl.float32)
        b_10 = tl.load(p_10 + o_c, mask=m_10 & m_c, other=0.0).to(tl.float32)
        b_01 = tl.load(p_01 + o_c, mask=m_01 & m_c, other=0.0).to(tl.float32)
        b_11 = tl.load(p_11 + o_c, mask=m_11 & m_c, other=0.0).to(tl.float32)
        b_x = w_00[:, None] * b_00 + w_10[:, None] * b_10
        b_x = b_x + w_01[:, None] * b_01
        b_x = b_x + w_11[:, None] * b_11
        b_dot += b_q * b_x
        b_src += b_q * b_q
        b_dst += b_x * b_x
    lengths = _length(b_src) * _length(b_dst)
    tl.store(score + i_n * P + o_p, tl.div_rn(tl.sum(b_dot, 1), lengths), mask=m_p)
