"""The torch.library face of trajectory attention: schemas, fakes and autograd; kernels hang below it."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from zsvr_kernels.records import is_exact
from zsvr_kernels.validation import check_one_device, refuse_double_backward

_LAUNCHERS = {
    "cpu": "cpu",
    "triton": "triton_launch",
}  # backend -> module beside this one with launch_fwd and launch_bwd

_TRAJECTORY = "Tensor positions, Tensor valid, Tensor frames"
_RECORDS = "Tensor? base=None, Tensor? fractions=None"  # of the trajectories, where triton finds them made
_library = torch.library.Library("zsvr", "FRAGMENT")
_library.define(
    f"trajectory_attention_fwd(Tensor q, Tensor k, Tensor v, {_TRAJECTORY}, int Hg, int Wg, float scale, "
    f"str backend, {_RECORDS}) -> (Tensor, Tensor)"
)
_library.define(
    f"trajectory_attention_out(Tensor q, Tensor k, Tensor v, {_TRAJECTORY}, int Hg, int Wg, float scale, "
    f"str backend, Tensor(a!) out, {_RECORDS}) -> Tensor"
)
_library.define(
    "trajectory_attention_bwd(Tensor d_o, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor lse, "
    f"{_TRAJECTORY}, Tensor? offsets, Tensor? samples, Tensor? weights, int Hg, int Wg, float scale, "
    f"bool[] needs, str backend, {_RECORDS}) -> (Tensor, Tensor, Tensor, Tensor)"
)


def _launcher(backend: str) -> Any:
    if backend not in _LAUNCHERS:
        raise ValueError(f"backend must be one of {', '.join(_LAUNCHERS)}, got {backend!r}")
    return importlib.import_module(f"{__package__}.{_LAUNCHERS[backend]}")


def _records(backend: str, base: Tensor | None, fractions: Tensor | None) -> dict[str, Any]:
    """Return the launcher's argument that hands over records, if there are any."""
    if base is None and fractions is None:
        return {}
    if backend != "triton":
        raise ValueError(f"base and fractions are read by backend 'triton' alone, got {backend!r}")
    if base is None or fractions is None:
        raise ValueError("give both base and fractions, or neither")
    return {"made": (base, fractions)}


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
    base: Tensor | None = None,
    fractions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    launch = _launcher(backend).launch_fwd
    return launch(q, k, v, positions, valid, frames, (Hg, Wg), scale, **_records(backend, base, fractions))


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
    base: Tensor | None = None,
    fractions: Tensor | None = None,
) -> Tensor:
    launch = _launcher(backend).launch_fwd
    made = _records(backend, base, fractions)
    return launch(q, k, v, positions, valid, frames, (Hg, Wg), scale, out=out, **made)[1]


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
    base: Tensor | None = None,
    fractions: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    index = None if offsets is None else (offsets, samples, weights)
    launch, made = _launcher(backend).launch_bwd, _records(backend, base, fractions)
    return launch(d_o, dlse, q, k, v, lse, positions, valid, frames, index, (Hg, Wg), scale, tuple(needs), **made)


_library.impl("trajectory_attention_fwd", _fwd, "CompositeExplicitAutograd")
_library.impl("trajectory_attention_out", _out, "CompositeExplicitAutograd")
_library.impl("trajectory_attention_bwd", _bwd, "CompositeExplicitAutograd")


@torch.library.register_fake("zsvr::trajectory_attention_fwd", lib=_library)
def _fwd_fake(q: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    check_one_device(q, *(x for x in others if isinstance(x, Tensor)))
    return q.new_empty(q.shape), q.new_empty(q.shape[:4], dtype=torch.float32)


@torch.library.register_fake("zsvr::trajectory_attention_out", lib=_library)
def _out_fake(q: Tensor, *others: Any) -> Tensor:
    check_one_device(q, *(x for x in others if isinstance(x, Tensor)))
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
    base: Tensor | None = None,
    fractions: Tensor | None = None,
) -> tuple[Tensor, ...]:
    check_one_device(d_o, dlse, q, k, v, lse, positions, valid, frames, offsets, samples, weights, base, fractions)
    gradients = zip((q, k, v, positions), needs, strict=True)
    return tuple(x.new_empty(x.shape if needed else (0,)) for x, needed in gradients)


def records_for(backend: str, trajectories: Any, dtype: torch.dtype) -> tuple[Tensor | None, Tensor | None]:
    """Return the records that ``trajectories`` keeps if ``backend`` reads them; made now if they are not there yet."""
    if backend != "triton" or trajectories is None:
        return None, None
    return trajectories.records(is_exact(dtype))


class TrajectoryAttentionFunction(torch.autograd.Function):
    """Autograd over the two ops; lse is differentiable when it is returned to the caller.

    ``trajectories`` is the object whose kept inverse index and records are used; None (under torch.compile) makes
    the ops build their own.
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
        made = records_for(backend, trajectories, q.dtype)
        fields = (positions, valid, frames, Hg, Wg)
        o, lse = torch.ops.zsvr.trajectory_attention_fwd(q, k, v, *fields, scale, backend, *made)
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
        made = records_for(ctx.backend, ctx.trajectories, q.dtype)
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
            *made,
        )
        found = (g if n else None for g, n in zip(gradients, needs, strict=True))
        return (*found, None, None, None, None, None, None, None, None)
