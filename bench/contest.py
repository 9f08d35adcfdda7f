"""One case from check to record: correctness first, then interleaved rounds under pytest-benchmark, then memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
import torch._functorch.config
from torch import Tensor

from bench import memory, probes, workload
from bench.shapes import Case
from bench.timing import Rounds, summary

AGREEMENT = 0.05  # relative L2 difference beyond which a peer computes something else
VARIANTS = ("ours", "ours_out", "ours_sdpa", "ours_forward", "ours_index", "probe")
BASELINES = ("spatial_layer",)  # what ours stands in for: it computes something else by design


@dataclass(frozen=True)
class Budget:
    """How long a case may take, in seconds of rounds, and how many rounds at least and at most."""

    seconds: float
    least: int
    most: int


def first(result: Any) -> Tensor:
    """Return the tensor that stands for a result: its first, or the positions of trajectories."""
    if isinstance(result, Tensor):
        return result
    return result[0] if isinstance(result, tuple) else result.positions


def reason(error: Exception) -> str:
    """Return the first line of what an error says."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]


def _distance(x: Any, y: Any) -> float:
    x, y = first(x).detach().double(), first(y).detach().double()
    return float(torch.linalg.vector_norm(x - y) / torch.linalg.vector_norm(y).clamp(min=1e-30))


Calls = dict[str, Callable[[], Any]]


def enlist(
    case: Case, wants: Callable[[str], bool] = lambda name: True
) -> tuple[dict[str, Any], workload.Workload | None, Calls]:
    """Check a case and find out who takes part: ours, its variants and every wanted peer that computes the same.

    Returns:
        The record so far, the workload (None after a red check), the contestants, each of which was called once.
    """
    torch._dynamo.reset()
    # The backward alone is timed on a retained graph, which donated buffers do not allow.
    torch._functorch.config.donated_buffer = case.direction != "bwd"
    record: dict[str, Any] = {**case.describe(), "check": {"ok": True, "message": ""}, "contestants": {}}
    try:
        work = workload.BUILD[case.op](case)
        work.check()
    except AssertionError as error:
        record["check"] = {"ok": False, "message": str(error)}
        return record, None, {}
    record |= {"flops": work.flops, "gathered_bytes": work.bytes, "memory_traffic_bytes": work.traffic}
    record["left_out"] = dict(work.left_out)

    expected = work.contestants["ours"]()
    record["output_bytes"] = first(expected).numel() * first(expected).element_size()
    running: Calls = {"ours": work.contestants["ours"]}
    for name, call in work.contestants.items():
        if name == "ours" or not wants(name):
            continue
        try:
            result = call()
            distance = 0.0 if name in VARIANTS or name in BASELINES else _distance(result, expected)
            del result
        except Exception as error:  # whatever a peer or its compiler raises
            record["left_out"][name] = reason(error)
            continue
        if not distance <= AGREEMENT:
            record["left_out"][name] = f"its result differs by {distance:.1%}"
            continue
        running[name] = call
    return record, work, running


def run(case: Case, benchmark: Any, budget: Budget) -> dict[str, Any]:
    """Measure a case and return its record. A red check is recorded with no times at all."""
    record, work, running = enlist(case)
    if work is None:
        return record
    rates: list[float] = []
    if work.flops is not None and case.op in ("cross_frame_attention", "correspondence_search"):
        try:
            arithmetic = probes.Arithmetic("fma_fp32")
            running["probe"] = lambda: rates.append(arithmetic())
        except RuntimeError:
            record["left_out"]["probe"] = "no native module"

    rounds = Rounds(running)
    rounds.warm_up()
    rates.clear()
    rounds.repeats["probe"] = 1
    count = rounds.rounds_within(budget.seconds, budget.least, budget.most)
    gc.collect()
    gc.disable()
    try:
        benchmark.pedantic(rounds.ours, setup=rounds.others, rounds=count, iterations=1)
    finally:
        gc.enable()

    ours = rounds.samples["ours"]
    for name, samples in rounds.samples.items():
        if name == "probe":
            continue
        entry: dict[str, Any] = {**summary(samples), "rounds": len(samples)}
        if name != "ours":
            entry["ratio"] = summary(rounds.ratios(name))
        record["contestants"][name] = entry
    if rates:
        shares = [work.flops / t / rate for t, rate in zip(ours, rates, strict=True)]
        record["of_fma_peak"] = summary(shares)
    record["peak_extra_bytes"] = {
        name: memory.peak_extra(running[name])
        for name in running
        if name not in ("probe", "ours_forward", "ours_index")
    }
    benchmark.extra_info["case"] = case.name
    return record
