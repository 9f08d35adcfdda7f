"""What a compiled kernel consists of: instructions by kind, loops, registers, stack; from disassembly alone."""

from __future__ import annotations

import re
from typing import Any

Counts = dict[str, int]

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);", re.MULTILINE)
_LINE = re.compile(_INSTRUCTION.pattern + r"|^\s*(\.L_[\w.]+):", re.MULTILINE)
_WIDTH = re.compile(r"\.(?:(128)|(64)|([US]16)|([US]8))(?=\.|$)")
_HGMMA = re.compile(r"^HGMMA(?:\.SP)?\.(\d+)x(\d+)x(\d+)\.")
_HMMA = re.compile(r"^HMMA\.(16816|1688|1684)\.")
_HMMA_SHAPE = {"16816": 16 * 8 * 16, "1688": 16 * 8 * 8, "1684": 16 * 8 * 4}

# Kind of instruction -> its mnemonics.
_KINDS = {
    "HGMMA": r"HGMMA\.",
    "HMMA": r"HMMA\.",
    "UTCMMA": r"UTC\w*MMA\b",
    "LDG": r"LDG\.",
    "LDGSTS": r"LDGSTS\.",
    "UTMALDG": r"UTMALDG",
    "STG": r"STG\.",
    "LDS": r"(LDS|LDSM)\b",
    "STS": r"(STS|STSM)\b",
    "LDL": r"LDL\b",
    "STL": r"STL\b",
    "EX2": r"MUFU\.EX2",
    "MUFU": r"MUFU\.",
    "FFMA": r"FFMA\b",
    "FFMA2": r"FFMA2\b",
    "SHFL": r"SHFL\.",
    "BAR": r"BAR\.",
    "RED": r"(RED|REDG|ATOM|ATOMG)\b",
    "CALL": r"CALL\.",
}
_COMPILED = {kind: re.compile("^" + pattern) for kind, pattern in _KINDS.items()}
_LOADS = ("LDG", "LDGSTS", "STG")


def _width(mnemonic: str) -> str:
    """Return the bits that one lane moves: 128, 64, 32, 16 or 8."""
    found = _WIDTH.search(mnemonic)
    return next((g.lstrip("US") for g in found.groups() if g), "32") if found else "32"


def count(mnemonics: list[str]) -> Counts:
    """Count instructions by kind; loads and stores of global memory by width too, ``"LDG.128"``."""
    found: Counts = {"all": len(mnemonics)}
    for mnemonic in mnemonics:
        for kind, pattern in _COMPILED.items():
            if pattern.match(mnemonic):
                found[kind] = found.get(kind, 0) + 1
                if kind in _LOADS:
                    name = f"{kind}.{_width(mnemonic)}"
                    found[name] = found.get(name, 0) + 1
    return found


def mma_flops(mnemonics: list[str], num_warps: int) -> int:
    """Return the floating-point operations that a block's matrix instructions carry out when each runs once.

    A wgmma is one instruction of a group of 4 warps, an HMMA of one warp. What tcgen05 multiplies is not in its
    mnemonic: it counts nothing here.
    """
    total = 0
    for mnemonic in mnemonics:
        if found := _HGMMA.match(mnemonic):
            m, n, k = map(int, found.groups())
            total += 2 * m * n * k * num_warps // 4
        elif found := _HMMA.match(mnemonic):
            total += 2 * _HMMA_SHAPE[found.group(1)] * num_warps
    return total


