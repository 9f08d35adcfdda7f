"""Noise schedules, spaced sampling steps, time travel, windows of frames, and DDPM's coefficients.

``abar`` is the cumulative product of ``1 - beta``; ``a`` its value at the current sampling step and ``a_next`` at the
next one, 1 after the last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

SPACINGS = ("leading", "trailing", "linspace")
BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
SHORTEST_TAIL = 3  # windows: fewer frames than this join the window before


def linear_betas(N: int = 1000, first: float = 1e-4, last: float = 0.02) -> Tensor:
    """Return float64 ``[N]`` betas, equally spaced (Ho et al. 2020)."""
    return torch.linspace(first, last, N, dtype=torch.float64)


def scaled_linear_betas(N: int = 1000, first: float = 0.00085, last: float = 0.012) -> Tensor:
    """Return float64 ``[N]`` betas whose square roots are equally spaced (Rombach et al. 2022)."""
    return torch.linspace(first**0.5, last**0.5, N, dtype=torch.float64).square()


def cosine_betas(N: int = 1000, largest: float = 0.999) -> Tensor:
    """Return float64 ``[N]`` betas of the cosine schedule (Nichol and Dhariwal 2021, equation 17)."""
    level = torch.cos((torch.arange(N + 1, dtype=torch.float64) / N + 0.008) / 1.008 * math.pi / 2).square()
    return (1 - level[1:] / level[:-1]).clamp(max=largest)


def alphas_bar(betas: Tensor) -> Tensor:
    """Return float64 ``[N]``, ``abar[n] = prod_{m<=n} (1 - betas[m])``.

    Raises:
        ValueError: betas that are not a list of numbers within 0..1.
    """
    if betas.ndim != 1 or not len(betas) or not ((betas >= 0) & (betas <= 1)).all():
        raise ValueError(f"betas must be numbers within 0..1, [N], got shape {tuple(betas.shape)}")
    return (1 - betas.double()).cumprod(0)


def alphas_bar_from_config(config: Mapping[str, Any]) -> Tensor:
    """Return float64 ``[N]`` abar as a diffusers ``scheduler_config.json`` describes it.

    Args:
        config: ``num_train_timesteps``, ``beta_schedule``, ``beta_start``, ``beta_end``, ``trained_betas``,
            ``rescale_betas_zero_snr``; what is missing has the defaults of diffusers' DDPM scheduler.

    With zero terminal SNR (Lin et al. 2024) the last value is 2^-24 instead of 0, as in diffusers: from pure noise no
    clean image can be computed.

    Raises:
        ValueError: an unknown schedule, or numbers out of range.
    """
    N = int(config.get("num_train_timesteps") or 1000)
    first, last = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    trained = config.get("trained_betas")
    name = config.get("beta_schedule") or "linear"
    if trained is not None:
        betas = torch.as_tensor(trained, dtype=torch.float64)
    elif name == "linear":
        betas = linear_betas(N, first, last)
    elif name == "scaled_linear":
        betas = scaled_linear_betas(N, first, last)
    elif name == "squaredcos_cap_v2":
        betas = cosine_betas(N)
    elif name == "sigmoid":
        betas = torch.linspace(-6, 6, N, dtype=torch.float64).sigmoid() * (last - first) + first
    else:
        raise ValueError(f"beta_schedule must be one of {', '.join(BETA_SCHEDULES)}, got {name!r}")
    a = alphas_bar(betas)
    if config.get("rescale_betas_zero_snr"):
        root = a.sqrt()
        a = ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()
        a[-1] = 2.0**-24
    return a


def spaced_steps(K: int, N: int = 1000, spacing: str = "leading") -> list[int]:
    """Return K training steps of 0..N-1, decreasing.

    Args:
        K: 1..N.
        spacing: ``"leading"``: multiples of ``floor(N/K)``, ending at 0; ``"trailing"``: starting at N-1;
            ``"linspace"``: from N-1 to 0.

    Raises:
        ValueError: an unknown spacing, K out of range.
    """
    if spacing not in SPACINGS:
        raise ValueError(f"sampler.spacing must be one of {', '.join(SPACINGS)}, got {spacing!r}")
    if not 1 <= K <= N:
        raise ValueError(f"the number of sampling steps must be within 1..{N} (the prior's), got {K}")
    if spacing == "leading":
        return [(K - 1 - k) * (N // K) for k in range(K)]
    if spacing == "trailing":  # floor(N - k N / K + 1/2) - 1, in integers: a rounded quotient picks a neighbour
        return [(2 * K * N - 2 * k * N + K) // (2 * K) - 1 for k in range(K)]
    if K == 1:
        return [N - 1]
    return [(2 * (N - 1) * (K - 1 - k) + K - 1) // (2 * (K - 1)) for k in range(K)]


def last_index(steps: list[int], stop_step: int = 0) -> int:
    """Return the index of the last executed step: the first whose training step is at most ``stop_step``.

    Raises:
        ValueError: stop_step below 0.
    """
    if stop_step < 0:
        raise ValueError(f"sampler.stop_step must be at least 0, got {stop_step}")
    return next((k for k, step in enumerate(steps) if step <= stop_step), len(steps) - 1)


@dataclass(frozen=True)
class Operation:
    """One thing the sampler does.

    Attributes:
        k: index in the schedule: the step to execute, or the one to go back to.
        back: add noise to the prediction of x0 up to step k's level, instead of executing a step.
        visit: how often the same thing was done before.
    """

    k: int
    back: bool = False
    visit: int = 0


def plan_operations(K: int, ks: int, length: int = 1, repeat: int = 1) -> list[Operation]:
    """Return what the sampler does: steps 0..ks, with time travel (Lugmayr et al. 2022; Wang et al. 2023).

    Args:
        K: steps of the schedule. ks: index of the last executed one, 0..K-1.
        length: steps per jump. repeat: how often each stretch of ``length`` steps runs; 1 switches travel off.

    Raises:
        ValueError: numbers out of range.
    """
    if not 0 <= ks < K:
        raise ValueError(f"the last index must be within 0..{K - 1}, got {ks}")
    if length < 1 or repeat < 1:
        raise ValueError(f"sampler.travel must be two numbers of at least 1 (length, repeat), got {length}, {repeat}")
    operations: list[Operation] = []
    runs, returns, jumps = [0] * K, [0] * K, [0] * (K + 1)
    k = 0
    while k <= ks:
        operations.append(Operation(k, visit=runs[k]))
        runs[k] += 1
        k += 1
        if length <= k <= ks and (K - 1 - k) % length == 0 and jumps[k] < repeat - 1:
            jumps[k] += 1
            k -= length
            operations.append(Operation(k, back=True, visit=returns[k]))
            returns[k] += 1
    return operations


@dataclass(frozen=True)
class Window:
    """Frames restored together: ``frozen`` ones carried from before, ``new`` ones, and a look ``ahead``."""

    frozen: range
    new: range
    ahead: range

    @property
    def ids(self) -> list[int]:
        """Absolute indices of all frames of the window, increasing."""
        return [*self.frozen, *self.new, *self.ahead]


def plan_windows(T: int, window: int = 16, carry: int = 2, lookahead: int = 1) -> list[Window]:
    """Split a clip of T frames into windows; every frame is new in exactly one.

    Args:
        window: frames per window (the last may hold ``window + 2 - lookahead``: no tail of less than 3 frames).
        carry: frames of the window before that are replayed. lookahead: frames of the next one.

    Raises:
        ValueError: no frames, or a window that would make no progress.
    """
    if T < 1 or min(carry, lookahead) < 0 or window <= carry + lookahead:
        raise ValueError(
            "expected at least one frame, carry and lookahead of at least 0 and window.size > carry + lookahead, "
            f"got T={T}, size={window}, carry={carry}, lookahead={lookahead}"
        )
    windows = []
    start = 0
    while start < T:
        frozen = range(max(0, start - carry), start)
        stop = min(start + window - len(frozen) - lookahead, T)
        if T - stop < SHORTEST_TAIL:
            stop = T
        windows.append(Window(frozen, range(start, stop), range(stop, min(stop + lookahead, T))))
        start = stop
    return windows


@dataclass(frozen=True)
class Coefficients:
    """DDPM's step from level ``a`` to ``a_next`` for any spacing: ``mean = c1 x0 + c2 x``, variance ``var_small``.

    Source: Ho et al. 2020, equation 7, with ``alpha = a / a_next`` and ``beta = 1 - alpha``.
    """

    alpha: float
    beta: float
    c1: float
    c2: float
    var_small: float

    def variance(self, frac: Tensor | None = None) -> Tensor | float:
        """Return the variance; a learned fraction ``frac`` in [0, 1] interpolates its log between small and large.

        Source: Nichol and Dhariwal 2021, equation 15.
        """
        if frac is None or self.var_small == 0:
            return self.var_small
        return torch.exp(frac * math.log(self.beta) + (1 - frac) * math.log(self.var_small))


def coefficients(a: float, a_next: float) -> Coefficients:
    """Return DDPM's coefficients; ``a_next = 1`` gives ``mean = x0`` and no noise.

    Raises:
        ValueError: unless ``0 <= a < a_next <= 1``.
    """
    if not 0 <= a < a_next <= 1:
        raise ValueError(f"expected 0 <= a < a_next <= 1, got a={a!r}, a_next={a_next!r}")
    alpha = a / a_next
    beta = 1 - alpha
    rest = 1 - a_next
    return Coefficients(
        alpha=alpha,
        beta=beta,
        c1=a_next**0.5 * beta / (1 - a),
        c2=alpha**0.5 * rest / (1 - a),
        var_small=beta * rest / (1 - a),
    )
