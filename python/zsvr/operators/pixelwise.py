"""Degradations that act on every pixel for itself: noise only, gray, low light."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zsvr.operators.base import Flat, Operator, to_unit

PREVIEW_BRIGHTNESS = 0.4  # mean of a low-light preview


def check_canvas(canvas: tuple[int, int]) -> tuple[int, int]:
    """Return the canvas.

    Raises:
        ValueError: sides that are not positive.
    """
    if len(canvas) != 2 or min(canvas) < 1:
        raise ValueError(f"a canvas is (height, width), both at least 1, got {tuple(canvas)}")
    return (int(canvas[0]), int(canvas[1]))


class Denoise(Operator):
    """Nothing but noise: ``A x = x``."""

    name = "denoise"
    rho = 1.0
    full_row_rank = True

    def A(self, x: Tensor) -> Tensor:
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        return y

    def pinv(self, y: Tensor) -> Tensor:
        return y

    def measured_shape(self, canvas: tuple[int, int]) -> tuple[int, int, int]:
        return (3, *check_canvas(canvas))

    def spectrum(self) -> Flat:
        return Flat(1.0)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name}


class Gray(Operator):
    """Lost colour: ``A x = sum_k c_k x_k``, one channel.

    Args:
        weights: of red, green and blue; their sum is 1.
    """

    name = "gray"
    full_row_rank = True

    def __init__(self, weights: Sequence[float] = (1 / 3, 1 / 3, 1 / 3)) -> None:
        self.weights = tuple(float(w) for w in weights)
        if len(self.weights) != 3 or not abs(sum(self.weights) - 1) < 1e-3:
            raise ValueError(f"weights must be three numbers of sum 1 (red, green, blue), got {self.weights}")
        self.rho = sum(w * w for w in self.weights)

    def _column(self, x: Tensor) -> Tensor:
        return torch.tensor(self.weights, dtype=x.dtype, device=x.device)[:, None, None]

    def A(self, x: Tensor) -> Tensor:
        return (self._column(x) * x).sum(-3, keepdim=True)

    def adjoint(self, y: Tensor) -> Tensor:
        return self._column(y) * y

    def pinv(self, y: Tensor) -> Tensor:
        return self._column(y) / self.rho * y

    def measured_shape(self, canvas: tuple[int, int]) -> tuple[int, int, int]:
        return (1, *check_canvas(canvas))

    def from_picture(self, u: Tensor) -> Tensor:
        """Return the measurement of a picture of one channel, or of three that are averaged."""
        return super().from_picture(u if u.shape[-3] == 1 else self.A(u))

    def preview(self, y: Tensor) -> Tensor:
        return to_unit(y).expand(*y.shape[:-3], 3, *y.shape[-2:])

    def spectrum(self) -> Flat:
        return Flat(math.sqrt(self.rho))

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "weights": list(self.weights)}


class LowLight(Operator):
    """Low light: ``y01 = gain u + offset`` in [0, 1] units; a host estimates both (only GDP does).

    Args:
        gain, offset: of a simulated measurement; None and 0 for one that is given.
    """

    name = "lowlight"
    blind = True

    def __init__(self, gain: float | None = None, offset: float = 0.0) -> None:
        if gain is not None and not 0 < gain <= 1:
            raise ValueError(f"gain must be within 0..1, above 0, got {gain!r}")
        self.gain, self.offset = gain, float(offset)
        self.rho = 1.0 if gain is None else gain**2

    def _known_gain(self) -> float:
        if self.gain is None:
            raise ValueError(
                "the gain of this low-light operator is unknown: name one to simulate a measurement "
                "(lowlight(gain=0.2)), use host 'gdp' to restore a given one"
            )
        return self.gain

    def A(self, x: Tensor) -> Tensor:
        """Return a simulated measurement; affine in x."""
        gain = self._known_gain()
        return gain * x + (gain + 2 * self.offset - 1)

    def adjoint(self, y: Tensor) -> Tensor:
        return self._known_gain() * y

    def pinv(self, y: Tensor) -> Tensor:
        gain = self._known_gain()
        return (y - (gain + 2 * self.offset - 1)) / gain

    def measured_shape(self, canvas: tuple[int, int]) -> tuple[int, int, int]:
        return (3, *check_canvas(canvas))

    def preview(self, y: Tensor) -> Tensor:
        """Return the clip brightened by one gain to a mean of 0.4."""
        u = (y.float() + 1) / 2
        mean = u.mean().clamp(min=1e-4)
        return (u * (PREVIEW_BRIGHTNESS / mean)).clamp(0, 1).to(y.dtype)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "gain": self.gain, "offset": self.offset}
