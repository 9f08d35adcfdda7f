"""What the Triton kernels of trajectory attention share: tiles of sites, records, the corners of a cell and their mix.

Tiles have three axes: queries (or samples, or source sites), heads and channels. Lanes are to lie along channels, 16
bytes each, then along queries; heads are to be repetitions within a lane, so that what a record says is worked out once
for all heads of a program. Triton lays out axes without a direction of their own in the order in which they stand, 3.6
from the first, 3.9 from the last: hence the two orders, and `by_query` and `by_head`, to write for both.

Rows of 16-bit numbers are loaded as int32 words of two (KIND: 1 bfloat16, 2 float16; 0: numbers one by one, as float32
and rows that no word fits). A tile then consists of two planes, the even and the odd channels: bfloat16 needs one
instruction for each number that way. Functions return two planes; the second repeats the first where there is one.
"""

from __future__ import annotations

import triton
import triton.language as tl

QUERIES_FIRST = tl.constexpr(tuple(int(part) for part in triton.__version__.split(".")[:2]) < (3, 7))


@triton.jit
def by_query(x):  # [Q] -> along the queries of a tile
    return x[:, None, None] if QUERIES_FIRST else x[None, :, None]


@triton.jit
def by_head(x):  # [HEADS] -> along the heads of a tile
    return x[None, :, None] if QUERIES_FIRST else x[:, None, None]


@triton.jit
def by_channel(x):  # [channels] -> along the channels of a tile
    return x[None, None, :]


@triton.jit
def zeros(HEADS: tl.constexpr, Q: tl.constexpr, COUNT: tl.constexpr):  # a tile
    return tl.zeros([Q, HEADS, COUNT] if QUERIES_FIRST else [HEADS, Q, COUNT], tl.float32)


@triton.jit
def words_of(p, KIND: tl.constexpr):
    return p if KIND == 0 else p.to(tl.pointer_type(tl.int32), bitcast=True)


@triton.jit
def unpack(x, KIND: tl.constexpr):  # float32 planes of what was loaded
    if KIND == 0:
        even = x.to(tl.float32)
        odd = even
    elif KIND == 1:
        even = (x << 16).to(tl.float32, bitcast=True)
        odd = (x & -65536).to(tl.float32, bitcast=True)
    else:
        even = x.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        odd = (x >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return even, odd


@triton.jit
def dot(x_even, x_odd, y_even, y_odd, KIND: tl.constexpr):  # one number for each query and head
    product = x_even * y_even
    if KIND != 0:
        product += x_odd * y_odd
    return tl.sum(product, 2, keep_dims=True)


@triton.jit
def channels(even, odd, KIND: tl.constexpr):  # planes -> the row's own order
    return even if KIND == 0 else tl.interleave(even, odd)


@triton.jit
def tile_sites(
    i_tile, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, TILE_H: tl.constexpr, TILE_W: tl.constexpr
):  # sites [Q], mask [Q]
    COLUMNS: tl.constexpr = (WIDTH + TILE_W - 1) // TILE_W
    o_q = tl.arange(0, TILE_H * TILE_W)
    y = (i_tile // COLUMNS) * TILE_H + o_q // TILE_W
    x = (i_tile % COLUMNS) * TILE_W + o_q % TILE_W
    return y * WIDTH + x, (y < HEIGHT) & (x < WIDTH)


@triton.jit
def load_record(p_base, p_fractions, o_n, m_n, EXACT: tl.constexpr):
    # Twice the same word if fractions are packed, so that one loop can carry either form.
    cell = tl.load(p_base + o_n, mask=m_n, other=-1)
    if EXACT:
        first = tl.load(p_fractions + 2 * o_n, mask=m_n, other=0.0)
        second = tl.load(p_fractions + 2 * o_n + 1, mask=m_n, other=0.0)
    else:
        first = tl.load(p_fractions + o_n, mask=m_n, other=0)
        second = first
    return cell, first, second


@triton.jit
def fractions_of(first, second, EXACT: tl.constexpr):
    if EXACT:
        fx = first
        fy = second
    else:
        fx = (first & 0xFFFF).to(tl.float32) * (1.0 / 32768.0)
        fy = ((second >> 16) & 0xFFFF).to(tl.float32) * (1.0 / 32768.0)
    return fx, fy


@triton.jit
def is_inside(cell, frame, Tk, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    # Whether a sample can be read, whatever its record and its frame say: -1 is the largest unsigned number.
    LAST: tl.constexpr = HEIGHT * WIDTH - 1 - (WIDTH if HEIGHT > 1 else 0) - (1 if WIDTH > 1 else 0)
    cell = tl.where(frame.to(tl.uint32, bitcast=True) < Tk, cell, -1)
    return cell.to(tl.uint32, bitcast=True) <= LAST


@triton.jit
def corner_weights(fx, fy, is_live, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    # Dead samples get weight 0 everywhere: no corner of theirs is read.
    gx = tl.where(is_live, 1.0 - fx, 0.0) if WIDTH > 1 else tl.where(is_live, 1.0, 0.0)
    fx = tl.where(is_live, fx, 0.0)
    if HEIGHT > 1:
        w0 = gx * (1.0 - fy)
        w1 = fx * (1.0 - fy)
        w2 = gx * fy
        w3 = fx * fy
    else:
        w0 = gx
        w1 = fx
        w2 = w0
        w3 = w1
    return w0, w1, w2, w3


@triton.jit
def over_channels(m, o_c, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    # Along queries; channels from COUNT on are masked.
    return by_query(m) if BLOCK == COUNT else by_query(m) & by_channel(o_c < COUNT)


@triton.jit
def load_corners(p_x, step_x, step_y, m0, m1, m2, m3, HEIGHT: tl.constexpr, WIDTH: tl.constexpr):
    # Of a grid of one row or column, the corners that do not exist stand for the first; `mix` leaves them out.
    c0 = tl.load(p_x, mask=m0, other=0)
    c1 = c0
    c2 = c0
    c3 = c0
    if WIDTH > 1:
        c1 = tl.load(p_x + step_x, mask=m1, other=0)
    if HEIGHT > 1:
        c2 = tl.load(p_x + step_y, mask=m2, other=0)
    if (WIDTH > 1) and (HEIGHT > 1):
        c3 = tl.load(p_x + (step_y + step_x), mask=m3, other=0)
    return c0, c1, c2, c3


@triton.jit
def mix(c0, c1, c2, c3, w0, w1, w2, w3, HEIGHT: tl.constexpr, WIDTH: tl.constexpr, KIND: tl.constexpr):
    even, odd = unpack(c0, KIND)
    even = w0 * even
    odd = w0 * odd
    if WIDTH > 1:
        x, y = unpack(c1, KIND)
        even += w1 * x
        odd += w1 * y
    if HEIGHT > 1:
        x, y = unpack(c2, KIND)
        even += w2 * x
        odd += w2 * y
    if (WIDTH > 1) and (HEIGHT > 1):
        x, y = unpack(c3, KIND)
        even += w3 * x
        odd += w3 * y
    return even, odd


@triton.jit
def join_pair(first, second):  # two float32 as one int64
    first = first.to(tl.int32, bitcast=True).to(tl.int64)
    second = second.to(tl.int32, bitcast=True).to(tl.int64)
    return (second << 32) | (first & 0xFFFFFFFF)


@triton.jit
def split_pair(pair):
    first = pair.to(tl.int32).to(tl.float32, bitcast=True)
    second = (pair >> 32).to(tl.int32).to(tl.float32, bitcast=True)
    return first, second
