"""What a compiled kernel must fulfil; each failure says what was got and what is allowed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zsvr_kernels._triton import SHARED_MEMORY

REGISTER_FILE = 65536  # 32-bit registers of a streaming multiprocessor
VGPRS = 512  # of a lane, shared by the waves of one of the 4 SIMDs of a compute unit
TENSOR_MEMORY = 512  # columns on sm_100


@dataclass(frozen=True)
class Expectation:
    """What is due of a kernel beyond fitting.

    Attributes:
        matrix: it multiplies matrices in a dtype that the matrix unit takes.
        wgmma: on sm_90 by wgmma, on sm_100 by tcgen05; tiles of fewer than 64 rows or 4 warps may use mma.sync.
        rows: it loads rows of tokens, so by 16 bytes a lane and never by 2.
    """

    matrix: bool = False
    wgmma: bool = True
    rows: bool = False


def registers_of_block(registers: int, num_warps: int) -> int:
    """Return the registers a block occupies: each warp's are allocated by 256."""
    return -(-registers * 32 // 256) * 256 * num_warps


def matrix_instructions(target: str, wgmma: bool) -> tuple[str, ...]:
    """Return the kinds of instruction that count as the matrix unit of a target."""
    if not target.startswith("sm_"):
        return ("MFMA",)
    newest = {"sm_90": ("HGMMA",), "sm_100": ("UTCMMA",)}.get(target, ())
    return newest if newest and wgmma else (*newest, "HMMA")


def failures(target: str, found: dict[str, Any], due: Expectation) -> list[str]:
    """Return what a compiled kernel fails, in words; ``found`` is a worker's answer."""
    if "error" in found:
        return [f"does not compile: {found['error']}"]
    counts, wrong = found["counts"], []

    def limit(what: str, got: int, allowed: int) -> None:
        if got > allowed:
            wrong.append(f"{what}: got {got}, allowed {allowed}")

    limit("bytes of shared memory", found["shared"], SHARED_MEMORY[target])
    if found["stack"]:
        loop = found["loop"] or {}
        inside = loop.get("LDL", 0) + loop.get("STL", 0)
        wrong.append(
            f"bytes of stack (spills): got {found['stack']}, allowed 0; {inside} instructions in the main loop"
        )
    limit("spilled vector registers", found["spills"], 0)
    warps = found["num_warps"]
    if target.startswith("sm_"):
        limit("registers of a block", registers_of_block(found["registers"], warps), REGISTER_FILE)
        limit("columns of tensor memory", found["tensor_memory"], TENSOR_MEMORY)
    else:
        limit("vector registers of a SIMD", -(-warps // 4) * found["registers"], VGPRS)
    if due.matrix:
        kinds = matrix_instructions(target, due.wgmma)
        if not any(counts.get(kind) for kind in kinds):
            other = {kind: counts[kind] for kind in ("HMMA", "FFMA") if counts.get(kind)}
            wrong.append(f"matrix instructions ({' or '.join(kinds)}): got 0 (but {other}), allowed 1 or more")
    if due.rows:
        wide = counts.get("LDG.128", 0) + counts.get("LDGSTS.128", 0) + counts.get("UTMALDG", 0)
        if not wide:
            wrong.append("16-byte loads of rows: got 0, allowed 1 or more")
        limit("2-byte loads", counts.get("LDG.16", 0), 0)
    return wrong
