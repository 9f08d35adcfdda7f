"""Which launches are gated and predicted: every operator at the shapes of bench/shapes.py, from metadata alone.

Launches come from the operators' own ``plan_*`` functions on meta tensors, so what is compiled here is what a GPU
would be given.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import shapes
from bench.shapes import WINDOW, Level
from gates.checks import Expectation
from zsvr_kernels._triton import Launch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
ATTENTION = ("cross_frame_attention", "trajectory_attention")
# Beside the levels of real networks: the largest common head dim, and one that is padded in every kernel.
LEVELS = shapes.LEVELS | {"wide-16": Level((16, 16), 8, 128), "padded-16": Level((16, 16), 4, 24)}
NETWORKS = ("adm-32", "adm-16", "adm-8", "sd-64", "sd-32", "sd-16")
T = 16


@dataclass(frozen=True)
class Case:
    """An operator at a shape; ``variant`` tells apart what a direction has several of."""

    op: str
    level: str
    T: int
    dtype: str
    direction: str
    variant: str = ""

    @property
    def shape(self) -> Level:
        return LEVELS[self.level]

    @property
    def P(self) -> int:
        return self.shape.grid[0] * self.shape.grid[1]

    @property
    def C(self) -> int:
        return self.shape.H * self.shape.D

    @property
    def window(self) -> int | None:
        """Frames on either side that trajectories reach; None: all."""
        return None if self.variant == "full" else WINDOW

    @property
    def L(self) -> int:
        return self.T if self.window is None else 2 * self.window + 1

    @property
    def key(self) -> str:
        name = f"{self.op}/{self.level}/T{self.T}/{self.dtype}/{self.direction}"
        return f"{name}/{self.variant}" if self.variant else name


def live_slots(case: Case) -> int:
    """Return how many slots of all trajectories through one site lie in the clip, summed over frames."""
    reach = case.T if case.window is None else case.window
    return sum(min(case.T - 1, i + reach) - max(0, i - reach) + 1 for i in range(case.T))


def gated() -> list[Case]:
    """Return the cases whose launches are compiled, most common first."""
    levels = (*NETWORKS, "wide-16", "padded-16")
    found = [
        Case(op, level, T, dtype, direction)
        for dtype in DTYPES
        for direction in ("fwd", "bwd")
        for op in ATTENTION
        for level in levels
    ]
    found += [
        Case("cross_frame_attention", level, T, dtype, "bwd", variant)
        for variant in ("add", "dlse")
        for dtype in DTYPES
        for level in ("adm-32", "sd-64")
    ]
    found += [Case("cross_frame_attention", "adm-32", T, "fp32", direction, "tf32") for direction in ("fwd", "bwd")]
    found += [Case("trajectory_attention", "adm-32", T, dtype, "bwd", "positions") for dtype in DTYPES]
    found += [Case("trajectory_records", "adm-32", T, dtype, "fwd") for dtype in ("bf16", "fp32")]
    found += [Case("chain_links", level, T, "fp32", "fwd", v) for level in ("adm-32", "adm-8") for v in ("", "records")]
    found += [
        Case(op, level, T, dtype, "fwd")
        for op in shapes.SEARCHES
        for dtype in DTYPES
        for level in (*NETWORKS, "narrow-32", "narrow-32-r4")
    ]
    return found


def measured() -> list[Case]:
    """Return the cases that `bench` measures, without the whole layer, and every level in every dtype."""
    found = {
        Case(op, level, frames, dtype, direction, *variant): None
        for op, lines in shapes.FULL.items()
        if op != "slr_attention"
        for level, frames, dtype, direction, _, *variant in lines
    }
    for dtype in DTYPES:
        for level in (*NETWORKS, "adm-8-half"):
            for direction in ("fwd", "bwd", "step"):
                found |= {Case(op, level, T, dtype, direction): None for op in ATTENTION}
                found[Case("trajectory_attention", level, T, dtype, direction, "full")] = None
        for level in (*NETWORKS, "narrow-32", "narrow-32-r4"):
            found |= {Case(op, level, T, dtype, "fwd"): None for op in shapes.SEARCHES}
    for level in NETWORKS:
        for direction in ("fwd", "bwd"):
            found[Case("cross_frame_attention", level, 64, "bf16", direction)] = None
            found[Case("trajectory_attention", level, 64, "bf16", direction, "full")] = None
        found |= {Case("chain_links", level, T, "fp32", "fwd", variant): None for variant in ("", "full")}
    return list(found)


# ---- launches ----


def _launcher(op: str) -> Any:
    return importlib.import_module(f"zsvr_kernels.ops.{op}.triton_launch")


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _tokens(case: Case, count: int) -> list[Tensor]:
    shape = (1, case.T, case.P, case.shape.H, case.shape.D)
    return [_meta(*shape, dtype=DTYPES[case.dtype]) for _ in range(count)]


def _cross_frame_attention(case: Case, target: str) -> list[Launch]:
    launcher, scale = _launcher(case.op), case.shape.D**-0.5
    q, k, v, o, d_o, dq, dk = _tokens(case, 7)
    frames = _meta(case.T, 2, dtype=torch.int32)
    lse = _meta(1, case.T, case.P, case.shape.H)
    if case.direction == "fwd":
        return launcher.plan_fwd(q, k, v, frames, scale, None, target)[0]
    dlse = lse if case.variant == "dlse" else None
    into = (dq, dk) if case.variant == "add" else None
    return launcher.plan_bwd(d_o, dlse, q, k, v, o, lse, frames, scale, (True,) * 3, into, target)[0]


def _trajectory_attention(case: Case, target: str) -> list[Launch]:
    launcher, scale, grid = _launcher(case.op), case.shape.D**-0.5, case.shape.grid
    q, k, v, d_o, out = _tokens(case, 5)
    samples = (1, case.T, case.L, case.P)
    positions, base = _meta(*samples, 2), _meta(*samples, dtype=torch.int32)
    fractions = _meta(*samples, 2) if case.dtype == "fp32" else _meta(*samples, dtype=torch.int32)
    frames = _meta(case.T, case.L, dtype=torch.int32)
    lse = _meta(1, case.T, case.P, case.shape.H)
    tables = ((base, fractions), frames)
    if case.direction == "fwd":
        return launcher.plan_fwd(q, k, v, *tables, grid, scale, out, lse, target)
    # Whatever flow leaves of the four corners of every sample: a number that is no multiple of anything.
    entries = 4 * live_slots(case) * case.P - 1
    index = (_meta(case.T * case.P + 1, dtype=torch.int64), _meta(entries, dtype=torch.int32), _meta(entries))
    needs = (True, True, True, case.variant == "positions")
    return launcher.plan_bwd(d_o, None, q, k, v, lse, positions, *tables, index, grid, scale, needs, target)[1]


def _trajectory_records(case: Case, target: str) -> list[Launch]:
    samples = (1, case.T, case.L, case.P)
    records = importlib.import_module("zsvr_kernels.records")
    return records.plan_records(
        _meta(*samples, 2), _meta(*samples, dtype=torch.bool), case.shape.grid, case.dtype == "fp32"
    )[1]


def _chain_links(case: Case, target: str) -> list[Launch]:
    pairs = [_meta(1, case.T - 1, case.P, 2) for _ in range(2)]
    checks = [_meta(1, case.T - 1, case.P, dtype=torch.bool) for _ in range(2)]
    rules = (case.shape.grid, case.window, False, False)
    return _launcher(case.op).plan_chain(*pairs, *checks, *rules, target, records=case.variant == "records")[0]


def _features(case: Case) -> tuple[Tensor, Tensor]:
    """Return features of adjacent frames as they are read in practice: views of one tensor."""
    features = _meta(case.T, case.P, case.C, dtype=DTYPES[case.dtype])
    return features[:-1], features[1:]


def _correspondence_search(case: Case, target: str) -> list[Launch]:
    centre = _meta(case.T - 1, case.P, 2, dtype=torch.int32)
    level = case.shape
    return _launcher(case.op).plan_search(*_features(case), centre, level.grid, level.radius, target)[0]


def _link_score(case: Case, target: str) -> list[Launch]:
    positions = _meta(case.T - 1, case.P, 2)
    return _launcher("correspondence_search").plan_score(*_features(case), positions, case.shape.grid, target)[0]


@contextlib.contextmanager
def _float32_products(precision: str) -> Iterator[None]:
    """Plan as if the user had chosen how float32 enters matrix products."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


