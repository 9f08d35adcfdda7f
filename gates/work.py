"""What each kernel does, from its launch: the counts that the model turns into times.

A kernel that is not listed has its operands' bytes alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gates.cases import Case, live_slots
from gates.model import Work
from zsvr_kernels._triton import Launch

CACHED = 40e6  # bytes that the second-level cache holds of a working set, of 50 MB
TOGETHER = 3  # query frames whose blocks run at the same time, roughly


def operands(launch: Launch) -> float:
    """Return the bytes of a launch's tensors; one that is passed twice counts once."""
    seen: dict[tuple[int, int, torch.Size], float] = {}
    for x in launch.arguments.values():
        if isinstance(x, Tensor):
            name = (x.untyped_storage()._cdata, x.storage_offset(), x.shape)
            seen[name] = float(x.numel() * x.element_size())
    return sum(seen.values())


def _matrix_dtype(x: Tensor, precision: str) -> str:
    return precision if x.dtype == torch.float32 else "16"


def _attention_tiles(a: dict[str, Any], blocks: int, steps: float, rows: int, columns: int, products: int) -> Work:
    """Return the work of a kernel of cross-frame attention that keeps ``rows`` and streams ``columns`` at a time."""
    width, size = a["D1"] + a["D2"], a["q"].element_size()
    tiles = blocks * steps
    streamed = tiles * 2 * columns * a["D"] * size  # K and V, or q and d_o
    return Work(
        l2=streamed + blocks * 2 * rows * a["D"] * size,
        l1=streamed,
        mma=tiles * products * 2.0 * rows * columns * width,
        mma_dtype=_matrix_dtype(a["q"], a["PRECISION"]),
        exponentials=tiles * rows * columns,
        iterations=steps,
        steps=2,  # an entry of the frame table, then the first tile; later tiles are asked for ahead
    )


def _cross_frame_fwd(a: dict[str, Any], blocks: int, case: Case) -> Work:
    return _attention_tiles(a, blocks, a["steps"], a["BLOCK_M"], a["BLOCK_N"], 2)


def _cross_frame_dq(a: dict[str, Any], blocks: int, case: Case) -> Work:
    return _attention_tiles(a, blocks, a["steps"], a["BLOCK_M"], a["BLOCK_N"], 3)


def _cross_frame_dkv(a: dict[str, Any], blocks: int, case: Case) -> Work:
    users = (2 * case.T - 2) / case.T  # query frames of a source frame, in the mean
    rows = users * case.P
    steps = rows / a["BLOCK_M"] if a["PACKED"] else users * math.ceil(case.P / a["BLOCK_M"])
    return _attention_tiles(a, blocks, steps, a["BLOCK_N"], a["BLOCK_M"], 4)


def _chain(a: dict[str, Any], blocks: int, case: Case) -> Work:
    live = live_slots(case) / case.T - 1
    samples = case.T * case.P * live
    return Work(
        l2_rows=samples * (4 * 8 + 1) + case.T * case.P * case.L * 9.0,
        iterations=live / 2,  # of one direction
        steps=max(case.T - 1 if case.window is None else case.window, 1),  # the longest chain
    )


def _gathers(a: dict[str, Any], blocks: int, case: Case) -> Work:
    """Return the work of a kernel that gathers K and V for tiles of queries, slot by slot."""
    live = live_slots(case) / case.T  # slots of a query that lie in the clip
    queries, size = a["TILE_H"] * a["TILE_W"], a["q"].element_size()
    rows = blocks * live * a["HEADS"] * a["D"] * size * 2.0  # K and V of one site for every slot
    record = 12 if a["EXACT"] else 8
    # K and V of a query frame's slots, where they exceed the second-level cache, come from memory again for each query
    # frame but those that run together.
    held = 2.0 * case.P * case.C * size * live
    return Work(
        hbm=case.T * held / TOGETHER if held > CACHED else 0.0,
        l1=rows * queries * 4,
        # Where flow is smooth the cells of a tile's queries tile the source frame as the queries do theirs.
        l2_rows=rows * (a["TILE_H"] + 1) * (a["TILE_W"] + 1) + blocks * live * queries * record,
        exponentials=blocks * a["L"] * a["HEADS"] * queries * 2.0,
        iterations=a["L"],
        steps=a["L"] + 1,
    )


def _gather_pairs(a: dict[str, Any], blocks: int, case: Case) -> Work:
    forward = _gathers(a, blocks, case)
    stored = 8.0 * live_slots(case) * case.P * case.shape.H if a["NEEDS_PAIRS"] else 0.0
    return dataclasses.replace(forward, l2=stored, exponentials=forward.exponentials / 2)


