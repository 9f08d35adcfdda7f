"""Launches the C++ search on CPU tensors. Allocates everything it writes."""

from __future__ import annotations

from torch import Tensor


def _features(p, f_src: Tensor, f_dst: Tensor, grid: tuple[int, int]) -> None:
    raise RuntimeError("no kernel yet")


def launch_search(
    f_src: Tensor,  # [N, P, C]
    f_dst: Tensor,  # [N, P, C]
    centre: Tensor,  # int32 [N, P, 2]
    grid: tuple[int, int],
    radius: int,
) -> tuple[Tensor, Tensor]:  # site int32 [N, P], score fp32 [N, P]
    raise RuntimeError("no kernel yet")


def launch_score(
    f_src: Tensor,  # [N, P, C]
    f_dst: Tensor,  # [N, P, C]
    positions: Tensor,  # fp32 [N, P, 2]
    grid: tuple[int, int],
) -> Tensor:  # fp32 [N, P]
    raise RuntimeError("no kernel yet")
