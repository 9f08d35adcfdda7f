"""Sampling rules of one signature, and the plain loop that draws pictures from a prior.

A rule computes the next state from the current one:

    rule(x, x0, eps, frac, z, a, a_next) -> next x

``x``, ``x0``, ``eps``, ``z`` and ``frac`` (or None) are ``[T, C, h, w]``: state, prediction of the clean frames,
predicted noise, fresh standard normal noise, learned variance fraction in [0, 1]. ``a`` and ``a_next`` are abar at this
step and at the next one, 1 after the last: then every rule returns x0.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from zsvr.noise import FrameNoise, NoiseOptions
from zsvr.priors.base import Prior
from zsvr.schedule import coefficients, last_index, spaced_steps

Rule = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor, float, float], Tensor]


def predict_x0(x: Tensor, eps: Tensor, a: float) -> Tensor:
    """Return ``(x - sqrt(1-a) eps) / sqrt(a)``, the clean frames that noise ``eps`` was added to."""
    return (x - (1 - a) ** 0.5 * eps) / a**0.5


def predict_eps(x: Tensor, x0: Tensor, a: float) -> Tensor:
    """Return ``(x - sqrt(a) x0) / sqrt(1-a)``, the noise that was added to clean frames ``x0``."""
    return (x - a**0.5 * x0) / (1 - a) ** 0.5


def add_noise(x0: Tensor, z: Tensor, a: float) -> Tensor:
    """Return ``sqrt(a) x0 + sqrt(1-a) z``: clean frames at noise level ``a``."""
    return a**0.5 * x0 + (1 - a) ** 0.5 * z


def ddpm(x: Tensor, x0: Tensor, eps: Tensor, frac: Tensor | None, z: Tensor, a: float, a_next: float) -> Tensor:
    """Take a step of ancestral sampling: the posterior mean of the next state given x and x0, plus its noise.

    Source: Ho et al. 2020, equations 6 and 7; learned variance: Nichol and Dhariwal 2021, equation 15.
    """
    c = coefficients(a, a_next)
    mean = c.c1 * x0 + c.c2 * x
    variance = c.variance(frac)
    return mean + (variance.sqrt() if isinstance(variance, Tensor) else variance**0.5) * z


def ddim(eta: float = 0.0) -> Rule:
    """Return the rule of implicit sampling; ``eta = 0`` is deterministic, 1 has DDPM's variance.

    ``sigma = eta sqrt((1-a_next)/(1-a) (1-a/a_next))``; next x = ``sqrt(a_next) x0 + sqrt(1-a_next-sigma^2) eps +
    sigma z``.

    Source: Song, Meng and Ermon 2021, equations 12 and 16.
    """
    check_eta(eta)

    def rule(x: Tensor, x0: Tensor, eps: Tensor, frac: Tensor | None, z: Tensor, a: float, a_next: float) -> Tensor:
        sigma = eta * coefficients(a, a_next).var_small ** 0.5
        direction = max(1 - a_next - sigma**2, 0.0) ** 0.5
        return a_next**0.5 * x0 + direction * eps + sigma * z

    return rule


def ddnm(eta: float = 0.85) -> Rule:
    """Return DDNM's rule: next x = ``sqrt(a_next) x0 + sqrt(1-a_next) (eta z + sqrt(1-eta^2) eps)``.

    Source: Wang, Yu and Zhang, ICLR 2023 (the sampler of their experiments).
    """
    check_eta(eta)

    def rule(x: Tensor, x0: Tensor, eps: Tensor, frac: Tensor | None, z: Tensor, a: float, a_next: float) -> Tensor:
        return add_noise(x0, eta * z + (1 - eta**2) ** 0.5 * eps, a_next)

    return rule


def check_eta(eta: float) -> None:
    """Raise ValueError unless eta is within 0..1."""
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be within 0..1, got {eta!r}")


Callback = Callable[[int, int, Tensor, Tensor], None]


@torch.no_grad()
def sample(
    prior: Prior,
    frames: int,
    *,
    size: tuple[int, int] | None = None,
    steps: int = 100,
    spacing: str = "leading",
    stop_step: int = 0,
    rule: Rule = ddpm,
    clip: bool = True,
    noise: NoiseOptions | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
    callback: Callback | None = None,
    progress: bool = False,
) -> Tensor:
    """Draw frames from a prior, without any measurement.

    Args:
        prior: the diffusion model.
        frames: how many, T.
        size: height and width in pixels; None: what the prior was trained at.
        steps, spacing, stop_step: the schedule; see `spaced_steps` and `last_index`.
        rule: how a state follows from the one before.
        clip: clamp predictions of pixels to [-1, 1] (never those of latents).
        noise: how frames share noise; None: each frame has its own.
        seed: 0..2^63-1.
        device: where the prior is.
        callback: called after every step with ``k, training step, next x, x0``.
        progress: show a bar (needs tqdm).

    Returns:
        ``[T, channels, h, w]``: frames in [-1, 1], or latents.

    Raises:
        ValueError: a size that the prior does not take, numbers out of range.

    Example:
        >>> sample(prior, 4, steps=50, rule=ddim(), seed=1).shape
        torch.Size([4, 3, 256, 256])
    """
    size = size or prior.size
    if min(size) < 1 or size[0] % prior.multiple or size[1] % prior.multiple:
        raise ValueError(f"height and width must be multiples of {prior.multiple} for this prior, got {size}")
    shape = (prior.channels, size[0] // prior.factor, size[1] // prior.factor)
    fields = FrameNoise(seed, shape, frames, noise or NoiseOptions("none"))
    schedule = spaced_steps(steps, len(prior.alphas_bar), spacing)
    ks = last_index(schedule, stop_step)
    levels = [float(prior.alphas_bar[step]) for step in schedule[: ks + 1]] + [1.0]
    ids = range(frames)
    x = fields("initial", ids, device=device)
    for k in _bar(range(ks + 1), progress):
        a, a_next = levels[k], levels[k + 1]
        eps, frac = prior.predict(x, schedule[k])
        x0 = predict_x0(x, eps, a)
        if clip and prior.factor == 1:
            x0 = x0.clamp(-1, 1)
        z = fields("step", ids, step=schedule[k], device=device) if k < ks else torch.zeros_like(x)
        x = rule(x, x0, eps, frac, z, a, a_next)
        if callback is not None:
            callback(k, schedule[k], x, x0)
    return x


def _bar(steps: range, progress: bool) -> Iterable[int]:
    if not progress:
        return steps
    from tqdm import tqdm

    return tqdm(steps, unit="step")
