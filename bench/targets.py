"""The speeds this project set out to reach, and what a result file says about each of them.

They are set on the retained allocator. A ratio is a peer's time over ours; "possible" is the ratio at which ours would
run at the ceiling of the arithmetic it uses, so a target above it cannot be met on that machine by any kernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

Record = dict[str, Any]
Run = dict[str, Any]
ALLOCATOR = "R"


@dataclass(frozen=True)
class Line:
    """One target at one case: reached must be at least the bound, or at most where ``upper``."""

    what: str
    case: str
    bound: float
    reached: float
    upper: bool = False
    note: str = ""

    @property
    def met(self) -> bool:
        return self.reached <= self.bound if self.upper else self.reached >= self.bound


def sites(record: Record) -> int:
    return int(record["grid"][0] * record["grid"][1])


def _ratio(record: Record, peer: str) -> float | None:
    entry = record["contestants"].get(peer)
    return None if entry is None else float(entry["ratio"]["p50"])


def _time(record: Record) -> float:
    return float(record["contestants"]["ours"]["p50"])


def _possible(record: Record, peer: str, ceilings: dict[str, float | None]) -> str:
    """Say how large the ratio could get, and how close to the ceiling the peer is by itself."""
    ratio, rate = _ratio(record, peer), record["flops"] / _time(record)
    names = ("tile_bf16", "dot_bf16", "fma_fp32") if record["dtype"] == "bf16" else ("fma_fp32",)
    peak = max((ceilings[n] or 0.0 for n in names), default=0.0)
    if not peak or ratio is None:
        return ""
    return f"possible {ratio * peak / rate:.2f}: the peer alone runs at {rate / ratio / peak:.0%} of the ceiling"


def _cross_frame(record: Record, ceilings: dict[str, float | None]) -> Iterator[Line]:
    name, N, dtype = record["name"], sites(record), record["dtype"]
    if record["direction"] == "bwd":
        wanted = {"sdpa_concat": 2.0}
    elif dtype == "bf16":
        wanted = {"sdpa_concat": 4.5} if N >= 1024 else {}
    else:
        bound = 2.3 if N >= 1024 else 2.2 if N == 256 else 1.8
        wanted = dict.fromkeys(("sdpa_concat", "compiled", "flex") if N >= 1024 else ("sdpa_concat",), bound)
    for peer, bound in wanted.items():
        if (ratio := _ratio(record, peer)) is not None:
            yield Line(f"ratio to {peer}", name, bound, ratio, note=_possible(record, peer, ceilings))
    if record["direction"] != "fwd":
        return
    if dtype == "fp32" and "of_fma_peak" in record:
        bound = 0.82 if N >= 1024 else 0.72 if N == 256 else 0.55
        yield Line("share of the float32 FMA peak", name, bound, record["of_fma_peak"]["p50"])
    if dtype == "bf16" and N >= 1024 and ceilings.get("dot_bf16"):
        share = record["flops"] / _time(record) / ceilings["dot_bf16"]
        yield Line("share of the vdpbf16ps peak", name, 0.72, share)
    extra = record.get("peak_extra_bytes", {}).get("ours")
    if extra is not None:
        lse = 4 * record["T"] * N * record["H"]
        pack = 2 * record["T"] * record["H"] * record["D"] * (-(-N // 32) * 32) if dtype == "bf16" else 0
        beyond = max(0, extra - record["output_bytes"] - lse - pack) / 2**20
        yield Line("MB beyond output, lse and V pack", name, 1.0, beyond, upper=True)


def _trajectory(record: Record) -> Iterator[Line]:
    name, N = record["name"], sites(record)
    if record["direction"] == "bwd":
        if forward := _ratio(record, "ours_forward"):
            yield Line("backward over forward", name, 2.2, 1 / forward, upper=True)
        return
    if record["direction"] == "step":
        wanted = {"eager_gather": 14.0} | ({"compiled_gather": 3.0} if record["threads"] == 1 else {})
    elif N >= 1024:
        wanted = {"compiled_gather": 3.0, "eager_gather": 25.0, "eager_grid_sample": 35.0}
    else:
        wanted = {"compiled_gather": 2.0} if N == 64 else {}
    for peer, bound in wanted.items():
        if (ratio := _ratio(record, peer)) is not None:
            yield Line(f"ratio to {peer}", name, bound, ratio)


def _slr(record: Record) -> Iterator[Line]:
    """The whole layer beside the spatial one that it replaces."""
    if record["dtype"] != "fp32" or record["variant"] == "corrected" or sites(record) < 1024:
        return
    if (ratio := _ratio(record, "spatial_layer")) is not None:
        yield Line("spatial layer's time over ours", record["name"], 1.0, ratio)
    extra = record.get("peak_extra_bytes", {})
    ours, spatial = extra.get("ours"), extra.get("spatial_layer")
    if ours is not None and spatial:
        yield Line("peak extra memory over the spatial layer's", record["name"], 1.2, ours / spatial, upper=True)


def _search(record: Record) -> Iterator[Line]:
    # A full correlation of 16x16 sites is only ten times a window's work, so its bound holds from 32x32 on.
    wanted = {"eager_unfold": 35.0} | ({"bmm": 12.0} if sites(record) >= 1024 else {})
    for peer, bound in wanted.items():
        if record["dtype"] == "fp32" and (ratio := _ratio(record, peer)) is not None:
            yield Line(f"ratio to {peer}", record["name"], bound, ratio)


def lines(result: dict[str, Any]) -> list[Line]:
    """Return every target that the result file has a measurement for, in its order."""
    found: list[Line] = []
    times: dict[tuple[Any, ...], float] = {}
    for run in result["runs"]:
        if run["allocator"] != ALLOCATOR:
            continue
        for record in run["cases"]:
            if not record["check"]["ok"]:
                continue
            key = tuple(record[n] for n in ("op", "level", "T", "dtype", "direction", "threads"))
            times[key] = _time(record)
            if record["op"] == "cross_frame_attention":
                found += _cross_frame(record, run["probes"])
            elif record["op"] == "trajectory_attention":
                found += _trajectory(record)
            elif record["op"] == "slr_attention":
                found += _slr(record)
            elif record["op"] == "correspondence_search":
                found += _search(record)
            elif record["op"] == "chain_links" and (ratio := _ratio(record, "eager")) is not None:
                found.append(Line("ratio to eager", record["name"], 5.0, ratio))
    for (op, level, T, dtype, direction, threads), seconds in times.items():
        case = f"{level}-T{T}-{dtype}-{direction}-{threads}t"
        if op == "trajectory_attention" and threads == 2:
            single = times.get((op, level, T, dtype, direction, 1))
            if single is not None:
                found.append(Line("two threads over one", case, 1.8, single / seconds))
        if op == "trajectory_attention" and dtype == "bf16" and direction == "fwd":
            wide = times.get((op, level, T, "fp32", direction, threads))
            if wide is not None:
                found.append(Line("time of bf16 over fp32", case, 0.70, seconds / wide, upper=True))
        if op == "chain_links":
            attention = times.get(("trajectory_attention", level, T, "fp32", "fwd", threads))
            if attention is not None:
                found.append(Line("time over trajectory attention's", case, 0.05, seconds / attention, upper=True))
    return found
