"""Correspondence search beside `unfold`, a masked full correlation, and the reference eager and compiled."""

from __future__ import annotations

from collections.abc import Callable

from bench.shapes import Case

OP = "correspondence_search"


def bench_correspondence_search(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
