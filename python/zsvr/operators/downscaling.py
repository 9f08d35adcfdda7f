"""Lost resolution: block means and bicubic reduction."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zsvr.operators.base import Flat, Operator
from zsvr.operators.pixelwise import check_canvas
from zsvr.operators.separable import Separable, folded

KEYS = -0.5  # parameter of the cubic


class _Downscale(Operator):
    full_row_rank = True

    def __init__(self, scale: int = 4) -> None:
        if isinstance(scale, bool) or not isinstance(scale, int) or scale < 1:
            raise ValueError(f"scale must be an integer of at least 1, got {scale!r}")
        self.scale = scale
        self.rho = 1 / scale**2

    def measured_shape(self, canvas: tuple[int, int]) -> tuple[int, int, int]:
        H, W = check_canvas(canvas)
        f = self.scale
        if H % f or W % f:
            fits = tuple(max(f, round(n / f) * f) for n in (H, W))
            raise ValueError(
                f"a canvas must be a multiple of the scale {f}: {H} x {W} is not, {fits[0]} x {fits[1]} is"
            )
        return (3, H // f, W // f)

    def canvas(self, measured: tuple[int, int]) -> tuple[int, int]:
        return (measured[0] * self.scale, measured[1] * self.scale)

    def preview(self, y: Tensor) -> Tensor:
        """Return the picture enlarged, bicubically."""
        u = (y.float() + 1) / 2
        large = torch.nn.functional.interpolate(
            u.flatten(0, -4) if u.ndim > 3 else u[None],
            self.canvas((y.shape[-2], y.shape[-1])),
            mode="bicubic",
            antialias=True,  # has the cubic of parameter -0.5; nothing is reduced here
        )
        return large.clamp(0, 1).reshape(*y.shape[:-2], *large.shape[-2:]).to(y.dtype)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "scale": self.scale}


class AverageDownscale(_Downscale):
    """Means of blocks of ``scale x scale`` pixels.

    Args:
        scale: at least 1.
    """

    name = "sr_avg"

    def A(self, x: Tensor) -> Tensor:
        _, h, w = self.measured_shape((x.shape[-2], x.shape[-1]))
        return x.reshape(*x.shape[:-2], h, self.scale, w, self.scale).mean((-3, -1))

    def adjoint(self, y: Tensor) -> Tensor:
        return self.pinv(y) / self.scale**2

    def pinv(self, y: Tensor) -> Tensor:
        return y.repeat_interleave(self.scale, -2).repeat_interleave(self.scale, -1)

    def spectrum(self) -> Flat:
        return Flat(1 / self.scale)


class BicubicDownscale(_Downscale):
    """Antialiased bicubic reduction (Keys' cubic of parameter -0.5), with half-sample symmetric borders.

    Args:
        scale: at least 1.
    """

    name = "sr_bicubic"

    def __init__(self, scale: int = 4) -> None:
        super().__init__(scale)
        self._map = Separable(lambda n, vertical: reduction(n, scale))

    def A(self, x: Tensor) -> Tensor:
        self.measured_shape((x.shape[-2], x.shape[-1]))
        return self._map.forward(x)

    def adjoint(self, y: Tensor) -> Tensor:
        return self._map.adjoint(y, self.canvas((y.shape[-2], y.shape[-1])))

    def pinv(self, y: Tensor) -> Tensor:
        return self._map.inverse(y, self.canvas((y.shape[-2], y.shape[-1])))

    def spectrum(self) -> Separable:
        return self._map


def cubic(t: Tensor) -> Tensor:
    """Return Keys' cubic (1981) of parameter -0.5 at t."""
    t = t.abs()
    near = ((KEYS + 2) * t - (KEYS + 3)) * t * t + 1
    far = ((KEYS * t - 5 * KEYS) * t + 8 * KEYS) * t - 4 * KEYS
    return torch.where(t <= 1, near, torch.where(t < 2, far, torch.zeros_like(t)))


def reduction(n: int, scale: int) -> Tensor:
    """Return the float64 ``[n/scale, n]`` matrix of antialiased bicubic reduction of one axis; rows have sum 1."""
    centre = (torch.arange(n // scale, dtype=torch.float64)[:, None] + 0.5) * scale
    at = torch.floor(centre - 2 * scale).long() + torch.arange(4 * scale + 2)
    weights = cubic((at + 0.5 - centre) / scale)
    return folded(at, weights / weights.sum(1, keepdim=True), n)
