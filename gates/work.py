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


def operands(launch: Launch) -> float:
    """Return the bytes of a launch's tensors; one that is passed twice counts once."""
    seen: dict[tuple[int, int, torch.Size], float] = {}
    for x in launch.arguments.values():
        if isinstance(x, Tensor):
            name = (id(x.untyped_storage()._cdata), x.storage_offset(), x.shape)
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


KERNELS: dict[str, Callable[[dict[str, Any], int, Case], Work]] = {
    "_cross_frame_attention_fwd_kernel": _cross_frame_fwd,
    "_cross_frame_attention_bwd_dq_kernel": _cross_frame_dq,
    "_cross_frame_attention_bwd_dkv_kernel": _cross_frame_dkv,
    "_chain_links_kernel": _chain,
}


def work(launch: Launch, case: Case) -> Work:
    """Return what a launch does in a case."""
    blocks = math.prod(launch.grid)
    count = KERNELS.get(launch.kernel.fn.__name__)
    found = Work() if count is None or blocks == 0 else count(launch.arguments, blocks, case)
    return dataclasses.replace(found, hbm=operands(launch))
