"""Tiles of cross-frame attention's kernels by target, dtype, head dim and sites: a table, nothing is tuned at run time."""

from __future__ import annotations

import math
from typing import Any, NamedTuple


class Tiles(NamedTuple):
    """Queries and keys of a tile, warps of a program, and how many tiles are in flight."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, Any]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


Table = dict[str, dict[str, tuple[tuple[int, Tiles], ...]]]

# kernel -> target -> (largest D, tiles), ascending.
_BITS_16: Table = {
    "fwd": {
        "sm_90": (
            (96, Tiles(128, 64, 4, 3)),
            (128, Tiles(128, 64, 8, 3)),
            (256, Tiles(128, 64, 8, 2)),
        ),
        "cpu": ((256, Tiles(32, 32, 4, 1)),),
    },
    "dq": {
        "sm_90": (
            (64, Tiles(128, 64, 8, 3)),
            (128, Tiles(128, 64, 8, 2)),
            (256, Tiles(64, 64, 8, 2)),
        ),
        "cpu": ((256, Tiles(32, 32, 4, 1)),),
    },
    "dkv": {
        "sm_90": (
            (64, Tiles(64, 128, 8, 3)),
            (128, Tiles(64, 128, 8, 2)),
            (256, Tiles(64, 64, 8, 2)),
        ),
        "cpu": ((256, Tiles(32, 32, 4, 1)),),
    },
}
_BITS_32 = _BITS_16


def split(D: int) -> tuple[int, int]:
    """Return the channels of the two tiles of a row: powers of two from 16 on, the second 0 where one is enough."""
    first = 1 << (D.bit_length() - 1)
    if D <= 16 or D == first:
        return max(first, 16), 0
    return first, max(16, 1 << (D - first - 1).bit_length())


def is_packed(P: int, block: int) -> bool:
    """Return whether tiles of ``block`` rows run over frames of ``P`` sites laid end to end.

    They do where tiles that end with the frame would waste much.
    """
    return P % block != 0 and P < 4 * block


def tiles(kernel: str, target: str, itemsize: int, D: int, P: int, R: int) -> Tiles:
    """Return the tiles of kernel ``"fwd"``, ``"dq"`` or ``"dkv"``.

    Args:
        target: a key of `_triton.SHARED_MEMORY`, or ``"cpu"`` in the interpreter.
        itemsize: bytes of an element.
        D: head dim.
        P: sites of a frame.
        R: entries of a row of the frame table.
    """
    table = (_BITS_16 if itemsize == 2 else _BITS_32)[kernel]
    return next(t for largest, t in table[target] if largest >= D)
