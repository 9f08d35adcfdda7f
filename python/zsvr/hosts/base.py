"""What a host is: a zero-shot restoration method for images, as one step of its sampler (METHOD section 9)."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from zsvr.operators.base import Operator


@dataclass
class Step:
    """Everything about the current sampling step that a host may read.

    Attributes:
        k, K: index of the step in the schedule, and the schedule's length.
        training_step: S[k].
        a, a_next: abar at this step and at the next executed one (1 at the last).
        a_schedule: abar at the next level of the full schedule, also when stopping early (DDNM+).
        is_last: the last executed step: no noise.
        x: ``[T, C, h, w]`` the state. x0: prediction of the clean frames, clipped where the host clips, temporal shift
            not yet added. eps: the network's noise. frac: learned variance fraction or None. z: step noise.
        shift: temporal shift at x0, like x0 (zero where there is none).
        held: bool ``[T]``, frames of a window that are only carried; their gradients and shifts are zero.
    """

    k: int
    K: int
    training_step: int
    a: float
    a_next: float
    a_schedule: float
    is_last: bool
    x: Tensor
    x0: Tensor
    eps: Tensor
    frac: Tensor | None
    z: Tensor
    shift: Tensor
    held: Tensor


class Host(abc.ABC):
    """A restoration method. Independent of everything temporal: it sees frames as a batch.

    Attributes:
        default_steps: K where the user names none.
        clips_x0: whether x0 is clamped to [-1, 1] before anything else.
        needs_network_gradient: x requires a gradient while the network runs (DPS).
    """

    name: str
    default_steps: int
    clips_x0: bool
    needs_network_gradient: bool = False

    @abc.abstractmethod
    def start(self, y: Tensor, operator: Operator, seed: int) -> Any:
        """Return the state of one window for measurements ``y [T, Cy, Hy, Wy]`` (nothing, or low light's f and m)."""

    @abc.abstractmethod
    def advance(self, step: Step, y: Tensor, operator: Operator, state: Any) -> tuple[Tensor, Tensor]:
        """Return the next x and the corrected x0 that is the result if this is the last step."""
