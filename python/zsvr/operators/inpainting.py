"""Missing pixels: ``A x = m x``."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zsvr import noise
from zsvr.operators.base import Flat, Operator, to_model
from zsvr.operators.kernels import gaussian
from zsvr.operators.pixelwise import check_canvas
from zsvr.operators.separable import apply, convolution

FILL_STD = 8.0  # pixels, of the Gaussian that fills holes in a preview
FILL_FLOOR = 1e-3

WHITE = 128 / 255 - 1e-6  # the darkest grey that counts as white


def read_mask(path: str | os.PathLike[str]) -> Tensor:
    """Read a mask from a picture or a video: bool ``[frames, H, W]``, true where it is brighter than half.

    Raises:
        FileNotFoundError: there is no such file.
        ModuleNotFoundError: PyAV is not installed.
        ValueError: it holds no picture.
    """
    if not pathlib.Path(path).is_file():
        raise FileNotFoundError(f"no mask at {path}")
    from zsvr.video import stream

    return torch.stack([frame.picture.mean(0) >= WHITE for frame in stream(path)])


class Inpaint(Operator):
    """Known and missing pixels: ``A x = m x`` with ``m`` 1 where a pixel is known. Give exactly one of the three.

    Args:
        mask: ``[H, W]``, or ``[T, H, W]`` with one for each frame of the clip, of 0 (missing) and 1 (known); or the
            path of a picture or a video, white where pixels are known.
        ratio: share of pixels that are missing, at random, the same in all frames; 0..1.
        box: ``(top, left, height, width)`` of one missing rectangle, in pixels.
        seed: of ``ratio``.
        invert: the mask tells what is missing instead.
    """

    name = "inpaint"
    rho = 1.0

    def __init__(
        self,
        mask: Tensor | str | os.PathLike[str] | None = None,
        *,
        ratio: float | None = None,
        box: Sequence[int] | None = None,
        seed: int = 0,
        invert: bool = False,
    ) -> None:
        if sum(given is not None for given in (mask, ratio, box)) != 1:
            raise ValueError("inpaint needs exactly one of mask (a tensor or a file), ratio and box")
        self.ratio, self.seed = ratio, seed
        self.box: tuple[int, ...] | None = None if box is None else tuple(int(n) for n in box)
        self.mask: Tensor | None = None  # bool [H, W] or [T, H, W], true = known
        if mask is not None:
            self.mask = _binary(mask if isinstance(mask, Tensor) else read_mask(mask))
            if self.mask.ndim == 3 and len(self.mask) == 1:
                self.mask = self.mask[0]
            self.mask = ~self.mask if invert else self.mask
        elif invert:
            raise ValueError("invert belongs to a mask; ratio and box already say what is missing")
        if ratio is not None and not 0 <= ratio <= 1:
            raise ValueError(f"ratio must be within 0..1, got {ratio!r}")
        if self.box is not None and (len(self.box) != 4 or min(self.box[:2]) < 0 or min(self.box[2:]) < 1):
            raise ValueError(f"box must be (top, left, height, width) in pixels, got {self.box}")
        self._made: dict[tuple[int, int], Tensor] = {}

    def known(self, canvas: tuple[int, int]) -> Tensor:
        """Return the mask for a canvas: bool ``[H, W]`` or ``[T, H, W]``, on the CPU.

        Raises:
            ValueError: the mask or the box does not fit the canvas.
        """
        H, W = check_canvas(canvas)
        if self.mask is not None:
            if tuple(self.mask.shape[-2:]) != (H, W):
                h, w = self.mask.shape[-2:]
                raise ValueError(f"the mask is {h} x {w} pixels, the frames are {H} x {W}: give a mask of their size")
            return self.mask
        if (H, W) not in self._made:
            if self.ratio is not None:
                made = noise.uniform(self.seed, "mask", (H, W)) >= self.ratio
            else:
                assert self.box is not None
                top, left, height, width = self.box
                if top + height > H or left + width > W:
                    raise ValueError(f"the box {self.box} (top, left, height, width) leaves the canvas {H} x {W}")
                made = torch.ones(H, W, dtype=torch.bool)
                made[top : top + height, left : left + width] = False
            self._made[H, W] = made
        return self._made[H, W]

    def _m(self, x: Tensor) -> Tensor:
        known = self.known((x.shape[-2], x.shape[-1]))
        if known.ndim == 3:
            if x.ndim < 4 or x.shape[-4] != len(known):
                raise ValueError(
                    f"this mask has {len(known)} frames, so frames must be [..., {len(known)}, C, H, W]; got "
                    f"{tuple(x.shape)} (select(frames) gives the operator of some of them)"
                )
            known = known[:, None]
        return known.to(x.device)

    def A(self, x: Tensor) -> Tensor:
        return x.masked_fill(~self._m(x), 0.0)

    def adjoint(self, y: Tensor) -> Tensor:
        return self.A(y)

    def pinv(self, y: Tensor) -> Tensor:
        return self.A(y)

    def measured_shape(self, canvas: tuple[int, int]) -> tuple[int, int, int]:
        self.known(canvas)
        return (3, *check_canvas(canvas))

    def from_picture(self, u: Tensor) -> Tensor:
        return self.A(to_model(u))

    def preview(self, y: Tensor) -> Tensor:
        """Return the picture with its holes filled by a Gaussian mean of the known pixels around."""
        m = self._m(y)
        known = m.to(torch.float32).expand(*y.shape[:-3], 1, *y.shape[-2:])
        u = ((y.float() + 1) / 2) * known
        kernel = gaussian(2 * int(3 * FILL_STD) + 1, FILL_STD)
        rows, columns = convolution(kernel, y.shape[-2]), convolution(kernel, y.shape[-1])
        filled = apply(rows, u, columns) / apply(rows, known, columns).clamp(min=FILL_FLOOR)
        return torch.where(m, u, filled).clamp(0, 1).to(y.dtype)

    def select(self, frames: Sequence[int]) -> Inpaint:
        if self.mask is None or self.mask.ndim == 2:
            return self
        return Inpaint(self.mask[list(frames)]) if len(frames) > 1 else Inpaint(self.mask[frames[0]])

    def spectrum(self) -> Flat:
        return Flat(1.0)

    def describe(self) -> dict[str, Any]:
        if self.mask is not None:
            return {"name": self.name, "mask": self.mask}
        if self.ratio is not None:
            return {"name": self.name, "ratio": self.ratio, "seed": self.seed}
        return {"name": self.name, "box": list(self.box or ())}


def _binary(mask: Tensor) -> Tensor:
    if mask.ndim not in (2, 3):
        raise ValueError(f"a mask is [H, W] or [T, H, W], got {tuple(mask.shape)}")
    if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
        raise ValueError("a mask holds 0 (missing) and 1 (known) only")
    return (mask != 0).cpu()
