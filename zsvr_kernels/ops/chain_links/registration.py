"""The torch.library face of chaining: schema and fake. There is no gradient through it."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from zsvr_kernels.validation import check_one_device

_LAUNCHERS = {"cpu": "cpu", "triton": "triton_launch"}  # backend -> module beside this one with launch

_library = torch.library.Library("zsvr", "FRAGMENT")
_library.define(
    "chain_links(Tensor forward, Tensor backward, Tensor valid_forward, Tensor valid_backward, int Hg, "
    "int Wg, int? window, bool nearest, bool corners, str backend) -> (Tensor, Tensor)"
)


def _launcher(backend: str) -> Any:
    if backend not in _LAUNCHERS:
        raise ValueError(f"backend must be one of {', '.join(_LAUNCHERS)}, got {backend!r}")
    return importlib.import_module(f"{__package__}.{_LAUNCHERS[backend]}")


def _chain(
    forward: Tensor,
    backward: Tensor,
    valid_forward: Tensor,
    valid_backward: Tensor,
    Hg: int,
    Wg: int,
    window: int | None,
    nearest: bool,
    corners: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    launch = _launcher(backend).launch
    return launch(forward, backward, valid_forward, valid_backward, (Hg, Wg), window, nearest, corners)


def chain_with_records(
    forward: Tensor,
    backward: Tensor,
    valid_forward: Tensor,
    valid_backward: Tensor,
    grid: tuple[int, int],
    window: int | None,
    nearest: bool,
    corners: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Chain on a GPU; the launch leaves the records of trajectory attention too. Not for traced code."""
    launch = _launcher("triton").launch
    return launch(forward, backward, valid_forward, valid_backward, grid, window, nearest, corners, records=True)


_library.impl("chain_links", _chain, "CompositeExplicitAutograd")


@torch.library.register_fake("zsvr::chain_links", lib=_library)
def _chain_fake(
    forward: Tensor,
    backward: Tensor,
    valid_forward: Tensor,
    valid_backward: Tensor,
    Hg: int,
    Wg: int,
    window: int | None,
    nearest: bool,
    corners: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    check_one_device(forward, backward, valid_forward, valid_backward)
    B, pairs, P, _ = forward.shape
    L = pairs + 1 if window is None else 2 * window + 1
    shape = (B, pairs + 1, L, P)
    return forward.new_empty(*shape, 2), forward.new_empty(shape, dtype=torch.bool)
