"""Blur: separable with symmetric borders, and any kernel with periodic (or extended) ones.

Small singular values amplify noise. Those below ``svd_tol`` are dropped from the pseudo-inverse and from the spectrum
alike, so that whoever uses both sees one operator; measurements are still made with all of A.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from zsvr.operators import kernels
from zsvr.operators.base import Operator, Spectral
from zsvr.operators.pixelwise import check_canvas
from zsvr.operators.separable import (
    Separable,
    apply,
    convolution,
    cosine_factors,
    cosines,
    mirrored,
    reciprocal,
    truncated,
)
from zsvr.operators.solving import conjugate_gradients

Kernel = str | Tensor | tuple[Tensor, Tensor]
SIGNAL_VARIANCE = 0.25  # of frames in [-1, 1], for the Wiener filter


class _Blur(Operator):
    exact_pinv = False  # it is that of the truncated operator
    inverses: tuple[str, ...] = ("closed", "cg")

    def __init__(self, svd_tol: float, pinv: str, cg_iters: int) -> None:
        if not 0 < svd_tol < 1:
            raise ValueError(f"operator.svd_tol must be within 0..1, neither included, got {svd_tol!r}")
        if pinv not in self.inverses:
            raise ValueError(f"operator.pinv must be one of {', '.join(self.inverses)} for {self.name}, got {pinv!r}")
        if cg_iters < 1:
            raise ValueError(f"operator.cg_iters must be at least 1, got {cg_iters!r}")
        self.svd_tol, self.inverse, self.cg_iters = svd_tol, pinv, cg_iters

    def pinv(self, y: Tensor) -> Tensor:
        if self.inverse == "cg":
            return conjugate_gradients(self.A, self.adjoint, y, self.cg_iters)
        return self._closed(y)

    def _closed(self, y: Tensor) -> Tensor:
        raise AssertionError("a blur has a closed inverse")

    def measured_shape(self, canvas: tuple[int, int]) -> tuple[int, int, int]:
        return (3, *check_canvas(canvas))

    def _arguments(self) -> dict[str, Any]:
        return {"svd_tol": self.svd_tol, "pinv": self.inverse, "cg_iters": self.cg_iters}


class SeparableBlur(_Blur):
    """Blur ``K_v x K_h^T`` with half-sample symmetric borders.

    Args:
        kernel: a text (`kernels.parse`), ``[taps]`` for both axes, or a pair (vertical, horizontal); odd lengths.
        svd_tol: singular values (products of the axes') below it are dropped.
        pinv: ``"closed"``: truncated singular value decomposition; ``"cg"``: conjugate gradients on all of A.
        cg_iters: iterations of ``"cg"``.
    """

    name = "blur_sep"

    def __init__(
        self, kernel: Kernel = "gaussian", *, svd_tol: float = 3e-2, pinv: str = "closed", cg_iters: int = 50
    ) -> None:
        super().__init__(svd_tol, pinv, cg_iters)
        self.kernel = kernels.as_separable(kernel)  # vertical, horizontal; float64 [taps]
        self.rho = _bound(self.kernel[0]) * _bound(self.kernel[1])
        symmetric = all(torch.equal(k, k.flip(0)) for k in self.kernel)
        self._map = Separable(
            lambda n, vertical: convolution(self.kernel[0 if vertical else 1], n),
            svd_tol,
            (lambda n, vertical: cosine_factors(self.kernel[0 if vertical else 1], n)) if symmetric else None,
        )

    def A(self, x: Tensor) -> Tensor:
        return self._map.forward(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return self._map.adjoint(y, (y.shape[-2], y.shape[-1]))

    def _closed(self, y: Tensor) -> Tensor:
        return self._map.inverse(y, (y.shape[-2], y.shape[-1]))

    def spectrum(self) -> Separable | None:
        """Return products of the axes' singular values, where `pinv` is their truncated inverse."""
        return self._map if self.inverse == "closed" else None

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "kernel": self.kernel, **self._arguments()}


