"""How the search kernels are launched, by target, dtype and size.

From what the compiler makes of them and the arithmetic in README.md, not from measurements. Dtypes go by their bytes.
"""

from __future__ import annotations

from typing import NamedTuple


class Dense(NamedTuple):
    """Search by products of whole tiles with the box around their windows."""

    TILE_H: int
    TILE_W: int
    STRIP_H: int  # rows and columns of the box per product
    STRIP_W: int
    BLOCK_C: int
    num_warps: int
    num_stages: int
    limit: int  # a box of more strips costs more than walking the windows


class OneByOne(NamedTuple):
    """Search window by window."""

    TILE_H: int
    TILE_W: int
    CANDIDATES: int
    BLOCK_C: int
    options: dict[str, int]


class Rows(NamedTuple):
    """Kernels that read tokens row by row: inverse lengths and link scores."""

    BLOCK: int
    BLOCK_C: int
    options: dict[str, int]


# Sites of a box that cost as much as one site of a window walked on its own: on matrix units, and by multiply-adds.
_WORTH = {2: 32, 4: 2}
_QUERIES = 64
# Sites of a strip for 2-byte features whose rows come in pieces of 16 bytes, 64 for others. The sums of this block of
# channels and of all are in registers at once: more would spill.
_STRIP = {"sm_80": 128, "sm_86": 128, "sm_90": 256, "sm_100": 256, "gfx942": 256, "cpu": 64}
_STAGES = {"sm_80": 3, "sm_86": 2, "sm_90": 3, "sm_100": 3, "gfx942": 2, "cpu": 1}


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _tile(queries: int, grid: tuple[int, int]) -> tuple[int, int]:
    """Return height and width of a tile of queries, as square as the grid lets it be."""
    side = 1 << (queries.bit_length() // 2)
    width = min(side, _power(grid[1]))
    height = min(queries // width, _power(grid[0]))
    return height, queries // height


def _window(grid: tuple[int, int], radius: int) -> int:
    """Return how many sites the window of a query has, away from the border."""
    return min(grid[0], 1 + 2 * radius) * min(grid[1], 1 + 2 * radius)


def _block_c(C: int, most: int) -> int:
    return min(most, max(16, _power(C)))


def _options(target: str, registers: int) -> dict[str, int]:
    # NVIDIA's compiler, left alone, saves registers for the sake of occupancy (64 and 128 here) until it spills.
    return {"num_warps": 4, "num_stages": 1} | ({"maxnreg": registers} if target.startswith("sm_") else {})


def dense(
    target: str, bytes_of: int, grid: tuple[int, int], C: int, radius: int, *, comes_in_pieces: bool = True
) -> Dense | None:
    """Return the configuration of the dense search; None where walking windows is cheaper even under smooth motion."""
    tile = _tile(_QUERIES, grid)
    is_interpreted = target == "cpu"
    if bytes_of == 4 and not comes_in_pieces and not is_interpreted:
        return None
    most = _STRIP[target] if bytes_of == 2 and comes_in_pieces else 64
    STRIP_W = min(8 if is_interpreted else 16, _power(grid[1]))
    STRIP_H = max(min(most // STRIP_W, _power(min(grid[0], tile[0] + 2 * radius))), 32 // STRIP_W)
    height, width = (min(n, side + 2 * radius) for n, side in zip(grid, tile, strict=True))
    strips = -(-height // STRIP_H) * -(-width // STRIP_W)  # under one common motion
    worth = (16 if is_interpreted else _WORTH[bytes_of]) * _window(grid, radius)
    limit = worth // (STRIP_H * STRIP_W)
    if strips > limit:
        return None
    # float32 on sm_86 spills with 32 channels.
    BLOCK_C = _block_c(C, 16 if is_interpreted else 64 if bytes_of == 2 else 16 if target == "sm_86" else 32)
    return Dense(*tile, STRIP_H, STRIP_W, BLOCK_C, 8, _STAGES[target], limit)


def one_by_one(target: str, bytes_of: int, grid: tuple[int, int], C: int, radius: int) -> OneByOne:
    """Return the configuration of the search window by window."""
    CANDIDATES = min(_power(_window(grid, radius)), 16)
    BLOCK_C = _block_c(C, 64 if bytes_of == 2 else 32)
    queries = 8 if CANDIDATES > 4 else 32
    return OneByOne(*_tile(queries, grid), CANDIDATES, BLOCK_C, _options(target, 168))


def part(config: Dense, bytes_of: int, C: int) -> OneByOne:
    """Return how a tile of the dense search walks its windows where its box is too large: a part at a time."""
    side = (min(4, config.TILE_H), 16 // min(4, config.TILE_H))
    if side[1] > config.TILE_W:
        side = (16 // config.TILE_W, config.TILE_W)
    return OneByOne(*side, 8, _block_c(C, 64 if bytes_of == 2 else 32), {})


def rows(target: str, bytes_of: int, C: int, rows_at_once: int) -> Rows:
    """Return the configuration of a kernel that has ``rows_at_once`` rows of a token in flight, 16 bytes a lane."""
    BLOCK_C = _block_c(C, 128 if bytes_of == 2 else 64)
    lanes = 256 if target == "gfx942" else 128
    BLOCK = (4 if rows_at_once == 1 else 1) * 16 * lanes // (BLOCK_C * bytes_of)
    return Rows(128 if target == "cpu" else BLOCK, BLOCK_C, _options(target, 96))
