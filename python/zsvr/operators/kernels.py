"""Blur kernels: odd, centred, of sum 1, in float64; and the text that names them."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def gaussian(taps: int = 9, std: float = 2.0) -> Tensor:
    """Return a sampled Gaussian, ``[taps]``; ``std`` in pixels."""
    _check_taps(taps)
    _check_positive("std", std)
    where = torch.arange(taps, dtype=torch.float64) - taps // 2
    return normalized(torch.exp(-0.5 * (where / std).square()))


def uniform(taps: int = 9) -> Tensor:
    """Return the box kernel, ``[taps]``."""
    _check_taps(taps)
    return torch.full((taps,), 1 / taps, dtype=torch.float64)


def motion(length: float = 15.0, angle: float = 0.0) -> Tensor:
    """Return the blur of a straight, even motion, ``[n, n]`` with n odd.

    Args:
        length: of the path in pixels, at least 1.
        angle: of the path in degrees, from the x axis towards the y axis (down).
    """
    if not 1 <= length < math.inf:
        raise ValueError(f"length must be a number of at least 1 pixel, got {length!r}")
    radius = math.ceil((length - 1) / 2)
    n = 2 * radius + 1
    samples = 16 * n + 1
    along = torch.linspace(-(length - 1) / 2, (length - 1) / 2, samples, dtype=torch.float64)
    turn = math.radians(angle)
    kernel = torch.zeros(n, n, dtype=torch.float64)
    pixel = torch.arange(n, dtype=torch.float64) - radius
    for x, y in zip((along * math.cos(turn)).tolist(), (along * math.sin(turn)).tolist(), strict=True):
        kernel += (1 - (pixel - y).abs()).clamp(min=0)[:, None] * (1 - (pixel - x).abs()).clamp(min=0)
    return normalized((kernel + kernel.flip(0, 1)) / 2)  # exactly point-symmetric: no shift


def anisotropic(taps: int = 9, std_vertical: float = 20.0, std_horizontal: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return vertical and horizontal Gaussians of their own widths, ``[taps]`` each."""
    return gaussian(taps, std_vertical), gaussian(taps, std_horizontal)


FAMILIES: dict[str, Callable[..., Tensor | tuple[Tensor, Tensor]]] = {
    "gaussian": gaussian,
    "uniform": uniform,
    "anisotropic": anisotropic,
    "motion": motion,
}
PRESETS = {
    "gaussian": "gaussian:9,2",
    "gaussian_short": "gaussian:5,10",
    "uniform": "uniform:9",
    "anisotropic": "anisotropic:9,20,1",
    "motion": "motion:15,0",
    "dps": "gaussian:61,3",
}


def parse(text: str) -> Tensor | tuple[Tensor, Tensor]:
    """Return the kernel that a text names: a preset (``"gaussian"``) or a family with numbers (``"gaussian:9,2"``).

    Returns:
        ``[taps]``, used along both axes; a pair (vertical, horizontal) of ``[taps]``; or ``[n, n]``.

    Raises:
        ValueError: an unknown name, or numbers the family does not take.
    """
    name, colon, numbers = PRESETS.get(text, text).partition(":")
    if name not in FAMILIES:
        raise ValueError(
            f"unknown kernel {text!r}: expected one of {', '.join(PRESETS)}, or a family with numbers such as "
            "gaussian:taps,std uniform:taps anisotropic:taps,std_vertical,std_horizontal motion:length,angle"
        )
    try:
        values = [float(number) for number in numbers.split(",")] if colon else []
        if name != "motion" and values:
            if values[0] != int(values[0]):
                raise ValueError(f"taps must be an integer, got {values[0]}")
            values[0] = int(values[0])
        return FAMILIES[name](*values)
    except (TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"kernel {text!r}: {error}") from error


def is_separable(kernel: str | Tensor | tuple[Tensor, Tensor]) -> bool:
    """Return whether a kernel is given as a row and a column: one list of taps, or two."""
    given = parse(kernel) if isinstance(kernel, str) else kernel
    return not (isinstance(given, Tensor) and given.dim() == 2)


def as_separable(kernel: str | Tensor | tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the vertical and the horizontal kernel, float64 ``[taps]`` each, odd and of sum 1.

    Raises:
        ValueError: a kernel that is not one-dimensional, of even length, or whose sum is not positive.
    """
    found = parse(kernel) if isinstance(kernel, str) else kernel
    pair = found if isinstance(found, tuple) else (found, found)
    if len(pair) != 2 or any(k.ndim != 1 or not len(k) % 2 for k in pair):
        raise ValueError(
            "a separable blur needs one kernel [taps] or two (vertical, horizontal), of odd length; got "
            f"{kernel if isinstance(kernel, str) else [tuple(k.shape) for k in pair]!r} (blur_fft takes any kernel)"
        )
    return normalized(pair[0]), normalized(pair[1])


def as_image(kernel: str | Tensor | tuple[Tensor, Tensor]) -> Tensor:
    """Return the kernel as float64 ``[rows, columns]`` of sum 1; one-dimensional ones are used along both axes.

    Raises:
        ValueError: not one- or two-dimensional, or the sum is not positive.
    """
    found = parse(kernel) if isinstance(kernel, str) else kernel
    if isinstance(found, Tensor) and found.ndim == 2:
        return normalized(found)
    pair = found if isinstance(found, tuple) else (found, found)
    if len(pair) != 2 or any(k.ndim != 1 for k in pair):
        raise ValueError(f"expected a kernel [rows, columns] or [taps], got {[tuple(k.shape) for k in pair]}")
    return normalized(torch.outer(normalized(pair[0]), normalized(pair[1])))


def normalized(kernel: Tensor) -> Tensor:
    """Return the kernel in float64 divided by its sum.

    Raises:
        ValueError: the kernel is empty, not finite, or its sum is not positive.
    """
    kernel = torch.as_tensor(kernel).detach().double().cpu()
    total = float(kernel.sum())
    if not kernel.numel() or not math.isfinite(total) or total <= 0:
        raise ValueError(
            f"a kernel must be finite and have a positive sum, got shape {tuple(kernel.shape)}, sum {total}"
        )
    return kernel / total


def _check_taps(taps: int) -> None:
    if isinstance(taps, bool) or not isinstance(taps, int) or taps < 1 or taps % 2 == 0:
        raise ValueError(f"taps must be an odd integer of at least 1, got {taps!r}")


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be a positive number, got {value!r}")
