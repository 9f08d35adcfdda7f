"""Launches the C++ search on CPU tensors. Allocates everything it writes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from zsvr_kernels import _native, validation


def _check(f_src: Tensor, f_dst: Tensor, grid: tuple[int, int]) -> tuple[int, int]:
    """Raise unless native code may follow the features' addresses; metadata only. Returns the grid."""
    grid = validation.check_features(f_src, f_dst, grid)
    validation.check_dtype("f_src", f_src, *_native.DTYPES)
    validation.check_on_cpu(f_src=f_src, f_dst=f_dst)
    return grid


def _fill(p: Any, f_src: Tensor, f_dst: Tensor, grid: tuple[int, int]) -> None:
    p.N, p.Hg, p.Wg, p.C = f_src.shape[0], *grid, f_src.shape[2]
    p.dtype = _native.DTYPES[f_src.dtype]
    p.f_src, p.f_dst = ((x.data_ptr(), x.stride()[:2]) for x in (f_src, f_dst))


def launch_search(
    f_src: Tensor,  # [N, P, C]
    f_dst: Tensor,  # [N, P, C]
    centre: Tensor,  # int32 [N, P, 2]
    grid: tuple[int, int],
    radius: int,
) -> tuple[Tensor, Tensor]:  # site int32 [N, P], score fp32 [N, P]
    native = _native.module()
    grid = _check(f_src, f_dst, grid)
    validation.check_centre(centre, f_src)
    validation.check_on_cpu(centre=centre)
    radius = validation.check_radius(radius)
    centre = centre.contiguous()
    site = f_src.new_empty(f_src.shape[:2], dtype=torch.int32)
    score = f_src.new_empty(f_src.shape[:2], dtype=torch.float32)
    p = native.CorrespondenceSearchParams()
    _fill(p, f_src, f_dst, grid)
    p.radius = radius
    p.centre, p.site, p.score = centre.data_ptr(), site.data_ptr(), score.data_ptr()
    workspace = _native.workspace(native.correspondence_search_workspace(p))
    p.workspace = workspace.data_ptr()
    native.correspondence_search(p, _native.parallel_for(), _native.threads())
    return site, score


def launch_score(
    f_src: Tensor,  # [N, P, C]
    f_dst: Tensor,  # [N, P, C]
    positions: Tensor,  # fp32 [N, P, 2]
    grid: tuple[int, int],
) -> Tensor:  # fp32 [N, P]
    native = _native.module()
    grid = _check(f_src, f_dst, grid)
    validation.check_link_positions(positions, f_src)
    validation.check_on_cpu(positions=positions)
    positions = positions.contiguous()
    score = f_src.new_empty(f_src.shape[:2], dtype=torch.float32)
    p = native.LinkScoreParams()
    _fill(p, f_src, f_dst, grid)
    p.positions, p.score = positions.data_ptr(), score.data_ptr()
    native.link_score(p, _native.parallel_for(), _native.threads())
    return score
