"""Launches the Triton search. Allocates everything it writes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

import zsvr_kernels.ops.correspondence_search.triton_configs as triton_configs
from zsvr_kernels import _triton, validation
from zsvr_kernels._triton import Launch
from zsvr_kernels.ops.correspondence_search.triton_score import _link_score_kernel
from zsvr_kernels.ops.correspondence_search.triton_search import (
    _inverse_lengths_kernel,
    _search_dense_kernel,
    _search_one_by_one_kernel,
)

INT32 = 1 << 31  # offsets inside a frame are int32 below this


def _features(f_src: Tensor, f_dst: Tensor) -> dict[str, Tensor | int | bool]:
    """Return what every kernel takes of the features: themselves, their strides and channels in units.

    A unit is the largest power of two up to 16 that divides them all: the compiler sees it as a constant, so rows whose
    length is 8 elements times any number are read in pieces of 16 bytes too. WIDE: offsets in a frame need 64 bits.
    """
    P, C = f_src.shape[1:]
    strides = {
        "s_src_n": f_src.stride(0),
        "s_src_p": f_src.stride(1),
        "s_dst_n": f_dst.stride(0),
        "s_dst_p": f_dst.stride(1),
        "C": C,
    }
    unit = math.gcd(16, *strides.values())
    return {
        "f_src": f_src,
        "f_dst": f_dst,
        **{name: stride // unit for name, stride in strides.items()},
        "UNIT": unit,
        "WIDE": any((P - 1) * x.stride(1) + C >= INT32 for x in (f_src, f_dst)),
    }


def plan_search(
    f_src: Tensor,  # [N, P, C]
    f_dst: Tensor,  # [N, P, C]
    centre: Tensor,  # int32 [N, P, 2]
    grid: tuple[int, int],
    radius: int,
    target: str,
) -> tuple[list[Launch], tuple[Tensor, Tensor]]:  # site int32 [N, P], score fp32 [N, P]
    """Plan the inverse lengths of all tokens, and the search: dense where that pays under smooth motion."""
    N, P, C = f_src.shape
    site = f_src.new_empty((N, P), dtype=torch.int32)
    score = f_src.new_empty((N, P), dtype=torch.float32)
    inverse = f_src.new_empty((2, N, P), dtype=torch.float32)
    bytes_of = f_src.element_size()
    features = _features(f_src, f_dst)
    rows = triton_configs.rows(target, bytes_of, C, 1)
    blocks = -(-P // rows.BLOCK)
    lengths = Launch(
        kernel=_inverse_lengths_kernel,
        grid=(N * blocks,),
        arguments={
            **features,
            "inverse": inverse,
            "P": P,
            "s_inverse": N * P,
            "blocks": blocks,
            "BLOCK": rows.BLOCK,
            "BLOCK_C": rows.BLOCK_C,
        },
        options=rows.options,
    )
    arguments = {
        **features,
        "centre": centre.contiguous(),
        "inverse": inverse,
        "site": site,
        "score": score,
        "Hg": grid[0],
        "Wg": grid[1],
        "radius": radius,
        "s_inverse": N * P,
    }

    def tiles(height: int, width: int) -> tuple[int, dict[str, int]]:
        tiles_y, tiles_x = -(-grid[0] // height), -(-grid[1] // width)
        return tiles_y * tiles_x, {"tiles_y": tiles_y, "tiles_x": tiles_x, "TILE_H": height, "TILE_W": width}

    pieces = int(features["UNIT"]) * bytes_of >= 16
    dense = triton_configs.dense(target, bytes_of, grid, C, radius, comes_in_pieces=pieces)
    if dense is None:
        config = triton_configs.one_by_one(target, bytes_of, grid, C, radius)
        count, tiling = tiles(config.TILE_H, config.TILE_W)
        search = Launch(
            kernel=_search_one_by_one_kernel,
            grid=(N * count,),
            arguments={**arguments, **tiling, "CANDIDATES": config.CANDIDATES, "BLOCK_C": config.BLOCK_C},
            options=config.options,
        )
        return [lengths, search], (site, score)
    count, tiling = tiles(dense.TILE_H, dense.TILE_W)
    part = triton_configs.part(dense, bytes_of, C)
    search = Launch(
        kernel=_search_dense_kernel,
        grid=(N * count,),
        arguments={
            **arguments,
            **tiling,
            "limit": dense.limit,
            "STRIP_H": dense.STRIP_H,
            "STRIP_W": dense.STRIP_W,
            "BLOCK_C": dense.BLOCK_C,
            "PART_H": part.TILE_H,
            "PART_W": part.TILE_W,
            "PART_CANDIDATES": part.CANDIDATES,
            "PART_C": part.BLOCK_C,
        },
        options={"num_warps": dense.num_warps, "num_stages": dense.num_stages},
    )
    return [lengths, search], (site, score)


def plan_score(
    f_src: Tensor,  # [N, P, C]
    f_dst: Tensor,  # [N, P, C]
    positions: Tensor,  # fp32 [N, P, 2]
    grid: tuple[int, int],
    target: str,
) -> tuple[list[Launch], Tensor]:  # fp32 [N, P]
    """Plan one launch that samples and normalises."""
    N, P, C = f_src.shape
    score = f_src.new_empty((N, P), dtype=torch.float32)
    rows = triton_configs.rows(target, f_src.element_size(), C, 5)
    blocks = -(-P // rows.BLOCK)
    launch = Launch(
        kernel=_link_score_kernel,
        grid=(N * blocks,),
        arguments={
            **_features(f_src, f_dst),
            "positions": positions.contiguous(),
            "score": score,
            "Hg": grid[0],
            "Wg": grid[1],
            "blocks": blocks,
            "BLOCK": rows.BLOCK,
            "BLOCK_C": rows.BLOCK_C,
        },
        options=rows.options,
    )
    return [launch], score


def _check(op: str, f_src: Tensor, f_dst: Tensor, where: dict[str, Tensor], grid: tuple[int, int]) -> tuple[int, int]:
    """Raise unless kernels may follow the tensors' addresses; metadata only. Returns the grid."""
    grid = validation.check_features(f_src, f_dst, grid)
    validation.check_dtype("f_src", f_src, *_triton.DTYPES)
    for name, x in where.items():
        (validation.check_centre if name == "centre" else validation.check_link_positions)(x, f_src)
    _triton.check_runs(op, f_src=f_src, f_dst=f_dst, **where)
    return grid


def launch_search(
    f_src: Tensor,  # [N, P, C]
    f_dst: Tensor,  # [N, P, C]
    centre: Tensor,  # int32 [N, P, 2]
    grid: tuple[int, int],
    radius: int,
) -> tuple[Tensor, Tensor]:  # site int32 [N, P], score fp32 [N, P]
    grid = _check("correspondence_search", f_src, f_dst, {"centre": centre}, grid)
    radius = validation.check_radius(radius)
    launches, found = plan_search(f_src, f_dst, centre, grid, radius, _triton.target(f_src.device))
    _triton.run(launches)
    return found


def launch_score(
    f_src: Tensor,  # [N, P, C]
    f_dst: Tensor,  # [N, P, C]
    positions: Tensor,  # fp32 [N, P, 2]
    grid: tuple[int, int],
) -> Tensor:  # fp32 [N, P]
    grid = _check("link_score", f_src, f_dst, {"positions": positions}, grid)
    launches, score = plan_score(f_src, f_dst, positions, grid, _triton.target(f_src.device))
    _triton.run(launches)
    return score