_PLANS = {
    "cross_frame_attention": _cross_frame_attention,
    "trajectory_attention": _trajectory_attention,
    "trajectory_records": _trajectory_records,
    "chain_links": _chain_links,
    "correspondence_search": _correspondence_search,
    "link_score": _link_score,
}


@functools.cache
def launches(case: Case, target: str) -> tuple[Launch, ...]:
    """Return the launches of a case on a target, in order."""
    if case.direction == "step":
        parts = [Case(case.op, case.level, case.T, case.dtype, part, case.variant) for part in ("fwd", "bwd")]
        return tuple(launch for part in parts for launch in launches(part, target))
    with _float32_products("high" if case.variant == "tf32" else "highest"):
        return tuple(_PLANS[case.op](case, target))


# ---- what is due ----

_PLAIN, _ROWS = Expectation(), Expectation(rows=True)
_PRODUCTS = Expectation(matrix=True, rows=True)
DUE = {
    "_cross_frame_attention_fwd_kernel": _PRODUCTS,
    "_cross_frame_attention_bwd_dq_kernel": _PRODUCTS,
    "_cross_frame_attention_bwd_dkv_kernel": _PRODUCTS,
    "_inverse_frames_kernel": _PLAIN,
    "_trajectory_attention_fwd_kernel": _ROWS,
    "_trajectory_attention_bwd_queries_kernel": _ROWS,
    "_trajectory_attention_bwd_sites_kernel": _ROWS,
    "_trajectory_attention_bwd_samples_kernel": _ROWS,
    "_trajectory_records_kernel": _PLAIN,
    "_chain_links_kernel": _PLAIN,
    "_search_dense_kernel": _PRODUCTS,
    "_search_one_by_one_kernel": _ROWS,
    "_inverse_lengths_kernel": _ROWS,
    "_link_score_kernel": _ROWS,
}


def due(launch: Launch) -> Expectation:
    """Return what is due of a launch's kernel.

    The matrix unit takes float32 only where the user opted in to TF32, in tiles that may be too small for wgmma.

    Raises:
        KeyError: nothing was said of the kernel in `DUE`.
    """
    name = launch.kernel.fn.__name__
    if name not in DUE:
        raise KeyError(f"gates/cases.py does not say what is due of {name}")
    expectation = DUE[name]
    if any(isinstance(x, Tensor) and x.element_size() == 2 for x in launch.arguments.values()):
        return expectation
    is_tf32 = launch.arguments.get("PRECISION") == "tf32"
    return dataclasses.replace(expectation, matrix=expectation.matrix and is_tf32, wgmma=False)
