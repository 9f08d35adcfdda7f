"""Null-space methods: DDNM for exact measurements, DDNM+ for noisy ones.

Source: Wang, Yu and Zhang, "Zero-Shot Image Restoration Using Denoising Diffusion Null-Space Model", ICLR 2023.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zsvr import samplers
from zsvr.hosts.base import Host, Step, check_flag, check_noise_std, refuse_blind
from zsvr.operators.base import Flat, Operator, Spectral

NOISE_MODES = ("auto", "isotropic")


class DDNM(Host):
    """Put the measurement into the range of A+ and leave the null space to the prior.

    ``x0c = x0 - A+ (A x0 - y)``; next x = ``sqrt(a_next) x0c + sqrt(1-a_next) (eta z + sqrt(1-eta^2) eps)``, section
    3.2 of the paper.

    Args:
        eta: share (as a standard deviation) of fresh noise, 0..1.
        clip_x0: clamp the clean estimate to [-1, 1] first.
    """

    name = "ddnm"
    default_steps = 100

    def __init__(self, *, eta: float = 0.85, clip_x0: bool = False) -> None:
        self.eta, self.clips_x0 = eta, check_flag("host.clip_x0", clip_x0)
        self._rule = samplers.ddnm(eta)

    def start(self, y: Tensor, operator: Operator, seed: int, previous: Any = None) -> None:
        refuse_blind(self.name, operator)

    def advance(self, step: Step, y: Tensor, operator: Operator, state: Any) -> tuple[Tensor, Tensor]:
        x0 = step.x0 + step.shift
        x0 = x0 - operator.pinv(operator.A(x0) - y)
        return self._rule(step.x, x0, step.eps, step.frac, step.z, step.a, step.a_next), x0

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "eta": self.eta, "clip_x0": self.clips_x0}


class DDNMPlus(Host):
    """As DDNM, for measurements with Gaussian noise: every component is corrected as far as its noise allows.

    With ``g = sqrt(a_schedule)``, ``s_n = sqrt(1 - a_schedule)``, ``sigma_y = 2 noise_std`` and singular value s: where
    the sampler's noise exceeds the measurement's, ``s_n >= g sigma_y / s``, the component is replaced and the
    measurement's noise counts as part of the sampler's; below that it is corrected partly. Then ``x0c = x0 - V lam V^T
    A+ (A x0 - y)`` and next x = ``g x0c + V (d1 V^T z + d2 V^T eps)``, section 3.3 of the paper and its appendix on
    singular values.

    Operators without a spectrum are treated as if s = 1 everywhere.

    Args:
        noise_std: standard deviation of the measurement's noise in [0, 1] units.
        eta: share (as a standard deviation) of fresh noise, 0..1.
        noise_mode: ``"auto"``: by singular value where the operator has a spectrum; ``"isotropic"``: s = 1.
        clip_x0: clamp the clean estimate to [-1, 1] first.
    """

    name = "ddnm+"
    default_steps = 100

    def __init__(
        self, *, noise_std: float = 0.0, eta: float = 0.85, noise_mode: str = "auto", clip_x0: bool = False
    ) -> None:
        if noise_mode not in NOISE_MODES:
            raise ValueError(f"ddnm.noise_mode must be one of {', '.join(NOISE_MODES)}, got {noise_mode!r}")
        self.noise_std, self.eta, self.noise_mode = check_noise_std(noise_std), eta, noise_mode
        self.clips_x0 = check_flag("host.clip_x0", clip_x0)
        samplers.check_eta(eta)

    def start(self, y: Tensor, operator: Operator, seed: int, previous: Any = None) -> None:
        refuse_blind(self.name, operator)

    def advance(self, step: Step, y: Tensor, operator: Operator, state: Any) -> tuple[Tensor, Tensor]:
        x0 = step.x0 + step.shift
        correction = operator.pinv(operator.A(x0) - y)
        spectrum = operator.spectrum() if self.noise_mode == "auto" else None
        if isinstance(spectrum, Spectral):
            correction, mixed = self._spectral(step, correction, spectrum)
        elif isinstance(spectrum, Flat):
            correction, mixed = self._flat(step, correction, spectrum.s, operator)
        else:
            correction, mixed = self._isotropic(step, correction)
        x0 = x0 - correction
        return (x0 if step.is_last else step.a_schedule**0.5 * x0 + mixed), x0

    def _levels(self, step: Step) -> tuple[float, float, float, float]:
        return step.a_schedule**0.5, (1 - step.a_schedule) ** 0.5, 2 * self.noise_std, self.eta

    def _mix(self, z: Tensor, eps: Tensor) -> Tensor:
        return self.eta * z + (1 - self.eta**2) ** 0.5 * eps

    def _spectral(self, step: Step, correction: Tensor, spectrum: Spectral) -> tuple[Tensor, Tensor]:
        """Return the weighted correction of x0, and the noise of the next state."""
        values = spectrum.values((correction.shape[-2], correction.shape[-1])).double()
        lam, d1, d2 = (t.to(correction) for t in weights(values, *self._levels(step)))
        noise = spectrum.synthesize(d1 * spectrum.analyze(step.z) + d2 * spectrum.analyze(step.eps))
        correction = spectrum.synthesize(lam * spectrum.analyze(correction))
        return correction.to(step.x.dtype), noise.to(step.x.dtype)

    def _flat(self, step: Step, correction: Tensor, s: float, operator: Operator) -> tuple[Tensor, Tensor]:
        """As `_spectral`, by projections: there is one singular value, and A+ A projects onto its components."""
        lam, d1, _ = (float(t) for t in weights(torch.tensor(s, dtype=torch.float64), *self._levels(step)))
        own, own_eps = (operator.pinv(operator.A(t)) for t in (step.z, step.eps))
        null = self._mix(step.z - own, step.eps - own_eps)
        return lam * correction, d1 * own + (1 - step.a_schedule) ** 0.5 * null

    def _isotropic(self, step: Step, correction: Tensor) -> tuple[Tensor, Tensor]:
        """As `_spectral`, for s = 1 and noise that is mixed alike in all components."""
        g, s_n, sigma_y, _ = self._levels(step)
        lam = 1.0 if s_n >= g * sigma_y else s_n / (g * sigma_y)
        rest = max(s_n**2 - (g * lam * sigma_y) ** 2, 0.0) ** 0.5
        return lam * correction, rest * self._mix(step.z, step.eps)

    def describe(self) -> dict[str, Any]:
        names = ("noise_std", "eta", "noise_mode")
        return {"name": self.name, **{name: getattr(self, name) for name in names}, "clip_x0": self.clips_x0}


def weights(s: Tensor, g: float, s_n: float, sigma_y: float, eta: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return DDNM+'s ``lam``, ``d1`` and ``d2`` for singular values s (float64, 0 in the null space).

    ``(g lam sigma_y / s)^2 + d1^2 + d2^2 = s_n^2`` for every component (without the first term where s = 0).
    """
    in_range = s > 0
    excess = g * sigma_y / s.masked_fill(~in_range, 1.0)  # the measurement's noise, seen in the state
    covered = in_range & (s_n >= excess)
    partly = in_range & ~covered
    fraction = s * s_n * (1 - eta**2) ** 0.5 / (g * sigma_y) if sigma_y > 0 else torch.ones_like(s)
    lam = torch.where(partly, fraction, torch.ones_like(s))
    d1 = torch.where(covered, (s_n**2 - excess.square()).clamp(min=0).sqrt(), torch.full_like(s, s_n * eta))
    d2 = torch.where(in_range, torch.zeros_like(s), torch.full_like(s, s_n * (1 - eta**2) ** 0.5))
    return lam, d1, d2
