"""A patched layer inside a compiled model: one operation that the compiler does not look into.

What a layer does depends on the context's state, which changes from step to step. Traced, every layer would be programs
of its own between graph breaks, and a U-Net would soon reach the compiler's limit; as one operation of a tensor it
breaks no graph and is compiled once. Its body runs as it would without compiler. It has no gradient.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable

import torch
from torch import Tensor, nn

_numbers = itertools.count()
_number_of: weakref.WeakKeyDictionary[nn.Module, int] = weakref.WeakKeyDictionary()
_running: dict[int, tuple[Callable[[Tensor], Tensor], int]] = {}  # layer -> what it does, channels of its output

_library = torch.library.Library("zsvr_layers", "FRAGMENT")
# What the body does changes from step to step, so a CUDA graph must not record it.
_library.define("run(Tensor x, int layer) -> Tensor", tags=(torch.Tag.cudagraph_unsafe,))


def number_of(module: nn.Module) -> int:
    """Return the module's number; it is the same in every patched block, so that compiled code stays good."""
    if module not in _number_of:
        _number_of[module] = next(_numbers)
    return _number_of[module]


def open_layer(layer: int, body: Callable[[Tensor], Tensor], channels: int) -> None:
    """Say what the layer of that number does from now on."""
    _running[layer] = body, channels


def close_layer(layer: int) -> None:
    """Say that it does nothing any more."""
    _running.pop(layer, None)


def run(
    x: Tensor,  # [N, C, Hg, Wg] or [N, P, C]
    layer: int,
) -> Tensor:  # [N, C', Hg, Wg] or [N, P, C']
    """Run a layer as one operation."""
    return torch.ops.zsvr_layers.run(x, layer)


def _open(layer: int) -> tuple[Callable[[Tensor], Tensor], int]:
    if layer not in _running:
        raise RuntimeError("compiled code of a zsvr_kernels.patched block ran after the block: torch.compiler.reset()")
    return _running[layer]


def _body(x: Tensor, layer: int) -> Tensor:
    return _open(layer)[0](x).contiguous()


_library.impl("run", _body, "CompositeExplicitAutograd")


@torch.library.register_fake("zsvr_layers::run", lib=_library)
def _fake(x: Tensor, layer: int) -> Tensor:
    channels = _open(layer)[1]
    return x.new_empty((x.shape[0], channels, *x.shape[2:]) if x.dim() == 4 else (*x.shape[:-1], channels))
