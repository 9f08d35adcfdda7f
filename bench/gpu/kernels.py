"""Microkernels that probe what bounds the operators: gathered rows, atomics, exponentials, an empty launch."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _row_gather_kernel(
    p_x,  # int32 [N, ROW]
    p_index,  # int32 [programs * FLIGHT * BLOCK]
    p_out,  # int32 [programs, PADDED]
    ROW: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    FLIGHT: tl.constexpr,
):
    # Computes: the sum over a program's rows x[index].
    # Grid: as many programs as there are blocks
    # Tiles: FLIGHT tiles of BLOCK rows, all loaded before the first is needed.
    # Traffic: 4*ROW*BLOCK*FLIGHT bytes gathered per program, through the first and second level.
    # Numerics: integers.
    i_program = tl.program_id(0)
    o_column = tl.arange(0, PADDED)[None, :]
    o_row = tl.arange(0, BLOCK)
    b_sum = tl.zeros((BLOCK, PADDED), tl.int32)
    for n in tl.static_range(FLIGHT):
        b_index = tl.load(p_index + (i_program * FLIGHT + n) * BLOCK + o_row)
        b_sum += tl.load(p_x + b_index[:, None] * ROW + o_column, mask=o_column < ROW, other=0)
    tl.store(p_out + i_program * PADDED + tl.arange(0, PADDED), tl.sum(b_sum, 0))


@triton.jit
def _scatter_add_kernel(
    p_x,  # fp32 [S, C]
    p_row,  # int32 [S]
    p_out,  # fp32 [N, C]
    C: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Computes: out[row[s]] += x[s] by atomics.
    # Grid: S / BLOCK programs
    # Tiles: BLOCK rows of C.
    # Traffic: 4*C*BLOCK bytes read, as many added per program.
    # Numerics: float32, in no fixed order.
    o_sample = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    o_column = tl.arange(0, C)[None, :]
    b_row = tl.load(p_row + o_sample)
    tl.atomic_add(p_out + b_row[:, None] * C + o_column, tl.load(p_x + o_sample[:, None] * C + o_column), sem="relaxed")


@triton.jit
def _gather_sum_kernel(
    p_x,  # fp32 [S, C]
    p_offsets,  # int32 [N + 1]
    p_samples,  # int32 [S]
    p_out,  # fp32 [N, C]
    C: tl.constexpr,
):
    # Computes: out[n] = sum of x[s] over the samples of row n, the same sums as _scatter_add_kernel.
    # Grid: a program per row
    # Tiles: one row of C.
    # Traffic: 4*C bytes read per sample, 4*C written per row.
    # Numerics: float32, in the order of the samples.
    i_row = tl.program_id(0)
    o_column = tl.arange(0, C)
    first, stop = tl.load(p_offsets + i_row), tl.load(p_offsets + i_row + 1)
    b_sum = tl.zeros((C,), tl.float32)
    for s in range(first, stop):
        b_sum += tl.load(p_x + tl.load(p_samples + s) * C + o_column)
    tl.store(p_out + i_row * C + o_column, b_sum)


@triton.jit
def _exp2_kernel(
    p_out,  # fp32 [programs, BLOCK]
    ROUNDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    # Computes: x = 2^-x, ROUNDS times.
    # Grid: as many programs as there are blocks
    # Tiles: BLOCK numbers in registers.
    # Traffic: 4*BLOCK bytes written per program.
    # Numerics: float32.
    o_number = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_x = o_number.to(tl.float32) * 1e-6
    for _ in range(ROUNDS):
        b_x = tl.exp2(-b_x)
    tl.store(p_out + o_number, b_x)


@triton.jit
def _empty_kernel(
    p_out,  # int32 [1]
):
    # Computes: nothing; stores one number.
    # Grid: one program
    # Tiles: none.
    # Traffic: 4 bytes.
    # Numerics: none.
    tl.store(p_out, 1)
