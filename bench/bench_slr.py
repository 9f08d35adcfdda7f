"""The whole SLR attention layer beside the spatial layer it replaces and beside SLR attention in eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable

from bench.shapes import Case

OP = "slr_attention"


def bench_slr(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
