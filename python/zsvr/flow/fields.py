"""Flow of a clip on its canvas: estimated, checked forward against backward, zero across cuts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import zsvr_kernels as zk
from zsvr.flow.estimators import Estimator, luma
from zsvr_kernels.links import CHECKS, inside_pixels, occlusion, resize_flow
from zsvr_kernels.sampling import warp

SHORTEST = 16  # pixels


@dataclass(frozen=True)
class EstimationOptions:
    """How flow is estimated and checked.

    Attributes:
        max_side: longest side, in pixels, that the estimator sees; larger frames are reduced.
        check, alpha, beta, threshold_warped, motion_boundary: the forward-backward check, as in
            `zsvr_kernels.Links.from_flow`; alpha and beta None: the check's defaults.
        cut_threshold: a pair of frames with a larger share of untrusted pixels in both directions is a cut; 1: never.
            Untrusted is what fails the check "U", whatever ``check`` is. On real clips cuts have 0.98 and more, other
            pairs less than 0.3, and 0.75 under noise of standard deviation 0.3.
        cut_difference: a pixel is untrusted, too, if its luma differs by more after warping; this finds cuts between
            pictures without texture, where every flow passes the check.
    """

    max_side: int = 512
    check: str = "U"
    alpha: float | None = None
    beta: float | None = None
    threshold_warped: bool = False
    motion_boundary: bool = False
    cut_threshold: float = 0.8
    cut_difference: float = 0.25

    def __post_init__(self) -> None:
        if self.max_side < SHORTEST:
            raise ValueError(f"max_side must be at least {SHORTEST}, got {self.max_side}")
        if self.check not in CHECKS:
            raise ValueError(f"check must be one of {', '.join(CHECKS)}, got {self.check!r}")
        for name in ("alpha", "beta"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < float("inf"):
                raise ValueError(f"{name} must be finite and at least 0, got {value}")
        if not 0 < self.cut_threshold <= 1 or not self.cut_difference > 0:
            raise ValueError(
                "cut_threshold must be within 0..1 and cut_difference above 0, got "
                f"{self.cut_threshold} and {self.cut_difference}"
            )

    @classmethod
    def of(cls, settings: Any) -> EstimationOptions:
        """Return these options as they stand in ``settings``, such as `zsvr.temporal.FlowOptions`; others: defaults."""
        names = [f.name for f in fields(cls) if hasattr(settings, f.name)]
        return cls(**{name: getattr(settings, name) for name in names})

    def bounds(self) -> tuple[float, float]:
        """Return alpha and beta with the check's defaults filled in."""
        alpha, beta = CHECKS[self.check]
        return alpha if self.alpha is None else self.alpha, beta if self.beta is None else self.beta


@dataclass(frozen=True, eq=False)
class Flow:
    """Flow of one clip on its canvas, checked. Across a cut it is zero and occluded everywhere.

    Attributes:
        forward: float32 ``[T-1, 2, Hc, Wc]``, from frame i to i+1, in pixels of the canvas.
        backward: ``[T-1, 2, Hc, Wc]``, from frame i+1 to i.
        occ_forward, occ_backward: bool ``[T-1, Hc, Wc]``, true where the forward-backward check failed.
        failed: float32 ``[T-1]``, share of untrusted pixels, the smaller of both directions.
        cuts: bool ``[T-1]``: frames i and i+1 belong to different shots.
    """

    forward: Tensor
    backward: Tensor
    occ_forward: Tensor
    occ_backward: Tensor
    failed: Tensor
    cuts: Tensor

    @property
    def frames(self) -> int:
        """Number of frames T."""
        return len(self.forward) + 1

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors by name."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @property
    def reliable_forward(self) -> Tensor:
        """Bool ``[T-1, Hc, Wc]``: the check holds and the flow stays on the canvas."""
        return ~self.occ_forward & inside_pixels(self.forward)

    @property
    def reliable_backward(self) -> Tensor:
        """Bool ``[T-1, Hc, Wc]``, likewise."""
        return ~self.occ_backward & inside_pixels(self.backward)

    def to(self, device: torch.device | str) -> Flow:
        """Return the flow on another device."""
        return Flow(**{name: x.to(device) for name, x in self.tensors().items()})

    def between(self, i: int, j: int) -> tuple[Tensor, Tensor]:
        """Return the flow ``[2, Hc, Wc]`` on frame i's grid into the adjacent frame j, and where it is reliable.

        Raises:
            ValueError: the frames are not adjacent, or there are no such frames.
        """
        if abs(i - j) != 1 or not 0 <= min(i, j) <= max(i, j) < self.frames:
            raise ValueError(f"flow is known between adjacent frames of 0..{self.frames - 1}, got {i} and {j}")
        flow, occ = (self.forward, self.occ_forward) if j > i else (self.backward, self.occ_backward)
        n = min(i, j)
        return flow[n], ~occ[n] & inside_pixels(flow[n])

    def window(self, ids: Sequence[int]) -> Flow:
        """Return the flow of some frames, rising; pairs that are not adjacent count as cuts."""
        if any(b <= a for a, b in itertools.pairwise(ids)) or not 0 <= min(ids) <= max(ids) < self.frames:
            raise ValueError(f"ids must rise within 0..{self.frames - 1}, got {list(ids)}")
        adjacent = torch.tensor([b == a + 1 for a, b in itertools.pairwise(ids)], dtype=torch.bool)
        part = {name: x[list(ids[:-1])] for name, x in self.tensors().items()}
        return cut(Flow(**part), ~adjacent.to(self.forward.device))

    def crop(self, rows: slice, columns: slice) -> Flow:
        """Return the flow of a tile of the canvas."""
        part = {name: x[..., rows, columns] if x.dim() > 1 else x for name, x in self.tensors().items()}
        return Flow(**part)

    def links(self, grid: tuple[int, int], **options: Any) -> zk.Links:
        """Return links on a token grid; options of `zsvr_kernels.Links.from_flow` such as ``resize``."""
        return zk.Links.from_flow(
            self.forward[None], self.backward[None], grid=grid,
            occ_forward=self.occ_forward[None], occ_backward=self.occ_backward[None], **options,
        )  # fmt: skip

    def context(self, **arguments: Any) -> zk.VideoContext:
        """Return a `zsvr_kernels.VideoContext` of the clip; arguments are its other ones (``options``, ``ids``, ..)."""
        return zk.VideoContext(
            self.forward[None], self.backward[None],
            occ_forward=self.occ_forward[None], occ_backward=self.occ_backward[None], **arguments,
        )  # fmt: skip


