"""The chaining kernel: tokens followed along their links, all start frames and both directions in one launch."""

import triton
import triton.language as tl


@triton.jit
def _clamp(x, last):
    # NaN becomes 0: no address may depend on it.
    return tl.where(x > 0.0, tl.where(x < last, x, last), 0.0)


@triton.jit
def _load_link(p_links, x, y, Wg, m):
    # [BLOCK, 2]: x and y of a link lie side by side and come in one 8-byte load.
    o = (y * Wg + x)[:, None] * 2 + tl.arange(0, 2)[None, :]
    return tl.load(p_links + o, mask=m[:, None], other=0.0)


@triton.jit
def _add_displacement(sum_x, sum_y, weight, b_link, x, y, NEAREST: tl.constexpr):
    to_x, to_y = tl.split(b_link)
    if NEAREST:
        to_x = tl.floor(to_x + 0.5)
        to_y = tl.floor(to_y + 0.5)
    return sum_x + weight * (to_x - x.to(tl.float32)), sum_y + weight * (to_y - y.to(tl.float32))


@triton.jit
def _store_pair(p, o_p, m_p, b_x, b_y):
    # [BLOCK, 2]: one 8-byte store a lane.
    tl.store(p + (o_p[:, None] * 2 + tl.arange(0, 2)[None, :]), tl.join(b_x, b_y), mask=m_p[:, None])


@triton.jit
def _store_slot(
    positions,
    valid,
    base,
    fractions,
    first,  # of the slot's P sites
    o_p,
    m_p,
    b_x,
    b_y,
    m_live,
    Hg,
    Wg,
    RECORDS: tl.constexpr,
    EXACT: tl.constexpr,
):
    _store_pair(positions + first * 2, o_p, m_p, b_x, b_y)
    tl.store(valid + first + o_p, m_live, mask=m_p)
    if RECORDS:
        # A cell never starts in the last column or row, so that its four corners exist; there the fraction is 1.
        b_cx = _clamp(b_x, (Wg - 1) * 1.0)
        b_cy = _clamp(b_y, (Hg - 1) * 1.0)
        x0 = tl.minimum(b_cx.to(tl.int32), tl.maximum(Wg - 2, 0))
        y0 = tl.minimum(b_cy.to(tl.int32), tl.maximum(Hg - 2, 0))
        fx = b_cx - x0.to(tl.float32)
        fy = b_cy - y0.to(tl.float32)
        tl.store(base + first + o_p, tl.where(m_live, y0 * Wg + x0, -1), mask=m_p)
        if EXACT:
            _store_pair(fractions + first * 2, o_p, m_p, fx, fy)
        else:
            packed = (fx * 32768.0 + 0.5).to(tl.int32) | ((fy * 32768.0 + 0.5).to(tl.int32) << 16)
            tl.store(fractions + first + o_p, packed, mask=m_p)