def _parse(text: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Return mnemonics in order, and loops as ranges of them: from a label to a branch back to it."""
    mnemonics: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for found in _LINE.finditer(text):
        mnemonic, operands, label = found.groups()
        if label is not None:
            labels[label] = len(mnemonics)
            continue
        mnemonics.append(mnemonic)
        if mnemonic.startswith("BRA") and (goal := re.search(r"\(?(\.L_[\w.]+)\)?", operands)):
            start = labels.get(goal.group(1))
            if start is not None and len(mnemonics) - start > 1:  # a branch to itself pads the end
                loops.append((start, len(mnemonics)))
    return mnemonics, loops


def innermost(loops: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the loops that hold no other loop."""
    return [
        (start, end)
        for start, end in loops
        if not any((s, e) != (start, end) and start <= s and e <= end for s, e in loops)
    ]


def analyse(text: str, num_warps: int) -> dict[str, Any]:
    """Return counts of a whole kernel, of its main loop, and of the loop around that without it, from ``nvdisasm -c``.

    The main loop is the innermost one with most matrix products, then most loads, then most instructions; None where
    there is no loop.
    """
    mnemonics, loops = _parse(text)
    bodies = innermost(loops)

    def weight(body: tuple[int, int]) -> tuple[int, int, int]:
        found = count(mnemonics[slice(*body)])
        matrix = sum(found.get(kind, 0) for kind in ("HGMMA", "HMMA", "UTCMMA"))
        return matrix, sum(found.get(kind, 0) for kind in ("LDG", "LDGSTS", "UTMALDG")), body[1] - body[0]

    def counted(part: list[str]) -> Counts:
        return count(part) | {"mma_flops": mma_flops(part, num_warps)}

    found: dict[str, Any] = {"counts": counted(mnemonics), "loop": None, "around": None, "loops": len(bodies)}
    if bodies:
        start, end = max(bodies, key=weight)
        found["loop"] = counted(mnemonics[start:end])
        wider = [(s, e) for s, e in loops if s <= start and end <= e and (s, e) != (start, end)]
        if wider:
            s, e = min(wider, key=lambda loop: loop[1] - loop[0])
            found["around"] = counted(mnemonics[s:start] + mnemonics[end:e])
    return found


def usage(text: str) -> dict[str, int]:
    """Return registers and stack bytes of a thread, from ``cuobjdump --dump-resource-usage``."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    if found is None:
        raise ValueError(f"cuobjdump printed no resource usage: {text[:200]!r}")
    return {"registers": int(found[1]), "stack": int(found[2])}


_AMD = {
    "MFMA": r"v_mfma_\w+",
    "LDG": r"(?:global|buffer|flat)_load_\w+",
    "LDG.128": r"(?:global|buffer|flat)_load_dwordx4",
    "LDG.64": r"(?:global|buffer|flat)_load_dwordx2",
    "LDG.32": r"(?:global|buffer|flat)_load_dword\b",
    "LDG.16": r"(?:global|buffer|flat)_load_(?:ushort|sshort|short)\w*",
    "LDG.8": r"(?:global|buffer|flat)_load_(?:ubyte|sbyte)\w*",
    "EX2": r"v_exp_\w+",
    "FFMA": r"v_(?:fma|fmac|fmaak|fmamk|pk_fma)_f32\w*",
    "SCRATCH": r"scratch_(?:load|store)\w*",
    "BAR": r"s_barrier",
}


def analyse_amd(text: str) -> dict[str, Any]:
    """Return the same of AMD's assembly; loops are not looked for."""

    def field(name: str) -> int:
        found = re.search(rf"^\s*\.{name}:\s+(\d+)", text, re.MULTILINE)
        return int(found[1]) if found else 0

    counts = {kind: len(re.findall(rf"^\s+{pattern}", text, re.MULTILINE)) for kind, pattern in _AMD.items()}
    counts = {kind: n for kind, n in counts.items() if n}
    counts["all"] = len(re.findall(r"^\s+[sv]_\w+|^\s+(?:global|buffer|flat|ds|scratch)_\w+", text, re.MULTILINE))
    return {
        "registers": field("vgpr_count"),
        "stack": field("private_segment_fixed_size"),
        "spills": field("vgpr_spill_count"),
        "counts": counts,
        "loop": None,
        "around": None,
        "loops": 0,
    }
