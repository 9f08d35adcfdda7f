"""GDP: the measurement's error, as a gradient on the clean frames (or on the state), shifts DDPM's mean.

Source: Fei et al., "Generative Diffusion Prior for Unified Image Restoration and Enhancement", CVPR 2023, algorithms 1
to 3. Here the low-light parameters descend each gradient once.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from zsvr import noise
from zsvr.hosts.base import Host, Step, check_flag, of_task
from zsvr.operators.base import Operator
from zsvr.schedule import coefficients

SCALES = {
    "sr_avg": 2000.0,
    "sr_bicubic": 2000.0,
    "blur_sep": 6000.0,
    "blur_fft": 6000.0,
    "inpaint": 4000.0,
    "gray": 6000.0,
    "denoise": 4000.0,
    "lowlight": 160000.0,
}
COLOR_SCALE = 500.0
FORMS = ("x0", "xt")
SCOPES = ("clip", "frame")


@dataclass
class LightState:
    """What low light estimates: ``y01 = f u + m``.

    Attributes:
        f: ``[T, 1, 1, 1]`` gain. m: ``[T, 1, H, W]`` offset.
        history: f before every step of the clip's first window, which later windows replay (scope ``"clip"``).
        position: steps done in this window.
        replays: whether f comes from the history.
    """

    f: Tensor
    m: Tensor
    history: list[float] = field(default_factory=list)
    position: int = 0
    replays: bool = False


class GDP(Host):
    """DDPM whose mean is shifted by ``-s/N_el A^T r``, ``r = (A x0 - y)/2``, N_el elements of one measured frame.

    Gray measurements also take ``-500 d L_color / d x0``. Low light estimates gain and offset of ``y01 = f u + m``.

    Args:
        scale: s; None: by task (published values; denoise: 4000; a composition: the smallest of its parts).
        form: ``"x0"``: gradients at the predicted clean frames; ``"xt"``: at the state.
        scale_by_variance: multiply the shift by the step's variance.
        rescale: multiply scales by N/K when fewer steps than the prior's are taken.
        max_gain: lower s so that ``s rho / (2 N_el)`` does not exceed it (rho of low light: f^2); None: never.
        f_scope: ``"clip"``: one f, so that exposure cannot flicker; ``"frame"``.
        m_scope: ``"frame"``, or ``"clip"``: one m for the frames of a window.
        lr: rate of f and m.
        clip_x0: clamp the clean estimate to [-1, 1] first.
    """

    name = "gdp"
    default_steps = 1000

    def __init__(
        self,
        *,
        scale: float | None = None,
        form: str = "x0",
        scale_by_variance: bool = False,
        rescale: bool = True,
        max_gain: float | None = 1.0,
        f_scope: str = "clip",
        m_scope: str = "frame",
        lr: float = 1.0,
        clip_x0: bool = True,
    ) -> None:
        for name, value, allowed in (
            ("gdp.form", form, FORMS),
            ("lowlight.f_scope", f_scope, SCOPES),
            ("lowlight.m_scope", m_scope, SCOPES),
        ):
            if value not in allowed:
                raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
        for name, number in (("host.scale", scale), ("gdp.max_gain", max_gain), ("lowlight.lr", lr)):
            if number is not None and not 0 <= number < float("inf"):
                raise ValueError(f"{name} must be a number of at least 0, got {number!r}")
        self.scale, self.form, self.scale_by_variance = scale, form, scale_by_variance
        self.rescale, self.max_gain = rescale, max_gain
        self.f_scope, self.m_scope, self.lr = f_scope, m_scope, lr
        self.clips_x0 = check_flag("host.clip_x0", clip_x0)

    def start(self, y: Tensor, operator: Operator, seed: int, previous: LightState | None = None) -> LightState | None:
        if not operator.blind:
            return None
        if operator.name != "lowlight":
            raise ValueError(f"host 'gdp' cannot estimate the parameters of {operator.name}")
        T, (H, W) = len(y), y.shape[-2:]
        f = 0.01 * noise.normal(seed, "light_gain", (1,)).to(y)
        m = 1e-4 * noise.uniform(seed, "light_offset", (H, W)).to(y)
        state = LightState(f.expand(T, 1, 1, 1).clone(), m.expand(T, 1, H, W).clone())
        if previous is not None and self.f_scope == "clip":
            state.history, state.replays = previous.history, True
        return state

    def advance(self, step: Step, y: Tensor, operator: Operator, state: LightState | None) -> tuple[Tensor, Tensor]:
        c = coefficients(step.a, step.a_next)
        variance = c.variance(step.frac)
        at = step.x0 if self.form == "x0" else step.x
        shift = self._shift(at, y, operator, step) if state is None else self._light(at, y, operator, step, state)
        if self.scale_by_variance:
            shift = shift * variance
        shift = shift + step.shift
        mean = c.c1 * step.x0 + c.c2 * step.x + shift
        deviation = variance.sqrt() if isinstance(variance, Tensor) else variance**0.5
        return mean + deviation * step.z, step.x0 + shift

    def _rate(self, step: Step) -> float:
        return step.N / step.K if self.rescale else 1.0

    def _gain(self, operator: Operator, step: Step) -> float:
        """Return s, not limited by ``max_gain``."""
        return (of_task(SCALES, operator, SCALES["denoise"]) if self.scale is None else self.scale) * self._rate(step)

    def _shift(self, at: Tensor, y: Tensor, operator: Operator, step: Step) -> Tensor:
        elements = y[0].numel()
        s = self._gain(operator, step)
        if self.max_gain is not None:
            s = min(s, 2 * elements * self.max_gain / operator.rho)
        shift = -s / elements * operator.adjoint((operator.A(at) - y) / 2)
        if any(part.name == "gray" for part in getattr(operator, "operators", (operator,))):
            shift = shift - COLOR_SCALE * self._rate(step) * color_gradient(at)
        return shift

    def _light(self, at: Tensor, y: Tensor, operator: Operator, step: Step, state: LightState) -> Tensor:
        elements = y[0].numel()
        if state.replays:
            state.f = torch.full_like(state.f, state.history[state.position])
        elif self.f_scope == "clip":
            state.history.append(float(state.f[0]))
        state.position += 1
        f, m = state.f, state.m
        u = (at + 1) / 2
        r = f * u + m - (y + 1) / 2
        s = torch.full_like(f, self._gain(operator, step))
        if self.max_gain is not None:
            s = torch.minimum(s, 2 * elements * self.max_gain / f.square().clamp(min=1e-30))
        shift = -s / elements * f * r

        df = 2 * (r * u).mean((1, 2, 3), keepdim=True)
        dm = 2 / elements * r.sum(1, keepdim=True)
        if self.f_scope == "clip":
            df = df.mean(0, keepdim=True).expand_as(f)
        if self.m_scope == "clip":
            dm = dm.mean(0, keepdim=True).expand_as(m)
        state.f = f - self.lr * df
        state.m = m - self.lr * self._rate(step) * dm
        return shift

    def describe(self) -> dict[str, Any]:
        names = ("scale", "form", "scale_by_variance", "rescale", "max_gain", "f_scope", "m_scope", "lr")
        return {"name": self.name, **{name: getattr(self, name) for name in names}, "clip_x0": self.clips_x0}


def color_loss(x: Tensor) -> Tensor:
    """Return how far channel means differ, ``[T]``, for frames ``[T, 3, H, W]`` in [-1, 1].

    ``sqrt((R-G)^4 + (R-B)^4 + (G-B)^4 + 1e-12)`` of the means in [0, 1].
    """
    red, green, blue = ((x + 1) / 2).mean((-2, -1)).unbind(-1)
    return ((red - green) ** 4 + (red - blue) ** 4 + (green - blue) ** 4 + 1e-12).sqrt()


def color_gradient(x: Tensor) -> Tensor:
    """Return the gradient of `color_loss`'s sum, ``[T, 3, H, W]``."""
    mean = ((x + 1) / 2).mean((-2, -1))  # [T, 3]
    cubes = (mean[:, :, None] - mean[:, None, :]) ** 3
    gradient = 2 * cubes.sum(2) / color_loss(x)[:, None]
    return (gradient / (2 * x.shape[-2] * x.shape[-1]))[..., None, None].expand_as(x)