def cut(flow: Flow, pairs: Tensor) -> Flow:
    """Return the flow with more pairs (bool ``[T-1]``) taken as cuts: zero flow, occluded everywhere."""
    where = pairs[:, None, None]
    return Flow(
        flow.forward.masked_fill(where[:, None], 0.0),
        flow.backward.masked_fill(where[:, None], 0.0),
        flow.occ_forward | where,
        flow.occ_backward | where,
        flow.failed,
        flow.cuts | pairs,
    )


def reduce(u: Tensor, max_side: int) -> Tensor:
    """Return frames ``[T, 3, H, W]`` reduced so that the longest side is at most ``max_side``: antialiased bilinear.

    The shorter side is not reduced below `SHORTEST`, which estimators need.
    """
    H, W = u.shape[-2:]
    if max(H, W) <= max_side:
        return u
    size = [max(min(side, SHORTEST), int(side * max_side / max(H, W) + 0.5)) for side in (H, W)]
    return F.interpolate(u, size=size, mode="bilinear", antialias=True, align_corners=False)


def _resize_mask(mask: Tensor, size: tuple[int, int]) -> Tensor:
    """Return a mask ``[N, h, w]`` on another size, by nearest: input ``floor((o + 0.5) s)``, in integers."""
    rows, columns = (
        (2 * torch.arange(target, device=mask.device) + 1) * source // (2 * target)
        for target, source in zip(size, mask.shape[-2:], strict=True)
    )
    return mask[:, rows][:, :, columns]


@torch.no_grad()
def estimate(u: Tensor, estimator: Estimator, options: EstimationOptions | None = None) -> Flow:
    """Estimate and check the flow of one clip.

    Args:
        u: floating ``[T, 3, Hc, Wc]`` in [0, 1].
        estimator: see `estimator`.
        options: see `EstimationOptions`.

    Returns:
        The flow on the canvas ``Hc x Wc``: resized bilinearly, displacements scaled; the check's result by nearest.
        Flow that is not finite is zero and occluded.

    Raises:
        ValueError: frames or an estimator's result that do not fit.
    """
    options = EstimationOptions() if options is None else options
    if u.dim() != 4 or u.shape[1] != 3 or not u.is_floating_point() or len(u) < 1:
        raise ValueError(f"frames must be floating [T, 3, H, W], got {tuple(u.shape)} of {u.dtype}")
    u = u.to(torch.promote_types(u.dtype, torch.float32))
    small = reduce(u, options.max_side)
    raw = [flow.detach().float() for flow in estimator(small)]
    if raw[0].shape != raw[1].shape or raw[0].dim() != 4 or raw[0].shape[:2] != (len(u) - 1, 2):
        raise ValueError(
            f"{estimator.name} must return two flows [{len(u) - 1}, 2, h, w], got {[tuple(f.shape) for f in raw]}"
        )
    canvas = (u.shape[2], u.shape[3])
    size = (raw[0].shape[2], raw[0].shape[3])
    if size != tuple(small.shape[-2:]):
        small = F.interpolate(u, size=size, mode="bilinear", antialias=True, align_corners=False)
    grey = luma(small.float())
    finite = [torch.isfinite(flow).all(1) for flow in raw]
    raw = [flow.masked_fill(~ok[:, None], 0.0) for flow, ok in zip(raw, finite, strict=True)]
    occ = [torch.empty_like(ok) for ok in finite]
    failed = torch.zeros(len(u) - 1)
    for n in range(len(u) - 1):
        shares = []
        for way, (here, there) in enumerate(((n, n + 1), (n + 1, n))):
            flow, opposite = raw[way][n : n + 1], raw[1 - way][n : n + 1]
            occ[way][n] = ~finite[way][n] | occlusion(
                flow[None], opposite[None], options.check, *options.bounds(), options.threshold_warped,
                options.motion_boundary,
            )[0, 0]  # fmt: skip
            differs = (warp(grey[there][None, None], flow)[0, 0] - grey[here]).abs() > options.cut_difference
            usual = (
                occ[way][n]
                if options == EstimationOptions()
                else ~finite[way][n] | occlusion(flow[None], opposite[None], "U", *CHECKS["U"])[0, 0]
            )
            shares.append(float((usual | differs).float().mean()))
        failed[n] = min(shares)
    forward, backward = (resize_flow(flow, canvas) for flow in raw)
    occ_forward, occ_backward = (_resize_mask(mask, canvas) for mask in occ)
    pairs = (failed > options.cut_threshold).to(u.device)
    whole = Flow(forward, backward, occ_forward, occ_backward, failed.to(u.device), torch.zeros_like(pairs))
    return cut(whole, pairs)
