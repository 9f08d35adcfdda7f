"""Cross-frame attention beside SDPA on concatenated K and V, torch.compile, FlexAttention and eager PyTorch."""

from __future__ import annotations

from collections.abc import Callable

from bench.shapes import Case

OP = "cross_frame_attention"


def bench_cross_frame_attention(case: Case, measure: Callable[[Case], None]) -> None:
    measure(case)
