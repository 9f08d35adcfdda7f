"""What the rest of the framework asks of an image diffusion model."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def sides(size: int | Sequence[int]) -> tuple[int, int]:
    """Return height and width in pixels of one side, or of a pair of them.

    Raises:
        ValueError: it is neither, or not positive.
    """
    pair: list[Any] = list(size) if isinstance(size, list | tuple) else [size, size]
    if len(pair) != 2 or not all(isinstance(n, int) and n > 0 for n in pair):
        raise ValueError(f"size must be a side in pixels, or (height, width), whole and positive; got {size!r}")
    return pair[0], pair[1]


class Prior(abc.ABC):
    """An image diffusion model: predicts noise in a batch of frames.

    Attributes:
        model: the network whose spatial self-attention `zsvr_kernels.patched` replaces.
        alphas_bar: float64 ``[N]``, cumulative products of ``1 - beta``.
        channels: of what is denoised: 3, or the latent's.
        size: height and width in pixels the model was trained at.
        multiple: both sides of a canvas must be multiples of this, in pixels.
        factor: pixels per cell of what is denoised: 1, or the VAE's 8.
        learns_variance: whether `predict` returns ``frac``.
        branches: guidance branches in a batch of the network (2 with classifier-free guidance).
        expected_count: how many layers the patch must find, or None.
    """

    model: nn.Module
    alphas_bar: Tensor
    channels: int = 3
    size: tuple[int, int]
    multiple: int = 1
    factor: int = 1
    learns_variance: bool = False
    branches: int = 1
    expected_count: int | None = None

    @abc.abstractmethod
    def predict(self, x: Tensor, step: int) -> tuple[Tensor, Tensor | None]:
        """Predict the noise in ``x [T, channels, h, w]`` at training step ``step`` (0..N-1).

        Returns:
            eps like x, and ``frac`` in [0, 1] like x where the variance is learned, else None.
        """

    def level(self, step: int) -> float:
        """Return abar at a training step.

        Raises:
            ValueError: no step of the schedule.
        """
        if not 0 <= step < len(self.alphas_bar):
            raise ValueError(f"step must be a training step, 0..{len(self.alphas_bar) - 1}, got {step}")
        return float(self.alphas_bar[step])

    def encode(self, u: Tensor) -> Tensor:
        """Return what is denoised for frames ``[T, 3, H, W]`` in [-1, 1]; differentiable."""
        return u

    def decode(self, x: Tensor) -> Tensor:
        """Return frames ``[T, 3, H, W]`` in [-1, 1] (not clipped) for what is denoised; differentiable."""
        return x

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return what a run's config.json says of the prior: kind, path, hash, configuration."""
