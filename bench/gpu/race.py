"""One case on a machine: correctness first, then every contestant cold, warm and from Python, then its memory."""

from __future__ import annotations

from typing import Any

from bench import contest
from bench.gpu.machine import MODES, Machine
from bench.shapes import Case
from bench.timing import Rounds, summary

COMPILED = ("compiled", "flex", "compiled_gather")  # peers whose compilation takes longer than everything else
SECONDS, LEAST, MOST, REPEATS = 0.05, 5, 15, 8  # of rounds per mode, and of calls in a sample


def is_wanted(group: str, name: str) -> bool:
    """Return whether a contestant other than ours belongs to a group of them: ``"core"`` or ``"compiled"``."""
    return (name in COMPILED) == (group == "compiled")


def run(case: Case, machine: Machine, group: str) -> dict[str, Any]:
    """Measure a case and return its record. A red check is recorded with no times at all."""
    record, work, running = contest.enlist(case, lambda name: is_wanted(group, name))
    record["group"] = group
    if work is None:
        return record
    prepared = {}
    for name, call in running.items():
        try:
            prepared[name] = machine.prepare(call)
        except Exception as error:
            if name == "ours":
                raise
            machine.tidy()
            record["left_out"][name] = contest.reason(error)
    record["contestants"] = {name: {} for name in prepared}
    for mode in MODES:
        rounds = Rounds({name: getattr(p, mode) for name, p in prepared.items()}, machine.now)
        rounds.warm_up()
        rounds.repeats = {name: min(count, REPEATS if mode == "cold" else 1) for name, count in rounds.repeats.items()}
        rounds.run(rounds.rounds_within(SECONDS, LEAST, MOST))
        for name, samples in rounds.samples.items():
            entry: dict[str, Any] = {**summary(samples), "rounds": len(samples)}
            if name != "ours":
                entry["ratio"] = summary(rounds.ratios(name))
            record["contestants"][name][mode] = entry
    record["clocks"] = machine.clocks()
    record["not_graphed"] = {name: p.why_not_graphed for name, p in prepared.items() if p.why_not_graphed}
    del prepared
    machine.tidy()
    record["peak_extra_bytes"] = {
        name: machine.peak_extra(running[name]) for name in record["contestants"] if name != "ours_forward"
    }
    return record
