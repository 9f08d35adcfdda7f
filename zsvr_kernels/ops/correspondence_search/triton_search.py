"""Kernels of correspondence search: inverse lengths, windows as one dense product per tile, windows one by one."""

import triton
import triton.language as tl

_SMALLEST_LENGTH = tl.constexpr(1e-6)
_NO_SITE = tl.constexpr(2147483647)


@triton.jit
def _rows(p, o_site, stride, WIDE: tl.constexpr):
    if WIDE:
        o_site = o_site.to(tl.int64)
    return p + o_site * stride


@triton.jit
def _inverse_lengths(p_rows, m_rows, C, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr):
    b_squares = tl.zeros([BLOCK, BLOCK_C], tl.float32)
    for c in range(0, C, BLOCK_C):
        o_c = c + tl.arange(0, BLOCK_C)
        # A tile of [BLOCK, BLOCK_C].
        b_x = tl.load(p_rows[:, None] + o_c[None, :], mask=m_rows[:, None] & (o_c < C)[None, :], other=0.0)
        b_x = b_x.to(tl.float32)
        b_squares += b_x * b_x
    b_length = tl.sqrt_rn(tl.sum(b_squares, 1))
    return tl.div_rn(1.0, tl.where(b_length < _SMALLEST_LENGTH, _SMALLEST_LENGTH, b_length))  # NaN stays


