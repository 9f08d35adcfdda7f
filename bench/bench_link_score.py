"""Link scores beside the reference, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable

from bench.shapes import Case

OP = "link_score"


def bench_link_score(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
