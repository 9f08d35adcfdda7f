"""The torch.library face of trajectory attention: schemas, fakes and autograd; kernels hang below it."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from zsvr_kernels.validation import check_one_device, refuse_double_backward

_LAUNCHERS = {
    "cpu": "cpu",
    "triton": "triton_launch",
}  # backend -> module beside this one with launch_fwd and launch_bwd

_TRAJECTORY = "Tensor positions, Tensor valid, Tensor frames"
_library = torch.library.Library("zsvr", "FRAGMENT")
_library.define(
    f"trajectory_attention_fwd(Tensor q, Tensor k, Tensor v, {_TRAJECTORY}, int Hg, int Wg, float scale, "
    "str backend) -> (Tensor, Tensor)"
)
_library.define(
    f"trajectory_attention_out(Tensor q, Tensor k, Tensor v, {_TRAJECTORY}, int Hg, int Wg, float scale, "
    "str backend, Tensor(a!) out) -> Tensor"
)
_library.define(
    "trajectory_attention_bwd(Tensor d_o, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor lse, "
    f"{_TRAJECTORY}, Tensor? offsets, Tensor? samples, Tensor? weights, int Hg, int Wg, float scale, "
    "bool[] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _launcher(backend: str) -> Any:
    if backend not in _LAUNCHERS:
        raise ValueError(f"backend must be one of {', '.join(_LAUNCHERS)}, got {backend!r}")
    return importlib.import_module(f"{__package__}.{_LAUNCHERS[backend]}")


def _fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    valid: Tensor,
    frames: Tensor,
    Hg: int,
    Wg: int,
    scale: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    return _launcher(backend).launch_fwd(q, k, v, positions, valid, frames, (Hg, Wg), scale)


def _out(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    valid: Tensor,
    frames: Tensor,
    Hg: int,
    Wg: int,
    scale: float,
    backend: str,
    out: Tensor,
) -> Tensor:
    launch = _launcher(backend).launch_fwd
    return launch(q, k, v, positions, valid, frames, (Hg, Wg), scale, out=out)[1]


def _bwd(
    d_o: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    positions: Tensor,
    valid: Tensor,
    frames: Tensor,
    offsets: Tensor | None,
    samples: Tensor | None,
    weights: Tensor | None,
    Hg: int,
    Wg: int,
    scale: float,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    index = None if offsets is None else (offsets, samples, weights)
    return _launcher(backend).launch_bwd(
        d_o, dlse, q, k, v, lse, positions, valid, frames, index, (Hg, Wg), scale, tuple(needs)
    )


_library.impl("trajectory_attention_fwd", _fwd, "CompositeExplicitAutograd")
_library.impl("trajectory_attention_out", _out, "CompositeExplicitAutograd")
_library.impl("trajectory_attention_bwd", _bwd, "CompositeExplicitAutograd")


@torch.library.register_fake("zsvr::trajectory_attention_fwd", lib=_library)
def _fwd_fake(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    check_one_device(q, *others[:5])
    return q.new_empty(q.shape), q.new_empty(q.shape[:4], dtype=torch.float32)


@torch.library.register_fake("zsvr::trajectory_attention_out", lib=_library)
def _out_fake(q: Tensor, *others: Any) -> Tensor:
    check_one_device(q, *others[:5], others[-1])
    return q.new_empty(q.shape[:4], dtype=torch.float32)


@torch.library.register_fake("zsvr::trajectory_attention_bwd", lib=_library)
def _bwd_fake(
    d_o: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lse: Tensor,
    positions: Tensor,
    valid: Tensor,
    frames: Tensor,
    offsets: Tensor | None,
    samples: Tensor | None,
    weights: Tensor | None,
    Hg: int,
    Wg: int,
    scale: float,
    needs: list[bool],
    backend: str,
) -> tuple[Tensor, ...]:
    check_one_device(d_o, dlse, q, k, v, lse, positions, valid, frames, offsets, samples, weights)
    gradients = zip((q, k, v, positions), needs, strict=True)
    return tuple(x.new_empty(x.shape if needed else (0,)) for x, needed in gradients)


class TrajectoryAttentionFunction(torch.autograd.Function):
    """Autograd over the two ops; lse is differentiable when it is returned to the caller.

    ``trajectories`` is the object whose cached inverse index the backward uses; None (under torch.compile)
    makes the backward build one for itself.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        positions: Tensor,
        valid: Tensor,
        frames: Tensor,
        trajectories: Any,
        Hg: int,
        Wg: int,
        scale: float,
        backend: str,
        return_lse: bool,
    ) -> tuple[Tensor, Tensor]:
        o, lse = torch.ops.zsvr.trajectory_attention_fwd(q, k, v, positions, valid, frames, Hg, Wg, scale, backend)
        ctx.save_for_backward(q, k, v, lse, positions, valid, frames)
        ctx.trajectories, ctx.grid, ctx.scale = trajectories, (Hg, Wg), scale
        ctx.backend, ctx.return_lse = backend, return_lse
        if not return_lse:
            ctx.mark_non_differentiable(lse)
        return o, lse

    @staticmethod
    def backward(ctx: Any, d_o: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
        refuse_double_backward("trajectory_attention")
        q, k, v, lse, positions, valid, frames = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[:4])
        index: tuple[Tensor | None, ...] = (None, None, None)
        if ctx.trajectories is not None and (needs[1] or needs[2]):
            index = ctx.trajectories.inverse(k.shape[1])
        gradients = torch.ops.zsvr.trajectory_attention_bwd(
            d_o,
            dlse if ctx.return_lse else None,
            q,
            k,
            v,
            lse,
            positions,
            valid,
            frames,
            *index,
            *ctx.grid,
            ctx.scale,
            needs,
            ctx.backend,
        )
        found = (g if n else None for g, n in zip(gradients, needs, strict=True))
        return (*found, None, None, None, None, None, None, None, None)
