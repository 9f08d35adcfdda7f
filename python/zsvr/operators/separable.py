"""Maps of frames that act on rows and columns independently: ``x -> R_v x R_h^T``, with their spectrum."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from zsvr.operators.base import Spectral
from zsvr_kernels import backends


class Factors(NamedTuple):
    """The singular value decomposition of one axis's matrix ``[m, n]``, m <= n.

    Attributes:
        left: ``[m, m]``. values: ``[m]``. right: ``[n, n]``, all of V, so that the null space has components too.
    """

    left: Tensor
    values: Tensor
    right: Tensor


class Separable(Spectral):
    """``x -> R_v x R_h^T`` for frames of any size. Singular values are products of the axes'.

    Args:
        matrix: returns the float64 matrix of an axis of n pixels; arguments n and whether the axis is vertical.
        tolerance: products of singular values below it count as 0, in `inverse` and in the spectrum.
        factors: returns the matrix's decomposition, where one is known; None: it is computed.
    """

    def __init__(
        self,
        matrix: Callable[[int, bool], Tensor],
        tolerance: float = 0.0,
        factors: Callable[[int, bool], Factors] | None = None,
    ) -> None:
        self._tolerance = tolerance
        decompose = factors or (lambda n, vertical: _decompose(matrix(n, vertical)))
        self._matrix = functools.lru_cache(maxsize=8)(
            lambda n, vertical, dtype, device: matrix(n, vertical).to(device, dtype)
        )
        self._exact = functools.lru_cache(maxsize=4)(decompose)
        self._factors = functools.lru_cache(maxsize=8)(
            lambda n, vertical, dtype, device: Factors(*(t.to(device, dtype) for t in self._exact(n, vertical)))
        )
        self._kept = functools.lru_cache(maxsize=4)(self._keep)

    def _matrices(self, canvas: tuple[int, int], like: Tensor) -> tuple[Tensor, Tensor]:
        H, W = canvas
        return self._matrix(H, True, like.dtype, like.device), self._matrix(W, False, like.dtype, like.device)

    def _axes(self, canvas: tuple[int, int], like: Tensor) -> tuple[Factors, Factors]:
        H, W = canvas
        return self._factors(H, True, like.dtype, like.device), self._factors(W, False, like.dtype, like.device)

    def _keep(self, canvas: tuple[int, int]) -> Tensor:
        """Return the singular values of the measured components, float64; those below the tolerance are 0."""
        v, h = self._exact(canvas[0], True), self._exact(canvas[1], False)
        return truncated(torch.outer(v.values, h.values), self._tolerance)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``R_v x R_h^T`` for ``x [..., C, H, W]``."""
        v, h = self._matrices((x.shape[-2], x.shape[-1]), x)
        return apply(v, x, h)

    def adjoint(self, y: Tensor, canvas: tuple[int, int]) -> Tensor:
        """Return ``R_v^T y R_h``, of the canvas's size."""
        v, h = self._matrices(canvas, y)
        return apply(v.mT, y, h.mT)

    def inverse(self, y: Tensor, canvas: tuple[int, int]) -> Tensor:
        """Return the pseudo-inverse of the truncated map, of the canvas's size."""
        v, h = self._axes(canvas, y)
        components = reciprocal(self._kept(canvas)).to(y) * apply(v.left.mT, y, h.left.mT)
        return apply(v.right[:, : len(v.values)], components, h.right[:, : len(h.values)])

    def values(self, canvas: tuple[int, int]) -> Tensor:
        kept = self._kept(canvas).float()
        return torch.nn.functional.pad(kept, (0, canvas[1] - kept.shape[1], 0, canvas[0] - kept.shape[0]))

    def analyze(self, x: Tensor) -> Tensor:
        v, h = self._axes((x.shape[-2], x.shape[-1]), x)
        return apply(v.right.mT, x, h.right.mT)

    def synthesize(self, c: Tensor) -> Tensor:
        v, h = self._axes((c.shape[-2], c.shape[-1]), c)
        return apply(v.right, c, h.right)


def _decompose(matrix: Tensor) -> Factors:
    left, values, transposed = torch.linalg.svd(matrix, full_matrices=True)
    return Factors(left, values, transposed.mT.contiguous())


def apply(rows: Tensor, x: Tensor, columns: Tensor) -> Tensor:
    """Return ``rows x columns^T`` for ``x [..., C, H, W]``, in x's dtype."""
    with backends.without_autocast(x.device):
        return rows.to(x) @ x @ columns.to(x).mT


def folded(taps_at: Tensor, weights: Tensor, n: int) -> Tensor:
    """Return the matrix ``[m, n]`` with ``weights [m, k]`` at positions ``taps_at`` (int64 ``[m, k]``), any integers.

    Positions outside 0..n-1 are folded back by half-sample symmetry, ``-1 -> 0``, as often as needed.
    """
    matrix = torch.zeros(taps_at.shape[0], n, dtype=torch.float64)
    return matrix.scatter_add_(1, mirrored(taps_at, n), weights.double())


def mirrored(at: Tensor, n: int) -> Tensor:
    """Return the index within 0..n-1 of any integer, by half-sample symmetry."""
    at = at % (2 * n)
    return torch.minimum(at, 2 * n - 1 - at)


def convolution(kernel: Tensor, n: int) -> Tensor:
    """Return the matrix ``[n, n]`` of convolution with an odd ``kernel [taps]`` and half-sample symmetric borders."""
    taps = len(kernel)
    offset = torch.arange(taps) - taps // 2
    return folded(torch.arange(n)[:, None] - offset, kernel.expand(n, taps), n)


def cosines(n: int) -> Tensor:
    """Return the orthonormal cosine transform of length n (DCT-II), float64 ``[n, n]``, frequencies by rows."""
    at = torch.arange(n, dtype=torch.float64)
    table = torch.cos(at[:, None] * (at + 0.5) * (torch.pi / n)) * (2 / n) ** 0.5
    table[0] *= 0.5**0.5
    return table


def cosine_factors(kernel: Tensor, n: int) -> Factors:
    """Return the decomposition of `convolution` with a symmetric kernel: the cosine transform diagonalizes it."""
    offset = torch.arange(len(kernel), dtype=torch.float64) - len(kernel) // 2
    frequency = torch.arange(n, dtype=torch.float64)[:, None] * (torch.pi / n)
    gain = (torch.cos(frequency * offset) * kernel).sum(1)  # [n], may be negative
    right = cosines(n).mT.contiguous()
    return Factors(torch.where(gain < 0, -right, right), gain.abs(), right)


def truncated(values: Tensor, tolerance: float) -> Tensor:
    """Return singular values with those below the tolerance set to 0."""
    return values.masked_fill(values < tolerance, 0.0)


def reciprocal(values: Tensor) -> Tensor:
    """Return ``1 / values``, 0 where they are 0."""
    return torch.where(values > 0, 1 / values.masked_fill(values <= 0, 1.0), torch.zeros_like(values))
