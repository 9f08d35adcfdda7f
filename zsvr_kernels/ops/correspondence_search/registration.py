"""The torch.library face of correspondence search: schemas and fakes. There is no gradient through it."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from zsvr_kernels.validation import check_one_device

_LAUNCHERS = {
    "cpu": "cpu",
    "triton": "triton_launch",
}  # backend -> module beside this one with launch_search and launch_score

_library = torch.library.Library("zsvr", "FRAGMENT")
_library.define(
    "correspondence_search(Tensor f_src, Tensor f_dst, Tensor centre, int Hg, int Wg, int radius, str backend) "
    "-> (Tensor, Tensor)"
)
_library.define("link_score(Tensor f_src, Tensor f_dst, Tensor positions, int Hg, int Wg, str backend) -> Tensor")


def _launcher(backend: str) -> Any:
    if backend not in _LAUNCHERS:
        raise ValueError(f"backend must be one of {', '.join(_LAUNCHERS)}, got {backend!r}")
    return importlib.import_module(f"{__package__}.{_LAUNCHERS[backend]}")


def _search(
    f_src: Tensor, f_dst: Tensor, centre: Tensor, Hg: int, Wg: int, radius: int, backend: str
) -> tuple[Tensor, Tensor]:
    return _launcher(backend).launch_search(f_src, f_dst, centre, (Hg, Wg), radius)


def _score(f_src: Tensor, f_dst: Tensor, positions: Tensor, Hg: int, Wg: int, backend: str) -> Tensor:
    return _launcher(backend).launch_score(f_src, f_dst, positions, (Hg, Wg))


_library.impl("correspondence_search", _search, "CompositeExplicitAutograd")
_library.impl("link_score", _score, "CompositeExplicitAutograd")


@torch.library.register_fake("zsvr::correspondence_search", lib=_library)
def _search_fake(
    f_src: Tensor, f_dst: Tensor, centre: Tensor, Hg: int, Wg: int, radius: int, backend: str
) -> tuple[Tensor, Tensor]:
    check_one_device(f_src, f_dst, centre)
    shape = f_src.shape[:2]
    return f_src.new_empty(shape, dtype=torch.int32), f_src.new_empty(shape, dtype=torch.float32)


@torch.library.register_fake("zsvr::link_score", lib=_library)
def _score_fake(f_src: Tensor, f_dst: Tensor, positions: Tensor, Hg: int, Wg: int, backend: str) -> Tensor:
    check_one_device(f_src, f_dst, positions)
    return f_src.new_empty(f_src.shape[:2], dtype=torch.float32)
