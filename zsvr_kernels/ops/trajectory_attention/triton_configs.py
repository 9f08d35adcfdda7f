"""Tile sizes of trajectory attention's Triton kernels, by target; committed, so that no run has to search."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """What a program computes.

    Attributes:
        heads: heads of a program, a divisor of H.
        height, width: the tile of sites, powers of two.
        entries: entries of the inverse index taken at a time (by source sites alone).
        num_warps: warps of a program.
    """

    heads: int
    height: int
    width: int
    entries: int
    num_warps: int


def power_of_two(n: int) -> int:
    """Return the least power of two that is not below ``n``."""
    return 1 << max(n - 1, 0).bit_length()


# (target, kernel) -> lanes' 16-byte pieces of a tile for each thread and head, heads, entries, warps.
_TABLE: dict[tuple[str, str], tuple[int, int, int, int]] = {
    ("cpu", "fwd"): (4, 4, 1, 4),
    ("cpu", "queries"): (4, 4, 1, 4),
    ("cpu", "sites"): (4, 4, 8, 4),
    ("cpu", "samples"): (4, 4, 1, 4),
}
_DEFAULT: dict[str, tuple[int, int, int, int]] = {
    "fwd": (1, 2, 1, 4),
    "queries": (1, 1, 1, 4),
    "sites": (1, 2, 2, 4),
    "samples": (1, 1, 1, 4),
}


def tile(kernel: str, target: str, itemsize: int, D: int, H: int, grid: tuple[int, int]) -> Tile:
    """Return the tile of ``"fwd"``, ``"queries"``, ``"sites"`` or ``"samples"`` (the backward's three) for a call."""
    pieces, heads, entries, warps = _TABLE.get((target, kernel), _DEFAULT[kernel])
    lanes = max(1, power_of_two(D) * itemsize // 16)  # threads of one row
    if lanes > 32:
        warps = 1  # a row in one warp: no sum crosses warps
    sites = max(1, pieces * 32 * warps // lanes)
    width = min(8, power_of_two(grid[1]))
    height = max(1, min(sites // width, power_of_two(grid[0])))
    return Tile(math.gcd(heads, H), height, max(1, sites // height), entries, warps)
