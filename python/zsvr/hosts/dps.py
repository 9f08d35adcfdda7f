"""DPS: the gradient of the measurement's error, through the network, shifts the sample.

Source: Chung et al., "Diffusion Posterior Sampling for General Noisy Inverse Problems", ICLR 2023, algorithm 1, with
one norm per frame: frames of a batch are independent.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zsvr.hosts.base import Host, Step, check_flag, of_task, refuse_blind
from zsvr.operators.base import Operator
from zsvr.schedule import coefficients

ZETAS = {"inpaint": 0.5}
DEFAULT_ZETA = 0.3
FLOOR = 1e-8  # inside the root of the norm


class DPS(Host):
    """Next x = ``mean + sqrt(var) z - zeta d/dx sum_i |y_i - A x0_i(x)|``, over the frames that are not held.

    Of a latent prior x0 is decoded first, and the gradient goes through the decoder.

    Args:
        zeta: step size; None: by task (0.5 for inpainting, 0.3 otherwise; a composition: the smallest of its parts).
        checkpoint: whoever runs the network should recompute activations in the backward instead of keeping them.
        clip_x0: clamp the clean estimate to [-1, 1]; the gradient goes through that, too.
    """

    name = "dps"
    default_steps = 1000
    needs_network_gradient = True

    def __init__(self, *, zeta: float | None = None, checkpoint: bool = True, clip_x0: bool = True) -> None:
        if zeta is not None and not 0 <= zeta < float("inf"):
            raise ValueError(f"dps.zeta must be a number of at least 0, got {zeta!r}")
        self.zeta, self.checkpoint = zeta, check_flag("dps.checkpoint", checkpoint)
        self.clips_x0 = check_flag("host.clip_x0", clip_x0)

    def start(self, y: Tensor, operator: Operator, seed: int, previous: Any = None) -> None:
        refuse_blind(self.name, operator)

    def advance(self, step: Step, y: Tensor, operator: Operator, state: Any) -> tuple[Tensor, Tensor]:
        zeta = of_task(ZETAS, operator, DEFAULT_ZETA) if self.zeta is None else self.zeta
        shift = step.shift - zeta * self.gradient(step, y, operator)
        c = coefficients(step.a, step.a_next)
        variance = c.variance(None if step.frac is None else step.frac.detach())
        deviation = variance.sqrt() if isinstance(variance, Tensor) else variance**0.5
        x, x0 = step.x.detach(), step.x0.detach()
        return c.c1 * x0 + c.c2 * x + deviation * step.z + shift, x0 + shift

    @staticmethod
    def gradient(step: Step, y: Tensor, operator: Operator) -> Tensor:
        """Return the gradient of the sum of the frames' norms with respect to x, ``[T, C, h, w]``.

        Raises:
            ValueError: x0 was made without recording gradients.
        """
        if not (step.x.requires_grad and step.x0.requires_grad):
            raise ValueError("dps needs x0 as a function of x: run the network with gradients on, x.requires_grad=True")
        error = (y - operator.A(step.x0 if step.picture is None else step.picture))[~step.held]
        if not len(error):
            return torch.zeros_like(step.x)
        norms = (error.square().sum((1, 2, 3)) + FLOOR).sqrt()
        (gradient,) = torch.autograd.grad(norms.sum(), step.x)
        return gradient

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "zeta": self.zeta, "checkpoint": self.checkpoint, "clip_x0": self.clips_x0}
