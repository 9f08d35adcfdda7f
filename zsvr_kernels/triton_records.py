"""Triton kernel: positions and validity to the records that gathers along trajectories read."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _trajectory_records_kernel(
    positions,  # fp32 [N, 2]
    valid,  # bool [N]
    base,  # int32 [N]
    fractions,  # int32 [N], or fp32 [N, 2] if EXACT
    count,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Computes: the cell and the fractions of every sample, clamped to the grid; base -1 where it is dead.
    # Grid: (ceil(N / BLOCK),).
    # Tiles: BLOCK samples.
    # Traffic: 9 bytes read and 8 (EXACT: 12) written for each sample.
    # Numerics: float32; packed fractions are multiples of 2^-15, so that 0, 1 and halves are exact.
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < count
    x = tl.load(positions + 2 * o_n, mask=m_n, other=0.0)
    y = tl.load(positions + 2 * o_n + 1, mask=m_n, other=0.0)
    is_live = (tl.load(valid + o_n, mask=m_n, other=0) != 0) & (x == x) & (y == y)
    # A comparison that NaN fails keeps it out of the conversion to int.
    x = tl.minimum(tl.where(x > 0.0, x, 0.0), WIDTH - 1.0)
    y = tl.minimum(tl.where(y > 0.0, y, 0.0), HEIGHT - 1.0)
    # The last cell ends on the border: there the fraction is 1, and all four corners exist.
    x0 = tl.minimum(x.to(tl.int32), WIDTH - 2 if WIDTH > 1 else 0)
    y0 = tl.minimum(y.to(tl.int32), HEIGHT - 2 if HEIGHT > 1 else 0)
    fx = x - x0.to(tl.float32)
    fy = y - y0.to(tl.float32)
    tl.store(base + o_n, tl.where(is_live, y0 * WIDTH + x0, -1), mask=m_n)
    if EXACT:
        tl.store(fractions + 2 * o_n, fx, mask=m_n)
        tl.store(fractions + 2 * o_n + 1, fy, mask=m_n)
    else:
        b_x = (fx * 32768.0 + 0.5).to(tl.int32)
        b_y = (fy * 32768.0 + 0.5).to(tl.int32)
        tl.store(fractions + o_n, b_x | (b_y << 16), mask=m_n)