def _gather_sites(a: dict[str, Any], blocks: int, case: Case) -> Work:
    entries = 4.0 * live_slots(case) / case.T  # of a source site's row in the index, in the mean
    height, width, size = a["TILE_H"], a["TILE_W"], a["q"].element_size()
    sites = blocks * height * width
    rows = sites * entries * a["HEADS"] * a["D"] * size * 2.0  # of q and d_o
    steps = entries / a["ENTRIES"]
    return Work(
        l1=rows,
        # The four corners of a query's cell lie in one tile, but for those along its border.
        l2_rows=rows * (height + 1) * (width + 1) / (4 * height * width) + sites * entries * (12.0 * a["HEADS"] + 8.0),
        iterations=steps,
        steps=2 * steps,  # an entry, then the rows it names
    )


def _gather_positions(a: dict[str, Any], blocks: int, case: Case) -> Work:
    rows = float(live_slots(case) * case.P * case.C * a["q"].element_size())
    heads = case.shape.H / a["HEADS"]
    reuse = (a["TILE_H"] + 1) * (a["TILE_W"] + 1) / (4 * a["TILE_H"] * a["TILE_W"])
    return Work(l1=10 * rows, l2_rows=(2 + 8 * reuse) * rows, iterations=heads, steps=heads + 2)


def _channels(a: dict[str, Any], case: Case) -> int:
    return math.ceil(case.C / a["BLOCK_C"])


def _lengths(a: dict[str, Any], blocks: int, case: Case) -> Work:
    loops = 2 * _channels(a, case) - 1  # one for each of the two features
    return Work(iterations=loops, steps=2)


def _score(a: dict[str, Any], blocks: int, case: Case) -> Work:
    rows = float((case.T - 1) * case.P * case.C * a["f_src"].element_size())
    return Work(l1=5 * rows, l2_rows=5 * rows, iterations=_channels(a, case), steps=2)


def _search_dense(a: dict[str, Any], blocks: int, case: Case) -> Work:
    (Hg, Wg), reach, size = case.shape.grid, 2 * case.shape.radius + 1, a["f_src"].element_size()
    queries = a["TILE_H"] * a["TILE_W"]
    # The box around a tile's windows, one site wider than the tile where flow bends a little.
    height, width = min(Hg, a["TILE_H"] + reach), min(Wg, a["TILE_W"] + reach)
    strips = math.ceil(height / a["STRIP_H"]) * math.ceil(width / a["STRIP_W"])
    strip = a["STRIP_H"] * a["STRIP_W"]
    products = blocks * strips * queries * strip * case.C * 2.0
    moved = blocks * strips * (queries + strip) * float(case.C * size)
    return Work(
        l2_rows=moved,
        l1=moved,
        mma=products,
        mma_dtype="16" if size == 2 else "ieee",
        iterations=strips * _channels(a, case),
        rounds=strips,
        steps=2 * strips,
    )


def _search_windows(a: dict[str, Any], blocks: int, case: Case) -> Work:
    (Hg, Wg), reach, size = case.shape.grid, 2 * case.shape.radius + 1, a["f_src"].element_size()
    window = min(Hg, reach) * min(Wg, reach)
    queries = a["TILE_H"] * a["TILE_W"]
    rounds = math.ceil(window / a["CANDIDATES"])
    row = float(case.C * size)
    return Work(
        l1=blocks * queries * (window + rounds) * row,
        l2_rows=blocks * ((a["TILE_H"] + reach - 1) * (a["TILE_W"] + reach - 1) + queries) * row,
        mma=blocks * queries * rounds * a["CANDIDATES"] * case.C * 2.0,
        mma_dtype="ieee",
        iterations=rounds * _channels(a, case),
        rounds=rounds,
        steps=rounds * _channels(a, case),
    )


KERNELS: dict[str, Callable[[dict[str, Any], int, Case], Work]] = {
    "_cross_frame_attention_fwd_kernel": _cross_frame_fwd,
    "_cross_frame_attention_bwd_dq_kernel": _cross_frame_dq,
    "_cross_frame_attention_bwd_dkv_kernel": _cross_frame_dkv,
    "_trajectory_attention_fwd_kernel": _gathers,
    "_trajectory_attention_bwd_queries_kernel": _gather_pairs,
    "_trajectory_attention_bwd_sites_kernel": _gather_sites,
    "_trajectory_attention_bwd_samples_kernel": _gather_positions,
    "_chain_links_kernel": _chain,
    "_inverse_lengths_kernel": _lengths,
    "_search_dense_kernel": _search_dense,
    "_search_one_by_one_kernel": _search_windows,
    "_link_score_kernel": _score,
}


def work(launch: Launch, case: Case) -> Work:
    """Return what a launch does in a case."""
    blocks = math.prod(launch.grid)
    count = KERNELS.get(launch.kernel.fn.__name__)
    found = Work() if count is None or blocks == 0 else count(launch.arguments, blocks, case)
    return dataclasses.replace(found, hbm=found.hbm + operands(launch))
