"""How long a kernel should take: roofs of the machine, what a block occupies, and the greatest of the terms.

Pure arithmetic. A roof bounds a rate over the whole chip; a term is work divided by its roof. Terms of work done
inside blocks grow by the share of the last round of blocks in which multiprocessors idle.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from gates.checks import REGISTER_FILE, registers_of_block

SHARED_PER_SM = 233472  # 228 KiB on sm_90, of which every block takes 1 KiB for itself
WARPS_PER_SM, BLOCKS_PER_SM = 64, 32


@dataclass(frozen=True)
class Roof:
    value: float
    source: str


_CLOCK = 1.83e9  # assumed; 1.98 GHz at most
SMS = 132
# Both are sm_90 with 132 multiprocessors; they differ in memory. "assumed": to be measured first.
_CHIP = {
    "sms": Roof(SMS, "vendor"),
    "clock_ghz": Roof(_CLOCK / 1e9, "assumed; the vendor's maximum is 1.98"),
    "mma_16_tflops": Roof(790.0, "working figure for dense bf16 and fp16 products, to be measured"),
    "mma_tf32_tflops": Roof(395.0, "half of bf16"),
    "fma_tflops": Roof(61.8, "128 lanes x 2 per clock and multiprocessor"),
    "exp_t": Roof(3.86, "16 per clock and multiprocessor"),
    "issue_t": Roof(0.97, "4 warp instructions per clock and multiprocessor"),
    "l1_tbs": Roof(30.9, "128 bytes per clock and multiprocessor"),
    "l2_tbs": Roof(9.7, "published read-only measurement up to 40 MB"),
    "l2_rows_tbs": Roof(5.5, "assumed for rows of 128 bytes in no order; planned for 5.5 to 9.7"),
    "latency_us": Roof(0.3, "assumed for a load from L2 that the next step waits for"),
    "launch_us": Roof(2.5, "assumed, of one kernel in a busy stream"),
}
ROOFS: dict[str, dict[str, Roof]] = {
    "h200": {**_CHIP, "hbm_tbs": Roof(4.3, "working figure; a published read-only measurement has 3.89")},
    "h100": {**_CHIP, "hbm_tbs": Roof(3.0, "working figure for copies")},
}
TERMS = ("launch", "hbm", "l2", "l1", "latency", "mma", "fma", "exp", "issue")


@dataclass(frozen=True)
class Work:
    """What one launch does, padding included; totals over all blocks unless said otherwise.

    Attributes:
        hbm: bytes of every operand, once.
        l2: bytes that blocks request from L2 in long runs.
        l2_rows: bytes that they request by rows in no order.
        l1: bytes that pass the first-level cache or shared memory.
        mma: floating-point operations of matrix products.
        mma_dtype: of their operands: ``"16"``, ``"tf32"``, or ``"ieee"``, which the matrix unit does not take.
        exponentials: evaluations of exp2.
        iterations: of the main loop, in the mean over blocks.
        rounds: of the loop around it.
        steps: loads of a block that wait for the one before.
    """

    hbm: float = 0.0
    l2: float = 0.0
    l2_rows: float = 0.0
    l1: float = 0.0
    mma: float = 0.0
    mma_dtype: str = "16"
    exponentials: float = 0.0
    iterations: float = 1.0
    rounds: float = 1.0
    steps: float = 0.0


def blocks_per_sm(registers: int, shared: int, num_warps: int) -> int:
    """Return how many blocks of a kernel one multiprocessor of sm_90 holds; 0 if it does not fit at all."""
    by_registers = REGISTER_FILE // max(1, registers_of_block(registers, num_warps))
    by_shared = SHARED_PER_SM // (shared + 1024)
    return min(by_registers, by_shared, WARPS_PER_SM // num_warps, BLOCKS_PER_SM)


def quantisation(blocks: int, sms: int) -> float:
    """Return by how much the busiest multiprocessor exceeds the mean, if blocks are equally long."""
    return math.ceil(blocks / sms) * sms / blocks


def instructions(found: dict[str, Any], iterations: float, rounds: float = 1.0) -> float:
    """Return the instructions of one warp: the main loop and the one around it as often as they run, the rest once."""
    loop, around = (found[name]["all"] if found[name] else 0 for name in ("loop", "around"))
    return found["counts"]["all"] + loop * (iterations - 1) + around * (rounds - 1)


@dataclass(frozen=True)
class Prediction:
    """Times in microseconds; ``us`` if everything overlaps, ``serial_us`` if nothing in a block does."""

    us: float
    serial_us: float
    bound: str
    terms: dict[str, float] = field(compare=False)


def predict(work: Work, blocks: int, found: dict[str, Any] | None, roofs: dict[str, Roof]) -> Prediction:
    """Predict one launch; ``found`` is what the kernel compiled to, None if unknown."""
    roof = {name: r.value for name, r in roofs.items()}
    sms = int(roof["sms"])
    share = quantisation(blocks, sms)
    terms = dict.fromkeys(TERMS, 0.0)
    terms["launch"] = roof["launch_us"]
    terms["hbm"] = work.hbm / roof["hbm_tbs"] / 1e6
    terms["l2"] = (work.l2 / roof["l2_tbs"] + work.l2_rows / roof["l2_rows_tbs"]) / 1e6
    terms["l1"] = work.l1 / roof["l1_tbs"] / 1e6 * share
    if work.mma_dtype == "ieee":
        terms["fma"] = work.mma / roof["fma_tflops"] / 1e6 * share
    else:
        terms["mma"] = work.mma / roof[f"mma_{work.mma_dtype}_tflops"] / 1e6 * share
    terms["exp"] = work.exponentials / roof["exp_t"] / 1e6 * share
    resident = 1
    if found is not None:
        warps = blocks * found["num_warps"]
        terms["issue"] = instructions(found, work.iterations, work.rounds) * warps / roof["issue_t"] / 1e6 * share
        resident = max(1, blocks_per_sm(found["registers"], found["shared"], found["num_warps"]))
    terms["latency"] = work.steps * roof["latency_us"] * math.ceil(blocks / (sms * resident))
    inside = {name: value for name, value in terms.items() if name != "launch"}
    slowest = max(inside, key=lambda name: inside[name])
    memory = max(terms["hbm"], terms["l2"], terms["l1"], terms["latency"])
    vector = max(terms["exp"], terms["issue"], terms["fma"])
    bound = slowest if inside[slowest] > terms["launch"] else "launch"
    return Prediction(
        us=terms["launch"] + inside[slowest],
        serial_us=terms["launch"] + memory + terms["mma"] + vector,
        bound=bound,
        terms=terms,
    )
