"""Links: where every token of a frame lies in the next and in the previous frame, on one token grid."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from zsvr_kernels import backends, validation
from zsvr_kernels.sampling import Grid, is_inside, sites, warp

CHECKS = {"U": (0.01, 0.5), "S": (0.001, 0.05), "none": (0.0, 0.0)}  # rule -> default alpha, beta
ROUNDINGS = ("bilinear", "nearest")
LINK_RULES = ("nearest", "corners")  # of chaining


def _choice(name: str, value: str, allowed: tuple[str, ...]) -> str:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")
    return value


@dataclass(frozen=True, eq=False, repr=False)
class Links:
    """Correspondences between adjacent frames of one clip on one token grid.

    Attributes:
        forward: float32 ``[B, T-1, P, 2]``, position (x, y) in frame i+1 of every site of frame i.
        backward: float32 ``[B, T-1, P, 2]``, position in frame i of every site of frame i+1.
        valid_forward, valid_backward: bool ``[B, T-1, P]``, false where the token is occluded. Leaving the frame
            is not marked here: it is tested on actual positions when links are chained.
        grid: ``(Hg, Wg)``, ``P = Hg * Wg``.
    """

    forward: Tensor
    backward: Tensor
    valid_forward: Tensor
    valid_backward: Tensor
    grid: Grid

    @property
    def frames(self) -> int:
        """Number of frames T."""
        return self.forward.shape[1] + 1

    def __repr__(self) -> str:
        B, valid = self.forward.shape[0], (self.valid_forward, self.valid_backward)
        share = ", ".join(f"{float(x.float().mean()):.0%}" for x in valid) if valid[0].numel() else "none"
        return f"Links(B={B}, T={self.frames}, grid={self.grid}, valid={share})"

    def tensors(self) -> dict[str, Tensor]:
        """Return the four tensors by name."""
        return {name: getattr(self, name) for name in ("forward", "backward", "valid_forward", "valid_backward")}

    def to(self, device: torch.device | str) -> Links:
        """Return the links on another device."""
        moved: dict[str, Any] = {name: x.to(device) for name, x in self.tensors().items()}
        return replace(self, **moved)

    def cut(self, pairs: Tensor) -> Links:
        """Return the links without those of some pairs of frames (bool ``[T-1]``): own site, not valid."""
        pairs = pairs.to(self.forward.device)[:, None]
        own = sites(self.grid, device=self.forward.device)
        return replace(
            self,
            forward=torch.where(pairs[..., None], own, self.forward),
            backward=torch.where(pairs[..., None], own, self.backward),
            valid_forward=self.valid_forward & ~pairs,
            valid_backward=self.valid_backward & ~pairs,
        )

    @classmethod
    def from_positions(
        cls,
        forward: Tensor,
        backward: Tensor,
        valid_forward: Tensor,
        valid_backward: Tensor,
        grid: Grid,
    ) -> Links:
        """Build links from positions, after checking them.

        Args:
            forward, backward: float32 ``[B, T-1, P, 2]`` (x, y) in token-grid pixels; non-finite ones become the
                own site and invalid.
            valid_forward, valid_backward: bool ``[B, T-1, P]``.
            grid: ``(Hg, Wg)`` with ``Hg * Wg = P``.

        Raises:
            TypeError, ValueError: tensors that do not fit each other or the grid.
        """
        grid = validation.check_links(forward, backward, valid_forward, valid_backward, grid)
        forward, valid_forward = _finite(forward.detach(), valid_forward, grid)
        backward, valid_backward = _finite(backward.detach(), valid_backward, grid)
        return cls(forward, backward, valid_forward, valid_backward, grid)

    @classmethod
    def from_flow(
        cls,
        flow_forward: Tensor,
        flow_backward: Tensor,
        *,
        grid: Grid,
        occ_forward: Tensor | None = None,
        occ_backward: Tensor | None = None,
        check: str = "U",
        alpha: float | None = None,
        beta: float | None = None,
        threshold_warped: bool = False,
        motion_boundary: bool = False,
        resize: str = "area",
        occ_pool: str = "max",
        rounding: str = "bilinear",
    ) -> Links:
        """Build links from optical flow: check it forward against backward, resize it, scale it.

        Args:
            flow_forward: floating ``[B, T-1, 2, Hi, Wi]``, (dx, dy) in pixels from frame i to frame i+1.
            flow_backward: ``[B, T-1, 2, Hi, Wi]``, from frame i+1 to frame i.
            grid: token grid ``(Hg, Wg)``.
            occ_forward, occ_backward: bool ``[B, T-1, Hi, Wi]``, true where occluded; both or neither. Without
                them the forward-backward check below runs at the flow's resolution.
            check: ``"U"``: ``|F + G| > alpha (|F| + |F'|) + beta``, where F' is the opposite flow and G is F'
                warped by F; ``"S"``: ``|F + G|^2 > alpha (|F|^2 + |G|^2) + beta``; ``"none"``.
            alpha, beta: finite, at least 0; None means (0.01, 0.5) for U, (0.001, 0.05) for S.
            threshold_warped: use ``|G|`` instead of ``|F'|`` in U.
            motion_boundary: also occluded where ``|grad F|^2 > 0.01 |F|^2 + 0.002``.
            resize: ``"area"``, ``"antialias"`` (triangle filter) or ``"nearest"``; enlarging is bilinear.
            occ_pool: a token is occluded if any pixel of its cell is (``"max"``), or more than half
                (``"mean"``).
            rounding: ``"nearest"`` rounds every position to a site.

        Returns:
            Links; non-finite flow counts as occluded and zero.

        Raises:
            TypeError, ValueError: tensors that do not fit, unknown options.

        Source: forward-backward check as in Meister et al. 2018 (U-type bounds) and Sundaram et al. 2010.

        Example:
            >>> flow = torch.zeros(1, 7, 2, 96, 128)
            >>> zsvr_kernels.Links.from_flow(flow, flow, grid=(12, 16)).forward.shape
            torch.Size([1, 7, 192, 2])
        """
        grid = validation.check_grid(grid)
        _choice("check", check, tuple(CHECKS))
        _choice("resize", resize, ("area", "antialias", "nearest"))
        _choice("occ_pool", occ_pool, ("max", "mean"))
        _choice("rounding", rounding, ROUNDINGS)
        validation.check_flow(flow_forward, flow_backward, occ_forward, occ_backward)
        default_alpha, default_beta = CHECKS[check]
        bounds = (
            validation.check_bound("alpha", default_alpha if alpha is None else alpha),
            validation.check_bound("beta", default_beta if beta is None else beta),
        )
        flows = [flow.detach().float() for flow in (flow_forward, flow_backward)]
        finite = [torch.isfinite(f).all(2) for f in flows]  # [B, T-1, Hi, Wi]
        flows = [f.masked_fill(~ok[:, :, None], 0.0) for f, ok in zip(flows, finite, strict=True)]
        occluded = []
        for n, given in enumerate((occ_forward, occ_backward)):
            occ = given
            if occ is None:
                occ = occlusion(flows[n], flows[1 - n], check, *bounds, threshold_warped, motion_boundary)
            occluded.append(occ | ~finite[n])
        own = sites(grid, device=flow_forward.device)
        positions, valid = [], []
        for flow, occ in zip(flows, occluded, strict=True):
            small = resize_flow(flow, grid, resize)  # [B, T-1, 2, Hg, Wg]
            position = own + small.flatten(3).mT
            positions.append(torch.floor(position + 0.5) if rounding == "nearest" else position)
            valid.append(~pool_occlusion(occ, grid, occ_pool).flatten(2))
        return cls.from_positions(positions[0], positions[1], valid[0], valid[1], grid)


def _finite(positions: Tensor, valid: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Replace non-finite positions by the own site and mark them invalid."""
    finite = torch.isfinite(positions).all(-1)
    own = sites(grid, device=positions.device).expand_as(positions)
    return torch.where(finite[..., None], positions, own), valid & finite


def occlusion(
    flow: Tensor,  # [B, T-1, 2, Hi, Wi], finite
    opposite: Tensor,  # [B, T-1, 2, Hi, Wi], finite
    check: str,
    alpha: float,
    beta: float,
    threshold_warped: bool = False,
    motion_boundary: bool = False,
) -> Tensor:  # bool [B, T-1, Hi, Wi]
    """Return where the forward-backward check (or a motion boundary) says the flow cannot be trusted.

    Where a length overflows float32 the check says nothing, so the pixel counts as occluded.
    """
    warped = warp(opposite.flatten(0, 1), flow.flatten(0, 1)).reshape(flow.shape)
    error = (flow + warped).square().sum(2)
    squares = flow.square().sum(2)
    if check == "U":
        other = warped if threshold_warped else opposite
        bound = alpha * (squares.sqrt() + other.square().sum(2).sqrt()) + beta
        occluded = _exceeds(error.sqrt(), bound)
    elif check == "S":
        occluded = _exceeds(error, alpha * (squares + warped.square().sum(2)) + beta)
    else:
        occluded = torch.zeros_like(squares, dtype=torch.bool)
    if motion_boundary:
        right = torch.nn.functional.pad(flow[..., 1:] - flow[..., :-1], (0, 1))
        below = torch.nn.functional.pad(flow[..., 1:, :] - flow[..., :-1, :], (0, 0, 0, 1))
        gradient = right.square().sum(2) + below.square().sum(2)
        occluded = occluded | _exceeds(gradient, 0.01 * squares + 0.002)
    return occluded


def _exceeds(x: Tensor, bound: Tensor) -> Tensor:
    """Return where ``x > bound``, and wherever either is not finite: inf > inf would say no."""
    return ~((x <= bound) & torch.isfinite(bound))


def _resize_matrix(size: int, target: int, kind: str) -> Tensor:
    """Return the float64 ``[target, size]`` matrix that resizes one axis in half-pixel geometry."""
    if kind == "nearest":  # floor((o + 0.5) * size / target), in integers: a rounded ratio picks a neighbour
        source = (2 * torch.arange(target, device="cpu") + 1) * size // (2 * target)
        return torch.nn.functional.one_hot(source, size).double()
    scale = size / target
    pixel = torch.arange(size, dtype=torch.float64, device="cpu")
    cell = torch.arange(target, dtype=torch.float64, device="cpu")[:, None]
    if target >= size:  # bilinear, border clamp
        where = ((cell + 0.5) * scale - 0.5).clamp(0, size - 1)
        return (1 - (where - pixel).abs()).clamp(min=0)
    if kind == "area":
        low, high = cell * scale, (cell + 1) * scale
        overlap = torch.minimum(high, pixel + 1) - torch.maximum(low, pixel)
        return overlap.clamp(min=0) / scale
    weights = (1 - ((pixel + 0.5) - (cell + 0.5) * scale).abs() / scale).clamp(min=0)
    return weights / weights.sum(1, keepdim=True)


def resize_flow(flow: Tensor, grid: Grid, resize: str = "area") -> Tensor:
    """Resize flow ``[..., 2, Hi, Wi]`` to ``[..., 2, Hg, Wg]``, displacements in pixels of the new grid."""
    Hi, Wi = flow.shape[-2:]
    rows = _resize_matrix(Hi, grid[0], resize).to(flow)
    columns = _resize_matrix(Wi, grid[1], resize).to(flow)
    ratio = torch.tensor((grid[1] / Wi, grid[0] / Hi), dtype=flow.dtype, device=flow.device)
    with backends.without_autocast(flow.device):
        return (rows @ flow @ columns.mT) * ratio[:, None, None]


def pool_occlusion(occluded: Tensor, grid: Grid, occ_pool: str = "max") -> Tensor:
    """Pool an occlusion mask ``bool [..., Hi, Wi]`` to ``[..., Hg, Wg]``.

    A token's cell is every pixel from ``floor(o*s)`` to ``ceil((o+1)*s) - 1``, ``s`` the size ratio of the axis.
    """

    def membership(size: int, target: int) -> Tensor:
        table = torch.zeros(target, size, dtype=torch.float32, device="cpu")
        for cell in range(target):
            first, stop = cell * size // target, -(-(cell + 1) * size // target)
            table[cell, first:stop] = 1.0
        return table.to(occluded.device)

    rows, columns = membership(occluded.shape[-2], grid[0]), membership(occluded.shape[-1], grid[1])
    with backends.without_autocast(occluded.device):
        count = rows @ occluded.float() @ columns.mT
    if occ_pool == "max":
        return count > 0.5
    return count > 0.5 * rows.sum(1)[:, None] * columns.sum(1)


def inside_pixels(flow: Tensor) -> Tensor:
    """Return where ``p + flow(p)`` stays on the canvas; flow ``[..., 2, Hc, Wc]`` -> bool ``[..., Hc, Wc]``."""
    grid = (flow.shape[-2], flow.shape[-1])
    own = sites(grid, dtype=flow.dtype, device=flow.device)
    return is_inside(own + flow.flatten(-2).mT, grid).unflatten(-1, grid)
