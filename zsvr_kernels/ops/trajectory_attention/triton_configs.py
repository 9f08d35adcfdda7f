"""Tile sizes of trajectory attention's Triton kernels, by target; committed, so that no run has to search."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Tile:
    """What a program computes.

    Attributes:
        heads: heads of a program, a divisor of H.
        height, width: the tile of sites, powers of two.
        entries: entries of the inverse index taken at a time (by source sites alone).
        num_warps: warps of a program.
        registers: the most that a thread may use; None: as many as the compiler likes.
    """

    heads: int
    height: int
    width: int
    entries: int
    num_warps: int
    registers: int | None = None


def power_of_two(n: int) -> int:
    """Return the least power of two that is not below ``n``."""
    return 1 << max(n - 1, 0).bit_length()


class Row(NamedTuple):
    """A row of the table: 16-byte pieces of a tile for each thread and head, then as in `Tile`."""

    pieces: int
    heads: int
    entries: int
    warps: int
    registers: int | None = None


# (target, kernel); what is not listed has the row of `_DEFAULT`, whose register limits spill nothing (make gates).
_TABLE: dict[tuple[str, str], Row] = {
    ("cpu", "fwd"): Row(4, 2, 1, 4),
    ("cpu", "queries"): Row(4, 2, 1, 4),
    ("cpu", "sites"): Row(4, 2, 3, 4),
    ("cpu", "samples"): Row(4, 2, 1, 4),
    ("sm_80", "fwd"): Row(1, 2, 1, 8, 96),
    ("sm_86", "fwd"): Row(1, 2, 1, 8),
    ("sm_100", "fwd"): Row(1, 2, 1, 8, 128),
    ("sm_100", "queries"): Row(1, 2, 1, 4, 160),
    ("sm_100", "sites fp16"): Row(1, 2, 1, 8),
    ("gfx942", "fwd"): Row(1, 2, 1, 4),
    ("gfx942", "queries"): Row(1, 1, 1, 4),
    ("gfx942", "sites"): Row(1, 2, 2, 4),
}
_DEFAULT: dict[str, Row] = {
    "fwd": Row(1, 2, 1, 8, 80),
    "fwd fp16": Row(1, 2, 1, 8, 96),
    "queries": Row(1, 2, 1, 8, 128),
    "sites": Row(1, 2, 2, 8),
    "samples": Row(1, 1, 1, 4),
}


def tile_of(kernel: str, target: str, dtype: str, D: int, H: int, grid: tuple[int, int]) -> Tile:
    """Return the tile of ``"fwd"``, ``"queries"``, ``"sites"`` or ``"samples"`` (the backward's three) for a call.

    ``dtype`` is ``"bf16"``, ``"fp16"`` or ``"fp32"``.
    """
    default = _DEFAULT.get(f"{kernel} {dtype}", _DEFAULT[kernel])
    row = _TABLE.get((target, f"{kernel} {dtype}"), _TABLE.get((target, kernel), default))
    itemsize = 4 if dtype == "fp32" else 2
    # Threads of one row of numbers; an interpreted program costs about the same whatever its tile.
    lanes = 8 if target == "cpu" else max(1, power_of_two(D) * itemsize // 16)
    if lanes > 32:  # a row stays in one warp, so that no sum crosses warps
        row = Row(row.pieces, 1, row.entries, 1)
    sites = max(1, row.pieces * row.warps * (64 if target.startswith("gfx") else 32) // lanes)
    width = min(8, power_of_two(grid[1]))
    height = max(1, min(sites // width, power_of_two(grid[0])))
    registers = row.registers if target.startswith("sm_") else None
    return Tile(math.gcd(row.heads, H), height, max(1, sites // height), row.entries, row.warps, registers)
