"""What a host is: a zero-shot restoration method for images, as one step of its sampler."""

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
        N: training steps of the prior.
        training_step: S[k].
        a, a_next: abar at this step and at the next executed one (1 at the last).
        a_schedule: abar at the next level of the full schedule, also when stopping early (DDNM+).
        is_last: the last executed step: no noise.
        x: ``[T, C, h, w]`` the state. x0: prediction of the clean frames, clipped where the host clips, temporal shift
            not yet added. eps: the network's noise. frac: learned variance fraction or None. z: step noise, zeros at
            the last step. Where the host needs the network's gradient, x0 is a function of x that autograd knows.
        shift: temporal shift at x0, like x0 (zero where there is none).
        picture: x0 decoded, ``[T, 3, H, W]``, as a function of x; None where x0 is a picture itself.
        held: bool ``[T]``, frames of a window that are only carried; their gradients and shifts are zero.
    """

    k: int
    K: int
    N: int
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
    picture: Tensor | None = None


class Host(abc.ABC):
    """A restoration method. Independent of everything temporal: it sees frames as a batch.

    Attributes:
        default_steps: K where the user names none.
        clips_x0: whether x0 is clamped to [-1, 1] before anything else; an argument ``clip_x0`` of every host.
        needs_network_gradient: x requires a gradient while the network runs (DPS).
    """

    name: str
    default_steps: int
    clips_x0: bool
    needs_network_gradient: bool = False

    @abc.abstractmethod
    def start(self, y: Tensor, operator: Operator, seed: int, previous: Any = None) -> Any:
        """Return the state of one window for measurements ``y [T, Cy, Hy, Wy]`` (nothing, or low light's f and m).

        Args:
            y: measurements of the window's frames.
            operator: A; `Operator.select` of the window's frames.
            seed: of what the host draws by itself.
            previous: the final state of the clip's window before, None for the first.

        Raises:
            ValueError: the host cannot restore what this operator did; says which can.
        """

    @abc.abstractmethod
    def advance(self, step: Step, y: Tensor, operator: Operator, state: Any) -> tuple[Tensor, Tensor]:
        """Return the next x and the corrected x0; both are the result if this is the last step.

        The state is changed in place.
        """

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """Return name and arguments, as `hosts.make` takes them."""


def refuse_blind(name: str, operator: Operator) -> None:
    """Raise ValueError for an operator with unknown parameters."""
    if operator.blind:
        raise ValueError(f"host {name!r} needs to know A, but {operator.name} has unknown parameters: use host 'gdp'")


def check_flag(name: str, value: bool) -> bool:
    """Return the flag; TypeError if it is none."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")
    return value


def check_noise_std(noise_std: float) -> float:
    """Return the standard deviation of the measurement's noise in [0, 1] units.

    Raises:
        ValueError: it is negative or not finite.
    """
    if not 0 <= noise_std < float("inf"):
        raise ValueError(f"noise_std must be a number of at least 0 (in units of [0, 1] frames), got {noise_std!r}")
    return float(noise_std)


def of_task(table: dict[str, float], operator: Operator, default: float) -> float:
    """Return the value of an operator's task; for a composition the smallest of its parts."""
    parts = getattr(operator, "operators", (operator,))
    return min(table.get(part.name, default) for part in parts)
