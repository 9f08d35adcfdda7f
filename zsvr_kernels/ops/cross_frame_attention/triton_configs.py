"""Tiles of cross-frame attention's kernels by target, dtype, head dim and sites; nothing is tuned at run time."""

from __future__ import annotations

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


ANY = 1 << 30

# (largest D, largest P, tiles), the first that fits. Held by `make gates`: no spills, shared memory within limits, and
# on sm_90 no matrix products that wait for each other for want of registers.
Row = tuple[int, int, Tiles]

_HOPPER: dict[str, tuple[Row, ...]] = {
    "fwd": (
        (160, 64, Tiles(64, 64, 4, 3)),
        (96, ANY, Tiles(128, 64, 4, 3)),
        (128, ANY, Tiles(128, 128, 8, 3)),
        (160, ANY, Tiles(128, 64, 8, 3)),
        (256, ANY, Tiles(128, 64, 8, 2)),
    ),
    "dq": (
        (160, 64, Tiles(64, 64, 4, 2)),
        (64, ANY, Tiles(128, 64, 8, 3)),
        (96, ANY, Tiles(64, 64, 4, 2)),
        (160, ANY, Tiles(128, 64, 8, 2)),
        (256, ANY, Tiles(128, 32, 8, 2)),
    ),
    "dkv": (
        (96, ANY, Tiles(64, 64, 4, 3)),
        (128, ANY, Tiles(32, 128, 8, 2)),
        (256, ANY, Tiles(32, 64, 8, 2)),  # at D = 256 Triton 3.9 spills 120 bytes, 3.6 none; smaller tiles lose wgmma
    ),
}
_BLACKWELL: dict[str, tuple[Row, ...]] = {
    **_HOPPER,
    "fwd": (
        (160, 64, Tiles(64, 64, 4, 3)),
        (64, ANY, Tiles(128, 64, 4, 3)),
        (96, ANY, Tiles(128, 64, 8, 3)),
        (128, ANY, Tiles(128, 128, 8, 3)),
        (160, ANY, Tiles(128, 64, 8, 3)),
        (256, ANY, Tiles(128, 64, 8, 2)),
    ),
    "dq": (
        (160, 64, Tiles(64, 64, 4, 2)),
        (64, ANY, Tiles(128, 64, 8, 2)),
        (96, ANY, Tiles(64, 64, 4, 2)),
        (160, ANY, Tiles(128, 64, 8, 2)),
        (256, ANY, Tiles(128, 32, 8, 2)),
    ),
    "dkv": (
        (96, ANY, Tiles(64, 64, 4, 3)),
        (128, ANY, Tiles(64, 128, 8, 2)),
        (160, ANY, Tiles(32, 128, 8, 2)),
        (256, ANY, Tiles(32, 64, 8, 2)),
    ),
}
_AMPERE: dict[str, tuple[Row, ...]] = {
    "fwd": (
        (96, 64, Tiles(64, 64, 4, 3)),
        (64, ANY, Tiles(128, 64, 4, 3)),
        (128, ANY, Tiles(128, 64, 8, 3)),
        (192, ANY, Tiles(128, 32, 8, 2)),
        (256, ANY, Tiles(64, 32, 8, 2)),
    ),
    "dq": (
        (96, 64, Tiles(64, 64, 4, 2)),
        (64, ANY, Tiles(128, 64, 8, 2)),
        (96, ANY, Tiles(64, 64, 8, 2)),
        (128, ANY, Tiles(128, 32, 8, 2)),
        (256, ANY, Tiles(64, 32, 8, 2)),
    ),
    "dkv": (
        (64, ANY, Tiles(64, 64, 4, 2)),
        (128, ANY, Tiles(64, 64, 8, 2)),
        (192, ANY, Tiles(16, 64, 8, 2)),
        (256, ANY, Tiles(32, 32, 8, 2)),
    ),
}
_SMALL_AMPERE: dict[str, tuple[Row, ...]] = {
    "fwd": (
        (96, 64, Tiles(64, 64, 4, 2)),
        (32, ANY, Tiles(64, 64, 4, 2)),
        (64, ANY, Tiles(128, 64, 4, 2)),
        (128, ANY, Tiles(128, 32, 8, 2)),
        (256, ANY, Tiles(64, 32, 8, 2)),
    ),
    "dq": (
        (96, 64, Tiles(64, 64, 4, 2)),
        (64, ANY, Tiles(128, 64, 8, 2)),
        (96, ANY, Tiles(64, 64, 8, 2)),
        (128, ANY, Tiles(128, 32, 8, 2)),
        (192, ANY, Tiles(32, 32, 8, 2)),
        (256, ANY, Tiles(32, 32, 8, 1)),
    ),
    "dkv": (
        (64, ANY, Tiles(64, 64, 4, 2)),
        (128, ANY, Tiles(32, 64, 8, 2)),
        (192, ANY, Tiles(16, 64, 8, 2)),
        (256, ANY, Tiles(32, 32, 8, 2)),
    ),
}
_CDNA3: dict[str, tuple[Row, ...]] = {
    "fwd": (
        (64, ANY, Tiles(128, 64, 4, 2)),
        (160, ANY, Tiles(128, 32, 4, 1)),
        (256, ANY, Tiles(64, 32, 4, 1)),
    ),
    "dq": (
        (32, ANY, Tiles(64, 64, 2, 1)),
        (64, ANY, Tiles(64, 64, 4, 1)),
        (256, ANY, Tiles(64, 32, 4, 1)),
    ),
    "dkv": (
        (64, ANY, Tiles(64, 64, 4, 1)),
        (128, ANY, Tiles(32, 64, 4, 1)),
        (256, ANY, Tiles(32, 32, 4, 1)),
    ),
}
_FLOAT32: dict[str, tuple[Row, ...]] = {
    "fwd": (
        (96, ANY, Tiles(64, 32, 8, 2)),
        (160, ANY, Tiles(32, 32, 8, 2)),
        (256, ANY, Tiles(32, 16, 8, 2)),
    ),
    "dq": (
        (96, ANY, Tiles(32, 32, 4, 2)),
        (160, ANY, Tiles(32, 16, 8, 2)),
        (256, ANY, Tiles(16, 16, 8, 2)),
    ),
    "dkv": (
        (32, ANY, Tiles(32, 32, 4, 2)),  # 16 bytes for each thread in a tile of 16 channels
        (64, ANY, Tiles(32, 32, 8, 2)),
        (256, ANY, Tiles(16, 32, 8, 2)),
    ),
}
_FLOAT32_SMALL: dict[str, tuple[Row, ...]] = {
    **_FLOAT32,
    "fwd": (
        (96, ANY, Tiles(64, 32, 8, 2)),
        (256, ANY, Tiles(32, 16, 8, 2)),
    ),
}
_FLOAT32_AMPERE: dict[str, tuple[Row, ...]] = {
    **_FLOAT32_SMALL,
    "dq": (
        (32, ANY, Tiles(32, 32, 4, 1)),
        (48, ANY, Tiles(32, 16, 8, 2)),
        (96, ANY, Tiles(32, 32, 8, 2)),
        (128, ANY, Tiles(16, 16, 8, 2)),
        (160, ANY, Tiles(32, 16, 8, 2)),
        (256, ANY, Tiles(16, 16, 8, 2)),
    ),
}
_FLOAT32_CDNA3: dict[str, tuple[Row, ...]] = {
    **_FLOAT32,
    "fwd": ((32, ANY, Tiles(64, 64, 4, 2)), *_FLOAT32["fwd"]),
    "dq": ((32, ANY, Tiles(32, 32, 2, 2)), *_FLOAT32["dq"]),
    "dkv": (
        (96, ANY, Tiles(16, 32, 4, 1)),
        (256, ANY, Tiles(16, 16, 4, 1)),
    ),
}
_TF32: dict[str, tuple[Row, ...]] = {
    "fwd": _FLOAT32["fwd"],
    "dq": (
        (96, ANY, Tiles(32, 32, 4, 2)),
        (256, ANY, Tiles(16, 16, 8, 2)),
    ),
    "dkv": (
        (96, ANY, Tiles(32, 32, 8, 2)),
        (256, ANY, Tiles(16, 16, 8, 2)),
    ),
}
_TF32_BLACKWELL: dict[str, tuple[Row, ...]] = {
    **_TF32,
    "dq": (
        (32, ANY, Tiles(32, 32, 4, 2)),
        (96, ANY, Tiles(32, 32, 8, 2)),
        (256, ANY, Tiles(16, 16, 8, 2)),
    ),
}
_TF32_HOPPER: dict[str, tuple[Row, ...]] = {
    "fwd": (
        (64, ANY, Tiles(64, 64, 8, 2)),
        (160, ANY, Tiles(64, 32, 8, 2)),
        (256, ANY, Tiles(32, 16, 8, 2)),
    ),
    "dq": (
        (96, ANY, Tiles(64, 64, 8, 2)),
        (160, ANY, Tiles(64, 32, 8, 2)),
        (256, ANY, Tiles(32, 16, 8, 2)),
    ),
    "dkv": (
        (96, ANY, Tiles(32, 64, 8, 2)),
        (256, ANY, Tiles(16, 16, 8, 2)),
    ),
}
_INTERPRETER: dict[str, tuple[Row, ...]] = {name: ((256, ANY, Tiles(32, 32, 4, 1)),) for name in ("fwd", "dq", "dkv")}
# How products are computed -> target -> kernel -> rows.
_TABLES = {
    "16-bit": {"sm_80": _AMPERE, "sm_86": _SMALL_AMPERE, "sm_90": _HOPPER, "sm_100": _BLACKWELL, "gfx942": _CDNA3},
    "ieee": {
        "sm_80": _FLOAT32_AMPERE,
        "sm_86": _FLOAT32_SMALL,
        "sm_90": _FLOAT32,
        "sm_100": _FLOAT32,
        "gfx942": _FLOAT32_CDNA3,
    },
    "tf32": {
        "sm_80": _TF32,
        "sm_86": _TF32,
        "sm_90": _TF32_HOPPER,
        "sm_100": _TF32_BLACKWELL,
        "gfx942": _FLOAT32_CDNA3,
    },
}


