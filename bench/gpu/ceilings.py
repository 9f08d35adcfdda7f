"""Roofs of a GPU, measured: memory, matrix products, exponentials, launches; gathered rows; atomics against CSR."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.gpu.machine import Machine, best
from zsvr_kernels._triton import Launch

Record = dict[str, Any]
ROW_BYTES = (80, 128, 160, 320, 1024, 2048)
WORKING_SETS = (5, 20, 40, 60, 150)  # MB: within and beyond the second-level cache
PATTERNS = ("random", "smooth", "identical")
SIDE = 32  # of the grid that a smooth gather walks over


def _matmul(machine: Machine, dtype: torch.dtype, size: int, tf32: bool = False) -> float:
    a, b = torch.randn(2, size, size, device=machine.device).to(dtype).unbind(0)
    out = torch.empty_like(a)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        return 2 * size**3 / best(machine, lambda: torch.mm(a, b, out=out))
    finally:
        torch.set_float32_matmul_precision(before)


def _memory(machine: Machine, size: int) -> Record:
    """Return bytes per second of reading, writing and copying ``size`` bytes."""
    x = torch.empty(size // 4, device=machine.device).fill_(1.0)
    y = torch.empty_like(x)
    total = torch.empty((), device=machine.device)
    return {
        "hbm_read": size / best(machine, lambda: torch.sum(x, dim=0, out=total)),
        "hbm_write": size / best(machine, lambda: y.fill_(2.0)),
        "hbm_copy": 2 * size / best(machine, lambda: y.copy_(x)),
    }


def measure(machine: Machine, small: bool) -> Record:
    """Return rates in bytes, operations and exponentials per second, and times of launches in seconds."""
    side = 64 if small else 8192
    found = _memory(machine, 1 << (20 if small else 31)) | {
        "mm_bf16": _matmul(machine, torch.bfloat16, side),
        "mm_fp16": _matmul(machine, torch.float16, side),
        "mm_tf32": _matmul(machine, torch.float32, side, tf32=True),
        "mm_fp32": _matmul(machine, torch.float32, side // 2),
    }
    if machine.has_triton:
        from bench.gpu import kernels

        programs, block, rounds = (2, 64, 4) if small else (16384, 1024, 256)
        out = torch.empty(programs * block, device=machine.device)
        exponentials = Launch(
            kernels._exp2_kernel, (programs,), {"p_out": out, "ROUNDS": rounds, "BLOCK": block}, {"num_warps": 4}
        )
        found["exp2"] = programs * block * rounds / best(machine, exponentials.run)
        flag = torch.empty(1, dtype=torch.int32, device=machine.device)
        empty = Launch(kernels._empty_kernel, (1,), {"p_out": flag})
        found["launch_seconds"] = best(machine, empty.run, mode="eager")
        found["graph_seconds"] = best(machine, empty.run)  # per kernel of a graph
        found["replay_seconds"] = best(machine, empty.run, mode="cold")  # of a graph of one kernel
    return found


def _rows(pattern: str, count: int, rows: int, generator: torch.Generator) -> Tensor:
    """Return which rows are gathered, int32 ``[count]``.

    smooth: the four corners of a position near each site of a grid, frame after frame, as trajectories read them.
    """
    device = generator.device
    if pattern == "identical":
        return torch.zeros(count, dtype=torch.int32, device=device)
    if pattern == "random":
        return torch.randint(rows, (count,), dtype=torch.int32, generator=generator, device=device)
    sites = torch.arange(-(-count // 4), device=device)
    corners = torch.tensor((0, 1, SIDE, SIDE + 1), device=device)
    shift = torch.randint(-2, 3, (sites.numel() // 16 + 1,), generator=generator, device=device).repeat_interleave(16)
    return ((sites + shift[: sites.numel()])[:, None] + corners).flatten()[:count].remainder(rows).int()


def gather(machine: Machine, row_bytes: int, small: bool) -> Record:
    """Return gathered bytes per second by pattern, working set and rows in flight."""
    from bench.gpu import kernels

    generator = torch.Generator(machine.device).manual_seed(1)
    row = row_bytes // 4
    padded = 1 << (row - 1).bit_length()
    found = []
    for megabytes in WORKING_SETS[:1] if small else WORKING_SETS:
        rows = max(1, (megabytes << 20) // row_bytes // (1024 if small else 1))
        x = torch.ones(rows, row, dtype=torch.int32, device=machine.device)
        for pattern in PATTERNS:
            for flight in (1, 4):
                block = max(8, min(64, 8192 // padded // flight)) if not small else 4
                programs = 2 if small else max(1, (1 << 30) // (row_bytes * block * flight))
                index = _rows(pattern, programs * block * flight, rows, generator)
                out = torch.empty(programs * padded, dtype=torch.int32, device=machine.device)
                arguments = {"p_x": x, "p_index": index, "p_out": out, "ROW": row, "PADDED": padded,
                             "BLOCK": block, "FLIGHT": flight}  # fmt: skip
                launch = Launch(kernels._row_gather_kernel, (programs,), arguments, {"num_warps": 4})
                seconds = best(machine, launch.run, samples=3)
                expected = block * flight
                if not bool((out.view(programs, padded)[:, :row] == expected).all()):
                    raise AssertionError(f"rows of {row_bytes} bytes, {pattern}: sums are not {expected}")
                found.append(
                    {"row_bytes": row_bytes, "pattern": pattern, "megabytes": megabytes, "flight": flight,
                     "rate": index.numel() * row_bytes / seconds}
                )  # fmt: skip
    return {"rows": found}


def atomics(machine: Machine, small: bool) -> Record:
    """Return bytes added per second by float32 atomics and by a CSR gather of equal work."""
    from bench.gpu import kernels

    generator = torch.Generator(machine.device).manual_seed(1)
    C = 64
    samples = 1 << (6 if small else 20)
    x = torch.randn(samples, C, generator=generator, device=machine.device)
    found = []
    for collisions in (1, 2, 8, 64):
        N = max(1, samples // collisions)
        row = (torch.randperm(samples, generator=generator, device=machine.device) % N).int()
        order = torch.argsort(row, stable=True)
        offsets = torch.zeros(N + 1, dtype=torch.int32, device=machine.device)
        offsets[1:] = torch.bincount(row, minlength=N).cumsum(0)
        added = torch.zeros(N, C, device=machine.device)
        summed = torch.empty_like(added)
        block = 16
        scatter = Launch(
            kernels._scatter_add_kernel, (samples // block,),
            {"p_x": x, "p_row": row, "p_out": added, "C": C, "BLOCK": block}, {"num_warps": 4},
        )  # fmt: skip
        csr = Launch(
            kernels._gather_sum_kernel, (N,),
            {"p_x": x, "p_offsets": offsets, "p_samples": order.int(), "p_out": summed, "C": C}, {"num_warps": 1},
        )  # fmt: skip
        scatter.run()
        csr.run()
        torch.testing.assert_close(added, summed, rtol=1e-4, atol=1e-4)
        rates = {name: 4.0 * samples * C / best(machine, launch.run) for name, launch in
                 (("atomics", scatter), ("csr", csr))}  # fmt: skip
        found.append({"collisions": collisions, "samples": samples, "channels": C, **rates})
    return {"rows": found}