@triton.jit
def _chain_links_kernel(
    forward,  # fp32 [B, T-1, P, 2]
    backward,  # fp32 [B, T-1, P, 2]
    valid_forward,  # bool [B, T-1, P]
    valid_backward,  # bool [B, T-1, P]
    positions,  # fp32 [B, T, L, P, 2]
    valid,  # bool [B, T, L, P]
    base,  # int32 [B, T, L, P], None without RECORDS
    fractions,  # int32 [B, T, L, P], or fp32 [B, T, L, P, 2] if EXACT; None without RECORDS
    T,
    L,
    Hg,
    Wg,
    window,  # frames on either side, -1: every frame has a slot
    blocks,  # of sites in a frame
    NEAREST: tl.constexpr,
    CORNERS: tl.constexpr,
    RECORDS: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Computes: positions and validity of every token along its chain of links; if RECORDS, also the cell of every slot
    #           (-1: not live) and its two fractions: float32, or multiples of 2^-15 in 16 bits each, x in the low half.
    # Grid:     (clip x start frame x direction x block of sites); a program owns its direction's slots of those sites.
    # Tiles:    [BLOCK] sites, one a lane: the current position and liveness stay in registers while frames go by.
    # Traffic:  a step reads up to 4 links of 8 bytes (corners of weight zero are not read) and 1 to 4 bytes of validity
    #           from the caches, and writes 9 bytes a slot (17 or 21 with RECORDS). Steps are dependent: latency counts.
    # Numerics: float32, products and sums in the reference's order. Launched without contraction it is bit-equal to it.
    i_program = tl.program_id(0)
    i_block = i_program % blocks
    i_direction = i_program // blocks % 2
    i_start = i_program // (blocks * 2) % T
    i_clip = i_program // (blocks * 2) // T

    P = Hg * Wg
    own = tl.where(window < 0, i_start, window)  # slot of the start frame
    i_own = (i_clip * T + i_start).to(tl.int64) * L + own
    step = 1 - 2 * i_direction
    slots = tl.where(i_direction == 0, L - 1 - own, own)
    live_slots = tl.minimum(slots, tl.where(i_direction == 0, T - 1 - i_start, i_start))
    if i_direction == 0:
        links = forward
        checks = valid_forward
    else:
        links = backward
        checks = valid_backward
    # Links between frames j and j+1 are number j: from frame i they are i, i+1, .. forward, i-1, i-2, .. backward.
    i_pair = i_clip.to(tl.int64) * (T - 1) + i_start - i_direction

    o_p = i_block * BLOCK + tl.arange(0, BLOCK)
    m_p = o_p < P
    own_x = (o_p % Wg).to(tl.float32)
    own_y = (o_p // Wg).to(tl.float32)
    last_x = (Wg - 1) * 1.0  # not .to(): an argument of 1 is a constant
    last_y = (Hg - 1) * 1.0
    if i_direction == 0:
        _store_slot(positions, valid, base, fractions, i_own * P, o_p, m_p, own_x, own_y, m_p, Hg, Wg, RECORDS, EXACT)

    b_x = own_x
    b_y = own_y
    m_live = m_p
    for n in range(live_slots):
        p_links = links + (i_pair + n * step) * P * 2
        p_checks = checks + (i_pair + n * step) * P
        b_cx = _clamp(b_x, last_x)
        b_cy = _clamp(b_y, last_y)
        x0 = b_cx.to(tl.int32)
        y0 = b_cy.to(tl.int32)
        x1 = tl.minimum(x0 + 1, Wg - 1)
        y1 = tl.minimum(y0 + 1, Hg - 1)
        fx = b_cx - x0.to(tl.float32)
        fy = b_cy - y0.to(tl.float32)
        gx = 1.0 - fx
        gy = 1.0 - fy
        w_00 = gx * gy
        w_10 = fx * gy
        w_01 = gx * fy
        w_11 = fx * fy
        # All loads of a step first, so that it waits once. A corner of weight zero may hold anything; it is not read,
        # and its product is a zero.
        if CORNERS:
            m_x = m_live & (fx > 0.0)
            m_y = m_live & (fy > 0.0)
            check_00 = tl.load(p_checks + y0 * Wg + x0, mask=m_live, other=0)
            check_10 = tl.load(p_checks + y0 * Wg + x1, mask=m_x, other=1)
            check_01 = tl.load(p_checks + y1 * Wg + x0, mask=m_y, other=1)
            check_11 = tl.load(p_checks + y1 * Wg + x1, mask=m_x & m_y, other=1)
        else:
            nearest_x = _clamp(tl.floor(b_x + 0.5), last_x).to(tl.int32)
            nearest_y = _clamp(tl.floor(b_y + 0.5), last_y).to(tl.int32)
            check_00 = tl.load(p_checks + nearest_y * Wg + nearest_x, mask=m_live, other=0)
        link_00 = _load_link(p_links, x0, y0, Wg, m_live)
        link_10 = _load_link(p_links, x1, y0, Wg, m_live & (w_10 != 0.0))
        link_01 = _load_link(p_links, x0, y1, Wg, m_live & (w_01 != 0.0))
        link_11 = _load_link(p_links, x1, y1, Wg, m_live & (w_11 != 0.0))
        sum_x, sum_y = _add_displacement(0.0, 0.0, w_00, link_00, x0, y0, NEAREST)
        sum_x, sum_y = _add_displacement(sum_x, sum_y, w_10, link_10, x1, y0, NEAREST)
        sum_x, sum_y = _add_displacement(sum_x, sum_y, w_01, link_01, x0, y1, NEAREST)
        sum_x, sum_y = _add_displacement(sum_x, sum_y, w_11, link_11, x1, y1, NEAREST)
        b_x = b_x + sum_x
        b_y = b_y + sum_y
        ok = check_00.to(tl.int1)
        if CORNERS:
            ok &= check_10.to(tl.int1) & check_01.to(tl.int1) & check_11.to(tl.int1)
        inside = (b_x >= -0.5) & (b_x <= last_x + 0.5) & (b_y >= -0.5) & (b_y <= last_y + 0.5)
        m_live = m_live & ok & inside
        b_x = tl.where(m_live, b_x, own_x)
        b_y = tl.where(m_live, b_y, own_y)
        first = (i_own + (n + 1) * step) * P
        _store_slot(positions, valid, base, fractions, first, o_p, m_p, b_x, b_y, m_live, Hg, Wg, RECORDS, EXACT)

    m_lost = m_p & (o_p < 0)
    for n in range(live_slots, slots):  # frames outside the clip
        first = (i_own + (n + 1) * step) * P
        _store_slot(positions, valid, base, fractions, first, o_p, m_p, own_x, own_y, m_lost, Hg, Wg, RECORDS, EXACT)