class FourierBlur(_Blur):
    """Convolution with any kernel.

    Args:
        kernel: a text (`kernels.parse`), ``[rows, columns]``, or ``[taps]`` for both axes. Its middle is at index
            ``size // 2``.
        svd_tol: frequencies whose gain is below it are dropped from the pseudo-inverse.
        pinv: ``"closed"``; ``"cg"``: conjugate gradients on all of A; ``"wiener"``: a regularized inverse,
            ``conj(h) / (|h|^2 + sigma_y^2 / 0.25)``, which is no pseudo-inverse and needs ``noise_std``. None:
            ``"closed"`` where there is one, else ``"cg"``.
        cg_iters: iterations of ``"cg"``.
        fft_pad: ``"none"``: periodic borders; ``"reflect"``: frames are extended by half the kernel, half-sample
            symmetric, and the result is cropped. Then only kernels that are symmetric along each axis have a closed
            inverse (cosine transforms diagonalize A).
        noise_std: standard deviation of the measurement's noise in [0, 1] units, for ``"wiener"``.
    """

    name = "blur_fft"
    inverses = ("closed", "cg", "wiener")

    def __init__(
        self,
        kernel: Kernel = "gaussian",
        *,
        svd_tol: float = 3e-2,
        pinv: str | None = None,
        cg_iters: int = 50,
        fft_pad: str = "none",
        noise_std: float | None = None,
    ) -> None:
        if fft_pad not in ("none", "reflect"):
            raise ValueError(f"operator.fft_pad must be none or reflect, got {fft_pad!r}")
        self.kernel = kernels.as_image(kernel)  # float64 [rows, columns]
        diagonal = fft_pad == "none" or _is_symmetric(self.kernel)
        super().__init__(svd_tol, pinv or ("closed" if diagonal else "cg"), cg_iters)
        if (pinv == "wiener") != (noise_std is not None and noise_std > 0):
            raise ValueError(f"noise_std (above 0) and pinv='wiener' belong together, got {noise_std!r}, {pinv!r}")
        if not diagonal and self.inverse != "cg":
            raise ValueError(
                f"operator.pinv={pinv!r} with fft_pad='reflect' needs a kernel that is symmetric along each axis; "
                "pinv='cg' takes any"
            )
        self.fft_pad, self.noise_std = fft_pad, noise_std
        # Extending repeats border pixels, along each axis at most once where the kernel is smaller than the frame.
        self.rho = float(self.kernel.abs().sum()) ** 2 * (1 if diagonal else 4)
        spectrum = FourierSpectrum if fft_pad == "none" else CosineSpectrum
        self._spectrum = spectrum(self.transfer, svd_tol)
        self._gains = functools.lru_cache(maxsize=8)(self._make_gains)

    def transfer(self, H: int, W: int) -> Tensor:
        """Return the transfer function of a canvas, complex128 ``[H, W]``."""
        rows, columns = self.kernel.shape
        at = [(torch.arange(size) - size // 2) % n for size, n in ((rows, H), (columns, W))]
        spread = torch.zeros(H, columns, dtype=torch.float64).index_add_(0, at[0], self.kernel)
        whole = torch.zeros(H, W, dtype=torch.float64).index_add_(1, at[1], spread)
        return torch.fft.fft2(whole)

    def _make_gains(self, kind: str, H: int, W: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return the transfer function, its conjugate or its inverse, for the half spectrum of a real transform."""
        h = self.transfer(H, W)[:, : W // 2 + 1]
        if kind == "adjoint":
            h = h.conj()
        elif kind == "inverse" and self.noise_std is not None:
            h = h.conj() / (h.abs().square() + (2 * self.noise_std) ** 2 / SIGNAL_VARIANCE)
        elif kind == "inverse":
            h = h.conj() * reciprocal(truncated(h.abs(), self.svd_tol)).square()
        return h.to(device, dtype)

    def _filter(self, x: Tensor, kind: str) -> Tensor:
        """Filter with ``"forward"``, ``"adjoint"`` or ``"inverse"``; periodic."""
        spectrum = torch.fft.rfft2(x if x.dtype == torch.float64 else x.float())
        H, W = x.shape[-2:]
        gains = self._gains(kind, H, W, spectrum.dtype, x.device)
        return torch.fft.irfft2(spectrum * gains, s=(H, W)).to(x.dtype)

    @property
    def _margins(self) -> tuple[int, int]:
        return (0, 0) if self.fft_pad == "none" else (self.kernel.shape[0] // 2, self.kernel.shape[1] // 2)

    def _crop(self, x: Tensor) -> Tensor:
        top, left = self._margins
        return x[..., top : x.shape[-2] - top, left : x.shape[-1] - left]

    def _extend(self, x: Tensor) -> Tensor:
        top, left = self._margins
        return x.index_select(-2, _reflected(x.shape[-2], top, x)).index_select(-1, _reflected(x.shape[-1], left, x))

    def _fold(self, x: Tensor) -> Tensor:
        """The adjoint of `_extend`: borders are added onto the pixels they were copied from."""
        top, left = self._margins
        H, W = x.shape[-2] - 2 * top, x.shape[-1] - 2 * left
        rows = x.new_zeros(*x.shape[:-2], H, x.shape[-1]).index_add(-2, _reflected(H, top, x), x)
        return x.new_zeros(*x.shape[:-2], H, W).index_add(-1, _reflected(W, left, x), rows)

    def A(self, x: Tensor) -> Tensor:
        if self.fft_pad == "none":
            return self._filter(x, "forward")
        return self._crop(self._filter(self._extend(x), "forward"))

    def adjoint(self, y: Tensor) -> Tensor:
        if self.fft_pad == "none":
            return self._filter(y, "adjoint")
        top, left = self._margins
        return self._fold(self._filter(torch.nn.functional.pad(y, (left, left, top, top)), "adjoint"))

    def _closed(self, y: Tensor) -> Tensor:
        if self.fft_pad == "none":
            return self._filter(y, "inverse")
        H, W = y.shape[-2:]
        twice = torch.cat((y, y.flip(-2)), -2)  # symmetric, therefore periodic without a seam
        return self._filter(torch.cat((twice, twice.flip(-1)), -1), "inverse")[..., :H, :W]

    def spectrum(self) -> Spectral | None:
        """Return the gains of frequencies, where `pinv` is their truncated inverse."""
        return self._spectrum if self.inverse == "closed" else None

    def describe(self) -> dict[str, Any]:
        known = {"name": self.name, "kernel": self.kernel, **self._arguments(), "fft_pad": self.fft_pad}
        return known if self.noise_std is None else {**known, "noise_std": self.noise_std}


class FourierSpectrum(Spectral):
    """Singular values are gains of frequencies; components are those of the unitary Fourier transform, complex.

    Args:
        transfer: returns the transfer function for a height and a width.
        tolerance: gains below it count as 0.
    """

    def __init__(self, transfer: Callable[[int, int], Tensor], tolerance: float) -> None:
        self._values = functools.lru_cache(maxsize=4)(lambda H, W: truncated(transfer(H, W).abs(), tolerance).float())

    def values(self, canvas: tuple[int, int]) -> Tensor:
        return self._values(*canvas)

    def analyze(self, x: Tensor) -> Tensor:
        return torch.fft.fft2(x if x.dtype == torch.float64 else x.float(), norm="ortho")

    def synthesize(self, c: Tensor) -> Tensor:
        return torch.fft.ifft2(c, norm="ortho").real


class CosineSpectrum(Spectral):
    """As `FourierSpectrum` for symmetric borders: gains at half frequencies, and orthonormal cosine transforms."""

    def __init__(self, transfer: Callable[[int, int], Tensor], tolerance: float) -> None:
        self._values = functools.lru_cache(maxsize=4)(
            lambda H, W: truncated(transfer(2 * H, 2 * W)[:H, :W].abs(), tolerance).float()
        )
        self._cosines = functools.lru_cache(maxsize=8)(lambda n, dtype, device: cosines(n).to(device, dtype))

    def values(self, canvas: tuple[int, int]) -> Tensor:
        return self._values(*canvas)

    def _pair(self, x: Tensor) -> tuple[Tensor, Tensor]:
        H, W = x.shape[-2:]
        return self._cosines(H, x.dtype, x.device), self._cosines(W, x.dtype, x.device)

    def analyze(self, x: Tensor) -> Tensor:
        v, h = self._pair(x)
        return apply(v, x, h)

    def synthesize(self, c: Tensor) -> Tensor:
        v, h = self._pair(c)
        return apply(v.mT, c, h.mT)


def _reflected(n: int, margin: int, x: Tensor) -> Tensor:
    """Return the indices that extend an axis of n by a margin on both sides, half-sample symmetric."""
    return mirrored(torch.arange(-margin, n + margin, device=x.device), n)


def _bound(kernel: Tensor) -> float:
    """Return a bound on ``|K|^2`` of symmetric-border convolution: largest row sum times largest column sum."""
    size = convolution(kernel, 2 * len(kernel)).abs()
    return float(size.sum(0).max() * size.sum(1).max())


def _is_symmetric(kernel: Tensor) -> bool:
    """Return whether a kernel ``[rows, columns]`` is odd and the same when flipped along either axis."""
    odd = kernel.shape[0] % 2 == 1 and kernel.shape[1] % 2 == 1
    return odd and torch.equal(kernel, kernel.flip(0)) and torch.equal(kernel, kernel.flip(1))
