"""Maps of frames that act on rows and columns independently: ``x -> R_v x R_h^T``, with their spectrum."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from zsvr.operators.base import Spectral
from zsvr_kernels import backends


@dataclass(frozen=True)
class Axis:
    """One axis of a separable map and its singular value decomposition.

    Attributes:
        matrix: ``[m, n]``, m <= n.
        left: ``[m, m]``. values: ``[m]``. right: ``[n, n]``, all of V, so that the null space has components too.
    """

    matrix: Tensor
    left: Tensor
    values: Tensor
    right: Tensor

    @classmethod
    def of(cls, matrix: Tensor) -> Axis:
        """Decompose a float64 matrix ``[m, n]``, m <= n."""
        left, values, rightT = torch.linalg.svd(matrix, full_matrices=True)
        return cls(matrix, left, values, rightT.mT.contiguous())

    def to(self, dtype: torch.dtype, device: torch.device) -> Axis:
        """Return the axis in another dtype, on another device."""
        return Axis(*(t.to(device, dtype) for t in (self.matrix, self.left, self.values, self.right)))


class Separable(Spectral):
    """``x -> R_v x R_h^T`` for frames of any size. Singular values are products of the axes'.

    Args:
        matrix: returns the float64 matrix of an axis of n pixels; arguments n and whether the axis is vertical.
        tolerance: products of singular values below it count as 0, in `inverse` and in the spectrum.
    """

    def __init__(self, matrix: Callable[[int, bool], Tensor], tolerance: float = 0.0) -> None:
        self._tolerance = tolerance
        self._exact = functools.lru_cache(maxsize=4)(lambda n, vertical: Axis.of(matrix(n, vertical)))
        self._axis = functools.lru_cache(maxsize=8)(
            lambda n, vertical, dtype, device: self._exact(n, vertical).to(dtype, device)
        )
        self._kept = functools.lru_cache(maxsize=4)(self._keep)

    def _axes(self, canvas: tuple[int, int], like: Tensor) -> tuple[Axis, Axis]:
        H, W = canvas
        return self._axis(H, True, like.dtype, like.device), self._axis(W, False, like.dtype, like.device)

    def _keep(self, canvas: tuple[int, int]) -> Tensor:
        """Return the singular values of the measured components, float64; those below the tolerance are 0."""
        v, h = self._exact(canvas[0], True), self._exact(canvas[1], False)
        return truncated(torch.outer(v.values, h.values), self._tolerance)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``R_v x R_h^T`` for ``x [..., C, H, W]``."""
        v, h = self._axes((x.shape[-2], x.shape[-1]), x)
        return apply(v.matrix, x, h.matrix)

    def adjoint(self, y: Tensor, canvas: tuple[int, int]) -> Tensor:
        """Return ``R_v^T y R_h``, of the canvas's size."""
        v, h = self._axes(canvas, y)
        return apply(v.matrix.mT, y, h.matrix.mT)

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


def truncated(values: Tensor, tolerance: float) -> Tensor:
    """Return singular values with those below the tolerance set to 0."""
    return values.masked_fill(values < tolerance, 0.0)


def reciprocal(values: Tensor) -> Tensor:
    """Return ``1 / values``, 0 where they are 0."""
    return torch.where(values > 0, 1 / values.masked_fill(values <= 0, 1.0), torch.zeros_like(values))
