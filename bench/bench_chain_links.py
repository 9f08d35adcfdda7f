"""Chaining beside its loop in eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable

from bench.shapes import Case

OP = "chain_links"


def bench_chain_links(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
