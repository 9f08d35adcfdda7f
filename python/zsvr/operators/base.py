"""What a degradation is: a linear map A of frames, its adjoint and its pseudo-inverse."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Flat:
    """The spectrum of an operator with one common singular value ``s`` (and zero); ``Q = A+ A`` projects."""

    s: float


class Spectral(abc.ABC):
    """The spectrum of ``A = U s V^T``, as what DDNM+ needs of it: components of the input space by singular value."""

    @abc.abstractmethod
    def values(self, canvas: tuple[int, int]) -> Tensor:
        """Return the singular value of every component, float32, shaped to broadcast against `analyze`'s result.

        Values that the pseudo-inverse drops are 0.
        """

    @abc.abstractmethod
    def analyze(self, x: Tensor) -> Tensor:
        """Return ``V^T x`` for ``x [..., C, H, W]``."""

    @abc.abstractmethod
    def synthesize(self, c: Tensor) -> Tensor:
        """Return ``V c``, real, of the shape that was analyzed."""


class Operator(abc.ABC):
    """A degradation ``y = A x`` of frames in the model's range [-1, 1], frame by frame.

    All methods take any leading axes: ``x [..., 3, Hc, Wc]``, ``y [..., Cy, Hy, Wy]``, and keep dtype and device.

    Attributes:
        name: as in the command line and in saved descriptions.
        rho: largest eigenvalue of ``A^T A``, or a bound on it.
        exact_pinv: whether ``A A+ A = A`` holds exactly (in arithmetic without rounding).
        full_row_rank: whether ``A A+ = I``.
        blind: A has parameters that nobody knows and a host must estimate; then A is defined for simulation only.
    """

    name: str
    rho: float
    exact_pinv: bool = True
    full_row_rank: bool = False
    blind: bool = False

    @abc.abstractmethod
    def A(self, x: Tensor) -> Tensor:
        """Return the measurement ``A x``."""

    @abc.abstractmethod
    def adjoint(self, y: Tensor) -> Tensor:
        """Return ``A^T y``."""

    @abc.abstractmethod
    def pinv(self, y: Tensor) -> Tensor:
        """Return ``A+ y``, or the regularized inverse that was asked for."""

    @abc.abstractmethod
    def measured_shape(self, canvas: tuple[int, int]) -> tuple[int, int, int]:
        """Return ``(Cy, Hy, Wy)`` for a canvas ``(Hc, Wc)``.

        Raises:
            ValueError: the operator does not fit the canvas; says what would.
        """

    def canvas(self, measured: tuple[int, int]) -> tuple[int, int]:
        """Return the canvas ``(Hc, Wc)`` whose measurement has size ``(Hy, Wy)``."""
        return measured

    def from_picture(self, u: Tensor) -> Tensor:
        """Return the measurement that a degraded picture ``u [..., 3, Hy, Wy]`` in [0, 1] shows."""
        return to_model(u)

    def preview(self, y: Tensor) -> Tensor:
        """Return a picture in [0, 1], ``[T, 3, Hc, Wc]``, for optical flow and for people."""
        return to_unit(y)

    def select(self, frames: Sequence[int]) -> Operator:
        """Return the operator of some frames of the clip: itself, unless it differs from frame to frame."""
        return self

    def spectrum(self) -> Flat | Spectral | None:
        """Return the spectrum, or None where there is none in closed form (then DDNM+ is isotropic)."""
        return None

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return name and arguments, values that JSON or safetensors (tensors) can hold; `operators.load` reads it."""

    def __repr__(self) -> str:
        return _summary(self.describe())


def _summary(value: Any) -> str:
    """Return a description as text, tensors by shape."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, dict):
        return f"{value['name']}({', '.join(f'{n}={_summary(v)}' for n, v in value.items() if n != 'name')})"
    if isinstance(value, list | tuple):
        return f"[{', '.join(_summary(v) for v in value)}]"
    return repr(value)


def to_model(u: Tensor) -> Tensor:
    """Return frames of [0, 1] in the model's range [-1, 1]."""
    return 2 * u - 1


def to_unit(x: Tensor) -> Tensor:
    """Return frames of the model's range in [0, 1], clipped."""
    return ((x + 1) / 2).clamp(0, 1)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of two stacks of frames, in float64."""
    return torch.sum(a.double() * b.double())