def split(D: int) -> tuple[int, int]:
    """Return the channels of the two tiles of a row: powers of two from 16 on, the second 0 where one is enough."""
    first = 1 << (D.bit_length() - 1)
    if D <= 16 or first == D:
        return max(first, 16), 0
    return first, max(16, 1 << (D - first - 1).bit_length())


def is_packed(P: int, block: int) -> bool:
    """Return whether tiles of ``block`` rows run over frames of ``P`` sites laid end to end.

    They do where tiles that end with the frame would waste much.
    """
    return P % block != 0 and 4 * block > P


def tiles(kernel: str, target: str, itemsize: int, precision: str, D: int, P: int) -> Tiles:
    """Return the tiles of kernel ``"fwd"``, ``"dq"`` or ``"dkv"``.

    Args:
        target: a key of `_triton.SHARED_MEMORY`, or ``"cpu"`` in the interpreter.
        itemsize: bytes of an element.
        precision: of `_triton.input_precision`.
        D: head dim.
        P: sites of a frame.
    """
    tables = _TABLES["16-bit" if itemsize == 2 else precision]
    rows = (_INTERPRETER if target == "cpu" else tables[target])[kernel]
    return next(chosen for largest_D, largest_P, chosen in rows if largest_D >= D and largest_P >= P)
