"""Trajectories: where every token of every frame lies in the other frames of its clip."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from zsvr_kernels import inverse_index, records, validation
from zsvr_kernels.inverse_index import Index
from zsvr_kernels.records import Records
from zsvr_kernels.sampling import Grid

_building = threading.Lock()  # of the module: a lock made in __init__ could not be traced by torch.compile


@dataclass(frozen=True)
class _Kept:
    """What was built from trajectories and is kept."""

    key: tuple[int, ...]
    built: tuple[Tensor, ...]
    stream: torch.cuda.Stream | None  # on GPUs, which built it
    event: torch.cuda.Event | None  # and when it is there

    def use(self, device: torch.device) -> tuple[Tensor, ...]:
        """Return it, ready for the current stream, maybe another one than built it."""
        if self.stream is not None and self.event is not None:
            stream = torch.cuda.current_stream(device)
            if stream != self.stream:
                stream.wait_event(self.event)
                for x in self.built:
                    x.record_stream(stream)
        return self.built


def _is_captured(x: Tensor) -> bool:
    """Return whether what is called on this tensor now becomes part of a CUDA graph instead of running."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


class Trajectories:
    """Positions of every query token in L slots, each slot a frame of the clip.

    Build it with `chain_links` or `Trajectories.from_positions`.

    Attributes (they cannot be set; shapes, dtypes and devices are checked when the object is made):
        positions: float32 ``[B, T, L, P, 2]``, (x, y) in token-grid pixels; may require a gradient.
        valid: bool ``[B, T, L, P]``, false where the slot must not be read.
        frames: int32 ``[T, L]``, the frame of each slot, -1 = absent.
        grid: ``(Hg, Wg)``, ``P = Hg * Wg``.

    The backward of `trajectory_attention` needs the inverse of the gather. It is built once and kept here, 8 bytes
    for each of up to 4 corners of every live slot (on GPUs of every slot), until positions or validity are written to.
    So are the records that GPU kernels read, 8 bytes for each slot, 12 for float32 attention.

    A CUDA graph whose capture finds either kept reads that memory in every replay: the trajectories must live as long
    as the graph, and new values in ``positions`` or ``valid`` do not reach it. One that finds nothing kept builds it
    in every replay.
    """

    def __init__(self, positions: Tensor, valid: Tensor, frames: Tensor, grid: Grid) -> None:
        self._grid = validation.check_trajectory_fields(positions, valid, frames, grid)
        self._positions = positions
        self._valid = valid
        self._frames = frames
        self._kept: dict[str, _Kept] = {}
        self._captured: list[tuple[Tensor, ...]] = []  # graphs know its addresses, so it outlives its place in _kept

    @property
    def positions(self) -> Tensor:
        return self._positions

    @property
    def valid(self) -> Tensor:
        return self._valid

    @property
    def frames(self) -> Tensor:
        return self._frames

    @property
    def grid(self) -> Grid:
        return self._grid

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
        trajectories = cls(positions, valid, frames, grid)
        if int(frames.min()) < -1:
            raise ValueError(f"frames holds {int(frames.min())}, but entries must be -1 (absent) or a frame")
        bad = ~torch.isfinite(positions.detach()).all(-1) & valid
        if bool(bad.any()):
            where = tuple(bad.nonzero()[0].tolist())
            raise ValueError(f"positions[{where}] is not finite, but valid is true there: mark it invalid")
        return trajectories

    @property
    def slots(self) -> int:
        """Number of slots L."""
        return self.positions.shape[2]

    def to(self, device: torch.device | str) -> Trajectories:
        """Return the trajectories on another device; what was built from them is not carried over."""
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
            TypeError, ValueError: ``Tk`` is not an int of at least 1, ``frames`` holds an index beyond ``Tk - 1`` (on
                GPUs such a slot is absent), the tensors are neither on the CPU nor on a GPU, or ``T*L*P`` reaches
                2^31.
            RuntimeError: the native module is missing.
        """

        def build() -> Index:
            return inverse_index.inverse(self.positions.detach(), self.valid, self.frames, self.grid, Tk)

        return self._keep("index", (self.positions, self.valid, self.frames), (Tk,), build)

    def records(self, exact: bool) -> Records:
        """Return what GPU kernels read of a sample, its cell and fractions; built once, then kept.

        Args:
            exact: fractions in float32, as attention in float32 needs them; otherwise in 16 bits.

        Returns:
            base int32 ``[B, T, L, P]``, -1 where not valid; fractions float32 ``[B, T, L, P, 2]`` or int32
            ``[B, T, L, P]``, see `zsvr_kernels.records`.

        Raises:
            RuntimeError: Triton cannot run on this device.
        """

        def build() -> Records:
            return records.records(self.positions, self.valid, self.grid, exact)

        return self._keep("exact records" if exact else "records", (self.positions, self.valid), (), build)

    def hold_records(self, base: Tensor, fractions: Tensor) -> None:
        """Keep records (16-bit fractions) that were made together with the positions, instead of building them."""
        self._keep("records", (self.positions, self.valid), (), lambda: (base, fractions))

    def _keep(self, name: str, of: tuple[Tensor, ...], extra: tuple[int, ...], build: Callable[[], Any]) -> Any:
        """Return what was built, or build it: anew whenever a tensor in ``of`` was written to."""
        if any(x.is_inference() for x in of):  # they do not count their changes, so nothing can be kept
            return build()
        key = (*extra, *(x._version for x in of))  # the tensors themselves never change for others
        if _is_captured(of[0]):
            # What a graph computes is there only once it ran: it may use what is kept, but not leave anything.
            with _building:
                kept = self._kept.get(name)
                if kept is not None and kept.key == key:
                    if not any(kept.built is x for x in self._captured):
                        self._captured.append(kept.built)
                    return kept.built
            return build()
        device = of[0].device
        with _building:
            kept = self._kept.get(name)
            if kept is None or kept.key != key:
                built = build()
                stream = torch.cuda.current_stream(device) if of[0].is_cuda else None
                kept = _Kept(key, built, stream, None if stream is None else stream.record_event())
                self._kept[name] = kept
            return kept.use(device)

    def kept(self) -> tuple[Tensor, ...]:
        """Return the tensors of all that is kept, whether or not it is still up to date; for counting memory."""
        return tuple(x for kept in self._kept.values() for x in kept.built)

    def isolated(self) -> Tensor:
        """Return the sites that reach no other frame: bool ``[B, T, P]``, true where no other frame's slot is live."""
        T = self.frames.shape[0]
        other = (self.frames >= 0) & (self.frames != torch.arange(T, device=self.frames.device)[:, None])
        return ~(self.valid & other[:, :, None]).any(2)

    def __getstate__(self) -> dict[str, object]:
        return {name: getattr(self, name) for name in ("positions", "valid", "frames", "grid")}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc, arg-type]

    def __repr__(self) -> str:
        B, T, L, _, _ = self.positions.shape
        live = float((self.valid & (self.frames >= 0)[:, :, None]).float().mean())
        return f"Trajectories(B={B}, T={T}, L={L}, grid={self.grid}, live={live:.0%})"
