"""Trajectory attention beside a compiled and an eager corner gather and `grid_sample`."""

from __future__ import annotations

from collections.abc import Callable

from bench.shapes import Case

OP = "trajectory_attention"


def bench_trajectory_attention(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
