"""``bench/predictions.json``: a predicted time for every measured case; gates/README.md has the schema."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

from gates import model
from gates.cases import Case, launches, live_slots, measured
from gates.describe import Description, describe, key
from gates.model import ROOFS, Prediction
from gates.pool import Job, compile_all
from gates.report import by_lines
from gates.work import work
from zsvr_kernels._triton import Launch

SCHEMA = 1
TARGET, VERSION = "sm_90", "3.6"  # the compiler of the machine to be measured on

# Peers at T = 16, R = 2 in bf16, microseconds on an H200: FlashAttention 3 at its published rates (of the padded head
# dim, halved below 512 keys), and what copying the listed frames side by side takes at 4.3 TB/s.
_FA3 = {
    "adm-32": (149, 407),
    "adm-16": (26, 79),
    "adm-8": (3, 10),
    "sd-64": (2217, 5824),
    "sd-32": (190, 558),
    "sd-16": (27, 102),
}
_CONCAT = {"adm-32": 31, "adm-16": 16, "adm-8": 4, "sd-64": 78, "sd-32": 39, "sd-16": 20}


def peers(case: Case) -> dict[str, float]:
    """Return what peers should take, microseconds on an H200; empty where no published figure says."""
    if case.op != "cross_frame_attention" or case.variant or case.dtype == "fp32" or case.level not in _FA3:
        return {}
    forward, backward = _FA3[case.level]
    attention = {"fwd": forward, "bwd": backward, "step": forward + backward}[case.direction]
    return {"fa3_like": attention * case.T / 16, "concat_copies": _CONCAT[case.level] * case.T / 16}


def useful(case: Case) -> dict[str, float]:
    """Return floating-point operations, exponentials and compulsory bytes, as the operators' READMEs count them."""
    tokens = case.T * case.P
    size = 4 if case.dtype == "fp32" else 2
    factor = {"fwd": 1.0, "bwd": 2.5, "step": 3.5}[case.direction]
    passes = {"fwd": 1.0, "bwd": 2.0, "step": 3.0}[case.direction]
    if case.op == "cross_frame_attention":
        pairs = 2 * case.T  # neighbours; at the ends the frame itself stands in for the missing one
        exponentials = case.shape.H * pairs * case.P**2 * (2.0 if case.direction == "step" else 1.0)
        moved = 4.0 * tokens * case.C * size * passes
        return {"flops": factor * 4 * case.C * case.P**2 * pairs, "exponentials": exponentials, "bytes": moved}
    if case.op == "trajectory_attention":
        samples = live_slots(case) * case.P
        moved = 4.0 * tokens * case.C * size * passes + 9.0 * samples
        return {"flops": factor * 20 * samples * case.C, "exponentials": samples * case.shape.H, "bytes": moved}
    pairs = (case.T - 1) * case.P
    if case.op == "chain_links":
        return {"flops": 30.0 * tokens * case.L, "exponentials": 0.0, "bytes": 18.0 * pairs + 9.0 * tokens * case.L}
    moved = 2.0 * pairs * case.C * size
    if case.op == "link_score":
        return {"flops": 14.0 * pairs * case.C, "exponentials": 0.0, "bytes": moved + 12 * pairs}
    window = (2 * case.shape.radius + 1) ** 2
    return {"flops": 2.0 * case.C * pairs * window, "exponentials": 0.0, "bytes": moved + 16 * pairs}


def _time(prediction: Prediction) -> dict[str, Any]:
    return {
        "us": round(prediction.us, 2),
        "serial_us": round(prediction.serial_us, 2),
        "bound": prediction.bound,
        "terms_us": {name: round(value, 2) for name, value in prediction.terms.items()},
    }


def _kernel(launch: Launch, found: dict[str, Any] | None) -> dict[str, Any]:
    """Return what is said of a launch on every machine alike."""
    blocks = math.prod(launch.grid)
    facts: dict[str, Any] = {
        "kernel": launch.kernel.fn.__name__,
        "grid": list(launch.grid),
        "quantisation": round(model.quantisation(blocks, model.SMS), 3),
        "compiled": found is not None,
    }
    if found is not None:
        facts |= {name: found[name] for name in ("num_warps", "registers", "shared")}
        resident = model.blocks_per_sm(found["registers"], found["shared"], found["num_warps"])
        facts |= {"blocks_per_sm": resident, "waves": round(blocks / (model.SMS * max(1, resident)), 2)}
    return facts


def record(case: Case, planned: tuple[Launch, ...], found: list[dict[str, Any] | None]) -> dict[str, Any]:
    """Return the entry of one case; ``found`` is what each launch compiled to, None if unknown."""
    fields = {name: getattr(case, name) for name in ("op", "level", "T", "dtype", "direction", "variant")}
    machines = {}
    for machine, roofs in ROOFS.items():
        each = [
            model.predict(work(launch, case), math.prod(launch.grid), what, roofs)
            for launch, what in zip(planned, found, strict=True)
        ]
        machines[machine] = {
            "us": round(sum(x.us for x in each), 2),
            "serial_us": round(sum(x.serial_us for x in each), 2),
            "bound": max(each, key=lambda x: x.us).bound,
            "kernels": [_time(x) for x in each],
        }
    kernels = [_kernel(launch, what) for launch, what in zip(planned, found, strict=True)]
    return {**fields, "work": useful(case), "kernels": kernels, "machines": machines, "peers_us": peers(case)}


def _compiled_as(case: Case) -> Case:
    """Return the case whose code stands for this one's: a product of float16 differs from bfloat16's in type alone."""
    is_same = case.dtype == "fp16" and case.op != "trajectory_attention"
    return dataclasses.replace(case, dtype="bf16") if is_same else case


def collect(select: str, jobs: int) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the entries of all measured cases by key, and the exact release of Triton that compiled them."""
    planned = {case: launches(case, TARGET) for case in measured() if select in case.key}
    described = {case: [describe(x, TARGET) for x in launches(_compiled_as(case), TARGET)] for case in planned}
    wanted = {key(description): description for each in described.values() for description in each}
    todo = {name: Job(VERSION, TARGET, name, description) for name, description in wanted.items()}
    results, exact = compile_all(list(todo.values()), jobs)

    def found(description: Description) -> dict[str, Any] | None:
        result = results[todo[key(description)]]
        return None if "error" in result else result

    entries = {case.key: record(case, each, [found(x) for x in described[case]]) for case, each in planned.items()}
    return entries, exact


def render(select: str, jobs: int, provenance: Callable[[dict[str, str]], dict[str, Any]]) -> str:
    """Return the text of ``bench/predictions.json``."""
    entries, exact = collect(select, jobs)
    whole = {
        "schema": SCHEMA,
        "provenance": provenance(exact) | {"target": TARGET},
        "roofs": {name: {what: vars(roof) for what, roof in roofs.items()} for name, roofs in ROOFS.items()},
        "cases": dict(sorted(entries.items())),
    }
    return by_lines(whole, "cases")
