"""Kernels for tests/test_gates.py: one that passes every gate, which other constants make fail each of them."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _product_kernel(
    p_a,
    p_b,
    p_out,
    n_k,
    scale,
    M: tl.constexpr,
    N: tl.constexpr,
    K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    o_m, o_n, o_k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    b_out = tl.zeros([M, N], tl.float32)
    for i_k in range(0, n_k, K):
        b_a = tl.load(p_a + o_m[:, None] * n_k + i_k + o_k[None, :])
        b_b = tl.load(p_b + o_n[:, None] * n_k + i_k + o_k[None, :])
        b_out = tl.dot(b_a, tl.trans(b_b), b_out, input_precision=PRECISION)
    b_out = tl.exp2(b_out * scale)
    tl.store(p_out + o_m[:, None] * N + o_n[None, :], b_out.to(p_out.dtype.element_ty))


@triton.jit
def _rows_kernel(p_x, p_index, p_out, stride, n, D: tl.constexpr, BLOCK: tl.constexpr):
    o_d = tl.arange(0, D)
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m_n = o_n < n
    b_index = tl.load(p_index + o_n, mask=m_n, other=0)
    b_x = tl.load(p_x + b_index[:, None] * stride + o_d[None, :], mask=m_n[:, None], other=0.0)
    tl.store(p_out + o_n[:, None] * D + o_d[None, :], b_x, mask=m_n[:, None])


@triton.jit(do_not_specialize=["plain"], do_not_specialize_on_alignment=["unaligned"])
def _arguments_kernel(p_x, p_absent, flag, one, wide, huge, ratio, plain, unaligned, text: tl.constexpr, n=32):
    tl.store(p_x, one + wide)
