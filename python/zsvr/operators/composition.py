"""Several degradations, one after the other."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from zsvr.operators.base import Operator, to_model
from zsvr.operators.inpainting import Inpaint
from zsvr.operators.pixelwise import Gray
from zsvr.operators.solving import conjugate_gradients


class Compose(Operator):
    """Apply ``operators[0]`` first: ``A x = A_n .. A_1 x``.

    ``A_1+ .. A_n+`` is the pseudo-inverse of no composition in general. It does satisfy ``A A+ A = A`` where every
    factor has full row rank (gray, sr_avg, sr_bicubic, denoise), also with a final inpainting; there it is used, and
    elsewhere conjugate gradients are.

    Args:
        operators: at least one; none whose parameters are unknown. A composition among them counts as its parts.
        pinv: ``"product"``, ``"cg"``, or None for that rule.
        cg_iters: iterations of ``"cg"``.
    """

    name = "compose"

    def __init__(self, operators: Sequence[Operator], *, pinv: str | None = None, cg_iters: int = 50) -> None:
        if not operators or not all(isinstance(op, Operator) for op in operators):
            raise ValueError(f"compose needs a list of at least one operator, got {operators!r}")
        self.operators: tuple[Operator, ...] = tuple(
            part for op in operators for part in (op.operators if isinstance(op, Compose) else (op,))
        )
        blind = [op.name for op in self.operators if op.blind]
        if blind:
            raise ValueError(f"compose takes linear operators only, got {', '.join(blind)}")
        if sum(isinstance(op, Gray) for op in self.operators) > 1:
            raise ValueError("compose takes gray once: colour is lost only once")
        if pinv not in (None, "product", "cg"):
            raise ValueError(f"operator.pinv must be product, cg or None for compose, got {pinv!r}")
        if cg_iters < 1:
            raise ValueError(f"operator.cg_iters must be at least 1, got {cg_iters!r}")
        body = self.operators[:-1] if isinstance(self.operators[-1], Inpaint) else self.operators
        exact = all(op.full_row_rank for op in body)
        self.pinv_rule, self.cg_iters = pinv, cg_iters
        self.inverse = pinv or ("product" if exact else "cg")
        self.rho = math.prod(op.rho for op in self.operators)
        self.exact_pinv = exact and self.inverse == "product"
        self.full_row_rank = self.exact_pinv and len(body) == len(self.operators)

    def A(self, x: Tensor) -> Tensor:
        for op in self.operators:
            x = op.A(x)
        return x

    def adjoint(self, y: Tensor) -> Tensor:
        for op in reversed(self.operators):
            y = op.adjoint(y)
        return y

    def pinv(self, y: Tensor) -> Tensor:
        if self.inverse == "cg":
            return conjugate_gradients(self.A, self.adjoint, y, self.cg_iters)
        for op in reversed(self.operators):
            y = op.pinv(y)
        return y

    def measured_shape(self, canvas: tuple[int, int]) -> tuple[int, int, int]:
        channels = 3
        for op in self.operators:
            made, *size = op.measured_shape(canvas)
            channels, canvas = min(channels, made), (size[0], size[1])
        return (channels, *canvas)

    def canvas(self, measured: tuple[int, int]) -> tuple[int, int]:
        for op in reversed(self.operators):
            measured = op.canvas(measured)
        return measured

    def from_picture(self, u: Tensor) -> Tensor:
        """Return the measurement of a picture; one of three channels is averaged where colour was lost."""
        for op in self.operators:
            if isinstance(op, Gray) and u.shape[-3] == 3:
                u = op.A(u)
        return self.operators[-1].from_picture(u)

    def preview(self, y: Tensor) -> Tensor:
        for op in reversed(self.operators):
            y = to_model(op.preview(y))
        return ((y + 1) / 2).clamp(0, 1)

    def select(self, frames: Sequence[int]) -> Compose:
        chosen = [op.select(frames) for op in self.operators]
        if all(a is b for a, b in zip(chosen, self.operators, strict=True)):
            return self
        return Compose(chosen, pinv=self.pinv_rule, cg_iters=self.cg_iters)

    def describe(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "operators": [op.describe() for op in self.operators],
            "pinv": self.pinv_rule,
            "cg_iters": self.cg_iters,
        }
