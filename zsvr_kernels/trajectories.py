"""Trajectories: where every token of every frame lies in the other frames of its clip."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from zsvr_kernels import validation
from zsvr_kernels.links import check_grid
from zsvr_kernels.sampling import Grid

Index = tuple[Tensor, Tensor, Tensor]


class Trajectories:
    """Positions of every query token in L slots, each slot a frame of the clip.

    Build it with `chain_links` or `Trajectories.from_positions`.

    Attributes:
        positions: float32 ``[B, T, L, P, 2]``, (x, y) in token-grid pixels; may require a gradient.
        valid: bool ``[B, T, L, P]``, false where the slot must not be read.
        frames: int32 ``[T, L]``, the frame of each slot, -1 = absent.
        grid: ``(Hg, Wg)``, ``P = Hg * Wg``.

    The backward of `trajectory_attention` needs the inverse of the gather. It is built once and kept here, 8 bytes
    for each of up to 4 corners of every live slot, until positions or validity are written to.
    """

    def __init__(self, positions: Tensor, valid: Tensor, frames: Tensor, grid: Grid) -> None:
        self.positions = positions
        self.valid = valid
        self.frames = frames
        self.grid = grid
        self._lock = threading.Lock()
        self._index: tuple[tuple[int, ...], Index] | None = None

    @classmethod
    def from_positions(cls, positions: Tensor, valid: Tensor, frames: Tensor, grid: Grid) -> Trajectories:
        """Build trajectories directly, after checking them.

        Args:
            positions: float32 ``[B, T, L, P, 2]`` (x, y); finite wherever ``valid`` is true.
            valid: bool ``[B, T, L, P]``.
            frames: int32 ``[T, L]``, -1 or a frame index (checked against k when used).
            grid: ``(Hg, Wg)`` with ``Hg * Wg = P``.

        Raises:
            TypeError, ValueError: tensors that do not fit, a non-finite valid position, a frame below -1.
        """
        grid = check_grid(grid)
        validation.check_tensor("positions", positions, 5, "[B, T, L, P, 2]")
        validation.check_dtype("positions", positions, torch.float32)
        B, T, L = positions.shape[:3]
        if min(B, T, L) < 1:
            raise ValueError(f"B, T and L must be at least 1, got positions {tuple(positions.shape)}")
        expected = (B, T, L, grid[0] * grid[1], 2)
        validation.check_shape("positions", positions, expected, f"on a {grid[0]}x{grid[1]} grid")
        validation.check_tensor("valid", valid, 4, "[B, T, L, P]")
        validation.check_dtype("valid", valid, torch.bool)
        validation.check_shape("valid", valid, expected[:4], "[B, T, L, P]")
        validation.check_tensor("frames", frames, 2, "[T, L]")
        validation.check_dtype("frames", frames, torch.int32)
        validation.check_shape("frames", frames, (T, L), "[T, L]")
        if len({x.device for x in (positions, valid, frames)}) != 1:
            raise ValueError("positions, valid and frames must be on one device")
        if int(frames.min()) < -1:
            raise ValueError(f"frames holds {int(frames.min())}, but entries must be -1 (absent) or a frame")
        bad = ~torch.isfinite(positions.detach()).all(-1) & valid
        if bool(bad.any()):
            where = tuple(bad.nonzero()[0].tolist())
            raise ValueError(f"positions[{where}] is not finite, but valid is true there: mark it invalid")
        return cls(positions, valid, frames, grid)

    @property
    def slots(self) -> int:
        """Number of slots L."""
        return self.positions.shape[2]

    def to(self, device: torch.device | str) -> Trajectories:
        """Return the trajectories on another device; the inverse index is not carried over."""
        return Trajectories(self.positions.to(device), self.valid.to(device), self.frames.to(device), self.grid)

    def detach(self) -> Trajectories:
        """Return the same trajectories without gradient of positions."""
        return Trajectories(self.positions.detach(), self.valid, self.frames, self.grid)

    def inverse(self, Tk: int) -> Index:
        """Return the inverse index of the corner gather over ``Tk`` source frames; built once, then kept.

        Row ``(b * Tk + j) * P + site`` owns entries ``offsets[row]..offsets[row + 1]``, ordered by sample, where
        ``sample = (i * L + l) * P + p``. Corners of weight zero and dead slots have no entry.

        Returns:
            offsets int64 ``[B*Tk*P + 1]``, samples int32 ``[nnz]``, weights float32 ``[nnz]``.

        Raises:
            ValueError: ``frames`` holds an index beyond ``Tk - 1``, or ``T*L*P`` reaches 2^31.
            RuntimeError: the native module is missing.
        """
        from zsvr_kernels.ops.trajectory_attention import cpu

        tensors = (self.positions, self.valid, self.frames)
        key = (Tk, *(x.data_ptr() for x in tensors), *(x._version for x in tensors))
        with self._lock:
            if self._index is None or self._index[0] != key:
                positions = self.positions.detach()
                self._index = (key, cpu.inverse(positions, self.valid, self.frames, self.grid, Tk))
            return self._index[1]

    def __getstate__(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in ("positions", "valid", "frames", "grid")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc, arg-type]

    def __repr__(self) -> str:
        B, T, L, _, _ = self.positions.shape
        live = float((self.valid & (self.frames >= 0)[:, :, None]).float().mean())
        return f"Trajectories(B={B}, T={T}, L={L}, grid={self.grid}, live={live:.0%})"