@triton.jit
def _inverse_lengths_kernel(
    f_src,  # [N, P, C]
    f_dst,  # [N, P, C]
    inverse,  # fp32 [2, N, P], of f_src and of f_dst
    P,
    C,  # as the strides of f_src and f_dst in units
    s_inverse,  # N * P
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
    # Computes: 1 / max(|token|, 1e-6) of both features.
    # Grid:     (frame pair x block of sites).
    # Tiles:    [BLOCK, BLOCK_C] tokens x channels, squares summed over blocks of channels.
    # Traffic:  reads both features once, so that the search after it finds them in the second-level cache.
    # Numerics: float32 sums, square root and quotient rounded to nearest; a length that is NaN stays NaN.
    i_n = (tl.program_id(0) // blocks).to(tl.int64)
    o_p = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    m_p = o_p < P
    p_inverse = inverse + i_n * P + o_p
    p_src = _rows(f_src + i_n * s_src_n * UNIT, o_p, s_src_p * UNIT, WIDE)
    tl.store(p_inverse, _inverse_lengths(p_src, m_p, C * UNIT, BLOCK, BLOCK_C), mask=m_p)
    p_dst = _rows(f_dst + i_n * s_dst_n * UNIT, o_p, s_dst_p * UNIT, WIDE)
    b_inverse = _inverse_lengths(p_dst, m_p, C * UNIT, BLOCK, BLOCK_C)
    tl.store(p_inverse + s_inverse, b_inverse, mask=m_p)


@triton.jit
def _tile(i_y, i_x, Hg, Wg, TILE_H: tl.constexpr, TILE_W: tl.constexpr):
    # Queries of a spatial tile and which of them exist.
    o = tl.arange(0, TILE_H * TILE_W)
    y = i_y * TILE_H + o // TILE_W
    x = i_x * TILE_W + o % TILE_W
    return y * Wg + x, (y < Hg) & (x < Wg)


@triton.jit
def _windows(p_centre, o_q, m_q, Hg, Wg, radius):
    # First and last column and row of every query's window, inside the grid.
    o = o_q[:, None] * 2 + tl.arange(0, 2)[None, :]
    x, y = tl.split(tl.load(p_centre + o, mask=m_q[:, None], other=0))
    x = tl.minimum(tl.maximum(x, 0), Wg - 1)
    y = tl.minimum(tl.maximum(y, 0), Hg - 1)
    left = tl.maximum(x - radius, 0)
    right = tl.minimum(x + radius, Wg - 1)
    above = tl.maximum(y - radius, 0)
    below = tl.minimum(y + radius, Hg - 1)
    return left, right, above, below


@triton.jit
def _search_one_by_one(
    p_src,
    p_dst,
    p_centre,
    p_inverse_src,
    p_inverse_dst,
    p_site,
    p_score,
    i_y,
    i_x,
    Hg,
    Wg,
    C,
    radius,
    s_src_p,
    s_dst_p,
    WIDE: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    CANDIDATES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Every query of the tile walks its own window in row-major order, CANDIDATES sites at a time.
    Q: tl.constexpr = TILE_H * TILE_W
    o_q, m_q = _tile(i_y, i_x, Hg, Wg, TILE_H, TILE_W)
    left, right, above, below = _windows(p_centre, o_q, m_q, Hg, Wg, radius)
    width = right - left + 1
    count = tl.where(m_q, width * (below - above + 1), 0)
    b_inverse = tl.load(p_inverse_src + o_q, mask=m_q, other=0.0)
    p_q = _rows(p_src, o_q, s_src_p, WIDE)[:, None, None]
    b_best = tl.full([Q], float("-inf"), tl.float32)
    b_site = above * Wg + left
    for begin in range(0, tl.max(count, 0), CANDIDATES):
        o_n = begin + tl.arange(0, CANDIDATES)
        m_n = o_n[None, :] < count[:, None]
        # Sites, [Q, CANDIDATES]:
        o_k = (above[:, None] + o_n[None, :] // width[:, None]) * Wg + left[:, None] + o_n[None, :] % width[:, None]
        p_k = _rows(p_dst, o_k, s_dst_p, WIDE)[:, :, None]
        b_products = tl.zeros([Q, CANDIDATES, BLOCK_C], tl.float32)
        for c in range(0, C, BLOCK_C):
            o_c = (c + tl.arange(0, BLOCK_C))[None, None, :]
            # A tile of [Q, 1, BLOCK_C] and one of [Q, CANDIDATES, BLOCK_C].
            b_q = tl.load(p_q + o_c, mask=m_q[:, None, None] & (o_c < C), other=0.0)
            b_k = tl.load(p_k + o_c, mask=m_n[:, :, None] & (o_c < C), other=0.0)
            b_products += b_q.to(tl.float32) * b_k.to(tl.float32)
        b_cosine = tl.sum(b_products, 2) * b_inverse[:, None]
        b_cosine = b_cosine * tl.load(p_inverse_dst + o_k, mask=m_n, other=0.0)
        b_cosine = tl.where(m_n & (b_cosine == b_cosine), b_cosine, float("-inf"))
        # Candidates come in ascending order: of equals the earlier stays.
        b_top = tl.max(b_cosine, 1)
        b_lowest = tl.min(tl.where(b_cosine == b_top[:, None], o_k, _NO_SITE), 1)
        better = b_top > b_best
        b_best = tl.where(better, b_top, b_best)
        b_site = tl.where(better, b_lowest, b_site)
    tl.store(p_site + o_q, b_site, mask=m_q)
    tl.store(p_score + o_q, b_best, mask=m_q)


@triton.jit
def _search_one_by_one_kernel(
    f_src,  # [N, P, C]
    f_dst,  # [N, P, C]
    centre,  # int32 [N, P, 2]
    inverse,  # fp32 [2, N, P]
    site,  # int32 [N, P]
    score,  # fp32 [N, P]
    Hg,
    Wg,
    C,  # as the strides of f_src and f_dst in units
    radius,
    s_src_n,
    s_src_p,
    s_dst_n,
    s_dst_p,
    s_inverse,  # N * P
    tiles_y,
    tiles_x,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    CANDIDATES: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    # Computes: for every source token the site of the largest cosine in its window of the destination frame.
    # Grid:     (frame pair x tile of queries).
    # Tiles:    [TILE_H * TILE_W, CANDIDATES, BLOCK_C] products of queries and their candidates, summed over blocks of
    #           channels. Windows of neighbours overlap, so most rows come from the first-level cache.
    # Traffic:  one row of C channels a candidate, 16 bytes a lane; f_src once for CANDIDATES of them.
    # Numerics: float32 products and sums; of equals the lowest site, NaN never.
    i_n = (tl.program_id(0) // (tiles_y * tiles_x)).to(tl.int64)
    i_tile = tl.program_id(0) % (tiles_y * tiles_x)
    first = i_n * (Hg * Wg)
    _search_one_by_one(
        f_src + i_n * s_src_n * UNIT,
        f_dst + i_n * s_dst_n * UNIT,
        centre + first * 2,
        inverse + first,
        inverse + s_inverse + first,
        site + first,
        score + first,
        i_tile // tiles_x,
        i_tile % tiles_x,
        Hg,
        Wg,
        C * UNIT,
        radius,
        s_src_p * UNIT,
        s_dst_p * UNIT,
        WIDE,
        TILE_H,
        TILE_W,
        CANDIDATES,
        BLOCK_C,
    )


@triton.jit
def _search_dense_kernel(
    f_src,  # [N, P, C]
    f_dst,  # [N, P, C]
    centre,  # int32 [N, P, 2]
    inverse,  # fp32 [2, N, P]
    site,  # int32 [N, P]
    score,  # fp32 [N, P]
    Hg,
    Wg,
    C,  # as the strides of f_src and f_dst in units
    radius,
    limit,  # strips of a box that is still compared whole
    s_src_n,
    s_src_p,
    s_dst_n,
    s_dst_p,
    s_inverse,  # N * P
    tiles_y,
    tiles_x,
    UNIT: tl.constexpr,
    WIDE: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    STRIP_H: tl.constexpr,
    STRIP_W: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PART_H: tl.constexpr,
    PART_W: tl.constexpr,
    PART_CANDIDATES: tl.constexpr,
    PART_C: tl.constexpr,
):
    # Computes: for every source token the site of the largest cosine in its window of the destination frame.
    # Grid:     (frame pair x tile of queries).
    # Tiles:    the box around all windows of the tile, in strips of STRIP_H x STRIP_W sites: a strip is
    #           [TILE_H * TILE_W, STRIP_H * STRIP_W] cosines, accumulated over blocks of BLOCK_C channels, then masked
    #           to each query's own window. A tile whose box takes more than `limit` strips walks windows one by one.
    # Traffic:  reads the tile's queries and the box once a strip, from the second-level cache; the next blocks of
    #           channels are on their way to shared memory while one is multiplied.
    # Numerics: a matrix product with float32 sums for every block of channels; blocks are added in float32 with
    #           rounding to nearest (matrix units round towards zero at every step). float32 features are multiplied
    #           exactly, never as TF32: rounded products would decide which site wins. Of equals the lowest site, NaN
    #           never.
    i_n = (tl.program_id(0) // (tiles_y * tiles_x)).to(tl.int64)
    i_tile = tl.program_id(0) % (tiles_y * tiles_x)
    i_y = i_tile // tiles_x
    i_x = i_tile % tiles_x
    first = i_n * (Hg * Wg)
    p_src = f_src + i_n * s_src_n * UNIT
    p_dst = f_dst + i_n * s_dst_n * UNIT
    p_centre = centre + first * 2
    p_inverse_src = inverse + first
    p_inverse_dst = inverse + s_inverse + first
    p_site = site + first
    p_score = score + first

    Q: tl.constexpr = TILE_H * TILE_W
    STRIP: tl.constexpr = STRIP_H * STRIP_W
    o_q, m_q = _tile(i_y, i_x, Hg, Wg, TILE_H, TILE_W)
    left, right, above, below = _windows(p_centre, o_q, m_q, Hg, Wg, radius)
    box_left = tl.min(tl.where(m_q, left, Wg), 0)
    box_right = tl.max(tl.where(m_q, right, -1), 0)
    box_above = tl.min(tl.where(m_q, above, Hg), 0)
    box_below = tl.max(tl.where(m_q, below, -1), 0)
    strips_x = (box_right - box_left) // STRIP_W + 1
    strips = strips_x * ((box_below - box_above) // STRIP_H + 1)
    if strips <= limit:
        b_inverse = tl.load(p_inverse_src + o_q, mask=m_q, other=0.0)
        p_q = _rows(p_src, o_q, s_src_p * UNIT, WIDE)[:, None]
        b_best = tl.full([Q], float("-inf"), tl.float32)
        b_site = above * Wg + left
        o_n = tl.arange(0, STRIP)
        for i_strip in range(strips):
            first_x = box_left + i_strip % strips_x * STRIP_W
            first_y = box_above + i_strip // strips_x * STRIP_H
            x = first_x + o_n % STRIP_W
            y = first_y + o_n // STRIP_W
            m_k = (x <= box_right) & (y <= box_below)
            o_k = y * Wg + x
            p_k = _rows(p_dst, o_k, s_dst_p * UNIT, WIDE)[:, None]
            b_cosine = tl.zeros([Q, STRIP], tl.float32)
            for c in range(0, C * UNIT, BLOCK_C):
                o_c = (c + tl.arange(0, BLOCK_C))[None, :]
                # A tile of [Q, BLOCK_C] and one of [STRIP, BLOCK_C].
                b_q = tl.load(p_q + o_c, mask=m_q[:, None] & (o_c < C * UNIT), other=0.0)
                b_k = tl.load(p_k + o_c, mask=m_k[:, None] & (o_c < C * UNIT), other=0.0)
                # The factor keeps the sum over blocks out of the matrix unit.
                b_cosine += tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * b_inverse[:, None]
            # Outside its window a cosine becomes -inf by addition, which costs less than a selection, and so does NaN.
            b_inverse_dst = tl.load(p_inverse_dst + o_k, mask=m_k, other=0.0)[None, :]
            m_x = (x[None, :] >= left[:, None]) & (x[None, :] <= right[:, None])
            m_y = (y[None, :] >= above[:, None]) & (y[None, :] <= below[:, None])
            b_cosine = b_cosine * b_inverse_dst + tl.where(m_x, 0.0, float("-inf"))
            b_cosine = tl.maximum(b_cosine + tl.where(m_y, 0.0, float("-inf")), float("-inf"))
            b_top = tl.max(b_cosine, 1)
            b_lowest = tl.min(tl.where(b_cosine == b_top[:, None], o_n[None, :], STRIP - 1), 1)
            b_lowest = (first_y + b_lowest // STRIP_W) * Wg + first_x + b_lowest % STRIP_W
            # Strips beside each other interleave their sites: of equals the lower.
            better = (b_top > b_best) | ((b_top == b_best) & (b_top > float("-inf")) & (b_lowest < b_site))
            b_best = tl.where(better, b_top, b_best)
            b_site = tl.where(better, b_lowest, b_site)
        tl.store(p_site + o_q, b_site, mask=m_q)
        tl.store(p_score + o_q, b_best, mask=m_q)
    else:
        PARTS_X: tl.constexpr = TILE_W // PART_W
        for i_part in range(TILE_H * TILE_W // (PART_H * PART_W)):
            _search_one_by_one(
                p_src,
                p_dst,
                p_centre,
                p_inverse_src,
                p_inverse_dst,
                p_site,
                p_score,
                i_y * (TILE_H // PART_H) + i_part // PARTS_X,
                i_x * PARTS_X + i_part % PARTS_X,
                Hg,
                Wg,
                C * UNIT,
                radius,
                s_src_p * UNIT,
                s_dst_p * UNIT,
                WIDE,
                PART_H,
                PART_W,
                PART_CANDIDATES,
                PART_C,
            )
