"""How the chaining kernel is launched, by target: from what the compiler makes of it, not from measurements."""

from __future__ import annotations

from typing import NamedTuple


class Chain(NamedTuple):
    """Sites of a program and the warps that share them."""

    BLOCK: int
    num_warps: int


# One warp, one site a lane: the number of blocks that fit bounds occupancy, not registers, so the compiler spends
# enough of them to have all loads of a step on their way at once; with four warps it waits three times a step.
_CHAIN = {"gfx942": Chain(64, 1), "cpu": Chain(512, 1)}  # 64 lanes; the interpreter pays per program
_OTHER = Chain(32, 1)


def chain(target: str) -> Chain:
    """Return the configuration."""
    return _CHAIN.get(target, _OTHER)
