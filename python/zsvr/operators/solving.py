"""Pseudo-inverse by iteration, where there is none in closed form."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def conjugate_gradients(
    forward: Callable[[Tensor], Tensor],
    adjoint: Callable[[Tensor], Tensor],
    y: Tensor,
    iterations: int = 50,
    tolerance: float = 1e-6,
) -> Tensor:
    """Return the least-squares solution of ``A x = y`` of smallest norm, by CGLS from 0.

    Every frame is solved for itself: its result does not depend on the others.

    Args:
        forward, adjoint: A and its adjoint, of frames ``[..., C, H, W]``.
        y: ``[..., Cy, Hy, Wy]``.
        iterations: at most so many; fewer regularize.
        tolerance: stop a frame when ``|A^T (y - A x)| <= tolerance |A^T y|``.

    Source: Hestenes and Stiefel 1952; Bjoerck, Numerical Methods for Least Squares Problems, section 7.4.
    """
    axes = (-3, -2, -1)

    def square(v: Tensor) -> Tensor:  # per frame, [..., 1, 1, 1]
        return v.double().square().sum(axes, keepdim=True)

    residual = y if y.dtype == torch.float64 else y.float()
    gradient = adjoint(residual)
    x = torch.zeros_like(gradient)
    direction = gradient
    gamma = square(gradient)
    enough = tolerance**2 * gamma
    for _ in range(iterations):
        active = gamma > enough
        if not active.any():
            break
        image = forward(direction)
        curvature = square(image)
        active = active & (curvature > 0)
        step = torch.where(active, gamma / curvature.clamp(min=1e-300), 0.0).to(x.dtype)
        x = x + step * direction
        residual = residual - step * image
        gradient = adjoint(residual)
        new = square(gradient)
        ratio = torch.where(active, new / gamma.clamp(min=1e-300), 0.0).to(x.dtype)
        direction = torch.where(active, gradient + ratio * direction, direction)
        gamma = torch.where(active, new, gamma)
    return x.to(y.dtype)
