"""What GPU kernels read of a trajectory: one small record for each sample, made once and kept by `Trajectories`.

A record is the cell of a sample and its two fractions, clamped to the grid. A cell is the site of its top left corner,
never in the last row or column (unless the grid has only one), so that the four corners are always the sites at
``+0, +1, +Wg, +Wg + 1``; on the far border a fraction is 1. Shared by all heads, layers of one grid and steps.
"""

from __future__ import annotations

import importlib

import torch
from torch import Tensor

from zsvr_kernels import _triton, validation
from zsvr_kernels.sampling import Grid

Records = tuple[Tensor, Tensor]  # base int32 [B, T, L, P], fractions int32 [B, T, L, P] or float32 [B, T, L, P, 2]
BLOCK = 1024


def is_exact(dtype: torch.dtype) -> bool:
    """Return whether attention in this dtype needs float32 fractions: packed ones are off by up to 2^-16."""
    return dtype not in (torch.float16, torch.bfloat16)


def plan_records(
    positions: Tensor,  # fp32 [B, T, L, P, 2]
    valid: Tensor,  # bool [B, T, L, P]
    grid: Grid,
    exact: bool,
) -> tuple[Records, list[_triton.Launch]]:
    """Return the tensors of records and the launch that fills them; metadata only."""
    kernels = importlib.import_module("zsvr_kernels.triton_records")
    positions, valid = positions.detach().contiguous(), valid.contiguous()
    base = valid.new_empty(valid.shape, dtype=torch.int32)
    shape = (*valid.shape, 2) if exact else valid.shape
    fractions = valid.new_empty(shape, dtype=torch.float32 if exact else torch.int32)
    count = valid.numel()
    arguments = {
        "positions": positions,
        "valid": valid,
        "base": base,
        "fractions": fractions,
        "count": count,
        "HEIGHT": grid[0],
        "WIDTH": grid[1],
        "EXACT": exact,
        "BLOCK": BLOCK,
    }
    launch = _triton.Launch(
        kernels._trajectory_records_kernel, (-(-count // BLOCK),), arguments, {"num_warps": 4, "num_stages": 1}
    )
    return (base, fractions), [launch]


def records(positions: Tensor, valid: Tensor, grid: Grid, exact: bool) -> Records:
    """Return the records of trajectories: ``base``, -1 where a slot is dead, and ``fractions``.

    Fractions are float32 ``[B, T, L, P, 2]`` if ``exact``; otherwise two of 16 bits, multiples of 2^-15, in an int32
    ``[B, T, L, P]``: x in the low half.

    Raises:
        RuntimeError: Triton cannot run on this device.
    """
    if (reason := _triton.refusal(positions.device.type, positions.dtype)) is not None:
        raise RuntimeError(f"records of trajectories are made by Triton: {reason}")
    made, launches = plan_records(positions, valid, grid, exact)
    _triton.run(launches)
    return made


def check_records(base: Tensor, fractions: Tensor, valid: Tensor, dtype: torch.dtype) -> bool:
    """Check records handed to a registered op, metadata only; return whether their fractions are exact.

    Kernels take a base out of range as dead.
    """
    shape = tuple(valid.shape)
    validation.check_tensor("base", base, 4, "[B, T, L, P]")
    validation.check_dtype("base", base, torch.int32)
    validation.check_shape("base", base, shape, "[B, T, L, P] of valid")
    if not isinstance(fractions, Tensor):
        raise TypeError(f"fractions must be a torch.Tensor beside base, got {type(fractions).__name__}")
    exact = fractions.dtype == torch.float32
    if is_exact(dtype):
        validation.check_dtype("fractions", fractions, torch.float32)
    else:
        validation.check_dtype("fractions", fractions, torch.int32, torch.float32)
    validation.check_shape("fractions", fractions, (*shape, 2) if exact else shape, "of base, by dtype")
    for name, x in (("base", base), ("fractions", fractions)):
        validation.check_device(name, x, valid, "valid")
        if not x.is_contiguous():
            raise ValueError(f"{name} must be contiguous, got strides {tuple(x.stride())}")
    return exact
